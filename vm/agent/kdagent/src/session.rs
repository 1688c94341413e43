//! A host's visit.

use core::ptr::null;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::failure::Answer;
use crate::handle::Owned;
use crate::sys;

/// What requests belong to: on a port, hosts come one after the other, and what one asked for is no matter
/// of the next.
pub struct Session {
    is_over: AtomicBool,
    over: Owned,
}

impl Session {
    pub fn new() -> Answer<Self> {
        // SAFETY: null stands for nothing.
        let event = unsafe { sys::CreateEventW(null(), sys::TRUE, 0, null()) };
        Ok(Session {
            is_over: AtomicBool::new(false),
            over: Owned::new(event, "make an event")?,
        })
    }

    pub fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        // SAFETY: the handle is an event's.
        unsafe { sys::SetEvent(self.over.raw()) };
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// What a wait ends by when the session is over.
    pub fn over(&self) -> sys::Handle {
        self.over.raw()
    }
}
