//! Data that several processors share.

use core::cell::UnsafeCell;
use core::fmt;
use windows_kernel_sys::base::KSPIN_LOCK;
use windows_kernel_sys::ntoskrnl::{KeAcquireSpinLockRaiseToDpc, KeReleaseSpinLock};

/// A value that one processor at a time uses; the others spin meanwhile.
///
/// To be used at or below `DISPATCH_LEVEL`.
///
/// ```no_run
/// # use windows_kernel_rs::SpinLock;
/// static TOTAL: SpinLock<u64> = SpinLock::new(0);
///
/// fn count(more: u64) -> u64 {
///     TOTAL.with(|total| {
///         *total += more;
///         *total
///     })
/// }
/// ```
///
/// What cannot go to another thread cannot be shared by it:
///
/// ```compile_fail,E0277
/// # use windows_kernel_rs::SpinLock;
/// static POINTER: SpinLock<*mut u8> = SpinLock::new(core::ptr::null_mut());
/// ```
pub struct SpinLock<T> {
    lock: UnsafeCell<KSPIN_LOCK>,
    value: UnsafeCell<T>,
}

// SAFETY: the lock lets one thread at a time at the value.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock around a value.
    pub const fn new(value: T) -> Self {
        Self {
            lock: UnsafeCell::new(0),
            value: UnsafeCell::new(value),
        }
    }

    /// Does something with the value, alone.
    ///
    /// It runs at `DISPATCH_LEVEL`: it shall be short, and neither sleep nor wait. Who asks for the
    /// same lock inside waits for ever. An operation, and not a guard, so that locks are given back
    /// in the opposite order, and with them the processor's level.
    pub fn with<R>(&self, operation: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: the lock is free or taken, and not moved while it is: we borrow it.
        let level = unsafe { KeAcquireSpinLockRaiseToDpc(self.lock.get()) };
        // SAFETY: we have the lock. Nothing unwinds, so it is given back.
        let outcome = operation(unsafe { &mut *self.value.get() });
        // SAFETY: we have the lock, and this was the level before it.
        unsafe { KeReleaseSpinLock(self.lock.get(), level) };
        outcome
    }
}

impl<T> fmt::Debug for SpinLock<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SpinLock").finish_non_exhaustive()
    }
}
