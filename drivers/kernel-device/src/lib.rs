//! What of a device needs no kernel: its gate, its control codes and its buffers.

#![no_std]
#![deny(missing_docs)]

pub mod buffer;
pub mod code;
pub mod gate;

pub use buffer::ControlBuffer;
pub use code::{Access, ControlCode, Method};
pub use gate::Gate;
