//! The memory of a call into a driver.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ptr::{null, null_mut};

use crate::failure::Answer;
use crate::handle::Owned;
use crate::sys;

/// What the kernel may use until the call has ended: the status block, the buffers and the event.
///
/// One that never ended is to be forgotten, not dropped.
pub struct Transfer {
    event: Owned,
    status: UnsafeCell<sys::IoStatusBlock>,
    input: Vec<u8>,
    output: Output,
}

/// A box of ours. A pointer, since to move or to borrow the box would claim what is in it.
struct Output(*mut [u8]);

// SAFETY: the pointer is this structure's own, and what the kernel writes is read only behind the end of the
// call, by the thread that made it.
unsafe impl Send for Transfer {}
// SAFETY: as above.
unsafe impl Sync for Transfer {}

/// An event for a transfer.
pub fn new_event() -> Answer<Owned> {
    // SAFETY: null stands for nothing.
    let event = unsafe { sys::CreateEventW(null(), sys::TRUE, 0, null()) };
    Owned::new(event, "make an event")
}

impl Transfer {
    /// The kernel resets the event when the call begins.
    pub fn new(event: Owned, input: &[u8], output_size: usize) -> Self {
        Transfer {
            event,
            status: UnsafeCell::default(),
            input: input.to_vec(),
            output: Output(Box::into_raw(vec![0; output_size].into_boxed_slice())),
        }
    }

    /// Gives the event back, of a transfer that has ended.
    pub fn into_event(self) -> Owned {
        self.event
    }

    pub fn event(&self) -> sys::Handle {
        self.event.raw()
    }

    pub fn status_block(&self) -> *mut sys::IoStatusBlock {
        self.status.get()
    }

    /// The input; null if it is empty.
    pub fn input(&self) -> (*const u8, u32) {
        match self.input.len() {
            0 => (null(), 0),
            length => (self.input.as_ptr(), length as u32),
        }
    }

    /// The place for the output; null if it is empty.
    pub fn output(&self) -> (*mut u8, u32) {
        match self.output.0.len() {
            0 => (null_mut(), 0),
            length => (self.output.0.cast(), length as u32),
        }
    }

    /// Waits until the kernel says that the call has ended, or until the transfer is released.
    pub fn wait(&self) {
        // SAFETY: the handle is an event's.
        let result = unsafe { sys::WaitForSingleObject(self.event(), sys::INFINITE) };
        assert_eq!(result, sys::WAIT_OBJECT_0, "wait for a device");
    }

    /// Ends a `wait`, though the call has not ended.
    pub fn release(&self) {
        // SAFETY: the handle is an event's.
        unsafe { sys::SetEvent(self.event()) };
    }

    /// Has the call cancelled that was made on this file; one that has ended is no matter.
    pub fn cancel(&self, file: sys::Handle) {
        let mut status = sys::IoStatusBlock::default();
        // SAFETY: the status block is what the kernel knows the call by, and nobody else's as long as this
        // lives. So a handle that is another file's meanwhile has no such call.
        unsafe { sys::NtCancelIoFileEx(file, self.status_block(), &mut status) };
    }

    /// What the kernel wrote.
    ///
    /// # Safety
    ///
    /// The call has ended.
    pub unsafe fn result(&self) -> (sys::IoStatusBlock, &[u8]) {
        // SAFETY: the kernel has no use for the memory any more.
        unsafe { (*self.status.get(), &*self.output.0) }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // SAFETY: `Transfer::new` made it of a box.
        drop(unsafe { Box::from_raw(self.0) });
    }
}
