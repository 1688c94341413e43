//! What is called of Windows: declarations only, as the Windows SDK has them.
#![allow(non_snake_case, missing_docs)]

use core::ffi::c_void;

pub type Handle = *mut c_void;
pub type Bool = i32;

pub const INVALID_HANDLE: Handle = -1isize as Handle;
pub const TRUE: Bool = 1;
pub const INFINITE: u32 = u32::MAX;
pub const WAIT_OBJECT_0: u32 = 0;
pub const WAIT_TIMEOUT: u32 = 258;

pub const ERROR_FILE_NOT_FOUND: u32 = 2;
pub const ERROR_PATH_NOT_FOUND: u32 = 3;
pub const ERROR_NO_MORE_FILES: u32 = 18;
pub const ERROR_HANDLE_EOF: u32 = 38;
pub const ERROR_CALL_NOT_IMPLEMENTED: u32 = 120;
pub const ERROR_ALREADY_EXISTS: u32 = 183;
pub const ERROR_MORE_DATA: u32 = 234;
pub const ERROR_IO_INCOMPLETE: u32 = 996;
pub const ERROR_IO_PENDING: u32 = 997;
pub const ERROR_SERVICE_DOES_NOT_EXIST: u32 = 1060;
pub const ERROR_NOT_ALL_ASSIGNED: u32 = 1300;

pub const STATUS_PENDING: u32 = 0x103;
pub const STATUS_BUFFER_OVERFLOW: u32 = 0x8000_0005;
pub const STATUS_INFO_LENGTH_MISMATCH: u32 = 0xC000_0004;
pub const STATUS_BUFFER_TOO_SMALL: u32 = 0xC000_0023;
pub const STATUS_CANCELLED: u32 = 0xC000_0120;

pub const STD_INPUT_HANDLE: u32 = -10i32 as u32;
pub const STD_OUTPUT_HANDLE: u32 = -11i32 as u32;
pub const STD_ERROR_HANDLE: u32 = -12i32 as u32;
pub const HANDLE_FLAG_INHERIT: u32 = 1;
pub const STACK_SIZE_PARAM_IS_A_RESERVATION: u32 = 0x0001_0000;

pub const SEM_FAILCRITICALERRORS: u32 = 1;
pub const SEM_NOGPFAULTERRORBOX: u32 = 2;
pub const SEM_NOOPENFILEERRORBOX: u32 = 0x8000;

pub const GENERIC_READ: u32 = 0x8000_0000;
pub const GENERIC_WRITE: u32 = 0x4000_0000;
pub const FILE_SHARE_READ: u32 = 1;
pub const FILE_SHARE_WRITE: u32 = 2;
pub const FILE_SHARE_DELETE: u32 = 4;
pub const FILE_OPEN: u32 = 1;
pub const FILE_NON_DIRECTORY_FILE: u32 = 0x40;
pub const OBJ_CASE_INSENSITIVE: u32 = 0x40;
pub const CREATE_ALWAYS: u32 = 2;
pub const OPEN_EXISTING: u32 = 3;
pub const FILE_ATTRIBUTE_NORMAL: u32 = 0x80;
pub const FILE_FLAG_OVERLAPPED: u32 = 0x4000_0000;
pub const FILE_FLAG_FIRST_PIPE_INSTANCE: u32 = 0x0008_0000;
pub const MOVEFILE_REPLACE_EXISTING: u32 = 1;
pub const MOVEFILE_WRITE_THROUGH: u32 = 8;
pub const PIPE_ACCESS_INBOUND: u32 = 1;
pub const PIPE_ACCESS_OUTBOUND: u32 = 2;
pub const PIPE_REJECT_REMOTE_CLIENTS: u32 = 8;

pub const COMM_BINARY: u32 = 1; // bits of `CommState::flags`
pub const COMM_DTR_ENABLE: u32 = 0x10;
pub const COMM_RTS_ENABLE: u32 = 0x1000;
pub const NO_PARITY: u8 = 0;
pub const ONE_STOP_BIT: u8 = 0;

