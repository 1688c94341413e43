//! Fails to start, with the status it is told, and leaves nothing behind.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Status` | `REG_DWORD` | 0xC0000001 | the NTSTATUS that the start ends with |

#![no_std]

use windows_kernel_rs::{Driver, Error, KernelModule, Parameters, TryBox, kernel_module};

/// What init has made when it fails, and must not leave behind.
struct Module {
    _memory: TryBox<[u8; 100]>,
}

impl KernelModule for Module {
    fn init(_: Driver, registry_path: &str) -> Result<Self, Error> {
        let _module = Module {
            _memory: TryBox::try_new([0; 100])?,
        };
        Err(match Parameters::open(registry_path)?.u32("Status")? {
            Some(status) => Error::from_kernel_errno(i32::from_ne_bytes(status.to_ne_bytes())),
            None => Error::UNSUCCESSFUL,
        })
    }

    fn cleanup(&mut self, _: Driver) {}
}

kernel_module!(Module);
