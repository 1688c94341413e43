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
/// The interrupt request level of a processor.
pub type KIRQL = u8;
/// A spin lock; zero is a free one.
pub type KSPIN_LOCK = usize;

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

/// A device of no type that Microsoft knows.
pub const FILE_DEVICE_UNKNOWN: u32 = 0x22;
/// The device's security counts for what is opened by a name below its own, too.
pub const FILE_DEVICE_SECURE_OPEN: u32 = 0x100;
/// Data of reads and writes are copied by the kernel.
pub const DO_BUFFERED_IO: u32 = 0x4;
/// Whoever waited for the request gets no more processor time for that.
pub const IO_NO_INCREMENT: i8 = 0;

/// A component of `DbgPrintEx` that is for the makers of drivers.
pub const DPFLTR_IHVDRIVER_ID: u32 = 77;

/// Names are compared without regard to case.
pub const OBJ_CASE_INSENSITIVE: u32 = 0x40;
/// The handle belongs to the kernel, whatever process is current.
pub const OBJ_KERNEL_HANDLE: u32 = 0x200;

/// The right to read a registry key.
pub const KEY_READ: ACCESS_MASK = 0x2_0019;

/// The right to read where a symbolic link leads.
pub const SYMBOLIC_LINK_QUERY: ACCESS_MASK = 0x1;

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
pub type DRIVER_STARTIO = unsafe extern "system" fn(device: *mut DEVICE_OBJECT, irp: *mut IRP);
pub type DRIVER_DISPATCH =
    unsafe extern "system" fn(device: *mut DEVICE_OBJECT, irp: *mut IRP) -> NTSTATUS;

/// What is asked of a device: a file on it is opened, or its last reference goes, or its last handle.
pub const IRP_MJ_CREATE: u8 = 0x00;
pub const IRP_MJ_CLOSE: u8 = 0x02;
pub const IRP_MJ_READ: u8 = 0x03;
pub const IRP_MJ_WRITE: u8 = 0x04;
pub const IRP_MJ_DEVICE_CONTROL: u8 = 0x0E;
pub const IRP_MJ_CLEANUP: u8 = 0x12;
/// The highest major function code.
pub const IRP_MJ_MAXIMUM_FUNCTION: usize = 0x1B;

#[repr(C)]
pub struct DRIVER_OBJECT {
    pub Type: i16,
    pub Size: i16,
    pub DeviceObject: *mut DEVICE_OBJECT,
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

/// The first fields. What follows, to a size of 0x150 bytes, is the kernel's.
#[repr(C)]
pub struct DEVICE_OBJECT {
    pub Type: i16,
    pub Size: u16,
    pub ReferenceCount: i32,
    pub DriverObject: *mut DRIVER_OBJECT,
    pub NextDevice: *mut DEVICE_OBJECT,
    pub AttachedDevice: *mut DEVICE_OBJECT,
    pub CurrentIrp: *mut IRP,
    pub Timer: *mut c_void,
    pub Flags: u32,
    pub Characteristics: u32,
    pub Vpb: *mut c_void,
    pub DeviceExtension: *mut c_void,
    pub DeviceType: u32,
    pub StackSize: i8,
}

/// The first fields of something that is open.
#[repr(C)]
pub struct FILE_OBJECT {
    pub Type: i16,
    pub Size: i16,
    pub DeviceObject: *mut DEVICE_OBJECT,
    pub Vpb: *mut c_void,
    /// The driver's own; null at first.
    pub FsContext: *mut c_void,
}

/// How a request ended.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct IO_STATUS_BLOCK {
    /// In a union with a pointer, hence the room behind it.
    pub Status: NTSTATUS,
    pub Information: usize,
}

