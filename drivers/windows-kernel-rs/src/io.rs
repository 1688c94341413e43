//! Printing to the kernel's debugger.
//!
//! Nothing here allocates. Text goes to `DbgPrint` as data, never as its format string, at most
//! [`PIECE_BYTES`] bytes a call: longer text is cut at a character's border and sent on. (A newline
//! right after a full piece goes with it.) A NUL is shown as `\0`. To be used at any IRQL up to the
//! devices' (`DIRQL`), as `DbgPrint` itself.
//!
//! Windows filters what is printed by component and level. `DbgPrint` is of the component `DEFAULT`
//! and the level `INFO` (bit 3), which is off unless the registry says otherwise, or a debugger in
//! `Kd_DEFAULT_Mask`: `HKLM\SYSTEM\CurrentControlSet\Control\Session Manager\Debug Print Filter`,
//! value `DEFAULT` (`REG_DWORD`) 8, read at boot.

use core::fmt::{self, Write};
pub use kernel_text::pieces::PIECE_BYTES;
use kernel_text::pieces::PieceWriter;
use windows_kernel_sys::ntoskrnl::DbgPrint;

/// What [`print!`](crate::print) calls.
pub fn print(arguments: fmt::Arguments<'_>) {
    let mut writer = PieceWriter::new(|piece| {
        // SAFETY: both are C strings, and `%s` takes one.
        unsafe {
            DbgPrint(c"%s".as_ptr(), piece.as_ptr());
        }
    });
    // It fails if a value's own formatting fails; what it wrote before is printed all the same.
    let _ = writer.write_fmt(arguments);
    writer.finish();
}

/// Prints to the kernel's debugger.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {
        $crate::io::print(::core::format_args!($($argument)*))
    };
}

/// Prints a line to the kernel's debugger.
#[macro_export]
macro_rules! println {
    () => {
        $crate::print!("\n")
    };
    ($($argument:tt)*) => {
        $crate::print!("{}\n", ::core::format_args!($($argument)*))
    };
}

/// Prints an expression with its place and its value, and gives the value back, as the standard
/// library's does.
///
/// ```no_run
/// # use windows_kernel_rs::dbg;
/// let doubled = dbg!(21 * 2);
/// ```
#[macro_export]
macro_rules! dbg {
    () => {
        $crate::println!("[{}:{}:{}]", ::core::file!(), ::core::line!(), ::core::column!())
    };
    ($value:expr $(,)?) => {
        // A match, so that temporaries live as long as they would without the macro.
        match $value {
            value => {
                $crate::println!(
                    "[{}:{}:{}] {} = {:#?}",
                    ::core::file!(),
                    ::core::line!(),
                    ::core::column!(),
                    ::core::stringify!($value),
                    &value
                );
                value
            }
        }
    };
    ($($value:expr),+ $(,)?) => {
        ($($crate::dbg!($value)),+,)
    };
}
