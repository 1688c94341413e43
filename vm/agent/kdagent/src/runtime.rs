//! What a C runtime and `std` would supply: memory, panics, the way out.

use alloc::string::ToString;
use core::alloc::{GlobalAlloc, Layout};
use core::panic::PanicInfo;
use core::ptr::null_mut;

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
pub fn complain(text: &str) {
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

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    complain("kdagent: ");
    complain(&info.to_string());
    complain("\n");
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
