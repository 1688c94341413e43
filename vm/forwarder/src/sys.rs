//! The system calls that the standard library does not offer, for Linux on x86-64.

use std::ffi::{c_int, c_short, c_uint, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

pub const POLLIN: c_short = 0x1;
pub const POLLOUT: c_short = 0x4;
pub const POLLERR: c_short = 0x8;
pub const POLLHUP: c_short = 0x10;

pub const O_NONBLOCK: c_int = 0o4000;

const AF_UNIX: c_int = 1;
const SOCK_SEQPACKET: c_int = 5;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const SOL_SOCKET: c_int = 1;
const SO_SNDBUF: c_int = 7;
const SO_PASSCRED: c_int = 16;
const SO_SNDBUFFORCE: c_int = 32;
const SCM_RIGHTS: c_int = 1;
const SCM_CREDENTIALS: c_int = 2;
const MSG_DONTWAIT: c_int = 0x40;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;

#[repr(C)]
struct IoVec {
    base: *mut c_void,
    length: usize,
}

#[repr(C)]
struct MsgHdr {
    name: *mut c_void,
    name_length: c_uint,
    vectors: *mut IoVec,
    vector_count: usize,
    control: *mut c_void,
    control_length: usize,
    flags: c_int,
}

/// A control message's header, and room for the largest of the bodies: credentials (three ints).
#[repr(C)]
#[derive(Default)]
struct Control {
    length: usize,
    level: c_int,
    kind: c_int,
    body: [c_int; 4],
}

/// What `cmsg_len` is for a body of so many ints.
const fn control_length(ints: usize) -> usize {
    size_of::<usize>() + (2 + ints) * size_of::<c_int>()
}

/// `struct pollfd`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PollFd {
    fd: RawFd,
    events: c_short,
    revents: c_short,
}

impl PollFd {
    /// `events` of `fd`; none of it where there is no `fd`.
    pub fn new(fd: Option<BorrowedFd<'_>>, events: c_short) -> Self {
        PollFd {
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
            events,
            revents: 0,
        }
    }

    /// Whether any of `events` was seen.
    pub fn has(&self, events: c_short) -> bool {
        self.revents & events != 0
    }
}

unsafe extern "C" {
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, fds: *mut RawFd) -> c_int;
    fn setsockopt(
        fd: RawFd,
        level: c_int,
        name: c_int,
        value: *const c_void,
        length: c_uint,
    ) -> c_int;
    fn recvmsg(fd: RawFd, message: *mut MsgHdr, flags: c_int) -> isize;
    fn sendmsg(fd: RawFd, message: *const MsgHdr, flags: c_int) -> isize;
    #[link_name = "poll"]
    fn c_poll(fds: *mut PollFd, count: u64, timeout: c_int) -> c_int;
    #[link_name = "dup2"]
    fn c_dup2(from: RawFd, to: RawFd) -> RawFd;
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Two connected sockets that keep the borders of messages.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for the two.
    checked(unsafe { socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds.as_mut_ptr()) })?;
    // SAFETY: both are new, and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

fn set_option(fd: BorrowedFd<'_>, name: c_int, value: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as c_uint;
    // SAFETY: the value is an int of that length, and only read.
    checked(unsafe {
        setsockopt(
            fd.as_raw_fd(),
            SOL_SOCKET,
            name,
            (&raw const value).cast(),
            length,
        )
    })?;
    Ok(())
}

/// Has messages that are received from `fd` say which process sent them.
pub fn pass_credentials(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, SO_PASSCRED, 1)
}

/// How many bytes may wait behind `fd`; beyond the system's limit only root may.
pub fn set_send_buffer(fd: BorrowedFd<'_>, bytes: c_int) -> io::Result<()> {
    set_option(fd, SO_SNDBUFFORCE, bytes).or_else(|_| set_option(fd, SO_SNDBUF, bytes))
}

/// Waits up to `timeout` milliseconds, -1 for ever.
pub fn poll(fds: &mut [PollFd], timeout: c_int) -> io::Result<()> {
    // SAFETY: the slice is of the system's own layout, and as long as is said.
    match checked(unsafe { c_poll(fds.as_mut_ptr(), fds.len() as u64, timeout) }) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        result => result.map(drop),
    }
}

/// Makes `to` another name of `from`.
pub fn duplicate_to(from: BorrowedFd<'_>, to: RawFd) -> io::Result<()> {
    // SAFETY: only 0, 1 and 2 are given, which the standard library does not own.
    checked(unsafe { c_dup2(from.as_raw_fd(), to) })?;
    Ok(())
}

/// A message that waits at `fd`, and the process that sent it; `WouldBlock` where there is none.
pub fn receive_message(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, u32)> {
    let mut control = Control::default();
    let length = receive(fd, buffer, &mut control, MSG_DONTWAIT)?;
    let credentials = control.level == SOL_SOCKET && control.kind == SCM_CREDENTIALS;
    Ok((
        length,
        if credentials {
            control.body[0] as u32
        } else {
            0
        },
    ))
}

/// Sends one byte and `given`, which the receiver gets a descriptor of its own for.
pub fn give(fd: BorrowedFd<'_>, given: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0u8];
    let mut vector = IoVec {
        base: byte.as_mut_ptr().cast(),
        length: 1,
    };
    let mut control = Control {
        length: control_length(1),
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        body: [given.as_raw_fd(), 0, 0, 0],
    };
    let message = message(&mut vector, &mut control, control_length(1));
    // SAFETY: all that the message names outlives the call.
    if unsafe { sendmsg(fd.as_raw_fd(), &raw const message, MSG_DONTWAIT) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits for what the other side gives.
pub fn take(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut control = Control::default();
    let length = receive(fd, &mut [0], &mut control, MSG_CMSG_CLOEXEC)?;
    let given = control.level == SOL_SOCKET && control.kind == SCM_RIGHTS;
    if length == 0 || !given || control.length != control_length(1) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // SAFETY: the system has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(control.body[0]) })
}

fn receive(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut Control,
    flags: c_int,
) -> io::Result<usize> {
    let mut vector = IoVec {
        base: buffer.as_mut_ptr().cast(),
        length: buffer.len(),
    };
    let mut message = message(&mut vector, control, size_of::<Control>());
    // SAFETY: buffer and control are as long as is said, and outlive the call.
    let length = unsafe { recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

fn message(vector: &mut IoVec, control: &mut Control, control_length: usize) -> MsgHdr {
    MsgHdr {
        name: ptr::null_mut(),
        name_length: 0,
        vectors: vector,
        vector_count: 1,
        control: ptr::from_mut(control).cast(),
        control_length,
        flags: 0,
    }
}
