//! Text on its way to and from the kernel, with nothing of a kernel in it.
//!
//! [`pieces`] cuts what is printed so that no debugger cuts it worse; [`utf16`] converts the
//! kernel's strings without ever aborting for want of memory; [`stack_record`] writes down where a
//! block was allocated.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;

pub mod pieces;
pub mod stack_record;
pub mod utf16;
