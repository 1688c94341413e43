//! Processes: list, end, wait.

use alloc::vec::Vec;

use frames::{ExitCode, Process, Processes};

use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::session::Session;
use crate::{sys, text};

/// On a busy Wine a list was seen to be refused, with ERROR_FILE_NOT_FOUND, once in thousands of times.
const ATTEMPTS: u32 = 5;

/// Milliseconds between two of them.
const PAUSE: u32 = 20;

/// The processes that run.
pub fn list() -> Answer<Processes> {
    const DOING: &str = "list the processes";
    let mut attempt = 1;
    let snapshot = loop {
        // SAFETY: no preconditions.
        let snapshot = unsafe { sys::CreateToolhelp32Snapshot(sys::TH32CS_SNAPPROCESS, 0) };
        match Owned::new(snapshot, DOING) {
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            result => break result?,
        }
        // SAFETY: no preconditions.
        unsafe { sys::Sleep(PAUSE) };
    };
    let mut entry = sys::ProcessEntry {
        size: size_of::<sys::ProcessEntry>() as u32,
        usage: 0,
        pid: 0,
        heap: 0,
        module: 0,
        threads: 0,
        parent: 0,
        priority: 0,
        flags: 0,
        name: [0; 260],
    };
    let mut processes = Vec::new();
    // SAFETY: the entry says its size.
    let mut result = unsafe { sys::Process32FirstW(snapshot.raw(), &mut entry) };
    while result != 0 {
        processes.push(Process {
            pid: entry.pid,
            parent: entry.parent,
            name: text::narrow(&entry.name),
        });
        // SAFETY: as above.
        result = unsafe { sys::Process32NextW(snapshot.raw(), &mut entry) };
    }
    match Failure::last(DOING) {
        end if end.win32_code() == Some(sys::ERROR_NO_MORE_FILES) => Ok(Processes { processes }),
        failure => Err(failure),
    }
}

fn open(pid: u32, access: u32) -> Answer<Owned> {
    // SAFETY: no preconditions.
    let process = unsafe { sys::OpenProcess(access, 0, pid) };
    Owned::new(process, "open the process")
}

/// Ends a process.
pub fn terminate(pid: u32, exit_code: u32) -> Answer {
    let process = open(pid, sys::PROCESS_TERMINATE)?;
    // SAFETY: the handle is one of a process.
    let result = unsafe { sys::TerminateProcess(process.raw(), exit_code) };
    check(result, "end the process")
}

/// Waits until a process has ended, or the session.
pub fn wait(pid: u32, session: &Session) -> Answer<ExitCode> {
    let process = open(
        pid,
        sys::SYNCHRONIZE | sys::PROCESS_QUERY_LIMITED_INFORMATION,
    )?;
    let handles = [process.raw(), session.over()];
    // SAFETY: there are two handles, of a process and of an event.
    match unsafe { sys::WaitForMultipleObjects(2, handles.as_ptr(), 0, sys::INFINITE) } {
        sys::WAIT_OBJECT_0 => {}
        _ if session.is_over() => return Err(Failure::Refused("the host is gone")),
        _ => return Err(Failure::last("wait for the process")),
    }
    Ok(ExitCode {
        exit_code: exit_code(&process)?,
    })
}

/// What a process ended with.
pub fn exit_code(process: &Owned) -> Answer<u32> {
    let mut code = 0;
    // SAFETY: the handle is one of a process.
    let result = unsafe { sys::GetExitCodeProcess(process.raw(), &mut code) };
    check(result, "get the exit code").map(|()| code)
}
