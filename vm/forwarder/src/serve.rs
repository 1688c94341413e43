//! The program that owns the port: one thread, which waits for whatever comes first.

use crate::forwarder::Forwarder;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLOUT, PollFd};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// How much of the trace may wait before who writes more of it has to.
const SEND_BUFFER: i32 = 4 << 20;
/// The rest of a longer message is lost. Wine's are of some 1,100 bytes.
const LONGEST: usize = 1 << 20;
/// After so many messages the rest of the world is looked at, even where they are dropped.
const AT_ONCE: usize = 256;
/// How long it takes, at most, to see that the host has connected: a port where nobody is there says "readable".
const ABSENT: i32 = 50;
/// How often to look whether there is a port.
const MISSING: i32 = 1000;

/// Serves `port` for ever; messages are dropped where there is no such port.
pub fn serve(port: &Path, control: &Path) -> io::Result<()> {
    let (ours, theirs) = sys::packet_pair()?;
    sys::pass_credentials(ours.as_fd())?;
    sys::set_send_buffer(theirs.as_fd(), SEND_BUFFER)?;
    let _ = fs::remove_file(control);
    let listener = UnixListener::bind(control)?;
    listener.set_nonblocking(true)?;
    let mut server = Server {
        messages: ours,
        given: theirs,
        listener,
        forwarder: Forwarder::new(nonce()?),
        buffer: vec![0; LONGEST],
        port: None,
        absent: false,
    };
    loop {
        if server.port.is_none() {
            server.port = open(port)?;
        }
        server.turn()?;
    }
}

/// Opens the port, once it is there.
fn open(port: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(sys::O_NONBLOCK);
    match options.open(port) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", port.display()),
        )),
    }
}

fn nonce() -> io::Result<u128> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}

struct Server {
    messages: OwnedFd,
    given: OwnedFd,
    listener: UnixListener,
    forwarder: Forwarder,
    buffer: Vec<u8>,
    port: Option<File>,
    /// Whether nobody is connected to the port at the host, as far as is known.
    absent: bool,
}

impl Server {
    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let takes = self.drops() || !self.forwarder.is_full();
        let mut wanted = [
            PollFd::new(takes.then(|| self.messages.as_fd()), POLLIN),
            PollFd::new(Some(self.listener.as_fd()), POLLIN),
        ];
        let timeout = match self.port {
            None => MISSING,
            Some(_) if self.absent => ABSENT,
            Some(_) => {
                let writes = !self.forwarder.pending().is_empty();
                let events = POLLIN | if writes { POLLOUT } else { 0 };
                return self.turn_with_port(&wanted, events);
            }
        };
        sys::poll(&mut wanted, timeout)?;
        self.take(&wanted)?;
        if self.port.is_some() {
            let mut port = [PollFd::new(self.port.as_ref().map(AsFd::as_fd), POLLIN)];
            sys::poll(&mut port, 0)?;
            self.absent = port[0].has(POLLHUP);
        }
        Ok(())
    }

    fn turn_with_port(&mut self, others: &[PollFd; 2], events: i16) -> io::Result<()> {
        let port = PollFd::new(self.port.as_ref().map(AsFd::as_fd), events);
        let mut wanted = [others[0], others[1], port];
        sys::poll(&mut wanted, -1)?;
        let [messages, listener, port] = wanted;
        self.take(&[messages, listener])?;
        self.absent = port.has(POLLHUP | POLLERR);
        if port.has(POLLIN) {
            self.read()?;
        }
        // What has just been taken goes with what was left.
        if !self.absent { self.write() } else { Ok(()) }
    }

    fn take(&mut self, [messages, listener]: &[PollFd; 2]) -> io::Result<()> {
        if listener.has(POLLIN) {
            self.give()?;
        }
        if messages.has(POLLIN) {
            self.take_messages()?;
        }
        Ok(())
    }

    /// Gives the socket to who asks. That one may be gone again, which is no harm.
    fn give(&self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((connection, _)) => {
                let _ = sys::give(connection.as_fd(), self.given.as_fd());
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether messages are dropped, for nobody reads them: who writes must not wait for a host that has gone.
    fn drops(&self) -> bool {
        self.absent || self.forwarder.drops()
    }

    /// Takes the messages that are there, but not more than the port takes at once.
    fn take_messages(&mut self) -> io::Result<()> {
        for _ in 0..AT_ONCE {
            if self.forwarder.is_full() && !self.drops() {
                break;
            }
            match sys::receive_message(self.messages.as_fd(), &mut self.buffer) {
                Ok(_) if self.absent => {}
                Ok((length, sender)) => self.forwarder.take_message(&self.buffer[..length], sender),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let Some(port) = &mut self.port else {
            return Ok(());
        };
        match port.read(&mut self.buffer[..4096]) {
            Ok(0) => self.absent = true,
            Ok(count) => self.forwarder.receive(&self.buffer[..count]),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(port) = &mut self.port else {
            return Ok(());
        };
        while !self.forwarder.pending().is_empty() {
            match port.write(self.forwarder.pending()) {
                Ok(count) => self.forwarder.wrote(count),
                Err(error) if is_passing(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
