//! Types and status constants.

#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]

use core::ffi::c_void;
use core::mem::{offset_of, size_of};

/// A status: negative is an error or a warning, anything else a success.
pub type NTSTATUS = i32;
/// A handle to a kernel object.
pub type HANDLE = *mut c_void;
/// The rights asked for with a handle.
pub type ACCESS_MASK = u32;
/// A truth value, one byte wide.
pub type BOOLEAN = u8;
/// The kind of memory asked of `ExAllocatePoolWithTag`.
pub type POOL_TYPE = i32;
/// The kind of memory asked of `ExAllocatePool2`.
pub type POOL_FLAGS = u64;
/// Kernel or user.
pub type KPROCESSOR_MODE = i8;

/// A status from the form that documentation gives it in.
const fn status(code: u32) -> NTSTATUS {
    NTSTATUS::from_ne_bytes(code.to_ne_bytes())
}

pub const STATUS_SUCCESS: NTSTATUS = status(0);
pub const STATUS_BUFFER_OVERFLOW: NTSTATUS = status(0x8000_0005);
pub const STATUS_DEVICE_BUSY: NTSTATUS = status(0x8000_0011);
pub const STATUS_NO_MORE_ENTRIES: NTSTATUS = status(0x8000_001A);
pub const STATUS_UNSUCCESSFUL: NTSTATUS = status(0xC000_0001);
pub const STATUS_NOT_IMPLEMENTED: NTSTATUS = status(0xC000_0002);
pub const STATUS_INFO_LENGTH_MISMATCH: NTSTATUS = status(0xC000_0004);
pub const STATUS_ACCESS_VIOLATION: NTSTATUS = status(0xC000_0005);
pub const STATUS_INVALID_HANDLE: NTSTATUS = status(0xC000_0008);
pub const STATUS_INVALID_PARAMETER: NTSTATUS = status(0xC000_000D);
pub const STATUS_NO_SUCH_DEVICE: NTSTATUS = status(0xC000_000E);
pub const STATUS_INVALID_DEVICE_REQUEST: NTSTATUS = status(0xC000_0010);
pub const STATUS_END_OF_FILE: NTSTATUS = status(0xC000_0011);
pub const STATUS_NO_MEMORY: NTSTATUS = status(0xC000_0017);
pub const STATUS_ACCESS_DENIED: NTSTATUS = status(0xC000_0022);
pub const STATUS_BUFFER_TOO_SMALL: NTSTATUS = status(0xC000_0023);
pub const STATUS_OBJECT_TYPE_MISMATCH: NTSTATUS = status(0xC000_0024);
pub const STATUS_OBJECT_NAME_INVALID: NTSTATUS = status(0xC000_0033);
pub const STATUS_OBJECT_NAME_NOT_FOUND: NTSTATUS = status(0xC000_0034);
pub const STATUS_OBJECT_NAME_COLLISION: NTSTATUS = status(0xC000_0035);
pub const STATUS_OBJECT_PATH_NOT_FOUND: NTSTATUS = status(0xC000_003A);
pub const STATUS_SHARING_VIOLATION: NTSTATUS = status(0xC000_0043);
pub const STATUS_DELETE_PENDING: NTSTATUS = status(0xC000_0056);
pub const STATUS_REVISION_MISMATCH: NTSTATUS = status(0xC000_0059);
pub const STATUS_PRIVILEGE_NOT_HELD: NTSTATUS = status(0xC000_0061);
pub const STATUS_INTEGER_OVERFLOW: NTSTATUS = status(0xC000_0095);
pub const STATUS_INSUFFICIENT_RESOURCES: NTSTATUS = status(0xC000_009A);
pub const STATUS_DEVICE_NOT_CONNECTED: NTSTATUS = status(0xC000_009D);
pub const STATUS_DEVICE_NOT_READY: NTSTATUS = status(0xC000_00A3);
pub const STATUS_IO_TIMEOUT: NTSTATUS = status(0xC000_00B5);
pub const STATUS_NOT_SUPPORTED: NTSTATUS = status(0xC000_00BB);
pub const STATUS_INTERNAL_ERROR: NTSTATUS = status(0xC000_00E5);
pub const STATUS_INVALID_USER_BUFFER: NTSTATUS = status(0xC000_00E8);
pub const STATUS_CANCELLED: NTSTATUS = status(0xC000_0120);
pub const STATUS_INVALID_DEVICE_STATE: NTSTATUS = status(0xC000_0184);
pub const STATUS_INVALID_BUFFER_SIZE: NTSTATUS = status(0xC000_0206);
pub const STATUS_NOT_FOUND: NTSTATUS = status(0xC000_0225);

