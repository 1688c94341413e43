//! Brings the machine down.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Where` | `REG_SZ` | `init` | or `cleanup` |
//! | `How` | `REG_SZ` | `panic` | or `page-fault` (a write to address 0x10), `bug-check` (0xE2E2 with 1, 2, 3, 4), `int3` |
//!
//! It says what it is about to do first.

#![no_std]

use core::arch::asm;
use windows_kernel_rs::{Driver, Error, KernelModule, Parameters, kernel_module, println};
use windows_kernel_sys::ntoskrnl::KeBugCheckEx;

struct Module {
    at_cleanup: Option<How>,
}

impl KernelModule for Module {
    fn init(_: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        let how = How::read(&parameters)?;
        let at_cleanup = match parameters.string("Where")?.as_deref() {
            None | Some("init") => {
                how.bring_down();
                None
            }
            Some("cleanup") => Some(how),
            Some(_) => return Err(Error::INVALID_PARAMETER),
        };
        Ok(Module { at_cleanup })
    }

    fn cleanup(&mut self, _: Driver) {
        if let Some(how) = &self.at_cleanup {
            how.bring_down();
        }
    }
}

kernel_module!(Module);

enum How {
    Panic,
    PageFault,
    BugCheck,
    Int3,
}

impl How {
    fn read(parameters: &Parameters) -> Result<Self, Error> {
        match parameters.string("How")?.as_deref() {
            None | Some("panic") => Ok(Self::Panic),
            Some("page-fault") => Ok(Self::PageFault),
            Some("bug-check") => Ok(Self::BugCheck),
            Some("int3") => Ok(Self::Int3),
            Some(_) => Err(Error::INVALID_PARAMETER),
        }
    }

    /// Returns from an `int3` that a debugger continues, and never else.
    fn bring_down(&self) {
        match self {
            Self::Panic => {
                println!("about to panic");
                panic!("as it was told");
            }
            Self::PageFault => {
                println!("about to write to address 0x10");
                // SAFETY: none; the fault is what was asked for. In assembly, so that the compiler
                // does not know better.
                unsafe { asm!("mov byte ptr [{address}], 1", address = in(reg) 0x10_usize) }
            }
            Self::BugCheck => {
                println!("about to bug-check");
                // SAFETY: it may be called at any time; there is no way back.
                unsafe { KeBugCheckEx(0xE2E2, 1, 2, 3, 4) }
            }
            Self::Int3 => {
                println!("about to hit a breakpoint");
                // SAFETY: changes nothing by itself.
                unsafe { asm!("int3") }
            }
        }
    }
}
