//! Files: in, out, away.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicU32, Ordering};

use frames::{FreeSpace, Sha256, Upload};

use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::server::Reply;
use crate::session::Session;
use crate::sync::Mutex;
use crate::{sys, text};

/// How much of a file is in memory at a time.
const CHUNK: usize = 256 << 10;

/// The longest path that Windows has, in units with the NUL.
const MAX_PATH: usize = 32_768;

/// The most files on their way in at a time.
const MAX_UPLOADS: usize = 64;

fn create(path: &[u16], access: u32, share: u32, disposition: u32) -> Answer<Owned> {
    // SAFETY: the path ends with a NUL, and null stands for nothing.
    let file = unsafe {
        sys::CreateFileW(
            path.as_ptr(),
            access,
            share,
            null(),
            disposition,
            sys::FILE_ATTRIBUTE_NORMAL,
            null_mut(),
        )
    };
    Owned::new(file, "open the file")
}

fn open(path: &str) -> Answer<Owned> {
    create(
        &text::wide(path)?,
        sys::GENERIC_READ,
        sys::FILE_SHARE_READ | sys::FILE_SHARE_WRITE | sys::FILE_SHARE_DELETE,
        sys::OPEN_EXISTING,
    )
}

fn size(file: &Owned) -> Answer<u64> {
    let mut size = 0;
    // SAFETY: the handle is a file's.
    let result = unsafe { sys::GetFileSizeEx(file.raw(), &mut size) };
    check(result, "get the file's size").map(|()| size)
}

fn at(offset: u64) -> sys::Overlapped {
    sys::Overlapped {
        internal: 0,
        internal_high: 0,
        offset: offset as u32,
        offset_high: (offset >> 32) as u32,
        event: null_mut(),
    }
}

/// Hands out the first `size` bytes of a file, chunk by chunk, and gives their hash.
fn read(file: &Owned, size: u64, mut take: impl FnMut(&[u8])) -> Answer<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK.min(size as usize)];
    let mut offset = 0;
    while offset < size {
        let wanted = (size - offset).min(CHUNK as u64) as usize;
        let mut count = 0;
        // SAFETY: the buffer has at least the size told; the file is not overlapped, so the call ends before
        // its structures do.
        let result = unsafe {
            sys::ReadFile(
                file.raw(),
                buffer.as_mut_ptr(),
                wanted as u32,
                &mut count,
                &mut at(offset),
            )
        };
        match check(result, "read the file") {
            // The end of the file, told so where the call names an offset.
            Err(Failure::Win32 {
                code: sys::ERROR_HANDLE_EOF,
                ..
            }) => count = 0,
            result => result?,
        }
        if count == 0 {
            return Err(Failure::Refused(
                "the file became shorter while it was read",
            ));
        }
        let chunk = &buffer[..count as usize];
        hash.update(chunk);
        take(chunk);
        offset += u64::from(count);
    }
    Ok(hash.finish())
}

/// Sends a file: its size, its bytes, their hash, as one message in many parts.
pub fn get(path: &str, reply: &mut Reply) -> Answer {
    let file = open(path)?;
    let size = size(&file)?;
    let length = u32::try_from(size).map_err(|_| Failure::Refused("the file is above 4 GiB"))?;
    reply.part(&length.to_le_bytes());
    let hash = read(&file, size, |chunk| reply.part(chunk))?;
    reply.finish(&frames::to_bytes(&&hash[..]));
    Ok(())
}

/// A file's hash; None if it is not there.
pub fn hash(path: &str) -> Answer<Option<[u8; 32]>> {
    let file = match open(path) {
        Err(Failure::Win32 {
            code: sys::ERROR_FILE_NOT_FOUND | sys::ERROR_PATH_NOT_FOUND,
            ..
        }) => return Ok(None),
        file => file?,
    };
    read(&file, size(&file)?, |_| {}).map(Some)
}

