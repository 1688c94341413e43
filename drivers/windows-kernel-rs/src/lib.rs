//! A small safe framework for Windows kernel drivers in stable Rust.
//!
//! A driver is a type that implements [`KernelModule`], and [`kernel_module!`] around it. The crate
//! holds nothing else: no `build.rs`, no linker flags.
//!
//! ```no_run
//! use windows_kernel_rs::{Driver, Error, KernelModule, kernel_module, println};
//!
//! struct Module;
//!
//! impl KernelModule for Module {
//!     fn init(_: Driver, _: &str) -> Result<Self, Error> {
//!         println!("Hello, world!");
//!         Ok(Module)
//!     }
//!
//!     fn cleanup(&mut self, _: Driver) {
//!         println!("Bye bye!");
//!     }
//! }
//!
//! kernel_module!(Module);
//! ```
//!
//! What programs open, read, write and control is a type that implements [`Device`], made by
//! [`Driver::create_device`].
//!
//! Memory: on stable Rust an allocation that cannot fail panics when it does fail, and a panic is a
//! bug check. So whatever the framework allocates, it allocates fallibly, and offers the means to
//! do likewise: [`TryBox`], [`try_format!`], `Vec::try_reserve`, and `?`, since `TryReserveError`
//! becomes [`Error::INSUFFICIENT_RESOURCES`].

#![no_std]
#![deny(missing_docs)]

extern crate alloc;

pub mod allocator;
pub mod boxed;
pub mod device;
mod device_list;
pub mod driver;
#[doc(hidden)]
pub mod entry;
pub mod error;
pub mod format;
pub mod io;
mod panicking;
pub mod parameters;
mod request;
mod runtime;
mod stack;
pub mod sync;
pub mod time;
mod unicode;

pub use boxed::TryBox;
pub use device::Device;
pub use driver::{Driver, KernelModule};
pub use error::Error;
pub use kernel_pool::PoolTag;
pub use parameters::Parameters;
pub use sync::SpinLock;
