//! Formatting that says so when there is no memory for the text.

use crate::error::Error;
use alloc::collections::TryReserveError;
use alloc::string::String;
use core::fmt::{self, Write};

/// What [`try_format!`](crate::try_format) calls.
///
/// # Errors
///
/// [`Error::INSUFFICIENT_RESOURCES`] without memory, [`Error::UNSUCCESSFUL`] if a value's own
/// formatting fails.
pub fn try_format(arguments: fmt::Arguments<'_>) -> Result<String, Error> {
    let mut writer = TryWriter {
        text: String::new(),
        refusal: None,
    };
    match (writer.write_fmt(arguments), writer.refusal) {
        (Ok(()), _) => Ok(writer.text),
        (Err(_), Some(refusal)) => Err(refusal.into()),
        (Err(_), None) => Err(Error::UNSUCCESSFUL),
    }
}

/// A string that keeps what `fmt::Error` cannot carry.
struct TryWriter {
    text: String,
    refusal: Option<TryReserveError>,
}

impl Write for TryWriter {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if let Err(refusal) = self.text.try_reserve(part.len()) {
            self.refusal = Some(refusal);
            return Err(fmt::Error);
        }
        self.text.push_str(part);
        Ok(())
    }
}

/// `format!`, with a `Result<String, Error>`.
///
/// ```no_run
/// # use windows_kernel_rs::{Error, try_format};
/// fn device_name(number: u32) -> Result<String, Error> {
///     try_format!(r"\Device\Hello{number}")
/// }
/// ```
#[macro_export]
macro_rules! try_format {
    ($($argument:tt)*) => {
        $crate::format::try_format(::core::format_args!($($argument)*))
    };
}
