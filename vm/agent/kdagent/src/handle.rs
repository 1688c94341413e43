//! Handles with an owner.

use crate::failure::{Answer, Failure};
use crate::sys;

/// A handle of the kernel's, closed when dropped.
pub struct Owned(sys::Handle);

// SAFETY: a handle is a number that all threads of the process may use.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Owned {
    /// Takes what a call returned that says "no" by null or INVALID_HANDLE_VALUE and the last error.
    pub fn new(handle: sys::Handle, doing: &'static str) -> Answer<Self> {
        if handle.is_null() || handle == sys::INVALID_HANDLE {
            Err(Failure::last(doing))
        } else {
            Ok(Owned(handle))
        }
    }

    pub fn raw(&self) -> sys::Handle {
        self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the handle is ours.
        unsafe { sys::CloseHandle(self.0) };
    }
}
