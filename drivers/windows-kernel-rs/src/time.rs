//! Waiting, and the clock.

use crate::error::Error;
use core::ptr;
use core::time::Duration;
use windows_kernel_sys::base::{
    KernelMode, SYSTEM_TIMEOFDAY_INFORMATION, SystemTimeOfDayInformation,
};
use windows_kernel_sys::ntoskrnl::{KeDelayExecutionThread, ZwQuerySystemInformation};

/// The kernel counts time in units of this many nanoseconds.
const UNIT_NANOSECONDS: u32 = 100;

#[allow(clippy::cast_possible_truncation)] // it is 16
const TIMES_BYTES: u32 = size_of::<SYSTEM_TIMEOFDAY_INFORMATION>() as u32;

/// Gives the processor away for at least this long. To be called at `PASSIVE_LEVEL`.
pub fn sleep(duration: Duration) {
    let units = duration.as_nanos().div_ceil(UNIT_NANOSECONDS.into());
    // A negative interval counts from now.
    let interval = -i64::try_from(units).unwrap_or(i64::MAX);
    // SAFETY: the interval outlives the call.
    unsafe {
        KeDelayExecutionThread(KernelMode, 0, &raw const interval);
    }
}

/// What the system's clock shows, as time since 1601. It jumps when somebody sets it. To be called
/// at `PASSIVE_LEVEL`.
///
/// # Errors
///
/// When the kernel refuses.
pub fn system_time() -> Result<Duration, Error> {
    let mut times = SYSTEM_TIMEOFDAY_INFORMATION::default();
    // SAFETY: the buffer is as long as it is said to be.
    Error::check(unsafe {
        ZwQuerySystemInformation(
            SystemTimeOfDayInformation,
            (&raw mut times).cast(),
            TIMES_BYTES,
            ptr::null_mut(),
        )
    })?;
    let units = u64::try_from(times.CurrentTime).map_err(|_| Error::INTERNAL_ERROR)?;
    Ok(Duration::from_micros(units / 10) + Duration::from_nanos(units % 10 * 100))
}
