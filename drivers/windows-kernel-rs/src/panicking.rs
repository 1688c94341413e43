//! A panic stops the machine, after it said where and why.

#![cfg(windows)]

use crate::println;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};
use windows_kernel_sys::ntoskrnl::KeBugCheckEx;

/// The bug check's code: the letters `RUST`. None of Windows' own.
///
/// Its parameters: line, column, address of the file's name, and that name's length in bytes.
const RUST_PANIC: u32 = u32::from_be_bytes(*b"RUST");

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);

    let (file, line, column) = info.location().map_or(("", 0, 0), |place| {
        (place.file(), place.line(), place.column())
    });
    // A message whose formatting panics shall not be formatted again.
    if !PANICKING.swap(true, Ordering::Relaxed) {
        println!("panicked at {file}:{line}:{column}: {}", info.message());
    }
    // SAFETY: it may be called at any time; there is no way back.
    unsafe {
        KeBugCheckEx(
            RUST_PANIC,
            line as usize,
            column as usize,
            file.as_ptr().addr(),
            file.len(),
        )
    }
}
