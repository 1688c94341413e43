//! The memory that a device's data are in.

use core::mem::MaybeUninit;
use core::slice;

/// Memory of the kernel's, zeroed, so that nothing of it reaches a program.
pub fn zeroed(memory: &mut [MaybeUninit<u8>]) -> &mut [u8] {
    memory.fill(MaybeUninit::new(0));
    // SAFETY: each byte has just been written.
    unsafe { slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), memory.len()) }
}

/// The input and the output of a buffered device control, which are in one place.
///
/// The input can be read until the output is taken, and not after: writing the one would change
/// the other.
///
/// ```
/// use kernel_device::ControlBuffer;
///
/// fn reverse(buffer: ControlBuffer<'_>) -> usize {
///     let length = buffer.input().len().min(buffer.output_len());
///     buffer.into_output()[..length].reverse();
///     length
/// }
/// ```
///
/// ```compile_fail,E0505
/// # use kernel_device::ControlBuffer;
/// fn copy(buffer: ControlBuffer<'_>) {
///     let input = buffer.input();
///     buffer.into_output().copy_from_slice(input);
/// }
/// ```
#[derive(Debug)]
pub struct ControlBuffer<'request> {
    bytes: &'request mut [u8],
    input: usize,
    output: usize,
}

impl<'request> ControlBuffer<'request> {
    /// The buffer of a request with so many bytes of input, and room for so many of output. What is
    /// behind the input is zeroed.
    ///
    /// # Panics
    ///
    /// If the memory is shorter than the longer of the two.
    ///
    /// # Safety
    ///
    /// The memory's first `input` bytes are initialised.
    #[doc(hidden)] // the framework's: a driver's author gets one, and makes none
    #[must_use]
    pub unsafe fn new(
        memory: &'request mut [MaybeUninit<u8>],
        input: usize,
        output: usize,
    ) -> Self {
        let memory = &mut memory[..input.max(output)];
        memory[input..].fill(MaybeUninit::new(0));
        // SAFETY: the input is initialised, by the caller's promise, and what is behind it was
        // just written.
        let bytes = unsafe { slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), memory.len()) };
        Self {
            bytes,
            input,
            output,
        }
    }

    /// What the program sent.
    #[must_use]
    pub fn input(&self) -> &[u8] {
        &self.bytes[..self.input]
    }

    /// How many bytes the program has room for.
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.output
    }

    /// The room for the answer. It begins as the input does, and is zero behind it.
    #[must_use]
    pub fn into_output(self) -> &'request mut [u8] {
        &mut self.bytes[..self.output]
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec::Vec;

    fn memory(bytes: &[u8]) -> Vec<MaybeUninit<u8>> {
        bytes.iter().copied().map(MaybeUninit::new).collect()
    }

    #[test]
    fn a_longer_output_begins_with_the_input_and_is_zero_behind_it() {
        let mut memory = memory(b"in, and secrets");
        // SAFETY: all of it is initialised.
        let buffer = unsafe { ControlBuffer::new(&mut memory, 2, 5) };
        assert_eq!(buffer.input(), b"in");
        assert_eq!(buffer.into_output(), b"in\0\0\0");
    }

    #[test]
    fn a_shorter_output_is_no_longer_than_it_should_be() {
        let mut memory = memory(b"input");
        // SAFETY: all of it is initialised.
        let buffer = unsafe { ControlBuffer::new(&mut memory, 5, 2) };
        assert_eq!((buffer.input(), buffer.output_len()), (&b"input"[..], 2));
        assert_eq!(buffer.into_output(), b"in");
    }

    #[test]
    fn there_may_be_neither() {
        // SAFETY: there is nothing to be initialised.
        let buffer = unsafe { ControlBuffer::new(&mut [], 0, 0) };
        assert!(buffer.input().is_empty());
        assert!(buffer.into_output().is_empty());
    }

    #[test]
    fn memory_is_zeroed() {
        assert_eq!(zeroed(&mut memory(b"secret")), [0; 6]);
    }
}
