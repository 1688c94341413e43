//! The agent's end of the byte stream to the host.

use alloc::vec::Vec;
use core::ptr::{null, null_mut};

use frames::base64;

use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::sync::Mutex;
use crate::{runtime, sys, text};

/// How long to wait, in milliseconds, before a port is asked again that has nobody at its other side.
const NOBODY: u32 = 50;

/// Which end the command line asks for.
pub enum Choice {
    /// Standard input and output, which end with the host.
    Stdio,
    /// The same, where all byte values have to come through before anything else does.
    CheckedStdio,
    /// The same, as lines of base64.
    Base64Stdio,
    /// The same, which are a port.
    Resident,
    /// A port to open, by its name with a NUL behind it.
    Port(Vec<u16>),
    /// A port to open as the service of this name, both with a NUL behind them.
    Service { name: Vec<u16>, port: Vec<u16> },
}

impl Choice {
    /// None if the command line cannot be understood.
    pub fn from_command_line() -> Option<Self> {
        let line = text::command_line();
        let arguments = match line.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?.1,
            None => line
                .split_once(char::is_whitespace)
                .map_or("", |split| split.1),
        };
        match arguments.split_whitespace().collect::<Vec<_>>()[..] {
            [] | ["--end", "stdio"] => Some(Choice::Stdio),
            ["--check-bytes"] => Some(Choice::CheckedStdio),
            ["--base64"] => Some(Choice::Base64Stdio),
            ["--end", "resident"] => Some(Choice::Resident),
            ["--end", "port", name] => text::wide(name).ok().map(Choice::Port),
            ["--service", name, "--end", "port", port] => Some(Choice::Service {
                name: text::wide(name).ok()?,
                port: text::wide(port).ok()?,
            }),
            _ => None,
        }
    }
}

/// A duplex byte stream: one thread reads, one at a time writes.
pub struct End {
    input: sys::Handle,
    output: sys::Handle,
    /// Of a port that was opened for both directions, without which Windows would let a write wait for the
    /// read before it.
    events: Option<[Owned; 2]>,
    is_port: bool,
    is_com_port: bool,
    /// Of a stream of lines of base64.
    lines: Option<Mutex<base64::Decoder>>,
}

// SAFETY: handles are numbers that all threads of the process may use.
unsafe impl Send for End {}
// SAFETY: as above.
unsafe impl Sync for End {}

impl End {
    pub fn open(choice: &Choice) -> Answer<Self> {
        match choice {
            Choice::Stdio => Ok(Self::stdio(false)),
            Choice::CheckedStdio => {
                let end = Self::stdio(false);
                end.check_bytes()?;
                Ok(end)
            }
            Choice::Base64Stdio => Ok(End {
                lines: Some(Mutex::new(base64::Decoder::new())),
                ..Self::stdio(false)
            }),
            Choice::Resident => Ok(Self::stdio(true)),
            Choice::Port(port) | Choice::Service { port, .. } => Self::port(port),
        }
    }

    fn stdio(is_port: bool) -> Self {
        // SAFETY: no preconditions.
        let [input, output] = [sys::STD_INPUT_HANDLE, sys::STD_OUTPUT_HANDLE]
            .map(|which| unsafe { sys::GetStdHandle(which) });
        for handle in [input, output] {
            // No program that we start may get at the stream.
            // SAFETY: a handle that is none makes it fail, which is all right.
            unsafe { sys::SetHandleInformation(handle, sys::HANDLE_FLAG_INHERIT, 0) };
        }
        End {
            input,
            output,
            events: None,
            is_port,
            is_com_port: false,
            lines: None,
        }
    }

