//! Cutting formatted text into pieces that one `DbgPrint` carries whole.

use core::ffi::CStr;
use core::fmt;

/// The most bytes of text in one piece.
///
/// The kernel debugger's transport carries 512 bytes a call and drops the rest; the next round
/// number below leaves room for a newline.
pub const PIECE_BYTES: usize = 500;

/// Room for the text, the newline that may ride along, and the terminator.
const BUFFER_BYTES: usize = PIECE_BYTES + 2;

/// How a NUL in the text is shown. A real one would end the C string early.
const VISIBLE_NUL: &str = "\\0";

/// Gathers formatted text in a fixed buffer, and hands it on in pieces.
///
/// A piece is at most [`PIECE_BYTES`] long and ends at a character's border. The newline right
/// after a full piece travels with it, as one more byte: alone in the next call it would show as an
/// empty line. What is left is handed on by [`finish`](Self::finish).
///
/// ```
/// use core::fmt::Write;
/// use kernel_text::pieces::PieceWriter;
///
/// let mut seen = Vec::new();
/// let mut writer = PieceWriter::new(|piece| seen.push(piece.to_owned()));
/// write!(writer, "{} drivers\n", 7).unwrap();
/// writer.finish();
/// assert_eq!(seen, [c"7 drivers\n".to_owned()]);
/// ```
pub struct PieceWriter<Sink: FnMut(&CStr)> {
    buffer: [u8; BUFFER_BYTES],
    length: usize,
    sink: Sink,
}

impl<Sink: FnMut(&CStr)> PieceWriter<Sink> {
    /// A writer that gives each piece to `sink`.
    pub const fn new(sink: Sink) -> Self {
        Self {
            buffer: [0; BUFFER_BYTES],
            length: 0,
            sink,
        }
    }

    /// Hands on what is left, if anything is.
    pub fn finish(mut self) {
        self.hand_on();
    }

    fn push(&mut self, mut text: &str) {
        loop {
            let room = PIECE_BYTES - self.length;
            let (fits, rest) = text.split_at(floor_char_boundary(text, room));
            self.append(fits.as_bytes());
            if rest.is_empty() {
                return;
            }
            text = rest;
            if let Some(after) = text.strip_prefix('\n') {
                self.append(b"\n");
                text = after;
            }
            self.hand_on();
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        self.buffer[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    fn hand_on(&mut self) {
        if self.length == 0 {
            return;
        }
        self.buffer[self.length] = 0;
        // No NUL gets into the buffer by `write_str`, so there is always exactly one.
        if let Ok(piece) = CStr::from_bytes_with_nul(&self.buffer[..=self.length]) {
            (self.sink)(piece);
        }
        self.length = 0;
    }
}

impl<Sink: FnMut(&CStr)> fmt::Write for PieceWriter<Sink> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut between = false;
        for part in text.split('\0') {
            if between {
                self.push(VISIBLE_NUL);
            }
            self.push(part);
            between = true;
        }
        Ok(())
    }
}

/// The last character border of `text` at or before `index`.
///
/// `str::floor_char_boundary` does the same, and is younger than the compiler we ask for.
fn floor_char_boundary(text: &str, index: usize) -> usize {
    let mut border = index.min(text.len());
    while !text.is_char_boundary(border) {
        border -= 1;
    }
    border
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use core::fmt::Write;
    use std::string::String;
    use std::vec::Vec;

    fn pieces_of(texts: &[&str]) -> Vec<String> {
        let mut pieces = Vec::new();
        let mut writer = PieceWriter::new(|piece| pieces.push(piece.to_str().unwrap().into()));
        for text in texts {
            writer.write_str(text).unwrap();
        }
        writer.finish();
        pieces
    }

    #[test]
    fn nothing_is_no_piece() {
        assert!(pieces_of(&[]).is_empty());
        assert!(pieces_of(&["", ""]).is_empty());
    }

    #[test]
    fn short_writes_are_gathered() {
        assert_eq!(pieces_of(&["a", "b\n", "c\n"]), ["ab\nc\n"]);
    }

    #[test]
    fn a_full_piece_takes_its_newline_along() {
        let line = "x".repeat(PIECE_BYTES);
        assert_eq!(pieces_of(&[&line, "\n"]), [line.clone() + "\n"]);
        assert_eq!(pieces_of(&[&(line.clone() + "\n")]), [line.clone() + "\n"]);
    }

    #[test]
    fn a_line_of_its_own_stays_empty() {
        let line = "x".repeat(PIECE_BYTES);
        assert_eq!(pieces_of(&[&line, "\n\n"]), [line + "\n", "\n".into()]);
    }

    #[test]
    fn long_text_is_cut_and_sent_on() {
        let line = "x".repeat(2 * PIECE_BYTES + 1);
        let lengths: Vec<usize> = pieces_of(&[&line]).iter().map(String::len).collect();
        assert_eq!(lengths, [PIECE_BYTES, PIECE_BYTES, 1]);
    }

    #[test]
    fn a_nul_is_shown() {
        assert_eq!(pieces_of(&["a\0b\0"]), ["a\\0b\\0"]);
    }

    #[test]
    fn a_nul_at_the_border_is_shown_whole_or_in_two() {
        for before in PIECE_BYTES - 3..=PIECE_BYTES + 1 {
            let text = "x".repeat(before) + "\0y";
            assert_eq!(pieces_of(&[&text]).concat(), text.replace('\0', "\\0"));
        }
    }

    #[test]
    fn no_character_is_ever_cut() {
        for character in ["é", "€", "🦀"] {
            for shift in 0..4 {
                let text = "x".repeat(shift) + &character.repeat(PIECE_BYTES);
                let pieces = pieces_of(&[&text]);
                assert_eq!(pieces.concat(), text);
                for piece in &pieces[..pieces.len() - 1] {
                    assert!(piece.len() <= PIECE_BYTES);
                    assert!(piece.len() > PIECE_BYTES - character.len());
                }
            }
        }
    }

    #[test]
    fn how_text_is_split_into_writes_changes_nothing() {
        let text = "héllo wörld, 🦀€\n".repeat(120);
        let whole = pieces_of(&[&text]);
        for step in 1..40 {
            let characters: Vec<char> = text.chars().collect();
            let parts: Vec<String> = characters.chunks(step).map(String::from_iter).collect();
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            assert_eq!(pieces_of(&parts), whole);
        }
    }
}