pub const SYNCHRONIZE: u32 = 0x0010_0000;
pub const PROCESS_TERMINATE: u32 = 1;
pub const PROCESS_QUERY_LIMITED_INFORMATION: u32 = 0x1000;
pub const TH32CS_SNAPPROCESS: u32 = 2;
pub const CREATE_SUSPENDED: u32 = 4;
pub const EXTENDED_STARTUPINFO_PRESENT: u32 = 0x0008_0000;
pub const CREATE_NO_WINDOW: u32 = 0x0800_0000;
pub const STARTF_USESTDHANDLES: u32 = 0x100;
pub const PROC_THREAD_ATTRIBUTE_HANDLE_LIST: usize = 0x0002_0002;
pub const JOB_OBJECT_EXTENDED_LIMIT_INFORMATION: u32 = 9;
pub const JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE: u32 = 0x2000;

pub const TOKEN_QUERY: u32 = 8;
pub const TOKEN_ADJUST_PRIVILEGES: u32 = 0x20;
pub const TOKEN_ELEVATION: u32 = 20;
pub const SE_PRIVILEGE_ENABLED: u32 = 2;

pub const SC_MANAGER_CONNECT: u32 = 1;
pub const SC_MANAGER_CREATE_SERVICE: u32 = 2;
pub const SERVICE_QUERY_STATUS: u32 = 4;
pub const SERVICE_START: u32 = 0x10;
pub const SERVICE_STOP: u32 = 0x20;
pub const DELETE: u32 = 0x0001_0000;
pub const SERVICE_KERNEL_DRIVER: u32 = 1;
pub const SERVICE_DEMAND_START: u32 = 3;
pub const SERVICE_ERROR_NORMAL: u32 = 1;
pub const SERVICE_WIN32_OWN_PROCESS: u32 = 0x10;
pub const SERVICE_CONTROL_STOP: u32 = 1;
pub const SERVICE_CONTROL_INTERROGATE: u32 = 4;
pub const SERVICE_CONTROL_SHUTDOWN: u32 = 5;
pub const SERVICE_ACCEPT_STOP: u32 = 1;
pub const SERVICE_ACCEPT_SHUTDOWN: u32 = 4;
pub const SERVICE_STOPPED: u32 = 1;
pub const SERVICE_RUNNING: u32 = 4;
pub const SC_STATUS_PROCESS_INFO: u32 = 0;

pub const HKEY_LOCAL_MACHINE: Handle = 0x8000_0002u32 as i32 as isize as Handle;
pub const KEY_QUERY_VALUE: u32 = 1;
pub const KEY_SET_VALUE: u32 = 2;
pub const KEY_WOW64_64KEY: u32 = 0x100;

#[repr(C)]
pub struct Overlapped {
    pub internal: usize,
    pub internal_high: usize,
    pub offset: u32,
    pub offset_high: u32,
    pub event: Handle,
}

/// DCB.
#[repr(C)]
#[derive(Default)]
pub struct CommState {
    pub size: u32,
    pub baud_rate: u32,
    pub flags: u32,
    pub reserved: u16,
    pub xon_limit: u16,
    pub xoff_limit: u16,
    pub byte_size: u8,
    pub parity: u8,
    pub stop_bits: u8,
    pub characters: [i8; 5],
    pub reserved_too: u16,
}

/// COMMTIMEOUTS, in milliseconds.
#[repr(C)]
#[derive(Default)]
pub struct CommTimeouts {
    pub read_interval: u32,
    pub read_multiplier: u32,
    pub read_constant: u32,
    pub write_multiplier: u32,
    pub write_constant: u32,
}

/// COMSTAT.
#[repr(C)]
#[derive(Default)]
pub struct CommStatus {
    pub flags: u32,
    pub queued_in: u32,
    pub queued_out: u32,
}

