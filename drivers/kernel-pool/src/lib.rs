//! What of a pool allocator needs no kernel: the tag, the alignment, and failures on demand.

#![no_std]
#![deny(missing_docs)]

pub mod failure;
pub mod placement;
pub mod tag;

pub use tag::PoolTag;
