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
        let status = Parameters::open(registry_path)?.u32("Status")?;
        Err(status.map_or(Error::UNSUCCESSFUL, |status| {
            Error::from_kernel_errno(status.cast_signed())
        }))
    }

    fn cleanup(&mut self, _: Driver) {}
}

kernel_module!(Module);
