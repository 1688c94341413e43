//! floor: starts and stops one driver, by the service control manager, and says how long that took.
//!
//! ```text
//! floor SERVICE
//! ```
//!
//! For each byte that it reads it does StartService and ControlService(STOP) once, and answers with the
//! microseconds of both together, a little-endian u32; `u32::MAX` if one failed. It ends with its input.
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
const FAILED: u32 = u32::MAX;

/// What the linker is told, so that a build needs neither a build script nor a configuration.
#[used]
#[unsafe(link_section = ".drectve")]
static LINKER: [u8; 57] = *b"/ENTRY:start /SUBSYSTEM:CONSOLE,10.0 /NODEFAULTLIB:msvcrt";

#[link(name = "kernel32", kind = "raw-dylib")]
unsafe extern "system" {
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
    let service = open_service();
    let (mut byte, mut count) = (0, 0);
    // SAFETY: the buffers are as long as told.
    while unsafe { ReadFile(input, &mut byte, 1, &mut count, null_mut()) } != 0 && count == 1 {
        let answer = cycle(service).to_le_bytes();
        // SAFETY: as above.
        unsafe { WriteFile(output, answer.as_ptr(), 4, &mut count, null_mut()) };
    }
    // SAFETY: the handle is ours, or null, which is refused.
    unsafe {
        CloseServiceHandle(service);
        ExitProcess(0)
    }
}

/// The service that the command line names behind its last space; null if there is none.
fn open_service() -> Handle {
    // SAFETY: the command line ends with a NUL, and the search does not go beyond it.
    unsafe {
        let mut end = GetCommandLineW();
        let mut name = end;
        while *end != 0 {
            if *end == u16::from(b' ') {
                name = end.add(1);
            }
            end = end.add(1);
        }
        let manager = OpenSCManagerW(null(), null(), SC_MANAGER_CONNECT);
        let service = OpenServiceW(manager, name, SERVICE_START | SERVICE_STOP);
        CloseServiceHandle(manager);
        service
    }
}

fn cycle(service: Handle) -> u32 {
    let (mut begin, mut end, mut frequency) = (0, 0, 0);
    let mut status = [0; 7];
    // SAFETY: the handle is the service's, or null, which is refused; what is written to is long enough.
    unsafe {
        QueryPerformanceFrequency(&mut frequency);
        QueryPerformanceCounter(&mut begin);
        if StartServiceW(service, 0, null()) == 0
            || ControlService(service, SERVICE_CONTROL_STOP, &mut status) == 0
        {
            return FAILED;
        }
        QueryPerformanceCounter(&mut end);
    }
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