/// Deletes a file.
pub fn delete(path: &str) -> Answer {
    let path = text::wide(path)?;
    // SAFETY: the path ends with a NUL.
    check(
        unsafe { sys::DeleteFileW(path.as_ptr()) },
        "delete the file",
    )
}

/// Makes the folder that `path` is to be in, and those above it.
fn create_parents(path: &str) -> Answer {
    let mut path = text::wide(path)?;
    if path.len() > MAX_PATH {
        return Err(Failure::Refused("the path is too long"));
    }
    let is_end = |&place: &usize| [b'\\', b'/'].map(u16::from).contains(&path[place]);
    let ends: Vec<usize> = (0..path.len()).filter(is_end).collect();
    // Up to the first folder that is there or can be made, and down again.
    let mut first = ends.len();
    while let Some(above) = first.checked_sub(1) {
        first = above;
        match create_folder(&mut path, ends[first]) {
            Err(Failure::Win32 {
                code: sys::ERROR_PATH_NOT_FOUND,
                ..
            }) if first > 0 => {}
            result => {
                result?;
                break;
            }
        }
    }
    ends.iter()
        .skip(first + 1)
        .try_for_each(|&end| create_folder(&mut path, end))
}

/// Makes the folder that the path has up to `end`, where it is not there.
fn create_folder(path: &mut [u16], end: usize) -> Answer {
    let separator = core::mem::replace(&mut path[end], 0);
    // SAFETY: the path ends with a NUL.
    let result = unsafe { sys::CreateDirectoryW(path.as_ptr(), null()) };
    let result = check(result, "create the folder");
    path[end] = separator;
    match result {
        Err(Failure::Win32 {
            code: sys::ERROR_ALREADY_EXISTS,
            ..
        }) => Ok(()),
        result => result,
    }
}

/// The names of all files on their way in, from before they are made until they are gone.
static UNFINISHED: Mutex<BTreeMap<u32, Vec<u16>>> = Mutex::new(BTreeMap::new());

/// A file on its way in, under another name until it is whole. Dropped before, it is deleted.
pub struct Temporary {
    id: u32,
    file: Option<Owned>,
    name: Vec<u16>,
    target: Vec<u16>,
}

impl Temporary {
    fn create(path: &str, id: u32) -> Answer<Self> {
        // SAFETY: no preconditions.
        let pid = unsafe { sys::GetCurrentProcessId() };
        let name = text::wide(&format!("{path}.kdagent-{pid}-{id}"))?;
        let target = text::wide(path)?;
        UNFINISHED.lock().insert(id, name.clone());
        let mut temporary = Temporary {
            id,
            file: None,
            name,
            target,
        };
        temporary.file = Some(match temporary.open() {
            Err(Failure::Win32 {
                code: sys::ERROR_PATH_NOT_FOUND,
                ..
            }) => {
                create_parents(path)?;
                temporary.open()?
            }
            file => file?,
        });
        Ok(temporary)
    }

    /// Begins anew what an agent left that was killed: ids of processes come again, in a copy of the guest
    /// and after a way back in time. Nobody else has a file of our id's name.
    fn open(&self) -> Answer<Owned> {
        create(
            &self.name,
            sys::GENERIC_READ | sys::GENERIC_WRITE,
            sys::FILE_SHARE_DELETE,
            sys::CREATE_ALWAYS,
        )
    }

    fn file(&self) -> Answer<&Owned> {
        self.file.as_ref().ok_or(NO_UPLOAD)
    }

    /// Puts it in its place, if it is what the host sent.
    ///
    /// Once: where Windows still has the old file mapped, that of a driver just unloaded, this may fail. Not
    /// verified on Windows.
    fn commit(mut self, sha256: &[u8]) -> Answer {
        let file = self.file()?;
        if read(file, size(file)?, |_| {})? != sha256 {
            return Err(Failure::Refused("the file did not arrive as it was sent"));
        }
        // A driver may crash the guest right after; the file is to be there then.
        // SAFETY: the handle is a file's.
        let result = unsafe { sys::FlushFileBuffers(file.raw()) };
        check(result, "flush the file")?;
        self.file = None;
        // SAFETY: the paths end with a NUL.
        let result = unsafe {
            sys::MoveFileExW(
                self.name.as_ptr(),
                self.target.as_ptr(),
                sys::MOVEFILE_REPLACE_EXISTING | sys::MOVEFILE_WRITE_THROUGH,
            )
        };
        check(result, "put the file in its place")?;
        self.name.clear();
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.file = None;
        if !self.name.is_empty() {
            delete_quietly(&self.name);
        }
        UNFINISHED.lock().remove(&self.id);
    }
}

