//! kdagent: the program in the guest that does what the host asks, over a duplex byte stream.
//!
//! ```text
//! kdagent [--end stdio]
//! ```
//!
//! No C runtime and nothing to install: it imports kernel32, advapi32 and ntdll alone, of Windows 10 and
//! later and of Wine 8 and later. It ends at once when its input ends.
//!
//! Exit codes: 0 the input ended, 2 the host broke the protocol, 3 a bug of ours (told on stderr), 64 a
//! command line that it does not know.
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
mod sync;
mod sys;
mod text;
mod thread;
mod workers;

use end::End;
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
    let Some(end) = End::from_command_line() else {
        runtime::complain(b"usage: kdagent [--end stdio]\n");
        runtime::exit(64);
    };
    Server::serve(end)
}
