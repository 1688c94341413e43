//! The registry below HKEY_LOCAL_MACHINE. What the bytes of a value mean is the host's affair.

use alloc::vec;
use alloc::vec::Vec;
use core::ptr::{null, null_mut};

use crate::failure::{Answer, Failure, check_code};
use crate::{sys, text};

struct Key(sys::Handle);

impl Key {
    fn open(path: &str, access: u32) -> Answer<Self> {
        let path = text::wide(path)?;
        let mut key = null_mut();
        // SAFETY: the path ends with a NUL.
        let code = unsafe {
            sys::RegOpenKeyExW(
                sys::HKEY_LOCAL_MACHINE,
                path.as_ptr(),
                0,
                access | sys::KEY_WOW64_64KEY,
                &mut key,
            )
        };
        check_code(code, "open the key").map(|()| Key(key))
    }

    fn create(path: &str) -> Answer<Self> {
        let path = text::wide(path)?;
        let mut key = null_mut();
        // SAFETY: the path ends with a NUL, and null stands for nothing.
        let code = unsafe {
            sys::RegCreateKeyExW(
                sys::HKEY_LOCAL_MACHINE,
                path.as_ptr(),
                0,
                null(),
                0,
                sys::KEY_SET_VALUE | sys::KEY_WOW64_64KEY,
                null(),
                &mut key,
                null_mut(),
            )
        };
        check_code(code, "create the key").map(|()| Key(key))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: the handle is ours.
        unsafe { sys::RegCloseKey(self.0) };
    }
}

/// Sets a value; the key is made where it is not.
pub fn set_value(key: &str, name: &str, kind: u32, data: &[u8]) -> Answer {
    let name = text::wide(name)?;
    let length = u16::try_from(2 * name.len())
        .map_err(|_| Failure::Refused("the value's name is too long"))?;
    let name = sys::UnicodeString {
        length: length - 2,
        maximum_length: length,
        buffer: name.as_ptr(),
    };
    let key = Key::create(key)?;
    // Not RegSetValueExW: it looks for the NUL of a string behind the data that it was told of.
    // SAFETY: the name is whole and stays during the call, the data is as long as told.
    let code =
        unsafe { sys::NtSetValueKey(key.0, &name, 0, kind, data.as_ptr(), data.len() as u32) };
    match code {
        0 => Ok(()),
        code => Err(Failure::Status {
            doing: "set the value",
            code,
        }),
    }
}

/// A value's type and bytes; None if the key or the value is not there.
pub fn get_value(key: &str, name: &str) -> Answer<Option<(u32, Vec<u8>)>> {
    let result = read_value(key, name);
    match result
        .as_ref()
        .err()
        .and_then(|failure| failure.win32_code())
    {
        Some(sys::ERROR_FILE_NOT_FOUND) => Ok(None),
        _ => result.map(Some),
    }
}

fn read_value(key: &str, name: &str) -> Answer<(u32, Vec<u8>)> {
    let name = text::wide(name)?;
    let key = Key::open(key, sys::KEY_QUERY_VALUE)?;
    let mut data = vec![0; 256];
    loop {
        let (mut kind, mut size) = (0, data.len() as u32);
        // SAFETY: the name ends with a NUL, the buffer is as long as told.
        let code = unsafe {
            sys::RegQueryValueExW(
                key.0,
                name.as_ptr(),
                null_mut(),
                &mut kind,
                data.as_mut_ptr(),
                &mut size,
            )
        };
        // It may have grown since, so that it has to be asked again.
        data.resize(size as usize, 0);
        if code != sys::ERROR_MORE_DATA {
            return check_code(code, "read the value").map(|()| (kind, data));
        }
    }
}

/// Deletes a value.
pub fn delete_value(key: &str, name: &str) -> Answer {
    let name = text::wide(name)?;
    let key = Key::open(key, sys::KEY_SET_VALUE)?;
    // SAFETY: the name ends with a NUL.
    check_code(
        unsafe { sys::RegDeleteValueW(key.0, name.as_ptr()) },
        "delete the value",
    )
}

/// Deletes a key and all below it.
pub fn delete_key(key: &str) -> Answer {
    // No name means HKLM itself, one alone SOFTWARE or SYSTEM: Windows would delete all that it can.
    if key.split('\\').filter(|name| !name.is_empty()).count() < 2 {
        return Err(Failure::Refused("the path of a key to delete is too short"));
    }
    let key = text::wide(key)?;
    // SAFETY: the path ends with a NUL.
    check_code(
        unsafe { sys::RegDeleteTreeW(sys::HKEY_LOCAL_MACHINE, key.as_ptr()) },
        "delete the key",
    )
}
