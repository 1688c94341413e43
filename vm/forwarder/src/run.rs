//! The program that becomes another one, whose stderr is the trace.

use crate::sys;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long the server may take to begin, and whoever had the port before to let it go.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);

const EBUSY: i32 = 16;

/// Becomes `program` with its arguments; returns why it could not.
pub fn run(port: Option<&Path>, program: &[&Path], control: &Path) -> io::Error {
    match prepare(port, control) {
        Ok(()) => {
            let error = Command::new(program[0]).args(&program[1..]).exec();
            named(program[0], error)
        }
        Err(error) => error,
    }
}

fn prepare(port: Option<&Path>, control: &Path) -> io::Result<()> {
    if let Some(path) = port {
        let port = patiently(path, || {
            OpenOptions::new().read(true).write(true).open(path)
        })?;
        replace(port.as_fd(), &[0, 1])?;
    }
    let server = patiently(control, || UnixStream::connect(control))?;
    let trace = sys::take(server.as_fd()).map_err(|error| named(control, error))?;
    replace(trace.as_fd(), &[2])
}

fn replace(fd: BorrowedFd<'_>, standard: &[i32]) -> io::Result<()> {
    standard
        .iter()
        .try_for_each(|&number| sys::duplicate_to(fd, number))
}

/// Tries until it is there, and nobody else's.
fn patiently<T>(path: &Path, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && begin.elapsed() < PATIENCE => sleep(PAUSE),
            result => return result.map_err(|error| named(path, error)),
        }
    }
}

fn may_pass(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    ) || error.raw_os_error() == Some(EBUSY)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
