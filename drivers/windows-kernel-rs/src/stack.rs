//! Where each block of memory was allocated, told to whoever listens.

#![cfg(feature = "capture-stacks")]

use core::ptr;
use kernel_text::stack_record::{MOST_FRAMES, StackRecord};
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
    let frames = frames.map(<*mut _>::addr);
    // Wine walks on beyond the thread's first function, which returns to nowhere.
    let count = frames[..usize::from(count)]
        .iter()
        .take_while(|&&frame| frame != 0)
        .count();
    let record = StackRecord::new(block.addr(), &frames[..count]);
    // SAFETY: both are C strings, and `%s` takes one.
    unsafe {
        DbgPrintEx(
            DPFLTR_IHVDRIVER_ID,
            LEVEL,
            c"%s".as_ptr(),
            record.as_c_str().as_ptr(),
        );
    }
}
