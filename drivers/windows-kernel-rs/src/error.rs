//! What can go wrong, in the kernel's own words.

use alloc::collections::TryReserveError;
use core::fmt;
use windows_kernel_sys::base::{self, NT_SUCCESS, NTSTATUS};

/// A status that says why something failed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Error(NTSTATUS);

/// The constants are the `STATUS_` codes of the same name.
#[allow(missing_docs)]
impl Error {
    pub const BUFFER_OVERFLOW: Self = Self(base::STATUS_BUFFER_OVERFLOW);
    pub const DEVICE_BUSY: Self = Self(base::STATUS_DEVICE_BUSY);
    pub const NO_MORE_ENTRIES: Self = Self(base::STATUS_NO_MORE_ENTRIES);
    pub const UNSUCCESSFUL: Self = Self(base::STATUS_UNSUCCESSFUL);
    pub const NOT_IMPLEMENTED: Self = Self(base::STATUS_NOT_IMPLEMENTED);
    pub const INFO_LENGTH_MISMATCH: Self = Self(base::STATUS_INFO_LENGTH_MISMATCH);
    pub const ACCESS_VIOLATION: Self = Self(base::STATUS_ACCESS_VIOLATION);
    pub const INVALID_HANDLE: Self = Self(base::STATUS_INVALID_HANDLE);
    pub const INVALID_PARAMETER: Self = Self(base::STATUS_INVALID_PARAMETER);
    pub const NO_SUCH_DEVICE: Self = Self(base::STATUS_NO_SUCH_DEVICE);
    pub const INVALID_DEVICE_REQUEST: Self = Self(base::STATUS_INVALID_DEVICE_REQUEST);
    pub const END_OF_FILE: Self = Self(base::STATUS_END_OF_FILE);
    pub const NO_MEMORY: Self = Self(base::STATUS_NO_MEMORY);
    pub const ACCESS_DENIED: Self = Self(base::STATUS_ACCESS_DENIED);
    pub const BUFFER_TOO_SMALL: Self = Self(base::STATUS_BUFFER_TOO_SMALL);
    pub const OBJECT_TYPE_MISMATCH: Self = Self(base::STATUS_OBJECT_TYPE_MISMATCH);
    pub const OBJECT_NAME_INVALID: Self = Self(base::STATUS_OBJECT_NAME_INVALID);
    pub const OBJECT_NAME_NOT_FOUND: Self = Self(base::STATUS_OBJECT_NAME_NOT_FOUND);
    pub const OBJECT_NAME_COLLISION: Self = Self(base::STATUS_OBJECT_NAME_COLLISION);
    pub const OBJECT_PATH_NOT_FOUND: Self = Self(base::STATUS_OBJECT_PATH_NOT_FOUND);
    pub const SHARING_VIOLATION: Self = Self(base::STATUS_SHARING_VIOLATION);
    pub const DELETE_PENDING: Self = Self(base::STATUS_DELETE_PENDING);
    pub const REVISION_MISMATCH: Self = Self(base::STATUS_REVISION_MISMATCH);
    pub const PRIVILEGE_NOT_HELD: Self = Self(base::STATUS_PRIVILEGE_NOT_HELD);
    pub const INTEGER_OVERFLOW: Self = Self(base::STATUS_INTEGER_OVERFLOW);
    pub const INSUFFICIENT_RESOURCES: Self = Self(base::STATUS_INSUFFICIENT_RESOURCES);
    pub const DEVICE_NOT_CONNECTED: Self = Self(base::STATUS_DEVICE_NOT_CONNECTED);
    pub const DEVICE_NOT_READY: Self = Self(base::STATUS_DEVICE_NOT_READY);
    pub const IO_TIMEOUT: Self = Self(base::STATUS_IO_TIMEOUT);
    pub const NOT_SUPPORTED: Self = Self(base::STATUS_NOT_SUPPORTED);
    pub const INTERNAL_ERROR: Self = Self(base::STATUS_INTERNAL_ERROR);
    pub const INVALID_USER_BUFFER: Self = Self(base::STATUS_INVALID_USER_BUFFER);
    pub const CANCELLED: Self = Self(base::STATUS_CANCELLED);
    pub const INVALID_DEVICE_STATE: Self = Self(base::STATUS_INVALID_DEVICE_STATE);
    pub const INVALID_BUFFER_SIZE: Self = Self(base::STATUS_INVALID_BUFFER_SIZE);
    pub const NOT_FOUND: Self = Self(base::STATUS_NOT_FOUND);
}

impl Error {
    /// The error of this status.
    ///
    /// Any status will do here. One that means success makes a driver's start, or a device's
    /// request, fail with `STATUS_UNSUCCESSFUL`: what failed shall not pass for what did not.
    #[must_use]
    pub const fn from_kernel_errno(status: NTSTATUS) -> Self {
        Self(status)
    }

    /// The status of this error.
    #[must_use]
    pub const fn to_kernel_errno(&self) -> NTSTATUS {
        self.0
    }

    /// The status of what failed: never one that would make anybody believe otherwise.
    pub(crate) const fn to_failure(self) -> NTSTATUS {
        if NT_SUCCESS(self.0) {
            base::STATUS_UNSUCCESSFUL
        } else {
            self.0
        }
    }

    /// An error if the status is one, or a warning.
    pub(crate) const fn check(status: NTSTATUS) -> Result<(), Self> {
        if NT_SUCCESS(status) {
            Ok(())
        } else {
            Err(Self(status))
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#010X}", self.0)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Error({self})")
    }
}

impl core::error::Error for Error {}

impl From<TryReserveError> for Error {
    fn from(_: TryReserveError) -> Self {
        Self::INSUFFICIENT_RESOURCES
    }
}
