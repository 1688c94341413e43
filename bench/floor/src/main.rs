//! floor: does by itself, in the guest, what is measured from the host, and says how long that took.
//!
//! ```text
//! floor cycle SERVICE
//! floor ioctl DEVICE
//! ```
//!
//! For each byte that it reads it does one round, and answers with the round's microseconds, a little-endian
//! u32; `u32::MAX` if something failed. A round of `cycle` is StartService and ControlService(STOP). One of
//! `ioctl` is 100 times DeviceIoControl with `echo`'s control code ECHO, 64 bytes in and out. It ends with
//! its input.
#![no_std]
#![no_main]

use core::ffi::c_void;
use core::panic::PanicInfo;
use core::ptr::{null, null_mut};

type Handle = *mut c_void;

const STD_INPUT_HANDLE: u32 = -10i32 as u32;
const STD_OUTPUT_HANDLE: u32 = -11i32 as u32;
const SC_MANAGER_CONNECT: u32 = 1;
const SERVICE_START: u32 = 0x10;
const SERVICE_STOP: u32 = 0x20;
const SERVICE_CONTROL_STOP: u32 = 1;
const GENERIC_READ_AND_WRITE: u32 = 0xC000_0000;
const OPEN_EXISTING: u32 = 3;
const ECHO: u32 = 0x0022_2000;
const IOCTLS: u32 = 100;
const DATA: [u8; 64] = [0x5A; 64];
const FAILED: u32 = u32::MAX;

/// What the linker is told, so that a build needs neither a build script nor a configuration.
#[used]
#[unsafe(link_section = ".drectve")]
static LINKER: [u8; 57] = *b"/ENTRY:start /SUBSYSTEM:CONSOLE,10.0 /NODEFAULTLIB:msvcrt";

#[link(name = "kernel32", kind = "raw-dylib")]
unsafe extern "system" {
    fn CloseHandle(handle: Handle) -> i32;
    fn CreateFileW(
        path: *const u16,
        access: u32,
        share: u32,
        security: *const c_void,
        disposition: u32,
        flags: u32,
        template: Handle,
    ) -> Handle;
    fn DeviceIoControl(
        device: Handle,
        code: u32,
        input: *const u8,
        input_size: u32,
        output: *mut u8,
        output_size: u32,
        count: *mut u32,
        o: *mut c_void,
    ) -> i32;
    fn ExitProcess(code: u32) -> !;
    fn GetCommandLineW() -> *const u16;
    fn GetStdHandle(which: u32) -> Handle;
    fn QueryPerformanceCounter(count: *mut u64) -> i32;
    fn QueryPerformanceFrequency(frequency: *mut u64) -> i32;
    fn ReadFile(file: Handle, buffer: *mut u8, size: u32, count: *mut u32, o: *mut c_void) -> i32;
    fn WriteFile(
        file: Handle,
        buffer: *const u8,
        size: u32,
        count: *mut u32,
        o: *mut c_void,
    ) -> i32;
}

#[link(name = "advapi32", kind = "raw-dylib")]
unsafe extern "system" {
    fn CloseServiceHandle(handle: Handle) -> i32;
    fn ControlService(service: Handle, control: u32, status: *mut [u32; 7]) -> i32;
    fn OpenSCManagerW(machine: *const u16, database: *const u16, access: u32) -> Handle;
    fn OpenServiceW(manager: Handle, name: *const u16, access: u32) -> Handle;
    fn StartServiceW(service: Handle, count: u32, arguments: *const *const u16) -> i32;
}

/// Where Windows begins.
#[unsafe(no_mangle)]
extern "system" fn start() -> ! {
    // SAFETY: no preconditions.
    let (input, output) = unsafe {
        (
            GetStdHandle(STD_INPUT_HANDLE),
            GetStdHandle(STD_OUTPUT_HANDLE),
        )
    };
    let mut round = Round::from_command_line();
    let (mut byte, mut count) = (0, 0);
    // SAFETY: the buffers are as long as told.
    while unsafe { ReadFile(input, &mut byte, 1, &mut count, null_mut()) } != 0 && count == 1 {
        let answer = measure(&mut round).to_le_bytes();
        // SAFETY: as above.
        unsafe { WriteFile(output, answer.as_ptr(), 4, &mut count, null_mut()) };
    }
    drop(round);
    // SAFETY: no preconditions.
    unsafe { ExitProcess(0) }
}

