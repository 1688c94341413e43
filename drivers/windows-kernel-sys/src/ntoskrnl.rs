//! Functions that `ntoskrnl.exe` exports.

// The link attribute stands for Windows alone (off it, rustc refuses it), so that the crates above
// can be type-checked and their documentation tested on any machine.

#![allow(non_snake_case)]

use crate::base::{
    ACCESS_MASK, BOOLEAN, DEVICE_OBJECT, DRIVER_OBJECT, HANDLE, IO_STATUS_BLOCK, IRP, KIRQL,
    KPROCESSOR_MODE, KSPIN_LOCK, NTSTATUS, OBJECT_ATTRIBUTES, POOL_TYPE, UNICODE_STRING,
};
use core::ffi::{c_char, c_int, c_void};

#[cfg_attr(
    windows,
    link(name = "ntoskrnl.exe", kind = "raw-dylib", modifiers = "+verbatim")
)]
unsafe extern "system" {
    pub fn ExAllocatePoolWithTag(pool_type: POOL_TYPE, bytes: usize, tag: u32) -> *mut c_void;
    pub fn ExFreePoolWithTag(block: *mut c_void, tag: u32);

    pub fn IoCreateDevice(
        driver: *mut DRIVER_OBJECT,
        extension_bytes: u32,
        name: *const UNICODE_STRING,
        device_type: u32,
        characteristics: u32,
        exclusive: BOOLEAN,
        device: *mut *mut DEVICE_OBJECT,
    ) -> NTSTATUS;
    pub fn IoCreateSymbolicLink(
        link: *const UNICODE_STRING,
        target: *const UNICODE_STRING,
    ) -> NTSTATUS;
    /// The device goes when nobody refers to it any more.
    pub fn IoDeleteDevice(device: *mut DEVICE_OBJECT);
    pub fn IoDeleteSymbolicLink(link: *const UNICODE_STRING) -> NTSTATUS;
    /// After it the request is the kernel's, or gone.
    pub fn IofCompleteRequest(irp: *mut IRP, boost: i8);

    /// Gives the level that the processor was at, and raises it to `DISPATCH_LEVEL`.
    pub fn KeAcquireSpinLockRaiseToDpc(lock: *mut KSPIN_LOCK) -> KIRQL;
    pub fn KeBugCheckEx(
        code: u32,
        parameter1: usize,
        parameter2: usize,
        parameter3: usize,
        parameter4: usize,
    ) -> !;
    /// The interval is in units of 100 ns; a negative one counts from now.
    pub fn KeDelayExecutionThread(
        mode: KPROCESSOR_MODE,
        alertable: BOOLEAN,
        interval: *const i64,
    ) -> NTSTATUS;

    /// Sets the processor to the level that it was at before.
    pub fn KeReleaseSpinLock(lock: *mut KSPIN_LOCK, level: KIRQL);

    /// An exported function or variable of the kernel, or null.
    pub fn MmGetSystemRoutineAddress(name: *const UNICODE_STRING) -> *mut c_void;

    /// Return addresses, innermost first, and how many. The hash may be null.
    pub fn RtlCaptureStackBackTrace(
        skip: u32,
        most: u32,
        frames: *mut *mut c_void,
        hash: *mut u32,
    ) -> u16;

    pub fn ZwClose(handle: HANDLE) -> NTSTATUS;
    pub fn ZwOpenFile(
        file: *mut HANDLE,
        access: ACCESS_MASK,
        attributes: *const OBJECT_ATTRIBUTES,
        status: *mut IO_STATUS_BLOCK,
        share: u32,
        options: u32,
    ) -> NTSTATUS;
    pub fn ZwOpenKey(
        key: *mut HANDLE,
        access: ACCESS_MASK,
        attributes: *const OBJECT_ATTRIBUTES,
    ) -> NTSTATUS;
    pub fn ZwOpenSymbolicLinkObject(
        link: *mut HANDLE,
        access: ACCESS_MASK,
        attributes: *const OBJECT_ATTRIBUTES,
    ) -> NTSTATUS;
    pub fn ZwQuerySystemInformation(
        class: c_int,
        information: *mut c_void,
        bytes: u32,
        needed: *mut u32,
    ) -> NTSTATUS;
    pub fn ZwQueryValueKey(
        key: HANDLE,
        name: *const UNICODE_STRING,
        class: c_int,
        information: *mut c_void,
        bytes: u32,
        needed: *mut u32,
    ) -> NTSTATUS;
    pub fn ZwReadFile(
        file: HANDLE,
        event: HANDLE,
        apc: *const c_void,
        apc_context: *const c_void,
        status: *mut IO_STATUS_BLOCK,
        buffer: *mut c_void,
        bytes: u32,
        offset: *const i64,
        key: *const u32,
    ) -> NTSTATUS;
}

#[cfg_attr(
    windows,
    link(name = "ntoskrnl.exe", kind = "raw-dylib", modifiers = "+verbatim")
)]
unsafe extern "C" {
    pub fn DbgPrint(format: *const c_char, ...) -> NTSTATUS;
    /// A level below 32 is a bit of the component's mask.
    pub fn DbgPrintEx(component: u32, level: u32, format: *const c_char, ...) -> NTSTATUS;

    // What compiled code calls unasked. The `core` of this target has none of them.

    pub fn memcmp(left: *const c_void, right: *const c_void, bytes: usize) -> c_int;
    pub fn memcpy(to: *mut c_void, from: *const c_void, bytes: usize) -> *mut c_void;
    pub fn memmove(to: *mut c_void, from: *const c_void, bytes: usize) -> *mut c_void;
    pub fn memset(to: *mut c_void, byte: c_int, bytes: usize) -> *mut c_void;
    pub fn strlen(text: *const c_char) -> usize;
    /// Touches the stack page by page in functions with large frames; not to be called by hand.
    pub fn __chkstk();
}
