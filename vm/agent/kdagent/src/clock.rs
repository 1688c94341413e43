//! Time.

use crate::sys;

/// Milliseconds, from some point in the past.
pub fn now() -> u64 {
    // SAFETY: no preconditions.
    unsafe { sys::GetTickCount64() }
}
