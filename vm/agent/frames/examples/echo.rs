//! Holds this codec against the host's: verdicts and second writings of what comes on stdin.
//!
//! A record on stdin is: what u8, operation u16, length u32, bytes. `what` is 0 for a stream of frames,
//! 1 for a request's body, 2 for a reply's, 3 for a port's stream, which comes in pieces of `operation` bytes
//! and of which the second writing is payload and answers. A record on stdout is: accepted u8, length u32, and the same
//! written anew, as far as it was accepted.

use std::io::{self, BufWriter, Read, Write};

use frames::port::{Event, GuestStream, Mark, encode_mark, encode_payload};
use frames::{Decoder, Request, encode, rewrite_reply};

fn rewrite_stream(data: &[u8]) -> (bool, Vec<u8>) {
    let mut decoder = Decoder::new();
    let mut out = Vec::new();
    decoder.receive_data(data);
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => encode(
                frame.kind,
                frame.operation,
                frame.request,
                &frame.body,
                &mut out,
            ),
            Ok(None) => return (true, out),
            Err(_) => return (false, out),
        }
    }
}

fn echo_port(data: &[u8], piece: usize) -> Vec<u8> {
    let mut stream = GuestStream::new();
    let mut out = Vec::new();
    for mut piece in data.chunks(piece) {
        while let Some(event) = stream.next_event(&mut piece) {
            match event {
                Event::Session(nonce) | Event::Again(nonce) => {
                    out.extend(encode_mark(Mark::Answer, nonce));
                }
                Event::Payload(data) => encode_payload(data, &mut out),
            }
        }
    }
    out
}

fn main() -> io::Result<()> {
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    let mut output = BufWriter::new(io::stdout().lock());
    let mut rest = &input[..];
    while let Some((&[what, o0, o1, l0, l1, l2, l3], tail)) = rest.split_first_chunk::<7>() {
        let operation = u16::from_le_bytes([o0, o1]);
        let (data, tail) = tail.split_at(u32::from_le_bytes([l0, l1, l2, l3]) as usize);
        rest = tail;
        let (accepted, again) = match what {
            0 => rewrite_stream(data),
            1 => match Request::read(operation, data) {
                Some(Ok(request)) => (true, request.body()),
                _ => (false, Vec::new()),
            },
            3 => (true, echo_port(data, operation.into())),
            _ => match rewrite_reply(operation, data) {
                Some(Ok(again)) => (true, again),
                _ => (false, Vec::new()),
            },
        };
        output.write_all(&[u8::from(accepted)])?;
        output.write_all(&(again.len() as u32).to_le_bytes())?;
        output.write_all(&again)?;
    }
    output.flush()
}
