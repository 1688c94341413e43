//! The agent's end of the byte stream to the host.

use alloc::vec::Vec;
use core::ptr::null_mut;

use crate::{sys, text};

/// A duplex byte stream: one thread reads, one at a time writes.
///
/// Standard input and output are the one kind so far. A port opened for both directions must be opened
/// overlapped, for otherwise Windows lets a write wait for the read before it.
pub struct End {
    input: sys::Handle,
    output: sys::Handle,
}

// SAFETY: handles are numbers that all threads of the process may use.
unsafe impl Send for End {}
// SAFETY: as above.
unsafe impl Sync for End {}

impl End {
    /// The end that the command line names; None if it cannot be understood.
    pub fn from_command_line() -> Option<Self> {
        let line = text::command_line();
        let arguments = match line.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?.1,
            None => line
                .split_once(char::is_whitespace)
                .map_or("", |split| split.1),
        };
        match arguments.split_whitespace().collect::<Vec<_>>()[..] {
            [] | ["--end", "stdio"] => Some(Self::stdio()),
            _ => None,
        }
    }

    fn stdio() -> Self {
        // SAFETY: no preconditions.
        let [input, output] = [sys::STD_INPUT_HANDLE, sys::STD_OUTPUT_HANDLE]
            .map(|which| unsafe { sys::GetStdHandle(which) });
        for handle in [input, output] {
            // No program that we start may get at the stream.
            // SAFETY: a handle that is none makes it fail, which is all right.
            unsafe { sys::SetHandleInformation(handle, sys::HANDLE_FLAG_INHERIT, 0) };
        }
        End { input, output }
    }

    /// Reads what is there, waiting for it; 0 at the end and after it broke.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        loop {
            let mut count = 0;
            // SAFETY: the buffer is as long as told.
            let result = unsafe {
                sys::ReadFile(
                    self.input,
                    buffer.as_mut_ptr(),
                    buffer.len() as u32,
                    &mut count,
                    null_mut(),
                )
            };
            match count as usize {
                _ if result == 0 => return 0,
                0 if self.is_live_pipe() => {}
                count => return count,
            }
        }
    }

    /// Of a pipe, no bytes are a write of none, if the other side is still there.
    fn is_live_pipe(&self) -> bool {
        let nothing = null_mut();
        // SAFETY: null stands for nothing; a handle of another kind makes it fail.
        let result =
            unsafe { sys::PeekNamedPipe(self.input, null_mut(), 0, nothing, nothing, nothing) };
        result != 0
    }

    /// Writes all of it, or says that the stream broke.
    pub fn write(&self, mut data: &[u8]) -> Result<(), ()> {
        while !data.is_empty() {
            let mut count = 0;
            // SAFETY: the buffer is as long as told.
            let result = unsafe {
                sys::WriteFile(
                    self.output,
                    data.as_ptr(),
                    data.len() as u32,
                    &mut count,
                    null_mut(),
                )
            };
            if result == 0 || count == 0 {
                return Err(());
            }
            data = &data[count as usize..];
        }
        Ok(())
    }
}
