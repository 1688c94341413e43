//! One line of text that says where a block of memory was allocated.

use core::ffi::CStr;

/// The longest record, its newline included: what one `DbgPrint` takes on every Windows.
const MOST_BYTES: usize = 480;

/// No record has more frames.
pub const MOST_FRAMES: usize = 28;

const HEAD: &[u8] = b"kdriver:stack ";

/// Room for the longest record, and for the NUL behind it.
pub const BUFFER_BYTES: usize = MOST_BYTES + 1;

/// Writes `kdriver:stack BLOCK FRAME FRAME ...` and a newline, all numbers in hexadecimal: the record of
/// a block and the return addresses that led to it, innermost first. The outermost are left out where
/// they are too many.
///
/// The buffer is the caller's, for there is little room on a kernel's stack to move it about.
///
/// ```
/// use kernel_text::stack_record::{BUFFER_BYTES, write};
///
/// let mut buffer = [0; BUFFER_BYTES];
/// let record = write(&mut buffer, 0xA0, [0x1000, 0x2F]);
/// assert_eq!(record, c"kdriver:stack a0 1000 2f\n");
/// ```
pub fn write(
    buffer: &mut [u8; BUFFER_BYTES],
    block: usize,
    frames: impl IntoIterator<Item = usize>,
) -> &CStr {
    buffer[..HEAD.len()].copy_from_slice(HEAD);
    let mut end = write_hexadecimal(buffer, HEAD.len(), block);
    for frame in frames.into_iter().take(MOST_FRAMES) {
        // A space before it, and the newline behind the last.
        if end + 1 + digits(frame) + 1 > MOST_BYTES {
            break;
        }
        buffer[end] = b' ';
        end = write_hexadecimal(buffer, end + 1, frame);
    }
    buffer[end] = b'\n';
    buffer[end + 1] = 0;
    CStr::from_bytes_until_nul(buffer).unwrap_or_default()
}

/// Writes a number at a place, with no leading zeros; where it ends.
fn write_hexadecimal(bytes: &mut [u8], start: usize, mut number: usize) -> usize {
    let end = start + digits(number);
    for digit in bytes[start..end].iter_mut().rev() {
        *digit = b"0123456789abcdef"[number % 16];
        number /= 16;
    }
    end
}

fn digits(number: usize) -> usize {
    number.checked_ilog2().map_or(1, |bit| bit as usize / 4 + 1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::format;
    use std::string::String;
    use std::vec::Vec;

    fn text(block: usize, frames: &[usize]) -> String {
        // What was there before does not matter.
        let mut buffer = [0xEE; BUFFER_BYTES];
        write(&mut buffer, block, frames.iter().copied())
            .to_str()
            .unwrap()
            .into()
    }

    #[test]
    fn numbers_are_as_rust_formats_them() {
        for number in [0, 1, 15, 16, 255, 256, 0x0123_4567_89AB_CDEF, usize::MAX] {
            let expected = format!("kdriver:stack {number:x} {number:x}\n");
            assert_eq!(text(number, &[number]), expected);
        }
    }

    #[test]
    fn a_block_without_frames_has_a_record_too() {
        assert_eq!(text(0xB10C, &[]), "kdriver:stack b10c\n");
    }

    #[test]
    fn no_more_frames_than_28() {
        let frames: Vec<usize> = (1..100).collect();
        let record = text(0, &frames);
        assert_eq!(record.split(' ').count(), 2 + MOST_FRAMES);
        assert!(record.ends_with(" 1c\n"));
    }

    #[test]
    fn no_more_bytes_than_480_and_no_frame_cut() {
        let frames = [0xFFFF_F800_1234_5678; MOST_FRAMES];
        let record = text(0xFFFF_9A0B_1234_5678, &frames);
        assert!(record.len() <= MOST_BYTES);
        assert!(record.len() + 17 > MOST_BYTES);
        assert!(record.ends_with(" fffff80012345678\n"));
    }
}
