//! Does not unload, or takes its time.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `How` | `REG_SZ` | `no-unload` | or `slow-cleanup`, `slow-init` |
//! | `Seconds` | `REG_DWORD` | 0xFFFFFFFF | how long the slow ones take; the default is for ever |
//! | `Busy` | `REG_DWORD` | 0 | 1: they keep the processor busy instead of sleeping |
//!
//! The slow ones print `slow` when they begin, and `done` if they end.

#![no_std]

use core::hint;
use core::time::Duration;
use windows_kernel_rs::time::{sleep, system_time};
use windows_kernel_rs::{Driver, Error, KernelModule, Parameters, kernel_module, println};

struct Module {
    at_cleanup: Option<Delay>,
}

impl KernelModule for Module {
    fn init(mut driver: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        let delay = Delay::read(&parameters)?;
        let at_cleanup = match parameters.string("How")?.as_deref() {
            None | Some("no-unload") => {
                driver.refuse_unload();
                None
            }
            Some("slow-cleanup") => Some(delay),
            Some("slow-init") => {
                delay.pass()?;
                None
            }
            Some(_) => return Err(Error::INVALID_PARAMETER),
        };
        Ok(Module { at_cleanup })
    }

    fn cleanup(&mut self, _: Driver) {
        if let Some(delay) = &self.at_cleanup {
            // Without a clock the delay is over; a cleanup cannot fail.
            let _ = delay.pass();
        }
    }
}

kernel_module!(Module);

struct Delay {
    /// None is for ever.
    length: Option<Duration>,
    busy: bool,
}

impl Delay {
    const FOR_EVER: u32 = u32::MAX;

    fn read(parameters: &Parameters) -> Result<Self, Error> {
        let seconds = parameters.u32("Seconds")?.unwrap_or(Self::FOR_EVER);
        Ok(Self {
            length: (seconds != Self::FOR_EVER).then(|| Duration::from_secs(seconds.into())),
            busy: parameters.u32("Busy")?.unwrap_or(0) != 0,
        })
    }

    fn pass(&self) -> Result<(), Error> {
        println!("slow");
        let start = system_time()?;
        while self
            .length
            .is_none_or(|length| system_time().is_ok_and(|now| now.saturating_sub(start) < length))
        {
            if self.busy {
                hint::spin_loop();
            } else {
                sleep(Duration::from_millis(10));
            }
        }
        println!("done");
        Ok(())
    }
}
