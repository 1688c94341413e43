//! The kernel's strings are UTF-16. Each conversion here reports want of memory, and never aborts.

use alloc::collections::TryReserveError;
use alloc::string::String;
use alloc::vec::Vec;
use core::char::REPLACEMENT_CHARACTER;

/// A literal as UTF-16, made by the compiler.
///
/// ```
/// use kernel_text::utf16;
///
/// const PARAMETERS: [u16; 10] = utf16::literal(b"Parameters");
/// assert_eq!(String::from_utf16_lossy(&PARAMETERS), "Parameters");
/// ```
///
/// # Panics
///
/// If a byte is not ASCII; in a constant that is a compile error.
#[must_use]
pub const fn literal<const LENGTH: usize>(ascii: &[u8; LENGTH]) -> [u16; LENGTH] {
    assert!(ascii.is_ascii(), "only ASCII is the same in UTF-16");
    let mut units = [0; LENGTH];
    let mut index = 0;
    while index < LENGTH {
        units[index] = ascii[index] as u16;
        index += 1;
    }
    units
}

/// Text from UTF-16, U+FFFD standing for each surrogate without its partner.
///
/// Exactly one allocation, none for no text.
///
/// # Errors
///
/// When there is not enough memory.
pub fn try_decode(units: impl Iterator<Item = u16> + Clone) -> Result<String, TryReserveError> {
    let characters =
        char::decode_utf16(units).map(|character| character.unwrap_or(REPLACEMENT_CHARACTER));
    let mut text = String::new();
    text.try_reserve_exact(characters.clone().map(char::len_utf8).sum())?;
    text.extend(characters);
    Ok(text)
}

/// Text as UTF-16, with no terminator.
///
/// Exactly one allocation, none for no text.
///
/// # Errors
///
/// When there is not enough memory.
pub fn try_encode(text: &str) -> Result<Vec<u16>, TryReserveError> {
    let mut units = Vec::new();
    units.try_reserve_exact(text.encode_utf16().count())?;
    units.extend(text.encode_utf16());
    Ok(units)
}

/// The UTF-16 units that little-endian bytes hold. An odd byte at the end is no unit.
pub fn units(bytes: &[u8]) -> impl Iterator<Item = u16> + Clone {
    bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
}

/// A registry string: what stands before the first NUL, if there is one.
///
/// # Errors
///
/// When there is not enough memory.
pub fn try_string(data: &[u8]) -> Result<String, TryReserveError> {
    try_decode(units(data).take_while(|&unit| unit != 0))
}

/// A registry multi-string: strings ended by NUL each, the list by an empty one.
///
/// # Errors
///
/// When there is not enough memory.
pub fn try_multi_string(data: &[u8]) -> Result<Vec<String>, TryReserveError> {
    let joined = try_decode(units(data))?;
    let parts = joined.split('\0').take_while(|part| !part.is_empty());
    let mut strings = Vec::new();
    strings.try_reserve_exact(parts.clone().count())?;
    for part in parts {
        strings.push(try_copy(part)?);
    }
    Ok(strings)
}

fn try_copy(text: &str) -> Result<String, TryReserveError> {
    let mut copy = String::new();
    copy.try_reserve_exact(text.len())?;
    copy.push_str(text);
    Ok(copy)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::string::ToString;

    fn data(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn there_and_back() {
        for text in ["", "hello", "héllo €", "🦀 \u{10FFFF}"] {
            let units = try_encode(text).unwrap();
            assert_eq!(try_decode(units.iter().copied()).unwrap(), text);
        }
    }

    #[test]
    fn a_lone_surrogate_becomes_the_replacement_character() {
        let units = [0x0061, 0xD800, 0x0062, 0xDC00];
        assert_eq!(try_decode(units.into_iter()).unwrap(), "a\u{FFFD}b\u{FFFD}");
    }

    #[test]
    fn decoding_reserves_exactly() {
        let text = try_decode("héllo".encode_utf16()).unwrap();
        assert_eq!(text.capacity(), text.len());
    }

    #[test]
    fn a_string_ends_at_its_terminator_or_at_the_end() {
        assert_eq!(try_string(&data("abc\0")).unwrap(), "abc");
        assert_eq!(try_string(&data("abc")).unwrap(), "abc");
        assert_eq!(try_string(&data("abc\0garbage")).unwrap(), "abc");
        assert_eq!(try_string(&[]).unwrap(), "");
    }

    #[test]
    fn an_odd_byte_is_dropped() {
        assert_eq!(try_string(b"a\0b").unwrap(), "a");
    }

    #[test]
    fn a_multi_string_ends_at_the_first_empty_one() {
        let strings = |text| try_multi_string(&data(text)).unwrap();
        assert_eq!(strings("one\0two\0\0"), ["one".to_string(), "two".into()]);
        assert_eq!(strings("one\0two"), ["one".to_string(), "two".into()]);
        assert!(strings("\0").is_empty());
        assert!(strings("").is_empty());
    }
}
