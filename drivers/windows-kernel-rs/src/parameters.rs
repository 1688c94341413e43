//! Typed reads of the service's `Parameters` key.

use crate::error::Error;
use crate::unicode::{self, UnicodeString};
use alloc::string::String;
use alloc::vec::Vec;
use core::ptr;
use kernel_text::utf16;
use windows_kernel_sys::base::{
    HANDLE, KEY_READ, KEY_VALUE_PARTIAL_INFORMATION, KeyValuePartialInformation,
    OBJ_CASE_INSENSITIVE, OBJ_KERNEL_HANDLE, OBJECT_ATTRIBUTES, REG_BINARY, REG_DWORD,
    REG_EXPAND_SZ, REG_MULTI_SZ, REG_QWORD, REG_SZ, UNICODE_STRING,
};
use windows_kernel_sys::ntoskrnl::{ZwClose, ZwOpenKey, ZwQueryValueKey};

const SUBKEY: [u16; 10] = utf16::literal(b"Parameters");

/// The values under `Parameters` in the service's key.
///
/// A value that is not there is `None`, and so is every value if the key itself is not there. A
/// value of another type is an error, [`Error::OBJECT_TYPE_MISMATCH`]: a mistyped test shall not
/// pass on the default. To be used at `PASSIVE_LEVEL`.
///
/// ```no_run
/// # use windows_kernel_rs::{Error, Parameters};
/// fn lines(registry_path: &str) -> Result<u32, Error> {
///     let parameters = Parameters::open(registry_path)?;
///     Ok(parameters.u32("Lines")?.unwrap_or(10))
/// }
/// ```
#[derive(Debug)]
pub struct Parameters {
    key: Option<Key>,
}

impl Parameters {
    /// Opens the key for reading, if there is one. `registry_path` is what
    /// [`init`](crate::KernelModule::init) got.
    ///
    /// # Errors
    ///
    /// When there is not enough memory, or the service's key cannot be opened.
    pub fn open(registry_path: &str) -> Result<Self, Error> {
        let units = unicode::try_encode(registry_path)?;
        let path = UnicodeString::new(&units)?;
        // SAFETY: a well-formed string that outlives the call.
        unsafe { Self::open_raw(path.as_raw()) }
    }

    /// # Safety
    ///
    /// `registry_path` is a well-formed string that nobody changes meanwhile.
    unsafe fn open_raw(registry_path: *const UNICODE_STRING) -> Result<Self, Error> {
        // SAFETY: as the caller promises; no root is needed for a full path.
        let service = unsafe { Key::open(ptr::null_mut(), registry_path) }?;
        let subkey = UnicodeString::of_literal(&SUBKEY);
        // SAFETY: the string is well formed, and the root is open.
        match unsafe { Key::open(service.handle, subkey.as_raw()) } {
            Ok(key) => Ok(Self { key: Some(key) }),
            Err(Error::OBJECT_NAME_NOT_FOUND) => Ok(Self { key: None }),
            Err(error) => Err(error),
        }
    }

    /// A `REG_DWORD`.
    ///
    /// # Errors
    ///
    /// [`Error::OBJECT_TYPE_MISMATCH`] for another type; or when there is not enough memory, or the
    /// kernel refuses.
    pub fn u32(&self, name: &str) -> Result<Option<u32>, Error> {
        let units = unicode::try_encode(name)?;
        self.dword(&UnicodeString::new(&units)?)
    }

    /// A `REG_QWORD`.
    ///
    /// # Errors
    ///
    /// As for [`u32`](Self::u32).
    pub fn u64(&self, name: &str) -> Result<Option<u64>, Error> {
        let units = unicode::try_encode(name)?;
        let number = self.number(&UnicodeString::new(&units)?, REG_QWORD)?;
        Ok(number.map(u64::from_le_bytes))
    }

    /// A `REG_SZ` or, with nothing expanded, a `REG_EXPAND_SZ`. It ends at its first NUL; a lone
    /// surrogate becomes U+FFFD.
    ///
    /// # Errors
    ///
    /// As for [`u32`](Self::u32).
    pub fn string(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(value) = self.value(name)? else {
            return Ok(None);
        };
        Ok(Some(utf16::try_string(
            value.data(&[REG_SZ, REG_EXPAND_SZ])?,
        )?))
    }

    /// A `REG_MULTI_SZ`. It ends at its first empty string.
    ///
    /// # Errors
    ///
    /// As for [`u32`](Self::u32).
    pub fn multi_string(&self, name: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(value) = self.value(name)? else {
            return Ok(None);
        };
        Ok(Some(utf16::try_multi_string(value.data(&[REG_MULTI_SZ])?)?))
    }

