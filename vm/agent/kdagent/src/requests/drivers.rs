//! Drivers by the native calls, whose NTSTATUS is DriverEntry's own.

use alloc::format;
use core::ptr::{null, null_mut};

use frames::Code;

use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::{sys, text};

/// NtLoadDriver of a service.
pub fn load(service: &str) -> Answer<Code> {
    call(sys::NtLoadDriver, service)
}

/// NtUnloadDriver of a service.
pub fn unload(service: &str) -> Answer<Code> {
    call(sys::NtUnloadDriver, service)
}

fn call(
    function: unsafe extern "system" fn(*const sys::UnicodeString) -> u32,
    service: &str,
) -> Answer<Code> {
    enable_privilege("SeLoadDriverPrivilege", "enable SeLoadDriverPrivilege")?;
    let path = text::wide(&format!(
        r"\Registry\Machine\System\CurrentControlSet\Services\{service}"
    ))?;
    let maximum_length = u16::try_from(2 * path.len())
        .map_err(|_| Failure::Refused("the service's name is too long"))?;
    let name = sys::UnicodeString {
        length: maximum_length - 2,
        maximum_length,
        buffer: path.as_ptr(),
    };
    // SAFETY: the string is whole and stays during the call.
    let code = unsafe { function(&name) };
    Ok(Code { code })
}

/// Opens this process's token.
pub fn open_token(access: u32) -> Answer<Owned> {
    const DOING: &str = "open the token";
    let mut token = null_mut();
    // SAFETY: the current process has a token.
    let result = unsafe { sys::OpenProcessToken(sys::GetCurrentProcess(), access, &mut token) };
    check(result, DOING)?;
    Owned::new(token, DOING)
}

/// Enables a privilege that this process's token has.
pub fn enable_privilege(name: &str, doing: &'static str) -> Answer {
    let token = open_token(sys::TOKEN_QUERY | sys::TOKEN_ADJUST_PRIVILEGES)?;
    let name = text::wide(name)?;
    let mut privilege = sys::TokenPrivilege {
        count: 1,
        luid: [0; 2],
        attributes: sys::SE_PRIVILEGE_ENABLED,
    };
    // SAFETY: the name ends with a NUL.
    let found = unsafe { sys::LookupPrivilegeValueW(null(), name.as_ptr(), &mut privilege.luid) };
    check(found, doing)?;
    // SAFETY: `count` says how many privileges there are; nothing is asked back.
    let result = unsafe {
        sys::AdjustTokenPrivileges(token.raw(), 0, &privilege, 0, null_mut(), null_mut())
    };
    check(result, doing)?;
    // The call succeeds also where the token lacks the privilege; the last error alone tells.
    match Failure::last(doing) {
        lacking if lacking.win32_code() == Some(sys::ERROR_NOT_ALL_ASSIGNED) => Err(lacking),
        _ => Ok(()),
    }
}
