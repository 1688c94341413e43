//! Windows's UTF-16.

use alloc::string::String;
use alloc::vec::Vec;

use crate::failure::{Answer, Failure};
use crate::sys;

/// UTF-16 with a NUL at its end; a NUL within would silently cut it, and is refused.
pub fn wide(text: &str) -> Answer<Vec<u16>> {
    if text.contains('\0') {
        return Err(Failure::Refused("a string with a NUL in it"));
    }
    Ok(text.encode_utf16().chain([0]).collect())
}

/// UTF-16 up to its NUL, or all of it. Lone surrogates become U+FFFD.
pub fn narrow(text: &[u16]) -> String {
    let end = text.iter().position(|&unit| unit == 0);
    String::from_utf16_lossy(&text[..end.unwrap_or(text.len())])
}

/// This process's command line.
pub fn command_line() -> String {
    // SAFETY: Windows keeps the command line, with a NUL behind it, as long as the process lives.
    unsafe {
        let line = sys::GetCommandLineW();
        let length = (0..).take_while(|&index| *line.add(index) != 0).count();
        narrow(core::slice::from_raw_parts(line, length))
    }
}