#[repr(C)]
pub struct SecurityAttributes {
    pub length: u32,
    pub descriptor: *mut c_void,
    pub inherit: Bool,
}

#[repr(C)]
pub struct StartupInfoEx {
    pub size: u32,
    pub reserved: *mut u16,
    pub desktop: *mut u16,
    pub title: *mut u16,
    pub position_and_size: [u32; 7],
    pub flags: u32,
    pub show_window: u16,
    pub reserved_size: u16,
    pub reserved_bytes: *mut u8,
    pub input: Handle,
    pub output: Handle,
    pub error: Handle,
    pub attributes: *mut c_void,
}

#[repr(C)]
pub struct ProcessInformation {
    pub process: Handle,
    pub thread: Handle,
    pub pid: u32,
    pub tid: u32,
}

#[repr(C)]
pub struct ProcessEntry {
    pub size: u32,
    pub usage: u32,
    pub pid: u32,
    pub heap: usize,
    pub module: u32,
    pub threads: u32,
    pub parent: u32,
    pub priority: i32,
    pub flags: u32,
    pub name: [u16; 260],
}

/// JOBOBJECT_EXTENDED_LIMIT_INFORMATION, of which the flags are all that we set.
#[repr(C)]
#[derive(Default)]
pub struct JobLimits {
    pub times: [i64; 2],
    pub flags: u32,
    pub working_set: [usize; 2],
    pub active_processes: u32,
    pub affinity: usize,
    pub classes: [u32; 2],
    pub io_counters: [u64; 6],
    pub memory: [usize; 4],
}

#[repr(C)]
pub struct TokenPrivilege {
    pub count: u32,
    pub luid: [u32; 2],
    pub attributes: u32,
}

#[repr(C)]
#[derive(Default)]
pub struct ServiceStatus {
    pub kind: u32,
    pub state: u32,
    pub controls: u32,
    pub win32_exit_code: u32,
    pub service_exit_code: u32,
    pub check_point: u32,
    pub wait_hint: u32,
    pub pid: u32,
    pub flags: u32,
}

/// SERVICE_TABLE_ENTRYW.
#[repr(C)]
pub struct ServiceEntry {
    pub name: *const u16,
    pub main: Option<unsafe extern "system" fn(u32, *mut *mut u16)>,
}

#[repr(C)]
pub struct UnicodeString {
    pub length: u16,
    pub maximum_length: u16,
    pub buffer: *const u16,
}

