//! kdagent: the program in the guest that does what the host asks, over a duplex byte stream.
//!
//! ```text
//! kdagent [--end stdio]      one host, at standard input and output
//! kdagent --end resident     hosts that come and go, at standard input and output, which are a port
//! kdagent --end port NAME    the same at a port that is opened: \\.\COM1, \\.\Global\com.kdriver.agent.0
//! kdagent --service SERVICE --end port NAME    the same as the Windows service of that name
//! kdagent --check-bytes      as the first, once all byte values have gone there and back
//! kdagent --base64           as the first, in lines of base64
//! ```
//!
//! No C runtime and nothing to install: it imports kernel32, advapi32 and ntdll alone, of Windows 10 and
//! later and of Wine 8 and later. It ends at once when its input ends, but for that of a port, which does not.
//!
//! Exit codes: 0 the input ended or the service was stopped, 1 it could not begin, 2 the host broke the protocol, 3 a bug of ours
//! (both told on stderr), 64 a command line that it does not know.
#![no_std]
#![no_main]

extern crate alloc;

mod clock;
mod end;
mod failure;
mod handle;
mod requests;
mod runtime;
mod server;
mod service;
mod session;
mod sync;
mod sys;
mod text;
mod thread;
mod workers;

use alloc::format;

use end::{Choice, End};
use server::Server;

/// What the linker is told, so that a build needs neither a build script nor a configuration.
#[used]
#[unsafe(link_section = ".drectve")]
static LINKER: [u8; 52] = *b"/ENTRY:start /SUBSYSTEM:CONSOLE /NODEFAULTLIB:msvcrt";

/// Where Windows begins.
#[unsafe(no_mangle)]
extern "system" fn start() -> ! {
    // Nobody is there to click a box away: not ours, nor one of a program that we start, which inherits this.
    // SAFETY: no preconditions.
    unsafe {
        sys::SetErrorMode(
            sys::SEM_FAILCRITICALERRORS | sys::SEM_NOGPFAULTERRORBOX | sys::SEM_NOOPENFILEERRORBOX,
        )
    };
    let Some(choice) = Choice::from_command_line() else {
        runtime::complain(b"usage: kdagent [--check-bytes|--base64|[--service NAME] --end stdio|resident|port NAME]\n");
        runtime::exit(64);
    };
    let ended = match &choice {
        Choice::Service { name, .. } => service::run(name),
        _ => End::open(&choice).and_then(Server::serve),
    };
    if let Err(failure) = ended {
        let error = failure.to_message();
        let complaint = format!("kdagent: can't {}: error {}\n", error.message, error.code);
        runtime::complain(complaint.as_bytes());
    }
    runtime::exit(1)
}
