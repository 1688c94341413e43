//! The kernel's strings.

use crate::error::Error;
use alloc::string::String;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::slice;
use kernel_text::utf16;
use windows_kernel_sys::base::UNICODE_STRING;

/// A `UNICODE_STRING` for the kernel to read, over units that somebody else keeps.
pub(crate) struct UnicodeString<'units> {
    raw: UNICODE_STRING,
    units: PhantomData<&'units [u16]>,
}

impl<'units> UnicodeString<'units> {
    /// Over a literal; one that is too long does not compile.
    pub(crate) const fn of_literal<const LENGTH: usize>(units: &'units [u16; LENGTH]) -> Self {
        const { assert!(LENGTH <= MOST_UNITS) }
        Self::over(units)
    }

    /// Over any units that are not too many.
    pub(crate) fn new(units: &'units [u16]) -> Result<Self, Error> {
        if units.len() > MOST_UNITS {
            return Err(Error::OBJECT_NAME_INVALID);
        }
        Ok(Self::over(units))
    }

    #[allow(clippy::cast_possible_truncation)] // both callers looked
    const fn over(units: &'units [u16]) -> Self {
        let bytes = size_of_val(units) as u16;
        Self {
            raw: UNICODE_STRING {
                Length: bytes,
                MaximumLength: bytes,
                Buffer: units.as_ptr().cast_mut(),
            },
            units: PhantomData,
        }
    }

    pub(crate) const fn as_raw(&self) -> *const UNICODE_STRING {
        &raw const self.raw
    }
}

/// The length is in bytes, and has 16 bits.
const MOST_UNITS: usize = u16::MAX as usize / 2;

/// The kernel's string as text.
///
/// # Safety
///
/// `string` is null, or a well-formed string that nobody changes meanwhile.
pub(crate) unsafe fn try_decode(string: *const UNICODE_STRING) -> Result<String, Error> {
    // SAFETY: as the caller promises.
    let Some(string) = (unsafe { string.as_ref() }) else {
        return Ok(String::new());
    };
    if string.Buffer.is_null() {
        return Ok(String::new());
    }
    // SAFETY: a well-formed string has that many bytes there.
    let units = unsafe { slice::from_raw_parts(string.Buffer, usize::from(string.Length) / 2) };
    Ok(utf16::try_decode(units.iter().copied())?)
}

/// Text as units for a [`UnicodeString`].
pub(crate) fn try_encode(text: &str) -> Result<Vec<u16>, Error> {
    Ok(utf16::try_encode(text)?)
}