#[repr(C)]
pub struct ObjectAttributes {
    pub length: u32,
    pub root: Handle,
    pub name: *const UnicodeString,
    pub attributes: u32,
    pub security_descriptor: *mut c_void,
    pub security_quality: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct IoStatusBlock {
    pub status: u32,
    pub information: usize,
}

#[repr(C)]
pub struct OsVersion {
    pub size: u32,
    pub major: u32,
    pub minor: u32,
    pub build: u32,
    pub platform: u32,
    pub service_pack: [u16; 128],
}

#[link(name = "kernel32", kind = "raw-dylib")]
unsafe extern "system" {
    pub fn AcquireSRWLockExclusive(lock: *mut usize);
    pub fn AssignProcessToJobObject(job: Handle, process: Handle) -> Bool;
    pub fn CancelIoEx(file: Handle, overlapped: *mut Overlapped) -> Bool;
    pub fn ClearCommError(file: Handle, errors: *mut u32, status: *mut CommStatus) -> Bool;
    pub fn CloseHandle(handle: Handle) -> Bool;
    pub fn CreateDirectoryW(path: *const u16, security: *const SecurityAttributes) -> Bool;
    pub fn CreateEventW(
        security: *const SecurityAttributes,
        manual: Bool,
        initial: Bool,
        name: *const u16,
    ) -> Handle;
    pub fn CreateFileW(
        path: *const u16,
        access: u32,
        share: u32,
        security: *const SecurityAttributes,
        disposition: u32,
        flags: u32,
        template: Handle,
    ) -> Handle;
    pub fn CreateJobObjectW(security: *const SecurityAttributes, name: *const u16) -> Handle;
    pub fn CreateNamedPipeW(
        name: *const u16,
        open_mode: u32,
        pipe_mode: u32,
        instances: u32,
        out_size: u32,
        in_size: u32,
        timeout: u32,
        security: *const SecurityAttributes,
    ) -> Handle;
    pub fn CreateProcessW(
        application: *const u16,
        command_line: *mut u16,
        process_security: *const SecurityAttributes,
        thread_security: *const SecurityAttributes,
        inherit: Bool,
        flags: u32,
        environment: *const c_void,
        directory: *const u16,
        startup: *const StartupInfoEx,
        information: *mut ProcessInformation,
    ) -> Bool;
    pub fn CreateThread(
        security: *const SecurityAttributes,
        stack: usize,
        start: unsafe extern "system" fn(*mut c_void) -> u32,
        parameter: *mut c_void,
        flags: u32,
        id: *mut u32,
    ) -> Handle;
    pub fn CreateToolhelp32Snapshot(flags: u32, pid: u32) -> Handle;
    pub fn DeleteFileW(path: *const u16) -> Bool;
    pub fn DeleteProcThreadAttributeList(list: *mut c_void);
    pub fn FlushFileBuffers(file: Handle) -> Bool;
    pub fn GetCommState(file: Handle, state: *mut CommState) -> Bool;
    pub fn GetCommandLineW() -> *const u16;
    pub fn GetCurrentProcess() -> Handle;
    pub fn GetCurrentProcessId() -> u32;
    pub fn GetDiskFreeSpaceExW(
        path: *const u16,
        free_to_caller: *mut u64,
        size: *mut u64,
        free: *mut u64,
    ) -> Bool;
    pub fn GetExitCodeProcess(process: Handle, code: *mut u32) -> Bool;
    pub fn GetFileSizeEx(file: Handle, size: *mut u64) -> Bool;
    pub fn GetLastError() -> u32;
    pub fn GetModuleHandleW(name: *const u16) -> Handle;
    pub fn GetOverlappedResult(
        file: Handle,
        overlapped: *mut Overlapped,
        count: *mut u32,
        wait: Bool,
    ) -> Bool;
    pub fn GetProcAddress(module: Handle, name: *const u8) -> *const c_void;
    pub fn GetProcessHeap() -> Handle;
    pub fn GetStdHandle(which: u32) -> Handle;
    pub fn GetSystemTimePreciseAsFileTime(time: *mut u64);
    pub fn GetTickCount64() -> u64;
    pub fn HeapAlloc(heap: Handle, flags: u32, size: usize) -> *mut c_void;
    pub fn HeapFree(heap: Handle, flags: u32, block: *mut c_void) -> Bool;
    pub fn HeapReAlloc(heap: Handle, flags: u32, block: *mut c_void, size: usize) -> *mut c_void;
    pub fn InitializeProcThreadAttributeList(
        list: *mut c_void,
        count: u32,
        flags: u32,
        size: *mut usize,
    ) -> Bool;
    pub fn MoveFileExW(from: *const u16, to: *const u16, flags: u32) -> Bool;
    pub fn OpenProcess(access: u32, inherit: Bool, pid: u32) -> Handle;
    pub fn OutputDebugStringA(text: *const u8);
    pub fn PeekNamedPipe(
        pipe: Handle,
        buffer: *mut u8,
        size: u32,
        count: *mut u32,
        available: *mut u32,
        left: *mut u32,
    ) -> Bool;
    pub fn Process32FirstW(snapshot: Handle, entry: *mut ProcessEntry) -> Bool;
    pub fn Process32NextW(snapshot: Handle, entry: *mut ProcessEntry) -> Bool;
    pub fn ReadFile(
        file: Handle,
        buffer: *mut u8,
        size: u32,
        count: *mut u32,
        overlapped: *mut Overlapped,
    ) -> Bool;
    pub fn ReleaseSRWLockExclusive(lock: *mut usize);
    pub fn ResumeThread(thread: Handle) -> u32;
    pub fn SetCommState(file: Handle, state: *const CommState) -> Bool;
    pub fn SetCommTimeouts(file: Handle, timeouts: *const CommTimeouts) -> Bool;
    pub fn SetErrorMode(mode: u32) -> u32;
    pub fn SetEvent(event: Handle) -> Bool;
    pub fn SetHandleInformation(handle: Handle, mask: u32, flags: u32) -> Bool;
    pub fn SetInformationJobObject(
        job: Handle,
        class: u32,
        limits: *const JobLimits,
        size: u32,
    ) -> Bool;
    pub fn Sleep(milliseconds: u32);
    pub fn SleepConditionVariableSRW(
        condition: *mut usize,
        lock: *mut usize,
        milliseconds: u32,
        flags: u32,
    ) -> Bool;
    pub fn TerminateJobObject(job: Handle, code: u32) -> Bool;
    pub fn TerminateProcess(process: Handle, code: u32) -> Bool;
    pub fn UpdateProcThreadAttribute(
        list: *mut c_void,
        flags: u32,
        attribute: usize,
        value: *const c_void,
        size: usize,
        previous: *mut c_void,
        returned: *mut usize,
    ) -> Bool;
    pub fn WaitForMultipleObjects(
        count: u32,
        handles: *const Handle,
        all: Bool,
        milliseconds: u32,
    ) -> u32;
    pub fn WaitForSingleObject(handle: Handle, milliseconds: u32) -> u32;
    pub fn WakeAllConditionVariable(condition: *mut usize);
    pub fn WakeConditionVariable(condition: *mut usize);
    pub fn WriteFile(
        file: Handle,
        buffer: *const u8,
        size: u32,
        count: *mut u32,
        overlapped: *mut Overlapped,
    ) -> Bool;
}

#[link(name = "advapi32", kind = "raw-dylib")]
unsafe extern "system" {
    pub fn AdjustTokenPrivileges(
        token: Handle,
        disable_all: Bool,
        new: *const TokenPrivilege,
        size: u32,
        previous: *mut TokenPrivilege,
        returned: *mut u32,
    ) -> Bool;
    pub fn CloseServiceHandle(handle: Handle) -> Bool;
    pub fn ControlService(service: Handle, control: u32, status: *mut ServiceStatus) -> Bool;
    pub fn CreateServiceW(
        manager: Handle,
        name: *const u16,
        display_name: *const u16,
        access: u32,
        kind: u32,
        start: u32,
        error_control: u32,
        image_path: *const u16,
        group: *const u16,
        tag: *mut u32,
        dependencies: *const u16,
        account: *const u16,
        password: *const u16,
    ) -> Handle;
    pub fn DeleteService(service: Handle) -> Bool;
    pub fn GetTokenInformation(
        token: Handle,
        class: u32,
        information: *mut u32,
        size: u32,
        returned: *mut u32,
    ) -> Bool;
    pub fn LookupPrivilegeValueW(system: *const u16, name: *const u16, luid: *mut [u32; 2])
    -> Bool;
    pub fn OpenProcessToken(process: Handle, access: u32, token: *mut Handle) -> Bool;
    pub fn OpenSCManagerW(machine: *const u16, database: *const u16, access: u32) -> Handle;
    pub fn OpenServiceW(manager: Handle, name: *const u16, access: u32) -> Handle;
    pub fn QueryServiceStatusEx(
        service: Handle,
        level: u32,
        status: *mut ServiceStatus,
        size: u32,
        needed: *mut u32,
    ) -> Bool;
    pub fn RegCloseKey(key: Handle) -> u32;
    pub fn RegCreateKeyExW(
        root: Handle,
        path: *const u16,
        reserved: u32,
        class: *const u16,
        options: u32,
        access: u32,
        security: *const SecurityAttributes,
        key: *mut Handle,
        disposition: *mut u32,
    ) -> u32;
    pub fn RegDeleteTreeW(root: Handle, path: *const u16) -> u32;
    pub fn RegDeleteValueW(key: Handle, name: *const u16) -> u32;
    pub fn RegOpenKeyExW(
        root: Handle,
        path: *const u16,
        options: u32,
        access: u32,
        key: *mut Handle,
    ) -> u32;
    pub fn RegQueryValueExW(
        key: Handle,
        name: *const u16,
        reserved: *mut u32,
        kind: *mut u32,
        data: *mut u8,
        size: *mut u32,
    ) -> u32;
    /// RtlGenRandom.
    pub fn SystemFunction036(buffer: *mut u8, size: u32) -> u8;
    pub fn RegisterServiceCtrlHandlerExW(
        name: *const u16,
        handler: unsafe extern "system" fn(u32, u32, *mut c_void, *mut c_void) -> u32,
        context: *mut c_void,
    ) -> Handle;
    /// It takes the first seven fields alone.
    pub fn SetServiceStatus(service: Handle, status: *const ServiceStatus) -> Bool;
    pub fn StartServiceCtrlDispatcherW(table: *const ServiceEntry) -> Bool;
    pub fn StartServiceW(service: Handle, count: u32, arguments: *const *const u16) -> Bool;
}

#[link(name = "ntdll", kind = "raw-dylib")]
unsafe extern "system" {
    pub fn NtCancelIoFileEx(
        file: Handle,
        which: *const IoStatusBlock,
        status: *mut IoStatusBlock,
    ) -> u32;
    pub fn NtCreateFile(
        file: *mut Handle,
        access: u32,
        attributes: *const ObjectAttributes,
        status: *mut IoStatusBlock,
        allocation_size: *const i64,
        file_attributes: u32,
        share: u32,
        disposition: u32,
        options: u32,
        extended_attributes: *const c_void,
        extended_attributes_size: u32,
    ) -> u32;
    pub fn NtDeviceIoControlFile(
        file: Handle,
        event: Handle,
        apc: *const c_void,
        apc_context: *const c_void,
        status: *mut IoStatusBlock,
        code: u32,
        input: *const u8,
        input_size: u32,
        output: *mut u8,
        output_size: u32,
    ) -> u32;
    pub fn NtLoadDriver(service: *const UnicodeString) -> u32;
    pub fn NtQuerySystemInformation(
        class: u32,
        buffer: *mut c_void,
        size: u32,
        returned: *mut u32,
    ) -> u32;
    pub fn NtReadFile(
        file: Handle,
        event: Handle,
        apc: *const c_void,
        apc_context: *const c_void,
        status: *mut IoStatusBlock,
        buffer: *mut u8,
        size: u32,
        offset: *const i64,
        key: *const u32,
    ) -> u32;
    pub fn NtSetSystemTime(time: *const u64, previous: *mut u64) -> u32;
    pub fn NtSetValueKey(
        key: Handle,
        name: *const UnicodeString,
        title: u32,
        kind: u32,
        data: *const u8,
        size: u32,
    ) -> u32;
    pub fn NtUnloadDriver(service: *const UnicodeString) -> u32;
    pub fn NtWriteFile(
        file: Handle,
        event: Handle,
        apc: *const c_void,
        apc_context: *const c_void,
        status: *mut IoStatusBlock,
        buffer: *const u8,
        size: u32,
        offset: *const i64,
        key: *const u32,
    ) -> u32;
    pub fn RtlGetVersion(version: *mut OsVersion) -> u32;
}

// What compiled code calls by itself. The prebuilt `core` of this target leaves it to the C runtime; ntdll
// has it too.
#[expect(dead_code, reason = "no source calls them")]
#[link(name = "ntdll", kind = "raw-dylib")]
unsafe extern "C" {
    fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8;
    fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8;
    fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8;
    fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32;
    fn strlen(text: *const u8) -> usize;
    fn __chkstk();
}
