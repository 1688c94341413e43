//! The protocol between host and agent: frames, messages and their limits, without input or output.
//!
//! Its twin on the host is `pytest_kdriver/guest/frames.py` and `messages.py`; both are fuzzed against
//! each other. All numbers are little-endian.
//!
//! ```text
//! frame     length u32, then as many bytes: version u8, kind u8, operation u16, request u32, body
//! body      the fields of the operation's message, one after the other, nothing behind them
//! field     u32 | u64 | bool u8 (0, 1) | bytes (u32 length, bytes) | string (bytes, UTF-8)
//!           | list (u32 count, items) | option (bool, item if true)
//! ```
//!
//! The host sends requests, each in one frame and with an id of its own. The agent answers each with one
//! reply or one error that carries the same id, in any order. A reply may be cut into parts: the bodies of
//! all its frames, joined, are the message. An error may end a reply that has begun.
//!
//! A frame that breaks these rules ends the conversation, for behind it no border is known. A body that
//! breaks its message's rules is answered by an error, and the conversation goes on.
//!
//! Where the stream is a port, which nobody ever closes, there is one more layer below: [`port`]. Where bytes
//! are changed on their way, there is another one: [`base64`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod base64;
mod frame;
mod message;
pub mod port;
mod sha256;
mod wire;

pub use frame::{
    Decoder, Frame, FrameError, HEADER_SIZE, Kind, MAX_BODY, MAX_FRAME, PROTOCOL_VERSION, encode,
};
pub use message::*;
pub use sha256::Sha256;
pub use wire::{Malformed, Reader, Wire, from_bytes, to_bytes};
