//! What goes to the port, without the port.

use frames::port::{Event, GuestStream, Mark, encode_mark, encode_payload};

/// How many bytes may wait for the port before no more messages are taken: as many as it takes at once.
const ENOUGH: usize = 32 << 10;

/// The state of the stream to the host.
pub struct Forwarder {
    stream: GuestStream,
    /// Whether the host has ever asked: before that there is nobody for whom messages are kept.
    synced: bool,
    out: Vec<u8>,
    sent: usize,
}

impl Forwarder {
    /// A forwarder that has just begun: its first bytes say so, with this nonce.
    pub fn new(nonce: u128) -> Self {
        Forwarder {
            stream: GuestStream::new(),
            synced: false,
            out: encode_mark(Mark::Boot, nonce).to_vec(),
            sent: 0,
        }
    }

    /// Whether messages are dropped, since nobody has asked for any yet.
    pub fn drops(&self) -> bool {
        !self.synced
    }

    /// Whether as much waits as the port takes at once.
    pub fn is_full(&self) -> bool {
        self.pending().len() >= ENOUGH
    }

    /// Takes a message that the process `sender` wrote.
    pub fn take_message(&mut self, message: &[u8], sender: u32) {
        if self.drops() {
            return;
        }
        let length = u32::try_from(message.len()).expect("the buffer is smaller");
        encode_payload(&length.to_le_bytes(), &mut self.out);
        encode_payload(&sender.to_le_bytes(), &mut self.out);
        encode_payload(message, &mut self.out);
    }

    /// Takes what came from the host.
    pub fn receive(&mut self, mut data: &[u8]) {
        while let Some(event) = self.stream.next_event(&mut data) {
            match event {
                Event::Session(nonce) => {
                    self.synced = true;
                    // What waits is of the session before, and its first frame may be cut.
                    self.out.clear();
                    self.sent = 0;
                    self.out.extend(encode_mark(Mark::Answer, nonce));
                }
                Event::Again(nonce) => self.out.extend(encode_mark(Mark::Answer, nonce)),
                Event::Payload(_) => {} // the host has nothing to say
            }
        }
    }

    /// What is to be written to the port.
    pub fn pending(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// So many bytes of what was pending are written.
    pub fn wrote(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &[u8] = b"~~B00000000000000000000000000000009~";

    fn sync(nonce: u8) -> Vec<u8> {
        format!("~S{nonce:032x}~").into_bytes()
    }

    fn answer(nonce: u8) -> Vec<u8> {
        format!("~~A{nonce:032x}~").into_bytes()
    }

    fn write_all(forwarder: &mut Forwarder) -> Vec<u8> {
        let bytes = forwarder.pending().to_vec();
        forwarder.wrote(bytes.len());
        bytes
    }

    #[test]
    fn a_message_is_framed_with_its_sender() {
        let mut forwarder = Forwarder::new(9);
        forwarder.receive(&sync(1));
        forwarder.take_message(b"a~b\n", 0x1234);
        assert_eq!(
            write_all(&mut forwarder),
            [&answer(1)[..], b"\x04\0\0\0\x34\x12\0\0a}^b\n"].concat()
        );
    }

    #[test]
    fn messages_that_nobody_asked_for_are_dropped() {
        let mut forwarder = Forwarder::new(9);
        assert!(forwarder.drops());
        forwarder.take_message(b"early\n", 1);
        assert_eq!(write_all(&mut forwarder), BOOT);
        forwarder.receive(&sync(1));
        assert!(!forwarder.drops());
        assert_eq!(write_all(&mut forwarder), answer(1));
    }

    #[test]
    fn a_new_session_has_nothing_of_the_one_before() {
        let mut forwarder = Forwarder::new(9);
        forwarder.receive(&sync(1));
        forwarder.take_message(b"old\n", 1);
        forwarder.wrote(40);
        forwarder.receive(&sync(2));
        assert_eq!(write_all(&mut forwarder), answer(2));
    }

    #[test]
    fn the_same_session_loses_nothing() {
        let mut forwarder = Forwarder::new(9);
        forwarder.receive(&sync(1));
        write_all(&mut forwarder);
        forwarder.take_message(b"x", 1);
        forwarder.receive(&sync(1));
        let frame = b"\x01\0\0\0\x01\0\0\0x".as_slice();
        assert_eq!(write_all(&mut forwarder), [frame, &answer(1)].concat());
    }

    #[test]
    fn it_is_full_until_the_port_has_taken_some() {
        let mut forwarder = Forwarder::new(9);
        forwarder.receive(&sync(1));
        while !forwarder.is_full() {
            forwarder.take_message(&[b'x'; 1000], 1);
        }
        assert!(forwarder.pending().len() < ENOUGH + 1100);
        forwarder.wrote(2000);
        assert!(!forwarder.is_full());
    }
}