fn delete_quietly(path: &[u16]) {
    // SAFETY: the path ends with a NUL.
    unsafe { sys::DeleteFileW(path.as_ptr()) };
}

const NO_UPLOAD: Failure = Failure::Refused("no such upload");

/// The files on their way in.
pub struct Uploads {
    next: AtomicU32,
    files: Mutex<BTreeMap<u32, Arc<Temporary>>>,
}

impl Uploads {
    pub const fn new() -> Self {
        Uploads {
            next: AtomicU32::new(1),
            files: Mutex::new(BTreeMap::new()),
        }
    }

    pub fn begin(&self, path: &str, session: &Session) -> Answer<Upload> {
        let upload = self.next.fetch_add(1, Ordering::Relaxed);
        let file = Arc::new(Temporary::create(path, upload)?);
        let mut files = self.files.lock();
        if session.is_over() {
            drop(files);
            return Err(NO_UPLOAD);
        }
        if files.len() == MAX_UPLOADS {
            drop(files);
            return Err(Failure::Refused("too many files at a time"));
        }
        files.insert(upload, file);
        Ok(Upload { upload })
    }

    pub fn write(&self, upload: u32, offset: u64, mut data: &[u8]) -> Answer {
        let temporary = self.files.lock().get(&upload).cloned().ok_or(NO_UPLOAD)?;
        let file = temporary.file()?;
        let mut offset = offset;
        while !data.is_empty() {
            let mut count = 0;
            // SAFETY: the buffer is as long as told; the file is not overlapped, so the call ends before its
            // structures do.
            let result = unsafe {
                sys::WriteFile(
                    file.raw(),
                    data.as_ptr(),
                    data.len() as u32,
                    &mut count,
                    &mut at(offset),
                )
            };
            check(result, "write the file")?;
            data = &data[count as usize..];
            offset += u64::from(count);
        }
        Ok(())
    }

    pub fn finish(&self, upload: u32, sha256: &[u8]) -> Answer {
        Arc::into_inner(self.take(upload)?)
            .ok_or(Failure::Refused("the file is still being written"))?
            .commit(sha256)
    }

    pub fn abort(&self, upload: u32) -> Answer {
        self.take(upload).map(drop)
    }

    /// All that are on their way in, which nobody finds any more. Those of a session that is over stay away.
    pub fn take_all(&self) -> BTreeMap<u32, Arc<Temporary>> {
        core::mem::take(&mut *self.files.lock())
    }

    fn take(&self, upload: u32) -> Answer<Arc<Temporary>> {
        self.files.lock().remove(&upload).ok_or(NO_UPLOAD)
    }
}

/// How much room the disk has that a folder is on, in bytes, for who asks.
pub fn free_space(path: &str) -> Answer<FreeSpace> {
    let path = text::wide(path)?;
    let mut bytes = 0;
    // SAFETY: the path ends with a NUL, and null stands for what is not asked for.
    let result =
        unsafe { sys::GetDiskFreeSpaceExW(path.as_ptr(), &mut bytes, null_mut(), null_mut()) };
    check(result, "ask for the disk's room").map(|()| FreeSpace { bytes })
}

/// Deletes all that is on its way in, whichever thread is at it: the process is about to end.
pub fn forget_all() {
    let unfinished = UNFINISHED.lock();
    for name in unfinished.values() {
        delete_quietly(name);
    }
    // Nothing may be begun any more.
    core::mem::forget(unfinished);
}
