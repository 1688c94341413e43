use alloc::string::String;
use alloc::vec::Vec;

use crate::wire::{Malformed, Reader, Wire, from_bytes, to_bytes};

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident $(<$life:lifetime>)? { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $name $(<$life>)? { $($(#[$field_doc])* pub $field: $type,)* }
            messages!(@wire $name $(<$life>)? { $($field: $type),* });
        )*
    };
    (@wire $name:ident { $($field:ident: $type:ty),* }) => {
        impl<'a> Wire<'a> for $name {
            messages!(@methods 'a { $($field: $type),* });
        }
    };
    (@wire $name:ident <$life:lifetime> { $($field:ident: $type:ty),* }) => {
        impl<$life> Wire<$life> for $name<$life> {
            messages!(@methods $life { $($field: $type),* });
        }
    };
    (@methods $life:lifetime { $($field:ident: $type:ty),* }) => {
        fn read(_reader: &mut Reader<$life>) -> Result<Self, Malformed> {
            Ok(Self { $($field: <$type>::read(_reader)?),* })
        }
        fn write(&self, _out: &mut Vec<u8>) {
            $(self.$field.write(_out);)*
        }
    };
}

macro_rules! operations {
    ($life:lifetime $($(#[$doc:meta])* $number:literal $name:literal $variant:ident($request:ty) -> $reply:ty;)*) => {
        /// A request that came whole.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Request<$life> {
            $($(#[$doc])* $variant($request),)*
        }

        impl<$life> Request<$life> {
            /// Reads the request that `body` is for this operation; None for an operation that is none.
            pub fn read(operation: u16, body: &$life [u8]) -> Option<Result<Self, Malformed>> {
                match operation {
                    $($number => Some(from_bytes(body).map(Request::$variant)),)*
                    _ => None,
                }
            }

            /// The body that this request makes.
            pub fn body(&self) -> Vec<u8> {
                match self {
                    $(Request::$variant(message) => to_bytes(message),)*
                }
            }
        }

        /// The operations' names, as `hello` tells them.
        pub const OPERATIONS: &[&str] = &[$($name),*];

        /// Reads the reply that `body` is for this operation and writes it anew; None for no operation.
        ///
        /// The agent has no use for it; the host's codec is held against it.
        pub fn rewrite_reply(operation: u16, body: &[u8]) -> Option<Result<Vec<u8>, Malformed>> {
            match operation {
                $($number => Some(from_bytes::<$reply>(body).map(|reply| to_bytes(&reply))),)*
                _ => None,
            }
        }
    };
}

operations! { 'a
    /// Who is there?
    1 "hello" Hello(Hello) -> HelloReply;
    /// Begin to write a file: folders are made, a temporary file beside it is opened.
    2 "put_begin" PutBegin(Path<'a>) -> Upload;
    /// A piece of the file, at any offset, in any order.
    3 "put_data" PutData(PutData<'a>) -> Done;
    /// Compare the hash, and put the file in its place.
    4 "put_end" PutEnd(PutEnd<'a>) -> Done;
    /// Forget the file.
    5 "put_abort" PutAbort(Upload) -> Done;
    /// A file's content.
    6 "get" Get(Path<'a>) -> File<'_>;
    /// Delete a file.
    7 "delete" Delete(Path<'a>) -> Done;
    /// A file's hash.
    8 "hash" Hash(Path<'a>) -> OptionalHash<'_>;
    /// Register a driver.
    9 "create_service" CreateService(CreateService<'a>) -> Done;
    /// Remove a driver's registration.
    10 "delete_service" DeleteService(Name<'a>) -> Done;
    /// Start by the service control manager.
    11 "start_service" StartService(Name<'a>) -> Code;
    /// Stop by the service control manager.
    12 "stop_service" StopService(Name<'a>) -> Code;
    /// What the service control manager knows.
    13 "query_service" QueryService(Name<'a>) -> OptionalServiceStatus;
    /// NtLoadDriver.
    14 "load_driver" LoadDriver(Name<'a>) -> Code;
    /// NtUnloadDriver.
    15 "unload_driver" UnloadDriver(Name<'a>) -> Code;
    /// Set a registry value under HKLM; the key is made.
    16 "set_value" SetValue(SetValue<'a>) -> Done;
    /// A registry value under HKLM.
    17 "get_value" GetValue(ValueName<'a>) -> OptionalValue<'_>;
    /// Delete a registry value.
    18 "delete_value" DeleteValue(ValueName<'a>) -> Done;
    /// Delete a registry key and all below it.
    19 "delete_key" DeleteKey(Key<'a>) -> Done;
    /// The processes that run.
    20 "processes" Processes(Done) -> Processes;
    /// End a process.
    21 "terminate" Terminate(Terminate) -> Done;
    /// Answered when the process has ended.
    22 "wait_process" WaitProcess(Pid) -> ExitCode;
    /// NtQuerySystemInformation.
    23 "system_information" SystemInformation(InformationClass) -> Information<'_>;
    /// Run a program to its end.
    24 "run" Run(Run<'a>) -> Completed<'_>;
    /// OutputDebugStringA, then answer.
    25 "fence" Fence(Fence<'a>) -> Done;
    /// NtCreateFile of a device.
    26 "open_device" OpenDevice(OpenDevice<'a>) -> DeviceOpened;
    /// NtReadFile.
    27 "read_device" ReadDevice(ReadDevice) -> IoEnded<'_>;
    /// NtWriteFile.
    28 "write_device" WriteDevice(WriteDevice<'a>) -> IoEnded<'_>;
    /// NtDeviceIoControlFile.
    29 "ioctl" Ioctl(Ioctl<'a>) -> IoEnded<'_>;
    /// Cancel what is on its way, then NtClose.
    30 "close_device" CloseDevice(Device) -> Done;
    /// What time is it?
    31 "clock" Clock(Done) -> FileTime;
    /// NtSetSystemTime.
    32 "set_clock" SetClock(FileTime) -> Done;
    /// How much room a disk has.
    33 "free_space" FreeSpace(Path<'a>) -> FreeSpace;
}

messages! {
    /// Nothing to say.
    Done {}
    /// The body of an error frame.
    Error<'a> {
        /// 0: the agent's own refusal; 1: `code` is Win32's; 2: `code` is an NTSTATUS.
        domain: u32,
        /// 0 where the domain is 0.
        code: u32,
        /// What could not be done.
        message: &'a str,
    }
    /// Who is there?
    Hello {
        /// The version that the host speaks. The agent judges it by no more than each frame's own version:
        /// the host does, by the reply, and can say what to do about it.
        protocol: u32,
    }
    /// Who is there.
    HelloReply {
        /// The version that the agent speaks.
        protocol: u32,
        /// The agent's own.
        version: String,
        /// Rust's name for it: "x86_64".
        architecture: String,
        /// RtlGetVersion's.
        os_major: u32,
        /// RtlGetVersion's.
        os_minor: u32,
        /// RtlGetVersion's.
        os_build: u32,
        /// ntdll's `wine_get_version`.
        wine_version: Option<String>,
        /// The token's.
        elevated: bool,
        /// The agent's process.
        pid: u32,
        /// [`OPERATIONS`].
        operations: Vec<String>,
    }
    /// A file's path.
    Path<'a> {
        /// Windows's, absolute.
        path: &'a str,
    }
    /// A file on its way in.
    Upload {
        /// As `put_begin` named it.
        upload: u32,
    }
    /// A piece of a file on its way in.
    PutData<'a> {
        /// Which.
        upload: u32,
        /// Where the piece goes.
        offset: u64,
        /// The piece.
        data: &'a [u8],
    }
    /// The end of a file on its way in.
    PutEnd<'a> {
        /// Which.
        upload: u32,
        /// Of the whole.
        sha256: &'a [u8],
    }
    /// A file's content.
    File<'a> {
        /// All of it.
        data: &'a [u8],
        /// Of what was read.
        sha256: &'a [u8],
    }
    /// A file's hash, if there is one.
    OptionalHash<'a> {
        /// None: no such file.
        sha256: Option<&'a [u8]>,
    }
    /// A driver to register.
    CreateService<'a> {
        /// The service's name.
        name: &'a str,
        /// The driver's file.
        image_path: &'a str,
    }
    /// A service.
    Name<'a> {
        /// Its name.
        name: &'a str,
    }
    /// An answer that is a code: Win32's or an NTSTATUS, as the operation has it.
    Code {
        /// The code.
        code: u32,
    }
    /// What QueryServiceStatusEx says.
    ServiceStatus {
        /// SERVICE_STOPPED (1) and so on.
        state: u32,
        /// Why it ended.
        win32_exit_code: u32,
        /// The same in the service's own words, if `win32_exit_code` is 1066.
        service_exit_code: u32,
        /// 0 if none is known.
        pid: u32,
    }
    /// What QueryServiceStatusEx says, if there is such a service.
    OptionalServiceStatus {
        /// None: no such service.
        status: Option<ServiceStatus>,
    }
    /// A registry value to set.
    SetValue<'a> {
        /// Below HKLM.
        key: &'a str,
        /// The value's.
        name: &'a str,
        /// REG_DWORD (4) and so on.
        kind: u32,
        /// As the registry keeps it.
        data: &'a [u8],
    }
    /// Which registry value.
    ValueName<'a> {
        /// Below HKLM.
        key: &'a str,
        /// The value's.
        name: &'a str,
    }
    /// A registry value.
    Value<'a> {
        /// REG_DWORD (4) and so on.
        kind: u32,
        /// As the registry keeps it.
        data: &'a [u8],
    }
    /// A registry value, if there is one.
    OptionalValue<'a> {
        /// None: no such key or value.
        value: Option<Value<'a>>,
    }
    /// A registry key.
    Key<'a> {
        /// Below HKLM.
        key: &'a str,
    }
    /// A process that runs.
    Process {
        /// Its id.
        pid: u32,
        /// Its parent's id.
        parent: u32,
        /// Its image's file name.
        name: String,
    }
    /// The processes that run.
    Processes {
        /// In no order.
        processes: Vec<Process>,
    }
    /// A process to end.
    Terminate {
        /// Which.
        pid: u32,
        /// What it ends with.
        exit_code: u32,
    }
    /// A process.
    Pid {
        /// Its id.
        pid: u32,
    }
    /// How a process ended.
    ExitCode {
        /// Its exit code.
        exit_code: u32,
    }
    /// What to ask NtQuerySystemInformation for.
    InformationClass {
        /// SYSTEM_INFORMATION_CLASS.
        class: u32,
    }
    /// What NtQuerySystemInformation gave.
    Information<'a> {
        /// As it came.
        data: &'a [u8],
    }
    /// A program to run.
    Run<'a> {
        /// All of it, quoted.
        command_line: &'a str,
        /// Where to run it.
        directory: Option<&'a str>,
        /// What it reads.
        stdin: &'a [u8],
        /// Milliseconds.
        time_limit: u32,
        /// The most bytes to keep of each of its outputs; what is above is read and dropped.
        output_limit: u32,
    }
    /// How a program ended.
    Completed<'a> {
        /// None: the system does not say (on Wine a Unix program).
        exit_code: Option<u32>,
        /// What it wrote.
        stdout: &'a [u8],
        /// What it wrote.
        stderr: &'a [u8],
        /// It was ended at its time limit.
        timed_out: bool,
        /// It wrote more than was to be kept.
        truncated: bool,
    }
    /// A mark in the kernel log.
    Fence<'a> {
        /// What to print.
        cookie: &'a str,
    }
    /// A device to open.
    OpenDevice<'a> {
        /// NT's: `\\??\\name` or `\\Device\\Name`.
        path: &'a str,
        /// Milliseconds.
        time_limit: u32,
    }
    /// What came of opening a device.
    DeviceOpened {
        /// NTSTATUS.
        status: u32,
        /// As that of [`IoEnded`]; an open is never cancelled.
        outcome: u32,
        /// 0 if it was not opened.
        device: u32,
    }
    /// A device that is open.
    Device {
        /// As `open_device` named it.
        device: u32,
    }
    /// A read from a device.
    ReadDevice {
        /// Which.
        device: u32,
        /// The most bytes to read.
        length: u32,
        /// Milliseconds.
        time_limit: u32,
    }
    /// A write to a device.
    WriteDevice<'a> {
        /// Which.
        device: u32,
        /// What to write.
        data: &'a [u8],
        /// Milliseconds.
        time_limit: u32,
    }
    /// A control request to a device.
    Ioctl<'a> {
        /// Which.
        device: u32,
        /// CTL_CODE.
        code: u32,
        /// The input.
        data: &'a [u8],
        /// The most bytes to get.
        output_size: u32,
        /// Milliseconds.
        time_limit: u32,
    }
    /// A time.
    FileTime {
        /// 100 ns since 1601, UTC.
        time: u64,
    }
    /// A disk's room.
    FreeSpace {
        /// What the caller may use of it.
        bytes: u64,
    }
    /// How input or output ended, or that it did not.
    IoEnded<'a> {
        /// NTSTATUS; STATUS_PENDING where it did not end.
        status: u32,
        /// 0: by itself; 1: after it was cancelled, at its time limit or by a close; 2: not at all, though it
        /// was cancelled.
        outcome: u32,
        /// IO_STATUS_BLOCK's Information.
        count: u64,
        /// What was read, or the control request's output.
        data: &'a [u8],
    }
}