    fn port(name: &[u16]) -> Answer<Self> {
        // SAFETY: the name ends with a NUL, and null stands for nothing.
        let file = unsafe {
            sys::CreateFileW(
                name.as_ptr(),
                sys::GENERIC_READ | sys::GENERIC_WRITE,
                0,
                null(),
                sys::OPEN_EXISTING,
                sys::FILE_FLAG_OVERLAPPED,
                null_mut(),
            )
        };
        let file = Owned::new(file, "open the port")?;
        let is_com_port = set_up_com_port(file.raw())?;
        let (input, output) = (file.raw(), file.raw());
        core::mem::forget(file); // it stays open as long as the process lives
        Ok(End {
            input,
            output,
            events: Some([new_event()?, new_event()?]),
            is_port: true,
            is_com_port,
            lines: None,
        })
    }

    /// Waits for all byte values, and answers with the same. An error, and another answer, if what comes are
    /// others.
    ///
    /// They begin and end with letters, so that those that are left out on the way are missed, too.
    fn check_bytes(&self) -> Answer {
        const FIRST: u8 = b'B';
        let values: Vec<u8> = (0..=u8::MAX)
            .map(|value| FIRST.wrapping_add(value))
            .collect();
        let mut expected = &values[..];
        while !expected.is_empty() {
            let mut buffer = [0; 256];
            let count = self.read(&mut buffer[..expected.len()]);
            if count == 0 {
                return Err(Failure::Refused("read all byte values"));
            }
            let (now, then) = expected.split_at(count);
            if buffer[..count] != *now {
                let _ = self.write(b"no\n", || false);
                return Err(Failure::Refused("have all byte values unchanged"));
            }
            expected = then;
        }
        let _ = self.write(&values, || false); // if nobody reads it, there is nothing to read
        Ok(())
    }

    /// Whether hosts come and go.
    pub fn is_port(&self) -> bool {
        self.is_port
    }

    /// Reads what is there, waiting for it; 0 at the end and after it broke, and never of a port.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        loop {
            let count = self.read_coded(buffer);
            let Some(lines) = self.lines.as_ref().filter(|_| count > 0) else {
                return count;
            };
            match lines.lock().decode(&mut buffer[..count]) {
                Ok(0) => {}
                Ok(count) => return count,
                Err(base64::NotBase64) => {
                    runtime::complain(b"kdagent: a line is no base64\n");
                    return 0;
                }
            }
        }
    }

    fn read_coded(&self, buffer: &mut [u8]) -> usize {
        loop {
            match self.try_read(buffer) {
                Ok(count @ 1..) => return count,
                _ if self.is_port => {
                    // SAFETY: no preconditions.
                    unsafe { sys::Sleep(NOBODY) };
                }
                Ok(0) if self.is_live_pipe() => {}
                _ => return 0,
            }
        }
    }

    fn try_read(&self, buffer: &mut [u8]) -> Result<usize, ()> {
        if !self.is_com_port {
            return self.read_into(buffer);
        }
        // A COM port gives as many bytes as are asked for, however long it takes.
        let (first, rest) = buffer.split_at_mut(1);
        if self.read_into(first)? == 0 {
            return Ok(0);
        }
        match self.queued().min(rest.len()) {
            0 => Ok(1),
            count => Ok(1 + self.read_into(&mut rest[..count]).unwrap_or(0)),
        }
    }

    /// How many bytes a COM port has at once.
    fn queued(&self) -> usize {
        let mut status = sys::CommStatus::default();
        // SAFETY: the structure is what is asked for, and null stands for what is not.
        match unsafe { sys::ClearCommError(self.input, null_mut(), &mut status) } {
            0 => 0,
            _ => status.queued_in as usize,
        }
    }

    fn read_into(&self, buffer: &mut [u8]) -> Result<usize, ()> {
        let event = self.events.as_ref().map(|[reading, _]| reading);
        // SAFETY: the buffer is as long as told, and stays until the transfer is over.
        transfer(self.input, event, |count, overlapped| unsafe {
            sys::ReadFile(
                self.input,
                buffer.as_mut_ptr(),
                buffer.len() as u32,
                count,
                overlapped,
            )
        })
    }

    /// Of a pipe, no bytes are a write of none, if the other side is still there.
    fn is_live_pipe(&self) -> bool {
        let nothing = null_mut();
        // SAFETY: null stands for nothing; a handle of another kind makes it fail.
        let result =
            unsafe { sys::PeekNamedPipe(self.input, null_mut(), 0, nothing, nothing, nothing) };
        result != 0
    }

    /// Writes all of it, or says that the stream broke. To a port it is tried again until `is_over`.
    pub fn write(&self, data: &[u8], is_over: impl Fn() -> bool) -> Result<(), ()> {
        match self.lines {
            None => self.write_coded(data, is_over),
            Some(_) => self.write_coded(&base64::encode_line(data), is_over),
        }
    }

    fn write_coded(&self, mut data: &[u8], is_over: impl Fn() -> bool) -> Result<(), ()> {
        while !data.is_empty() {
            match self.try_write(data) {
                Ok(count @ 1..) => data = &data[count..],
                _ if self.is_port && !is_over() => {
                    // SAFETY: no preconditions.
                    unsafe { sys::Sleep(NOBODY) };
                }
                _ => return Err(()),
            }
        }
        Ok(())
    }

    fn try_write(&self, data: &[u8]) -> Result<usize, ()> {
        let event = self.events.as_ref().map(|[_, writing]| writing);
        // SAFETY: the buffer is as long as told, and stays until the transfer is over.
        transfer(self.output, event, |count, overlapped| unsafe {
            sys::WriteFile(
                self.output,
                data.as_ptr(),
                data.len() as u32,
                count,
                overlapped,
            )
        })
    }
}

