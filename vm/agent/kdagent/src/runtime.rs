//! What a C runtime and `std` would supply: memory, panics, the way out.

use core::alloc::{GlobalAlloc, Layout};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::sys;

/// The exit code after a bug of ours.
const EXIT_BUG: u32 = 3;

/// HeapAlloc aligns to this much on x86-64.
const HEAP_ALIGNMENT: usize = 16;

struct ProcessHeap;

#[global_allocator]
static HEAP: ProcessHeap = ProcessHeap;

// SAFETY: the process heap is there from start to end and thread-safe; HeapAlloc aligns to 16 bytes, and a
// layout that asks for more gets null.
unsafe impl GlobalAlloc for ProcessHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > HEAP_ALIGNMENT {
            return null_mut();
        }
        // SAFETY: any size is allowed.
        unsafe { sys::HeapAlloc(sys::GetProcessHeap(), 0, layout.size()).cast() }
    }

    unsafe fn dealloc(&self, block: *mut u8, _layout: Layout) {
        // SAFETY: the caller got the block from `alloc` or `realloc`.
        unsafe { sys::HeapFree(sys::GetProcessHeap(), 0, block.cast()) };
    }

    unsafe fn realloc(&self, block: *mut u8, _layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; the alignment stays the heap's own.
        unsafe { sys::HeapReAlloc(sys::GetProcessHeap(), 0, block.cast(), size).cast() }
    }
}

/// Writes to stderr, as far as there is one.
pub fn complain(text: &[u8]) {
    let mut count = 0;
    // SAFETY: the buffer is as long as told; a handle that is none makes it fail, which is all right.
    unsafe {
        let error = sys::GetStdHandle(sys::STD_ERROR_HANDLE);
        sys::WriteFile(
            error,
            text.as_ptr(),
            text.len() as u32,
            &mut count,
            null_mut(),
        );
    }
}

/// Ends the process, whatever its other threads hang in.
///
/// Not by ExitProcess: that runs each library's clean-up after the threads were cut off anywhere, which can
/// wait for a lock that one of them held.
pub fn exit(code: u32) -> ! {
    loop {
        // SAFETY: no preconditions.
        unsafe { sys::TerminateProcess(sys::GetCurrentProcess(), code) };
    }
}

/// A number that nobody has had before.
pub fn random() -> u128 {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is as long as told.
    let result = unsafe { sys::SystemFunction036(bytes.as_mut_ptr(), bytes.len() as u32) };
    assert!(result != 0, "the system has no random numbers");
    u128::from_ne_bytes(bytes)
}

/// As much of a text as fits, without the heap: it may be the reason for the panic, or locked.
struct Words {
    text: [u8; 1024],
    length: usize,
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (place, byte) in self.text[self.length..].iter_mut().zip(text.bytes()) {
            *place = byte;
            self.length += 1;
        }
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    if !PANICKING.swap(true, Ordering::Relaxed) {
        let mut words = Words {
            text: [0; 1024],
            length: 0,
        };
        let _ = writeln!(words, "kdagent: {info}");
        complain(&words.text[..words.length]);
    }
    exit(EXIT_BUG)
}

/// Compiled code that uses floating point asks for it.
#[unsafe(no_mangle)]
static _fltused: i32 = 0;

/// The prebuilt `core` names it, for unwinding, which does not happen here. Windows asks it whenever an
/// exception passes a function of `core`'s.
#[unsafe(no_mangle)]
extern "C" fn __CxxFrameHandler3() -> i32 {
    const CONTINUE_SEARCH: i32 = 1; // of EXCEPTION_DISPOSITION
    CONTINUE_SEARCH
}
