//! Calls a function that the kernel does not have.

#![no_std]

use windows_kernel_rs::{Driver, Error, KernelModule, kernel_module};

#[link(name = "ntoskrnl.exe", kind = "raw-dylib", modifiers = "+verbatim")]
unsafe extern "system" {
    fn KdriverNoSuchExport();
}

struct Module;

impl KernelModule for Module {
    fn init(_: Driver, _: &str) -> Result<Self, Error> {
        // SAFETY: Windows does not load this driver, and Wine ends it here.
        unsafe { KdriverNoSuchExport() };
        Ok(Module)
    }

    fn cleanup(&mut self, _: Driver) {}
}

kernel_module!(Module);
