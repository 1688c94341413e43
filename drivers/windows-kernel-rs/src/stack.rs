//! Where each block of memory was allocated, told to whoever listens.

#![cfg(feature = "capture-stacks")]

use core::ptr;
use kernel_text::stack_record::{self, BUFFER_BYTES, MOST_FRAMES};
use windows_kernel_sys::base::DPFLTR_IHVDRIVER_ID;
use windows_kernel_sys::ntoskrnl::{DbgPrintEx, RtlCaptureStackBackTrace};

/// A level of its own, which nobody prints at. Windows masks it off, unless it is asked for.
const LEVEL: u32 = 30;

/// Prints who allocated a block. Allocates nothing; to be called at or below `DISPATCH_LEVEL`.
pub(crate) fn record(block: *const u8) {
    let mut frames = [ptr::null_mut(); MOST_FRAMES];
    #[allow(clippy::cast_possible_truncation)] // it is 28
    let most = MOST_FRAMES as u32;
    // SAFETY: there is room for so many frames; nobody wants the hash.
    let count = unsafe { RtlCaptureStackBackTrace(0, most, frames.as_mut_ptr(), ptr::null_mut()) };
    let frames = &frames[..usize::from(count)];
    // Wine walks on beyond the thread's first function, which returns to nowhere.
    let frames = frames
        .iter()
        .map(|frame| frame.addr())
        .take_while(|&frame| frame != 0);
    let mut buffer = [0; BUFFER_BYTES];
    let record = stack_record::write(&mut buffer, block.addr(), frames);
    // SAFETY: both are C strings, and `%s` takes one.
    unsafe {
        DbgPrintEx(DPFLTR_IHVDRIVER_ID, LEVEL, c"%s".as_ptr(), record.as_ptr());
    }
}
