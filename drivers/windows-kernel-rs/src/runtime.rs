//! Names that compiled code refers to, and that a C runtime would have.

#![cfg(windows)]

/// Says that floating point is used, to a runtime that we do not have.
#[unsafe(no_mangle)]
static _fltused: i32 = 0;

/// The prebuilt `core` names it in its unwind tables. Nothing unwinds, so nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn __CxxFrameHandler3() -> i32 {
    const CONTINUE_SEARCH: i32 = 1;
    CONTINUE_SEARCH
}