/// Makes a transfer and waits until it is over; the event is there if the file is overlapped.
fn transfer(
    file: sys::Handle,
    event: Option<&Owned>,
    begin: impl FnOnce(*mut u32, *mut sys::Overlapped) -> sys::Bool,
) -> Result<usize, ()> {
    let mut count = 0;
    let Some(event) = event else {
        return match begin(&mut count, null_mut()) {
            0 => Err(()),
            _ => Ok(count as usize),
        };
    };
    let mut overlapped = sys::Overlapped {
        internal: 0,
        internal_high: 0,
        offset: 0,
        offset_high: 0,
        event: event.raw(),
    };
    // What is not over goes on behind the call, and uses this until then.
    let overlapped = &raw mut overlapped;
    // SAFETY: no preconditions.
    if begin(null_mut(), overlapped) == 0 && unsafe { sys::GetLastError() } != sys::ERROR_IO_PENDING
    {
        return Err(());
    }
    // SAFETY: the structure is this file's transfer's.
    match unsafe { sys::GetOverlappedResult(file, overlapped, &mut count, sys::TRUE) } {
        0 => Err(()),
        _ => Ok(count as usize),
    }
}

fn new_event() -> Answer<Owned> {
    // SAFETY: null stands for nothing.
    let event = unsafe { sys::CreateEventW(null(), sys::TRUE, 0, null()) };
    Owned::new(event, "make an event")
}

/// Sets a COM port to 115200 baud, 8 bits, no parity, one stop bit, no flow control, and has its reads and
/// writes wait for all that they are about. Whether it is one: a port of another kind has none of these.
fn set_up_com_port(file: sys::Handle) -> Answer<bool> {
    const DOING: &str = "set up the COM port";
    let mut state = sys::CommState {
        size: size_of::<sys::CommState>() as u32,
        ..Default::default()
    };
    // SAFETY: the structure says its size.
    if unsafe { sys::GetCommState(file, &mut state) } == 0 {
        return Ok(false);
    }
    state.baud_rate = 115_200;
    state.flags = sys::COMM_BINARY | sys::COMM_DTR_ENABLE | sys::COMM_RTS_ENABLE;
    state.byte_size = 8;
    state.parity = sys::NO_PARITY;
    state.stop_bits = sys::ONE_STOP_BIT;
    let no_timeouts = sys::CommTimeouts::default();
    // SAFETY: as above.
    check(unsafe { sys::SetCommState(file, &state) }, DOING)?;
    // SAFETY: the structure is what is asked for.
    check(unsafe { sys::SetCommTimeouts(file, &no_timeouts) }, DOING)?;
    Ok(true)
}