    /// A `REG_BINARY`.
    ///
    /// # Errors
    ///
    /// As for [`u32`](Self::u32).
    pub fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(value) = self.value(name)? else {
            return Ok(None);
        };
        let data = value.data(&[REG_BINARY])?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(data.len())?;
        bytes.extend_from_slice(data);
        Ok(Some(bytes))
    }

    /// Allocates nothing.
    fn dword(&self, name: &UnicodeString<'_>) -> Result<Option<u32>, Error> {
        Ok(self.number(name, REG_DWORD)?.map(u32::from_le_bytes))
    }

    /// Allocates nothing.
    fn number<const BYTES: usize>(
        &self,
        name: &UnicodeString<'_>,
        kind: u32,
    ) -> Result<Option<[u8; BYTES]>, Error> {
        let mut buffer = Buffer::default();
        let value = match self.query(name, &mut buffer.0)? {
            Answer::Missing => return Ok(None),
            Answer::Longer(_) => return Err(Error::OBJECT_TYPE_MISMATCH),
            Answer::Fits => Value { buffer: buffer.0 },
        };
        match value.data(&[kind])?.try_into() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => Err(Error::OBJECT_TYPE_MISMATCH),
        }
    }

    fn value(&self, name: &str) -> Result<Option<Value<Vec<u8>>>, Error> {
        let units = unicode::try_encode(name)?;
        let name = UnicodeString::new(&units)?;
        let mut buffer = Vec::new();
        let mut bytes = size_of::<Buffer>();
        // Somebody may write a longer value between two calls, hence a loop.
        loop {
            buffer.try_reserve_exact(bytes - buffer.len())?;
            buffer.resize(bytes, 0);
            match self.query(&name, &mut buffer)? {
                Answer::Missing => return Ok(None),
                Answer::Longer(needed) => bytes = needed.max(bytes + 1),
                Answer::Fits => return Ok(Some(Value { buffer })),
            }
        }
    }

    fn query(&self, name: &UnicodeString<'_>, buffer: &mut [u8]) -> Result<Answer, Error> {
        match &self.key {
            Some(key) => key.query(name, buffer),
            None => Ok(Answer::Missing),
        }
    }
}

/// What `Parameters\FailAllocation` says, zero if nothing; without one allocation.
///
/// # Safety
///
/// `registry_path` is a well-formed string that nobody changes meanwhile.
#[cfg(feature = "fail-allocation")]
pub(crate) unsafe fn fail_allocation(registry_path: *const UNICODE_STRING) -> Result<u32, Error> {
    const NAME: [u16; 14] = utf16::literal(b"FailAllocation");
    // SAFETY: as the caller promises.
    let parameters = unsafe { Parameters::open_raw(registry_path) }?;
    Ok(parameters
        .dword(&UnicodeString::of_literal(&NAME))?
        .unwrap_or(0))
}

/// How the kernel answered a query.
enum Answer {
    Missing,
    Longer(usize),
    Fits,
}

const HEAD_BYTES: usize = size_of::<KEY_VALUE_PARTIAL_INFORMATION>();

/// Room for any number.
#[derive(Default)]
#[repr(align(8))]
struct Buffer([u8; HEAD_BYTES + size_of::<u64>()]);

/// A value as the kernel gives it: a [`KEY_VALUE_PARTIAL_INFORMATION`], then the data.
struct Value<Bytes: AsRef<[u8]>> {
    buffer: Bytes,
}

impl<Bytes: AsRef<[u8]>> Value<Bytes> {
    /// The data, if they are of one of these types.
    fn data(&self, kinds: &[u32]) -> Result<&[u8], Error> {
        let (head, data) = self.buffer.as_ref().split_at(HEAD_BYTES);
        // SAFETY: the head is that long, made of integers alone, and read without regard to
        // alignment.
        let head = unsafe {
            head.as_ptr()
                .cast::<KEY_VALUE_PARTIAL_INFORMATION>()
                .read_unaligned()
        };
        if !kinds.contains(&head.Type) {
            return Err(Error::OBJECT_TYPE_MISMATCH);
        }
        data.get(..head.DataLength as usize)
            .ok_or(Error::INTERNAL_ERROR)
    }
}

/// An open registry key.
#[derive(Debug)]
struct Key {
    handle: HANDLE,
}

impl Key {
    /// # Safety
    ///
    /// `root` is null or an open key; `name` is a well-formed string that nobody changes meanwhile.
    unsafe fn open(root: HANDLE, name: *const UNICODE_STRING) -> Result<Self, Error> {
        let attributes = OBJECT_ATTRIBUTES {
            #[allow(clippy::cast_possible_truncation)]
            Length: size_of::<OBJECT_ATTRIBUTES>() as u32,
            RootDirectory: root,
            ObjectName: name,
            Attributes: OBJ_CASE_INSENSITIVE | OBJ_KERNEL_HANDLE,
            SecurityDescriptor: ptr::null(),
            SecurityQualityOfService: ptr::null(),
        };
        let mut handle = ptr::null_mut();
        // SAFETY: both pointers outlive the call, and the attributes are well formed.
        Error::check(unsafe { ZwOpenKey(&raw mut handle, KEY_READ, &raw const attributes) })?;
        Ok(Self { handle })
    }

    fn query(&self, name: &UnicodeString<'_>, buffer: &mut [u8]) -> Result<Answer, Error> {
        let bytes = u32::try_from(buffer.len()).map_err(|_| Error::INSUFFICIENT_RESOURCES)?;
        let mut needed = 0;
        // SAFETY: the key is open, the name well formed, and the buffer as long as it is said to
        // be.
        let answer = Error::check(unsafe {
            ZwQueryValueKey(
                self.handle,
                name.as_raw(),
                KeyValuePartialInformation,
                buffer.as_mut_ptr().cast(),
                bytes,
                &raw mut needed,
            )
        });
        match answer {
            Ok(()) => Ok(Answer::Fits),
            Err(Error::OBJECT_NAME_NOT_FOUND) => Ok(Answer::Missing),
            Err(Error::BUFFER_OVERFLOW | Error::BUFFER_TOO_SMALL) => {
                Ok(Answer::Longer(needed as usize))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nobody else's.
        unsafe {
            ZwClose(self.handle);
        }
    }
}
