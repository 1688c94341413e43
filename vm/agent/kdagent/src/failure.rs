//! Why a request could not be done.

use crate::sys;

/// The body of an error frame; `doing` is what was being done.
#[derive(Clone, Copy)]
pub enum Failure {
    /// The agent itself refuses.
    Refused(&'static str),
    /// A Win32 call said so.
    Win32 { doing: &'static str, code: u32 },
    /// A native call said so.
    Status { doing: &'static str, code: u32 },
}

pub type Answer<T = ()> = Result<T, Failure>;

impl Failure {
    /// What GetLastError says.
    pub fn last(doing: &'static str) -> Self {
        // SAFETY: no preconditions.
        let code = unsafe { sys::GetLastError() };
        Failure::Win32 { doing, code }
    }

    pub fn win32_code(self) -> Option<u32> {
        match self {
            Failure::Win32 { code, .. } => Some(code),
            _ => None,
        }
    }

    pub fn to_message(self) -> frames::Error<'static> {
        let (domain, code, message) = match self {
            Failure::Refused(message) => (0, 0, message),
            Failure::Win32 { doing, code } => (1, code, doing),
            Failure::Status { doing, code } => (2, code, doing),
        };
        frames::Error {
            domain,
            code,
            message,
        }
    }
}

/// The last error if a call returned FALSE.
pub fn check(result: sys::Bool, doing: &'static str) -> Answer {
    if result == 0 {
        Err(Failure::last(doing))
    } else {
        Ok(())
    }
}

/// The code if a call returned one that is not ERROR_SUCCESS.
pub fn check_code(code: u32, doing: &'static str) -> Answer {
    if code == 0 {
        Ok(())
    } else {
        Err(Failure::Win32 { doing, code })
    }
}
