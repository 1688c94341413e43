//! `kdtrace`: the stderr of all of Wine's programs in a guest, brought to the host through one port.
//!
//! ```text
//! kdtrace serve PORT                     owns PORT, and gives its socket's end to whoever asks
//! kdtrace run [--port PORT] PROGRAM ...  becomes PROGRAM, with that end as its stderr, and PORT as stdin and stdout
//! ```
//!
//! Wine writes each message of its trace by one `write`, and where a message ends can't be told afterwards. So
//! that stderr is a socket that keeps borders (`SOCK_SEQPACKET`), the same for all programs, so that their order
//! is kept too. A port has neither, so each message goes there in a frame: u32 length, u32 pid of who wrote it,
//! both little-endian, the message. Below that is the layer of `frames::port`.

mod forwarder;
mod run;
mod serve;
mod sys;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

const CONTROL: &str = "/run/kdriver/trace";
const USAGE: &str = "usage: kdtrace serve PORT | kdtrace run [--port PORT] PROGRAM [ARGUMENT...]";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let arguments: Vec<&Path> = arguments.iter().map(Path::new).collect();
    let words: Vec<&str> = arguments
        .iter()
        .map(|word| word.to_str().unwrap_or(""))
        .collect();
    let control = Path::new(CONTROL);
    let failure = match (words.as_slice(), arguments.as_slice()) {
        (["serve", _], [_, port]) => serve::serve(port, control).unwrap_err(),
        (["run", "--port", _, _, ..], [_, _, port, program @ ..]) => {
            run::run(Some(port), program, control)
        }
        (["run", "--port", ..], _) => usage(),
        (["run", _, ..], [_, program @ ..]) => run::run(None, program, control),
        _ => usage(),
    };
    eprintln!("kdtrace: {failure}");
    ExitCode::FAILURE
}

fn usage() -> std::io::Error {
    std::io::Error::other(USAGE)
}
