//! The layer below the frames on a port: a byte stream that has no beginning and no end.
//!
//! A serial or virtio-serial port stays, while programs on both sides come and go, and the guest may be put
//! back to a snapshot in the middle of a frame. So marks stand between the bytes:
//!
//! ```text
//! payload   any bytes; 7D and 7E are sent as 7D and the byte xor 20
//! mark      7E, 7E, kind u8, nonce (32 lowercase hexadecimal digits), 7E
//! kind      `S` sync, host to guest | `A` answer | `B` boot, both guest to host
//! ```
//!
//! A 7E in a mark that is not whole begins a new mark, so that one too many does no harm. One too many is sent:
//! behind a mark that was cut off right before its end, the first would be that end. After a mark or an escape
//! that is none, the receiver drops everything up to the next good mark.
//!
//! A guest's program sends `B` with a nonce of its own when it begins. It drops everything until the host's
//! `S`, answers `A` with the nonce of that, and then a session has begun, which lasts until the next `S` with
//! another nonce. Its twin on the host is `pytest_kdriver/port_stream.py`.

use alloc::vec::Vec;

const ESCAPE: u8 = 0x7D;
const FLAG: u8 = 0x7E;
const FLIP: u8 = 0x20;

const DIGITS: usize = 32;

/// The bytes of a mark.
pub const MARK_SIZE: usize = 2 + 1 + DIGITS + 1;

/// What a mark of the guest's says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The session with this nonce has begun.
    Answer = b'A',
    /// A program has begun to serve the port.
    Boot = b'B',
}

const SYNC: u8 = b'S';

/// Appends payload to `out`.
pub fn encode_payload(mut data: &[u8], out: &mut Vec<u8>) {
    out.reserve(data.len() + data.len() / 64);
    while let Some(at) = find_special(data) {
        out.extend_from_slice(&data[..at]);
        out.extend_from_slice(&[ESCAPE, data[at] ^ FLIP]);
        data = &data[at + 1..];
    }
    out.extend_from_slice(data);
}

/// The bytes of a mark.
pub fn encode_mark(mark: Mark, nonce: u128) -> [u8; MARK_SIZE] {
    write_mark(mark as u8, nonce)
}

fn write_mark(kind: u8, nonce: u128) -> [u8; MARK_SIZE] {
    let mut bytes = [FLAG; MARK_SIZE];
    bytes[2] = kind;
    for (index, digit) in bytes[3..3 + DIGITS].iter_mut().enumerate() {
        let value = (nonce >> (4 * (DIGITS - 1 - index))) as usize & 0xF;
        *digit = b"0123456789abcdef"[value];
    }
    bytes
}

fn find_special(data: &[u8]) -> Option<usize> {
    data.iter().position(|&byte| byte == ESCAPE || byte == FLAG)
}

/// What comes to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A new session begins, and the one before is over: [`Mark::Answer`] with this nonce is to be sent
    /// before anything else.
    Session(u128),
    /// The host asks again: the same is to be sent, and the session goes on.
    Again(u128),
    /// Bytes of this session.
    Payload(&'a [u8]),
}

/// A guest's side of the stream.
pub struct GuestStream {
    state: State,
    session: Option<u128>,
}

#[derive(Clone, Copy)]
enum State {
    /// Nothing is taken but a mark.
    Lost,
    Payload,
    Escape,
    /// So many bytes of a mark behind its flag have come, and the digits among them make this number.
    Mark(usize, u128),
}

impl Default for GuestStream {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestStream {
    /// A stream that has seen nothing yet.
    pub const fn new() -> Self {
        GuestStream {
            state: State::Lost,
            session: None,
        }
    }

    /// Drops everything up to the next `S`, which begins a session whatever its nonce: for payload that
    /// makes no sense.
    pub fn lose(&mut self) {
        self.state = State::Lost;
        self.session = None;
    }

