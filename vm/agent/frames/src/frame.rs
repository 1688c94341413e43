use alloc::vec::Vec;
use core::fmt;

/// The version of this protocol, in each frame and in `hello`.
pub const PROTOCOL_VERSION: u8 = 1;

/// The bytes of a frame between its length and its body.
pub const HEADER_SIZE: usize = 8;

/// The greatest length a frame may announce. It bounds what a peer can make us keep, and how long one
/// message holds up the others on a slow link.
pub const MAX_FRAME: usize = 1 << 20;

/// The most body bytes in one frame.
pub const MAX_BODY: usize = MAX_FRAME - HEADER_SIZE;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// From the host: do this.
    Request = 1,
    /// From the agent: a piece of a reply, more follow.
    Part = 2,
    /// From the agent: the last piece of a reply, most often the only one.
    Reply = 3,
    /// From the agent: it could not be done.
    Error = 4,
}

impl Kind {
    fn from_u8(value: u8) -> Option<Self> {
        [Kind::Request, Kind::Part, Kind::Reply, Kind::Error]
            .into_iter()
            .find(|kind| *kind as u8 == value)
    }
}

/// One frame. The operation's number is not judged here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// What the request is for; a reply repeats it.
    pub operation: u16,
    /// The request's id; a reply repeats it. 0 is no request's: an error about the stream itself.
    pub request: u32,
    /// The message, or a part of it.
    pub body: Vec<u8>,
}

/// Why a stream of frames cannot be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The announced length is below [`HEADER_SIZE`] or above [`MAX_FRAME`].
    Length(u32),
    /// Another version than [`PROTOCOL_VERSION`].
    Version(u8),
    /// No [`Kind`].
    Kind(u8),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Length(length) => write!(
                f,
                "a frame of {length} bytes; it has {HEADER_SIZE} to {MAX_FRAME}"
            ),
            FrameError::Version(version) => write!(
                f,
                "a frame of protocol version {version}; this side speaks {PROTOCOL_VERSION}"
            ),
            FrameError::Kind(kind) => write!(f, "a frame of kind {kind}, which is none"),
        }
    }
}

/// Appends a frame to `out`.
///
/// # Panics
///
/// If the body is longer than [`MAX_BODY`].
pub fn encode(kind: Kind, operation: u16, request: u32, body: &[u8], out: &mut Vec<u8>) {
    assert!(body.len() <= MAX_BODY, "the body fits no frame");
    out.reserve(4 + HEADER_SIZE + body.len());
    out.extend_from_slice(&((HEADER_SIZE + body.len()) as u32).to_le_bytes());
    out.extend_from_slice(&[PROTOCOL_VERSION, kind as u8]);
    out.extend_from_slice(&operation.to_le_bytes());
    out.extend_from_slice(&request.to_le_bytes());
    out.extend_from_slice(body);
}

/// Bytes in, frames out.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    failure: Option<FrameError>,
}

impl Decoder {
    /// A decoder that has seen nothing yet.
    pub const fn new() -> Self {
        Decoder {
            buffer: Vec::new(),
            start: 0,
            failure: None,
        }
    }

    /// Takes what came, cut anywhere.
    pub fn receive_data(&mut self, data: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(data);
    }

    /// The next whole frame, or None until more bytes come.
    ///
    /// A header is judged as soon as it is there, not when its frame is whole. After an error there is
    /// nothing but this error.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let result = self.read_frame();
        self.failure = result.as_ref().err().copied();
        result
    }

    fn read_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let available = &self.buffer[self.start..];
        let Some((length, rest)) = available.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length);
        if !(HEADER_SIZE..=MAX_FRAME).contains(&(length as usize)) {
            return Err(FrameError::Length(length));
        }
        let Some((&[version, kind, o0, o1, r0, r1, r2, r3], rest)) =
            rest.split_first_chunk::<HEADER_SIZE>()
        else {
            return Ok(None);
        };
        if version != PROTOCOL_VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = Kind::from_u8(kind).ok_or(FrameError::Kind(kind))?;
        let Some(body) = rest.get(..length as usize - HEADER_SIZE) else {
            return Ok(None);
        };
        let frame = Frame {
            kind,
            operation: u16::from_le_bytes([o0, o1]),
            request: u32::from_le_bytes([r0, r1, r2, r3]),
            body: body.to_vec(),
        };
        self.start += 4 + length as usize;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn decode(chunks: &[&[u8]]) -> Result<Vec<Frame>, FrameError> {
        let mut decoder = Decoder::new();
        let mut frames = Vec::new();
        for chunk in chunks {
            decoder.receive_data(chunk);
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_survive_a_cut_at_every_place() {
        let mut stream = Vec::new();
        let all: Vec<u8> = (0..=255).collect();
        encode(Kind::Request, 7, 1, &all, &mut stream);
        encode(Kind::Error, 0xFFFF, u32::MAX, &[], &mut stream);
        let whole = decode(&[&stream]).unwrap();
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[0].body, all);
        for cut in 0..=stream.len() {
            let (head, tail) = stream.split_at(cut);
            assert_eq!(decode(&[head, tail]).unwrap(), whole);
        }
    }

    #[test]
    fn the_longest_frame_passes_and_one_byte_more_does_not() {
        let mut stream = Vec::new();
        encode(Kind::Reply, 1, 1, &vec![1; MAX_BODY], &mut stream);
        assert_eq!(decode(&[&stream]).unwrap()[0].body.len(), MAX_BODY);
        let length = MAX_FRAME as u32 + 1;
        assert_eq!(
            decode(&[&length.to_le_bytes()]),
            Err(FrameError::Length(length))
        );
    }

    #[test]
    fn a_header_is_judged_before_its_body_comes() {
        assert_eq!(
            decode(&[&[7, 0, 0, 0]]),
            Err(FrameError::Length(HEADER_SIZE as u32 - 1))
        );
        assert_eq!(
            decode(&[&[9, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]]),
            Err(FrameError::Version(2))
        );
        assert_eq!(
            decode(&[&[9, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0]]),
            Err(FrameError::Kind(5))
        );
    }

    #[test]
    fn an_error_stays() {
        let mut decoder = Decoder::new();
        decoder.receive_data(&[0; 4]);
        assert!(decoder.next_frame().is_err());
        let mut good = Vec::new();
        encode(Kind::Request, 1, 1, &[], &mut good);
        decoder.receive_data(&good);
        assert!(decoder.next_frame().is_err());
    }
}
