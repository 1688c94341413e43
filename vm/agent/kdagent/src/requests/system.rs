//! The system as a whole.

use alloc::ffi::CString;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char};
use core::ptr::null_mut;

use frames::{FileTime, HelloReply, OPERATIONS, PROTOCOL_VERSION};

use super::drivers::{enable_privilege, open_token};
use crate::failure::{Answer, Failure};
use crate::{sys, text};

/// The most that one information class may give, in bytes.
const MAX_INFORMATION: usize = 64 << 20;

/// Who is there.
pub fn hello() -> HelloReply {
    let version = os_version();
    HelloReply {
        protocol: u32::from(PROTOCOL_VERSION),
        version: String::from(env!("CARGO_PKG_VERSION")),
        architecture: String::from("x86_64"),
        os_major: version.major,
        os_minor: version.minor,
        os_build: version.build,
        wine_version: wine_version(),
        elevated: is_elevated(),
        // SAFETY: no preconditions.
        pid: unsafe { sys::GetCurrentProcessId() },
        operations: OPERATIONS.iter().copied().map(String::from).collect(),
    }
}

fn os_version() -> sys::OsVersion {
    let mut version = sys::OsVersion {
        size: size_of::<sys::OsVersion>() as u32,
        major: 0,
        minor: 0,
        build: 0,
        platform: 0,
        service_pack: [0; 128],
    };
    // SAFETY: the structure says its size.
    unsafe { sys::RtlGetVersion(&mut version) };
    version
}

fn wine_version() -> Option<String> {
    let name = text::wide("ntdll.dll").ok()?;
    // SAFETY: ntdll is in every process, for good. On Wine alone it has this function, which takes nothing
    // and returns a string that stays.
    unsafe {
        let ntdll = sys::GetModuleHandleW(name.as_ptr());
        let function = sys::GetProcAddress(ntdll, c"wine_get_version".as_ptr().cast());
        if function.is_null() {
            return None;
        }
        let get_version: extern "C" fn() -> *const c_char = core::mem::transmute(function);
        let version = CStr::from_ptr(get_version());
        Some(version.to_string_lossy().into_owned())
    }
}

fn is_elevated() -> bool {
    let Ok(token) = open_token(sys::TOKEN_QUERY) else {
        return false;
    };
    let (mut elevated, mut size) = (0u32, 0);
    // SAFETY: TOKEN_ELEVATION is one u32.
    let result = unsafe {
        sys::GetTokenInformation(
            token.raw(),
            sys::TOKEN_ELEVATION,
            &mut elevated,
            size_of::<u32>() as u32,
            &mut size,
        )
    };
    result != 0 && elevated != 0
}

/// SystemCodeIntegrityInformation: eight bytes, of which the first four have to say so.
const CODE_INTEGRITY: u32 = 103;

/// NtQuerySystemInformation, with a buffer of the size that it wants.
pub fn information(class: u32) -> Answer<Vec<u8>> {
    // Some classes want exactly the size they tell, others grow from one call to the next. So: first what
    // was told, later with room above it.
    let mut buffer: Vec<u64> = match class {
        CODE_INTEGRITY => vec![8],
        _ => Vec::new(),
    };
    let mut told = 0u32;
    for attempt in 0u32.. {
        let size = buffer.len() * size_of::<u64>();
        let asked = if attempt == 1 { told as usize } else { size };
        let pointer = if asked == 0 {
            null_mut()
        } else {
            buffer.as_mut_ptr().cast()
        };
        told = 0;
        // SAFETY: the buffer has at least as many bytes as told, aligned for any of the structures.
        let code =
            unsafe { sys::NtQuerySystemInformation(class, pointer, asked as u32, &mut told) };
        let failure = Failure::Status {
            doing: "query the information",
            code,
        };
        match code {
            0 => {
                let bytes = buffer.iter().flat_map(|word| word.to_le_bytes());
                return Ok(bytes.take(asked.min(told as usize)).collect());
            }
            sys::STATUS_INFO_LENGTH_MISMATCH
            | sys::STATUS_BUFFER_TOO_SMALL
            | sys::STATUS_BUFFER_OVERFLOW => {
                let wanted = match attempt {
                    0 if told > 0 => told as usize,
                    _ => (2 * size).max(told as usize + told as usize / 4).max(4096),
                };
                if wanted > MAX_INFORMATION {
                    return Err(failure);
                }
                buffer.resize(wanted.div_ceil(size_of::<u64>()), 0);
            }
            _ => return Err(failure),
        }
    }
    unreachable!()
}

/// What time it is.
pub fn clock() -> FileTime {
    let mut time = 0;
    // SAFETY: a FILETIME is as long as a u64.
    unsafe { sys::GetSystemTimePreciseAsFileTime(&mut time) };
    FileTime { time }
}

/// Says what time it is.
pub fn set_clock(time: u64) -> Answer {
    enable_privilege("SeSystemtimePrivilege", "enable SeSystemtimePrivilege")?;
    // SAFETY: null stands for nothing.
    match unsafe { sys::NtSetSystemTime(&time, null_mut()) } {
        0 => Ok(()),
        code => Err(Failure::Status {
            doing: "set the clock",
            code,
        }),
    }
}

/// Puts a mark into the kernel log, behind all that was there before.
pub fn fence(cookie: &str) -> Answer {
    let cookie = CString::new(cookie).map_err(|_| Failure::Refused("a string with a NUL in it"))?;
    // SAFETY: the string ends with a NUL.
    unsafe { sys::OutputDebugStringA(cookie.as_ptr().cast()) };
    Ok(())
}