/// What is done for each byte. A handle that could not be opened makes each round fail.
enum Round {
    Cycle(Handle),
    Ioctl(Handle),
}

impl Round {
    /// The last word says what to open, the one before it begins with what to do.
    fn from_command_line() -> Self {
        // SAFETY: the command line ends with a NUL, and the search does not go beyond it.
        unsafe {
            let mut end = GetCommandLineW();
            let (mut word, mut last) = (end, end);
            while *end != 0 {
                if *end == u16::from(b' ') {
                    (word, last) = (last, end.add(1));
                }
                end = end.add(1);
            }
            if *word == u16::from(b'c') {
                Round::Cycle(open_service(last))
            } else {
                Round::Ioctl(open_device(last))
            }
        }
    }

    fn run(&mut self) -> bool {
        match *self {
            Round::Cycle(service) => start_and_stop(service),
            Round::Ioctl(device) => (0..IOCTLS).all(|_| control(device)),
        }
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, or none, which is refused.
        unsafe {
            match *self {
                Round::Cycle(service) => CloseServiceHandle(service),
                Round::Ioctl(device) => CloseHandle(device),
            }
        };
    }
}

/// # Safety
///
/// The name ends with a NUL.
unsafe fn open_service(name: *const u16) -> Handle {
    // SAFETY: null stands for this machine and its database; a handle that is none is refused.
    unsafe {
        let manager = OpenSCManagerW(null(), null(), SC_MANAGER_CONNECT);
        let service = OpenServiceW(manager, name, SERVICE_START | SERVICE_STOP);
        CloseServiceHandle(manager);
        service
    }
}

/// # Safety
///
/// The path ends with a NUL.
unsafe fn open_device(path: *const u16) -> Handle {
    // SAFETY: null stands for nothing.
    unsafe {
        CreateFileW(
            path,
            GENERIC_READ_AND_WRITE,
            0,
            null(),
            OPEN_EXISTING,
            0,
            null_mut(),
        )
    }
}

fn start_and_stop(service: Handle) -> bool {
    let mut status = [0; 7];
    // SAFETY: the handle is the service's, or null, which is refused; the status is long enough.
    unsafe {
        StartServiceW(service, 0, null()) != 0
            && ControlService(service, SERVICE_CONTROL_STOP, &mut status) != 0
    }
}

fn control(device: Handle) -> bool {
    let (mut output, mut count) = ([0; DATA.len()], 0);
    let size = DATA.len() as u32;
    // SAFETY: the handle is the device's, or none, which is refused; the buffers are as long as told.
    let result = unsafe {
        DeviceIoControl(
            device,
            ECHO,
            DATA.as_ptr(),
            size,
            output.as_mut_ptr(),
            size,
            &mut count,
            null_mut(),
        )
    };
    result != 0 && count == size
}

/// The microseconds of a round.
fn measure(round: &mut Round) -> u32 {
    let (mut begin, mut end, mut frequency) = (0, 0, 0);
    // SAFETY: what is written to is long enough.
    unsafe { QueryPerformanceFrequency(&mut frequency) };
    // SAFETY: as above.
    unsafe { QueryPerformanceCounter(&mut begin) };
    if !round.run() {
        return FAILED;
    }
    // SAFETY: as above.
    unsafe { QueryPerformanceCounter(&mut end) };
    let ticks: u64 = end - begin;
    (ticks * 1_000_000)
        .checked_div(frequency)
        .and_then(|microseconds| u32::try_from(microseconds).ok())
        .unwrap_or(FAILED)
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: no preconditions.
    unsafe { ExitProcess(3) }
}

/// The prebuilt `core` names it, for unwinding, which does not happen here.
#[unsafe(no_mangle)]
extern "C" fn __CxxFrameHandler3() -> i32 {
    1
}