    /// Takes what came, cut anywhere, off the front of `data`: up to the end of an event, or all of it.
    pub fn next_event<'a>(&mut self, data: &mut &'a [u8]) -> Option<Event<'a>> {
        while let Some((&byte, rest)) = data.split_first() {
            match self.state {
                State::Payload if byte != ESCAPE && byte != FLAG => {
                    let end = find_special(data).unwrap_or(data.len());
                    let (payload, rest) = data.split_at(end);
                    *data = rest;
                    return Some(Event::Payload(payload));
                }
                _ => *data = rest,
            }
            match (self.state, byte) {
                (State::Mark(count, nonce), FLAG) if count == 1 + DIGITS => {
                    self.state = State::Payload;
                    return Some(self.begin_session(nonce));
                }
                (State::Escape, FLAG) => {
                    self.lose();
                    self.state = State::Mark(0, 0);
                }
                (_, FLAG) => self.state = State::Mark(0, 0),
                (State::Lost, _) => {}
                (State::Payload, _) => self.state = State::Escape,
                (State::Escape, _) => match byte ^ FLIP {
                    ESCAPE | FLAG => {
                        self.state = State::Payload;
                        let unescaped: &[u8] = if byte ^ FLIP == FLAG {
                            &[FLAG]
                        } else {
                            &[ESCAPE]
                        };
                        return Some(Event::Payload(unescaped));
                    }
                    _ => self.lose(),
                },
                (State::Mark(0, _), SYNC) => self.state = State::Mark(1, 0),
                (State::Mark(count @ 1..=DIGITS, nonce), b'0'..=b'9' | b'a'..=b'f') => {
                    let digit = if byte <= b'9' {
                        byte - b'0'
                    } else {
                        byte - b'a' + 10
                    };
                    self.state = State::Mark(count + 1, nonce << 4 | u128::from(digit));
                }
                (State::Mark(..), _) => self.lose(),
            }
        }
        None
    }

    fn begin_session(&mut self, nonce: u128) -> Event<'static> {
        if self.session.replace(nonce) == Some(nonce) {
            Event::Again(nonce)
        } else {
            Event::Session(nonce)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// Numbers that look random (xorshift64).
    struct Chance(u64);

    impl Chance {
        fn next(&mut self, below: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 16) as usize % below
        }

        /// Bytes among which those that mean something are frequent.
        fn bytes(&mut self, most: usize) -> Vec<u8> {
            let length = self.next(most + 1);
            (0..length)
                .map(|_| match self.next(3) {
                    0 => b"}~]^SAB0f"[self.next(9)],
                    _ => self.next(256) as u8,
                })
                .collect()
        }
    }

    #[derive(Clone, Debug, PartialEq)]
    enum Seen {
        Session(u128),
        Again(u128),
        Payload(Vec<u8>),
    }

    /// What comes of pieces; payload that is not apart by a mark is joined.
    fn receive(stream: &mut GuestStream, pieces: &[&[u8]]) -> Vec<Seen> {
        let mut seen = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            while let Some(event) = stream.next_event(&mut rest) {
                match (event, seen.last_mut()) {
                    (Event::Payload(more), Some(Seen::Payload(data))) => data.extend(more),
                    (Event::Payload(data), _) => seen.push(Seen::Payload(data.to_vec())),
                    (Event::Session(nonce), _) => seen.push(Seen::Session(nonce)),
                    (Event::Again(nonce), _) => seen.push(Seen::Again(nonce)),
                }
            }
            assert!(rest.is_empty());
        }
        seen
    }

    fn sync(nonce: u128) -> Vec<u8> {
        write_mark(SYNC, nonce).to_vec()
    }

    fn payload(data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode_payload(data, &mut out);
        out
    }

    #[test]
    fn a_mark_is_its_kind_and_its_nonce_in_hexadecimal() {
        assert_eq!(
            &encode_mark(Mark::Boot, 0x0123_4567_89ab_cdef_0011_2233_4455_6677),
            b"~~B0123456789abcdef0011223344556677~"
        );
        assert_eq!(
            &encode_mark(Mark::Answer, 1),
            b"~~A00000000000000000000000000000001~"
        );
    }

    #[test]
    fn all_bytes_pass_and_no_flag_is_among_them() {
        let all: Vec<u8> = (0..=255).collect();
        let encoded = payload(&all);
        assert_eq!(encoded.len(), 258);
        assert!(!encoded.contains(&FLAG));
        let mut stream = GuestStream::new();
        assert_eq!(
            receive(&mut stream, &[&sync(7), &encoded]),
            [Seen::Session(7), Seen::Payload(all)]
        );
    }

    #[test]
    fn a_stream_may_be_cut_anywhere() {
        let mut chance = Chance(1);
        for _ in 0..500 {
            let (first, second) = (chance.bytes(20), chance.bytes(20));
            let nonces = [chance.0.into(), u128::MAX - u128::from(chance.0)];
            let whole = [
                chance.bytes(40),
                sync(nonces[0]),
                payload(&first),
                sync(nonces[1]),
                payload(&second),
            ]
            .concat();
            let expected = receive(&mut GuestStream::new(), &[&whole]);
            assert!(expected.contains(&Seen::Session(nonces[1])));
            if !second.is_empty() {
                assert_eq!(expected.last(), Some(&Seen::Payload(second)));
            }
            for _ in 0..4 {
                let a = chance.next(whole.len() + 1);
                let b = a + chance.next(whole.len() - a + 1);
                let pieces = [&whole[..a], &whole[a..b], &whole[b..]];
                assert_eq!(receive(&mut GuestStream::new(), &pieces), expected);
            }
        }
    }

    #[test]
    fn nothing_is_taken_before_the_first_sync() {
        let answer = encode_mark(Mark::Answer, 3);
        let seen = receive(
            &mut GuestStream::new(),
            &[b"login: ", &answer, b"payload", &sync(1), b"x"],
        );
        assert_eq!(seen, [Seen::Session(1), Seen::Payload(vec![b'x'])]);
    }

    #[test]
    fn the_same_nonce_is_the_same_session() {
        let seen = receive(
            &mut GuestStream::new(),
            &[&sync(1), &sync(1), b"x", &sync(1), b"y", &sync(2)],
        );
        assert_eq!(
            seen,
            [
                Seen::Session(1),
                Seen::Again(1),
                Seen::Payload(vec![b'x']),
                Seen::Again(1),
                Seen::Payload(vec![b'y']),
                Seen::Session(2),
            ]
        );
    }

    #[test]
    fn a_sync_is_found_behind_whatever_was_cut_off() {
        let whole = [payload(b"a}b~c"), sync(5)].concat();
        for end in 0..whole.len() {
            let mut stream = GuestStream::new();
            receive(&mut stream, &[&sync(9), &whole[..end]]);
            let mut seen = receive(&mut stream, &[&sync(6), b"z"]);
            if end == whole.len() - 1 {
                assert_eq!(seen.remove(0), Seen::Session(5));
            }
            assert_eq!(seen, [Seen::Session(6), Seen::Payload(vec![b'z'])], "{end}");
        }
    }

    #[test]
    fn a_lone_flag_does_no_harm_in_front_of_a_mark() {
        let seen = receive(&mut GuestStream::new(), &[b"~~", &sync(1), b"~", &sync(1)]);
        assert_eq!(seen, [Seen::Session(1), Seen::Again(1)]);
    }

    #[test]
    fn what_is_malformed_is_dropped_up_to_the_next_mark() {
        let answer = encode_mark(Mark::Answer, 1);
        let upper = b"~S0000000000000000000000000000000A~";
        let long = b"~S000000000000000000000000000000011~";
        for bad in [
            b"}x".as_slice(),
            b"}}",
            b"~x",
            b"~S0x",
            upper,
            long,
            &answer,
        ] {
            let mut stream = GuestStream::new();
            let seen = receive(&mut stream, &[&sync(1), b"a", bad, b"bcd", &sync(1), b"e"]);
            // There is a hole in the session, so that the same nonce begins it anew.
            let expected = [
                Seen::Session(1),
                Seen::Payload(vec![b'a']),
                Seen::Session(1),
                Seen::Payload(vec![b'e']),
            ];
            assert_eq!(seen, expected, "{bad:?}");
        }
    }

    #[test]
    fn a_session_that_is_given_up_is_over() {
        let mut stream = GuestStream::new();
        receive(&mut stream, &[&sync(1), b"a"]);
        stream.lose();
        assert_eq!(receive(&mut stream, &[b"b", &sync(1)]), [Seen::Session(1)]);
    }

    #[test]
    fn garbage_hides_no_later_sync() {
        let mut chance = Chance(2);
        for _ in 0..2000 {
            let mut stream = GuestStream::new();
            let garbage = chance.bytes(80);
            receive(&mut stream, &[&garbage]);
            let nonce = (u128::from(chance.0) << 64) + 1;
            assert_eq!(
                receive(&mut stream, &[&sync(nonce), b"x"]),
                [Seen::Session(nonce), Seen::Payload(vec![b'x'])]
            );
        }
    }
}
