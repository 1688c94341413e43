//! The pipes to a program, served by one thread without waiting for any of them.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicU32, Ordering};

use crate::failure::Answer;
use crate::handle::Owned;
use crate::{sys, text};

/// How much goes through a pipe at a time.
const CHUNK: usize = 64 << 10;

/// Which way the bytes go.
enum Way<'a> {
    /// To the program: what is left of it.
    In(&'a [u8]),
    /// From the program: what is kept of it.
    Out { kept: Vec<u8>, limit: usize },
}

/// Our end of a pipe, with at most one transfer on its way.
pub struct Pipe<'a> {
    file: Option<Owned>,
    event: Owned,
    way: Way<'a>,
    truncated: bool,
    in_flight: bool,
    /// Both are boxes of ours that belong to the system while a transfer is on its way. So they are
    /// pointers: to move or to borrow a box would claim what is in it.
    overlapped: *mut sys::Overlapped,
    buffer: *mut [u8],
}

impl<'a> Pipe<'a> {
    /// A pipe that feeds a program, and the program's end.
    pub fn to_program(data: &'a [u8]) -> Answer<(Self, Owned)> {
        Self::new(Way::In(data), sys::PIPE_ACCESS_OUTBOUND, sys::GENERIC_READ)
    }

    /// A pipe that keeps the first `limit` bytes that a program writes, and the program's end.
    pub fn from_program(limit: usize) -> Answer<(Self, Owned)> {
        let kept = Vec::new();
        Self::new(
            Way::Out { kept, limit },
            sys::PIPE_ACCESS_INBOUND,
            sys::GENERIC_WRITE,
        )
    }

    fn new(way: Way<'a>, ours: u32, theirs: u32) -> Answer<(Self, Owned)> {
        const DOING: &str = "make a pipe";
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: no preconditions.
        let pid = unsafe { sys::GetCurrentProcessId() };
        let name = text::wide(&format!(r"\\.\pipe\kdagent-{pid}-{number}"))?;
        // SAFETY: the name ends with a NUL, and null stands for nothing.
        let file = unsafe {
            sys::CreateNamedPipeW(
                name.as_ptr(),
                ours | sys::FILE_FLAG_OVERLAPPED | sys::FILE_FLAG_FIRST_PIPE_INSTANCE,
                sys::PIPE_REJECT_REMOTE_CLIENTS,
                1,
                CHUNK as u32,
                CHUNK as u32,
                0,
                null(),
            )
        };
        let file = Owned::new(file, DOING)?;
        let inherited = sys::SecurityAttributes {
            length: size_of::<sys::SecurityAttributes>() as u32,
            descriptor: null_mut(),
            inherit: sys::TRUE,
        };
        // SAFETY: as above.
        let end = unsafe {
            sys::CreateFileW(
                name.as_ptr(),
                theirs,
                0,
                &inherited,
                sys::OPEN_EXISTING,
                0,
                null_mut(),
            )
        };
        let end = Owned::new(end, DOING)?;
        // SAFETY: as above.
        let event = unsafe { sys::CreateEventW(null(), sys::TRUE, 0, null()) };
        let event = Owned::new(event, DOING)?;
        let overlapped = sys::Overlapped {
            internal: 0,
            internal_high: 0,
            offset: 0,
            offset_high: 0,
            event: event.raw(),
        };
        let pipe = Pipe {
            file: Some(file),
            event,
            way,
            truncated: false,
            in_flight: false,
            overlapped: Box::into_raw(Box::new(overlapped)),
            buffer: Box::into_raw(vec![0; CHUNK].into_boxed_slice()),
        };
        Ok((pipe, end))
    }

    /// Begins a transfer if none is on its way, and gives what to wait for; None if nothing more comes.
    pub fn begin(&mut self) -> Option<sys::Handle> {
        if !self.in_flight {
            self.in_flight = self.try_begin();
            if !self.in_flight {
                // The other side sees the end.
                self.file = None;
            }
        }
        self.file.as_ref().map(|_| self.event.raw())
    }

    fn try_begin(&mut self) -> bool {
        let Some(file) = &self.file else {
            return false;
        };
        let (buffer, overlapped) = (self.buffer.cast::<u8>(), self.overlapped);
        let result = match &self.way {
            Way::In([]) => return false,
            Way::In(data) => {
                let count = data.len().min(CHUNK);
                // SAFETY: no transfer is on its way, so the buffer is ours, and as long. Buffer and structure
                // stay until the transfer is over: `drop` sees to it.
                unsafe {
                    buffer.copy_from_nonoverlapping(data.as_ptr(), count);
                    sys::WriteFile(file.raw(), buffer, count as u32, null_mut(), overlapped)
                }
            }
            Way::Out { .. } => {
                // SAFETY: buffer and structure stay, as above.
                unsafe { sys::ReadFile(file.raw(), buffer, CHUNK as u32, null_mut(), overlapped) }
            }
        };
        // SAFETY: no preconditions.
        result != 0 || unsafe { sys::GetLastError() } == sys::ERROR_IO_PENDING
    }

    /// Takes the transfer's result if it is over.
    pub fn poll(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| self.in_flight) else {
            return;
        };
        let mut count = 0;
        // SAFETY: the structure is this file's transfer's.
        let result =
            unsafe { sys::GetOverlappedResult(file.raw(), self.overlapped, &mut count, 0) };
        if result == 0 {
            // SAFETY: no preconditions.
            if unsafe { sys::GetLastError() } != sys::ERROR_IO_INCOMPLETE {
                self.in_flight = false;
                self.file = None;
            }
            return;
        }
        self.in_flight = false;
        let count = count as usize;
        match &mut self.way {
            Way::In(data) => *data = &data[count..],
            Way::Out { kept, limit } => {
                let room = count.min(*limit - kept.len());
                // SAFETY: the transfer is over, so the buffer is ours.
                kept.extend_from_slice(unsafe { &(&*self.buffer)[..room] });
                self.truncated |= room < count;
            }
        }
    }

    /// What the program wrote, and whether that is less than all.
    pub fn into_output(mut self) -> (Vec<u8>, bool) {
        match &mut self.way {
            Way::In(_) => (Vec::new(), false),
            Way::Out { kept, .. } => (core::mem::take(kept), self.truncated),
        }
    }
}

impl Drop for Pipe<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.file.as_ref().filter(|_| self.in_flight) {
            let mut count = 0;
            // SAFETY: the structure is this file's transfer's. The system lets go of it and of the buffer
            // before the second call returns.
            unsafe {
                sys::CancelIoEx(file.raw(), self.overlapped);
                sys::GetOverlappedResult(file.raw(), self.overlapped, &mut count, sys::TRUE);
            }
        }
        // SAFETY: `new` made them of boxes, and no transfer is on its way any more.
        unsafe {
            drop(Box::from_raw(self.overlapped));
            drop(Box::from_raw(self.buffer));
        }
    }
}
