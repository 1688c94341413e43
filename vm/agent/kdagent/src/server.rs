//! Frames in, requests to the workers, frames out.

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use frames::{Decoder, Frame, FrameError, Kind, MAX_BODY, Request, Wire, encode, to_bytes};

use crate::end::End;
use crate::failure::Failure;
use crate::requests::{self, devices::Devices, files, files::Uploads};
use crate::sync::Mutex;
use crate::workers::Workers;
use crate::{runtime, sys, thread};

/// The exit code after a frame that is none.
const EXIT_PROTOCOL: u32 = 2;

/// How long the last error frame may take to be written, in milliseconds.
const LAST_WORDS: u32 = 1000;

/// What lives as long as the process.
pub struct Server {
    end: End,
    writing: Mutex<()>,
    pub workers: Workers,
    pub uploads: Uploads,
    pub devices: Devices,
}

impl Server {
    /// Serves the host until the stream ends, and with it the process.
    pub fn serve(end: End) -> ! {
        let server: &'static Server = Box::leak(Box::new(Server {
            end,
            writing: Mutex::new(()),
            workers: Workers::new(),
            uploads: Uploads::new(),
            devices: Devices::new(),
        }));
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = server.end.read(&mut buffer);
            if count == 0 {
                server.leave(0);
            }
            decoder.receive_data(&buffer[..count]);
            loop {
                match decoder.next_frame() {
                    Ok(Some(request)) if request.kind == Kind::Request => {
                        if Workers::submit(server, request).is_err() {
                            server.leave(EXIT_PROTOCOL);
                        }
                    }
                    Ok(Some(other)) => server.give_up(FrameError::Kind(other.kind as u8)),
                    Ok(None) => break,
                    Err(error) => server.give_up(error),
                }
            }
        }
    }

    /// Runs a request and answers it.
    pub fn serve_request(&'static self, frame: &Frame) {
        let mut reply = Reply {
            server: self,
            operation: frame.operation,
            request: frame.request,
        };
        let result = match Request::read(frame.operation, &frame.body) {
            None => Err(Failure::Refused("no such operation")),
            Some(Err(malformed)) => Err(Failure::Refused(malformed.0)),
            Some(Ok(request)) => requests::serve(self, request, &mut reply),
        };
        if let Err(failure) = result {
            reply.fail(failure);
        }
    }

    /// Answers a request that no thread is left for.
    pub fn refuse(&'static self, frame: &Frame) {
        Reply {
            server: self,
            operation: frame.operation,
            request: frame.request,
        }
        .fail(Failure::Refused("too many requests at a time"));
    }

    fn write(&self, kind: Kind, operation: u16, request: u32, body: &[u8]) {
        let mut frame = Vec::new();
        encode(kind, operation, request, body, &mut frame);
        let writing = self.writing.lock();
        let result = self.end.write(&frame);
        drop(writing);
        if result.is_err() {
            self.leave(0);
        }
    }

    /// Says why, if the host still reads, and ends.
    fn give_up(&'static self, error: FrameError) -> ! {
        let _ = thread::spawn(move || {
            let body = to_bytes(&frames::Error {
                domain: 0,
                code: 0,
                message: &error.to_string(),
            });
            self.write(Kind::Error, 0, 0, &body);
            self.leave(EXIT_PROTOCOL);
        });
        // SAFETY: no preconditions.
        unsafe { sys::Sleep(LAST_WORDS) };
        self.leave(EXIT_PROTOCOL)
    }

    fn leave(&self, code: u32) -> ! {
        files::forget_all();
        runtime::exit(code)
    }
}

/// The place for a request's answer.
#[derive(Clone)]
pub struct Reply {
    server: &'static Server,
    operation: u16,
    request: u32,
}

impl Reply {
    /// Answers, in as many frames as it takes.
    pub fn send<'a>(&mut self, message: &impl Wire<'a>) {
        self.finish(&to_bytes(message));
    }

    /// Sends a piece of the answer before the rest is there.
    pub fn part(&mut self, piece: &[u8]) {
        for body in piece.chunks(MAX_BODY) {
            self.server
                .write(Kind::Part, self.operation, self.request, body);
        }
    }

    /// Sends the last piece of the answer.
    pub fn finish(&mut self, piece: &[u8]) {
        let last = piece.len() - piece.len() % MAX_BODY;
        let (parts, rest) = piece.split_at(last);
        self.part(parts);
        self.server
            .write(Kind::Reply, self.operation, self.request, rest);
    }

    fn fail(&mut self, failure: Failure) {
        self.server.write(
            Kind::Error,
            self.operation,
            self.request,
            &to_bytes(&failure.to_message()),
        );
    }
}
