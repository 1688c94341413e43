//! A byte stream as lines of base64, for a way that changes bytes: RFC 4648 section 4, with padding. Each
//! line stands for bytes of its own; a line ends with a line feed, and may have a carriage return before it.

use alloc::vec::Vec;
use core::fmt;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// One line, with its end.
pub fn encode_line(data: &[u8]) -> Vec<u8> {
    let mut line = Vec::with_capacity(data.len().div_ceil(3) * 4 + 1);
    for group in data.chunks(3) {
        let mut bits = [0; 4];
        bits[1..=group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes(bits);
        for place in 0..4 {
            line.push(if place <= group.len() {
                ALPHABET[(bits >> (18 - 6 * place)) as usize & 63]
            } else {
                b'='
            });
        }
    }
    line.push(b'\n');
    line
}

/// A line that is no base64.
#[derive(Debug, PartialEq, Eq)]
pub struct NotBase64;

impl fmt::Display for NotBase64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a line that is no base64")
    }
}

/// Reads lines, in pieces of any size.
#[derive(Default)]
pub struct Decoder {
    bits: u32,
    /// How many signs of a group of four were read.
    place: u8,
    padded: bool,
}

impl Decoder {
    /// Nothing was read yet.
    pub const fn new() -> Self {
        Decoder {
            bits: 0,
            place: 0,
            padded: false,
        }
    }

    /// Puts what the signs stand for in their place; how many bytes that are.
    pub fn decode(&mut self, data: &mut [u8]) -> Result<usize, NotBase64> {
        let mut count = 0;
        for index in 0..data.len() {
            if let Some(byte) = self.read(data[index])? {
                data[count] = byte;
                count += 1;
            }
        }
        Ok(count)
    }

    fn read(&mut self, sign: u8) -> Result<Option<u8>, NotBase64> {
        let value = match sign {
            b'A'..=b'Z' => sign - b'A',
            b'a'..=b'z' => sign - b'a' + 26,
            b'0'..=b'9' => sign - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' if self.place >= 2 => {
                self.padded = true;
                self.place = (self.place + 1) % 4;
                return Ok(None);
            }
            b'\r' | b'\n' if self.place == 0 => {
                self.padded = false;
                return Ok(None);
            }
            _ => return Err(NotBase64),
        };
        if self.padded {
            return Err(NotBase64);
        }
        self.bits = self.bits << 6 | u32::from(value);
        self.place = (self.place + 1) % 4;
        Ok(match self.place {
            1 => None,
            2 => Some((self.bits >> 4) as u8),
            3 => Some((self.bits >> 2) as u8),
            _ => Some(self.bits as u8),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn decode(text: &[u8], piece: usize) -> Result<Vec<u8>, NotBase64> {
        let mut decoder = Decoder::new();
        let mut data = vec![];
        for piece in text.chunks(piece) {
            let mut piece = piece.to_vec();
            let count = decoder.decode(&mut piece)?;
            data.extend_from_slice(&piece[..count]);
        }
        Ok(data)
    }

    // The test vectors of RFC 4648, section 10.
    #[test]
    fn the_standard_s_examples() {
        for (plain, text) in [
            ("", "\n"),
            ("f", "Zg==\n"),
            ("fo", "Zm8=\n"),
            ("foo", "Zm9v\n"),
            ("foob", "Zm9vYg==\n"),
            ("fooba", "Zm9vYmE=\n"),
            ("foobar", "Zm9vYmFy\n"),
        ] {
            assert_eq!(encode_line(plain.as_bytes()), text.as_bytes());
            assert_eq!(decode(text.as_bytes(), 99), Ok(plain.into()));
        }
    }

    #[test]
    fn all_values_come_through_in_pieces_of_any_size() {
        let data: Vec<u8> = (0..=255).collect();
        let mut text = encode_line(&data[..100]);
        text.pop();
        text.extend_from_slice(b"\r\n");
        text.extend(encode_line(&data[100..]));
        for piece in 1..=text.len() {
            assert_eq!(decode(&text, piece).as_deref(), Ok(&data[..]));
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "%%%%",
            "Zg\n",
            "Z===\n",
            "Zg=v",
            "Zg==Zg==\n",
            "Zg= =",
            "=\n",
        ] {
            assert_eq!(decode(text.as_bytes(), 3), Err(NotBase64), "{text}");
        }
    }
}
