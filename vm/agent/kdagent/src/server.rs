//! Frames in, requests to the workers, frames out.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use frames::port::{Event, GuestStream, Mark, encode_mark, encode_payload};
use frames::{Decoder, Frame, FrameError, Kind, MAX_BODY, Request, Wire, encode, to_bytes};

use crate::end::End;
use crate::failure::{Answer, Failure};
use crate::requests::{self, devices::Devices, files, files::Uploads};
use crate::session::Session;
use crate::sync::{Condition, Mutex};
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
    marks: Marks,
    pub workers: Workers,
    pub uploads: Uploads,
    pub devices: Devices,
}

impl Server {
    /// Serves hosts until the stream ends, and with it the process; that of a port does not end.
    pub fn serve(end: End) -> Answer {
        let server: &'static Server = Box::leak(Box::new(Server {
            end,
            writing: Mutex::new(()),
            marks: Marks::new(),
            workers: Workers::new(),
            uploads: Uploads::new(),
            devices: Devices::new(),
        }));
        if server.end.is_port() {
            server.serve_port()
        } else {
            server.serve_host()
        }
    }

    /// Serves the one host of a stream that ends with it.
    fn serve_host(&'static self) -> Answer {
        let mut conversation = Conversation::new(self)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = self.end.read(&mut buffer);
            if count == 0 {
                self.leave(0);
            }
            if let Err(complaint) = conversation.receive_data(&buffer[..count]) {
                self.complain(&conversation.session, complaint, true);
                // SAFETY: no preconditions.
                unsafe { sys::Sleep(LAST_WORDS) };
                self.leave(EXIT_PROTOCOL);
            }
        }
    }

    /// Serves the hosts of a port, one after the other.
    ///
    /// This thread never writes: while nobody reads, a write waits, and the next host is to be heard.
    fn serve_port(&'static self) -> Answer {
        self.marks.begin(self)?;
        let mut stream = GuestStream::new();
        let mut conversation = Conversation::new(self)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = self.end.read(&mut buffer);
            let mut rest = &buffer[..count];
            while let Some(event) = stream.next_event(&mut rest) {
                match event {
                    Event::Session(nonce) => {
                        conversation.session.end();
                        self.clean_up();
                        conversation = Conversation::new(self)?;
                        self.marks.answer(nonce);
                    }
                    Event::Again(nonce) => self.marks.answer(nonce),
                    Event::Payload(data) => {
                        if let Err(complaint) = conversation.receive_data(data) {
                            self.complain(&conversation.session, complaint, false);
                            stream.lose();
                        }
                    }
                }
            }
        }
    }

    /// Takes away what the sessions that are over have left.
    fn clean_up(&'static self) {
        let uploads = self.uploads.take_all();
        let devices = self.devices.take_all();
        if uploads.is_empty() && devices.is_empty() {
            return;
        }
        // By a thread of its own, for a driver may take its time. Without one they stay as they are, unseen.
        let _ = thread::spawn(move || {
            drop(uploads);
            self.devices.close_all(devices);
        });
    }

    /// Runs a request and answers it.
    pub fn serve_request(&'static self, session: &Arc<Session>, frame: &Frame) {
        if session.is_over() {
            return;
        }
        let mut reply = self.reply(session, frame);
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
    pub fn refuse(&'static self, session: &Arc<Session>, frame: &Frame) {
        self.reply(session, frame)
            .fail(Failure::Refused("too many requests at a time"));
    }

    fn reply(&'static self, session: &Arc<Session>, frame: &Frame) -> Reply {
        Reply {
            server: self,
            session: session.clone(),
            operation: frame.operation,
            request: frame.request,
        }
    }

    /// Writes a frame, unless its session is over.
    fn write(&self, session: &Session, kind: Kind, operation: u16, request: u32, body: &[u8]) {
        let mut frame = Vec::new();
        encode(kind, operation, request, body, &mut frame);
        if self.end.is_port() {
            let mut payload = Vec::new();
            encode_payload(&frame, &mut payload);
            frame = payload;
        }
        self.write_bytes(&frame, || session.is_over());
    }

    fn write_bytes(&self, data: &[u8], is_over: impl Fn() -> bool) {
        let writing = self.writing.lock();
        let result = if is_over() {
            Ok(())
        } else {
            self.end.write(data, is_over)
        };
        drop(writing);
        if result.is_err() && !self.end.is_port() {
            self.leave(0);
        }
    }

    /// Says what is wrong with what the host sends, by a thread of its own, for nobody may read it.
    fn complain(&'static self, session: &Arc<Session>, complaint: String, leave: bool) {
        let session = session.clone();
        let _ = thread::spawn(move || {
            let body = to_bytes(&frames::Error {
                domain: 0,
                code: 0,
                message: &complaint,
            });
            self.write(&session, Kind::Error, 0, 0, &body);
            if leave {
                self.leave(EXIT_PROTOCOL);
            }
        });
    }

    fn leave(&self, code: u32) -> ! {
        files::forget_all();
        runtime::exit(code)
    }
}