/// A request. What a driver of one layer uses has its own name; the rest is `Reserved`.
#[repr(C)]
pub struct IRP {
    pub Type: i16,
    pub Size: u16,
    pub MdlAddress: *mut c_void,
    pub Flags: u32,
    /// `AssociatedIrp.SystemBuffer`.
    pub SystemBuffer: *mut c_void,
    pub ThreadListEntry: [*mut c_void; 2],
    pub IoStatus: IO_STATUS_BLOCK,
    pub RequestorMode: KPROCESSOR_MODE,
    pub PendingReturned: BOOLEAN,
    pub StackCount: i8,
    pub CurrentLocation: i8,
    pub Cancel: BOOLEAN,
    pub Reserved1: [u8; 3],
    pub Reserved2: [*mut c_void; 4],
    pub CancelRoutine: *mut c_void,
    pub UserBuffer: *mut c_void,
    pub Reserved3: [*mut c_void; 8],
    /// `Tail.Overlay.CurrentStackLocation`.
    pub CurrentStackLocation: *mut IO_STACK_LOCATION,
    pub OriginalFileObject: *mut FILE_OBJECT,
    pub Reserved4: *mut c_void,
}

/// What a request asks of one driver.
#[repr(C)]
pub struct IO_STACK_LOCATION {
    pub MajorFunction: u8,
    pub MinorFunction: u8,
    pub Flags: u8,
    pub Control: u8,
    pub Parameters: IO_PARAMETERS,
    pub DeviceObject: *mut DEVICE_OBJECT,
    pub FileObject: *mut FILE_OBJECT,
    pub CompletionRoutine: *mut c_void,
    pub Context: *mut c_void,
}

/// By major function; those that [`IRP_MJ_READ`] and its neighbours have.
#[repr(C)]
pub union IO_PARAMETERS {
    pub Transfer: IO_TRANSFER,
    pub DeviceIoControl: IO_DEVICE_CONTROL,
}

/// The first field of `Parameters.Read`, and of `Parameters.Write`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IO_TRANSFER {
    pub Length: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct IO_DEVICE_CONTROL {
    pub OutputBufferLength: u32,
    /// The kernel aligns each of these to a pointer's size.
    pub Reserved1: u32,
    pub InputBufferLength: u32,
    pub Reserved2: u32,
    pub IoControlCode: u32,
    pub Type3InputBuffer: *mut c_void,
}

const _: () = {
    assert!(size_of::<UNICODE_STRING>() == 16);
    assert!(size_of::<OBJECT_ATTRIBUTES>() == 48);
    assert!(size_of::<KEY_VALUE_PARTIAL_INFORMATION>() == 12);
    assert!(offset_of!(DRIVER_OBJECT, DriverName) == 56);
    assert!(offset_of!(DRIVER_OBJECT, DriverUnload) == 104);
    assert!(size_of::<DRIVER_OBJECT>() == 336);
    assert!(offset_of!(DEVICE_OBJECT, Flags) == 0x30);
    assert!(offset_of!(DEVICE_OBJECT, DeviceExtension) == 0x40);
    assert!(offset_of!(DEVICE_OBJECT, StackSize) == 0x4C);
    assert!(offset_of!(FILE_OBJECT, FsContext) == 0x18);
    assert!(offset_of!(IRP, SystemBuffer) == 0x18);
    assert!(offset_of!(IRP, IoStatus) == 0x30);
    assert!(offset_of!(IO_STATUS_BLOCK, Information) == 8);
    assert!(offset_of!(IRP, RequestorMode) == 0x40);
    assert!(offset_of!(IRP, CancelRoutine) == 0x68);
    assert!(offset_of!(IRP, UserBuffer) == 0x70);
    assert!(offset_of!(IRP, CurrentStackLocation) == 0xB8);
    assert!(size_of::<IRP>() == 0xD0);
    assert!(offset_of!(IO_STACK_LOCATION, Parameters) == 8);
    assert!(offset_of!(IO_DEVICE_CONTROL, InputBufferLength) == 8);
    assert!(offset_of!(IO_DEVICE_CONTROL, IoControlCode) == 0x10);
    assert!(offset_of!(IO_DEVICE_CONTROL, Type3InputBuffer) == 0x18);
    assert!(offset_of!(IO_STACK_LOCATION, DeviceObject) == 0x28);
    assert!(size_of::<IO_STACK_LOCATION>() == 0x48);
};
