//! Threads.

use alloc::boxed::Box;
use core::ffi::c_void;
use core::ptr::{null, null_mut};

use crate::failure::Answer;
use crate::handle::Owned;
use crate::sys;

/// Reserved for a thread's stack; the deepest of ours is far below it.
const STACK: usize = 256 << 10;

type Body = Box<dyn FnOnce() + Send>;

unsafe extern "system" fn run(parameter: *mut c_void) -> u32 {
    // SAFETY: `spawn` made the box and gave it to this thread alone.
    let body = unsafe { Box::from_raw(parameter.cast::<Body>()) };
    body();
    0
}

/// Starts a thread that nobody waits for.
pub fn spawn(body: impl FnOnce() + Send + 'static) -> Answer {
    let body: Body = Box::new(body);
    let parameter = Box::into_raw(Box::new(body));
    // SAFETY: `run` takes the parameter as what it is.
    let thread = unsafe {
        sys::CreateThread(
            null(),
            STACK,
            run,
            parameter.cast(),
            sys::STACK_SIZE_PARAM_IS_A_RESERVATION,
            null_mut(),
        )
    };
    match Owned::new(thread, "start a thread") {
        Ok(_) => Ok(()),
        Err(failure) => {
            // SAFETY: no thread got the box, so it is still ours.
            drop(unsafe { Box::from_raw(parameter) });
            Err(failure)
        }
    }
}