/// What one session's host says.
struct Conversation {
    server: &'static Server,
    session: Arc<Session>,
    decoder: Decoder,
}

impl Conversation {
    fn new(server: &'static Server) -> Answer<Self> {
        Ok(Conversation {
            server,
            session: Arc::new(Session::new()?),
            decoder: Decoder::new(),
        })
    }

    /// Takes what came; an error says why nothing behind it can be understood.
    fn receive_data(&mut self, data: &[u8]) -> Result<(), String> {
        self.decoder.receive_data(data);
        while let Some(request) = self.decoder.next_frame().map_err(|e| e.to_string())? {
            if request.kind != Kind::Request {
                return Err(FrameError::Kind(request.kind as u8).to_string());
            }
            Workers::submit(self.server, &self.session, request)
                .map_err(|()| String::from("too many requests wait for an answer"))?;
        }
        Ok(())
    }
}

/// The marks that a port's hosts wait for, and the thread that writes them.
struct Marks {
    /// The nonce of the session to be told of; a later one takes the place of one that nobody reads.
    answer: Mutex<Option<u128>>,
    asked: Condition,
}

impl Marks {
    const fn new() -> Self {
        Marks {
            answer: Mutex::new(None),
            asked: Condition::new(),
        }
    }

    fn begin(&'static self, server: &'static Server) -> Answer {
        thread::spawn(move || {
            server.write_bytes(&encode_mark(Mark::Boot, runtime::random()), || false);
            loop {
                let mut answer = self.answer.lock();
                let Some(nonce) = answer.take() else {
                    self.asked.wait(&mut answer);
                    continue;
                };
                drop(answer);
                server.write_bytes(&encode_mark(Mark::Answer, nonce), || false);
            }
        })
    }

    fn answer(&self, nonce: u128) {
        *self.answer.lock() = Some(nonce);
        self.asked.wake_one();
    }
}

/// The place for a request's answer.
#[derive(Clone)]
pub struct Reply {
    server: &'static Server,
    session: Arc<Session>,
    operation: u16,
    request: u32,
}

impl Reply {
    /// Whom the answer is for.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Answers, in as many frames as it takes.
    pub fn send<'a>(&mut self, message: &impl Wire<'a>) {
        self.finish(&to_bytes(message));
    }

    /// Sends a piece of the answer before the rest is there.
    pub fn part(&mut self, piece: &[u8]) {
        for body in piece.chunks(MAX_BODY) {
            self.write(Kind::Part, body);
        }
    }

    /// Sends the last piece of the answer.
    pub fn finish(&mut self, piece: &[u8]) {
        let last = piece.len() - piece.len() % MAX_BODY;
        let (parts, rest) = piece.split_at(last);
        self.part(parts);
        self.write(Kind::Reply, rest);
    }

    fn fail(&mut self, failure: Failure) {
        self.write(Kind::Error, &to_bytes(&failure.to_message()));
    }

    fn write(&self, kind: Kind, body: &[u8]) {
        self.server
            .write(&self.session, kind, self.operation, self.request, body);
    }
}