/// Whether a status is a success or an information, and neither warning nor error.
#[must_use]
pub const fn NT_SUCCESS(status: NTSTATUS) -> bool {
    status >= 0
}

/// Non-paged memory that nothing can be executed in.
pub const NonPagedPoolNx: POOL_TYPE = 512;
/// The block need not be zeroed.
pub const POOL_FLAG_UNINITIALIZED: POOL_FLAGS = 0x2;
/// Non-paged memory that nothing can be executed in.
pub const POOL_FLAG_NON_PAGED: POOL_FLAGS = 0x40;

pub const KernelMode: KPROCESSOR_MODE = 0;

/// Names are compared without regard to case.
pub const OBJ_CASE_INSENSITIVE: u32 = 0x40;
/// The handle belongs to the kernel, whatever process is current.
pub const OBJ_KERNEL_HANDLE: u32 = 0x200;

/// The right to read a registry key.
pub const KEY_READ: ACCESS_MASK = 0x2_0019;

pub const REG_SZ: u32 = 1;
pub const REG_EXPAND_SZ: u32 = 2;
pub const REG_BINARY: u32 = 3;
pub const REG_DWORD: u32 = 4;
pub const REG_MULTI_SZ: u32 = 7;
pub const REG_QWORD: u32 = 11;

/// The class of [`KEY_VALUE_PARTIAL_INFORMATION`].
pub const KeyValuePartialInformation: i32 = 2;
/// The class of [`SYSTEM_TIMEOFDAY_INFORMATION`].
pub const SystemTimeOfDayInformation: i32 = 3;

/// A counted string of UTF-16 units. The lengths are in bytes.
#[repr(C)]
pub struct UNICODE_STRING {
    pub Length: u16,
    pub MaximumLength: u16,
    pub Buffer: *mut u16,
}

#[repr(C)]
pub struct OBJECT_ATTRIBUTES {
    pub Length: u32,
    pub RootDirectory: HANDLE,
    pub ObjectName: *const UNICODE_STRING,
    pub Attributes: u32,
    pub SecurityDescriptor: *const c_void,
    pub SecurityQualityOfService: *const c_void,
}

/// The head of what `ZwQueryValueKey` gives. The data follow.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KEY_VALUE_PARTIAL_INFORMATION {
    pub TitleIndex: u32,
    pub Type: u32,
    pub DataLength: u32,
}

/// The first two fields; times are in units of 100 ns.
#[repr(C)]
#[derive(Default)]
pub struct SYSTEM_TIMEOFDAY_INFORMATION {
    pub BootTime: i64,
    pub CurrentTime: i64,
}

pub type DRIVER_UNLOAD = unsafe extern "system" fn(driver: *mut DRIVER_OBJECT);
pub type DRIVER_INITIALIZE =
    unsafe extern "system" fn(*mut DRIVER_OBJECT, *mut UNICODE_STRING) -> NTSTATUS;
pub type DRIVER_STARTIO = unsafe extern "system" fn(device: *mut c_void, irp: *mut c_void);
pub type DRIVER_DISPATCH =
    unsafe extern "system" fn(device: *mut c_void, irp: *mut c_void) -> NTSTATUS;

/// The highest major function code.
pub const IRP_MJ_MAXIMUM_FUNCTION: usize = 0x1B;

#[repr(C)]
pub struct DRIVER_OBJECT {
    pub Type: i16,
    pub Size: i16,
    pub DeviceObject: *mut c_void,
    pub Flags: u32,
    pub DriverStart: *mut c_void,
    pub DriverSize: u32,
    pub DriverSection: *mut c_void,
    pub DriverExtension: *mut c_void,
    pub DriverName: UNICODE_STRING,
    pub HardwareDatabase: *mut UNICODE_STRING,
    pub FastIoDispatch: *mut c_void,
    pub DriverInit: Option<DRIVER_INITIALIZE>,
    pub DriverStartIo: Option<DRIVER_STARTIO>,
    pub DriverUnload: Option<DRIVER_UNLOAD>,
    pub MajorFunction: [Option<DRIVER_DISPATCH>; IRP_MJ_MAXIMUM_FUNCTION + 1],
}

const _: () = {
    assert!(size_of::<UNICODE_STRING>() == 16);
    assert!(size_of::<OBJECT_ATTRIBUTES>() == 48);
    assert!(size_of::<KEY_VALUE_PARTIAL_INFORMATION>() == 12);
    assert!(offset_of!(DRIVER_OBJECT, DriverName) == 56);
    assert!(offset_of!(DRIVER_OBJECT, DriverUnload) == 104);
    assert!(size_of::<DRIVER_OBJECT>() == 336);
};
