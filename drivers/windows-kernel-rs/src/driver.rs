//! A driver as the kernel sees it, and as its author does.

use crate::device::Device;
use crate::device_list;
use crate::error::Error;
use core::ptr::NonNull;
use windows_kernel_sys::base::DRIVER_OBJECT;

/// What a driver does. [`kernel_module!`](crate::kernel_module) makes a driver of it.
///
/// Both functions run at `PASSIVE_LEVEL`, on a stack of the kernel's: 24 KiB, not all of it free. The
/// kernel calls a driver from any thread, hence `Send + Sync`. A module that is not does not compile:
///
/// ```compile_fail,E0277
/// # use windows_kernel_rs::{Driver, Error, KernelModule};
/// # use core::cell::Cell;
/// struct Module(Cell<u32>);
///
/// impl KernelModule for Module {
///     fn init(_: Driver, _: &str) -> Result<Self, Error> {
///         Ok(Module(Cell::new(0)))
///     }
///     fn cleanup(&mut self, _: Driver) {}
/// }
/// ```
///
/// The same with an atomic does:
///
/// ```no_run
/// # use windows_kernel_rs::{Driver, Error, KernelModule};
/// # use core::sync::atomic::AtomicU32;
/// struct Module(AtomicU32);
///
/// impl KernelModule for Module {
///     fn init(_: Driver, _: &str) -> Result<Self, Error> {
///         Ok(Module(AtomicU32::new(0)))
///     }
///     fn cleanup(&mut self, _: Driver) {}
/// }
/// ```
pub trait KernelModule: Sized + Send + Sync + 'static {
    /// Starts the driver. `registry_path` names the service's key, as
    /// [`Parameters::open`](crate::Parameters::open) wants it; a lone surrogate in it has become
    /// U+FFFD.
    ///
    /// # Errors
    ///
    /// The status with which the start shall fail. One that means success becomes
    /// `STATUS_UNSUCCESSFUL`. What was made so far is to be dropped here, as usual;
    /// [`cleanup`](Self::cleanup) is not called.
    fn init(driver: Driver, registry_path: &str) -> Result<Self, Error>;

    /// Called before the driver is unloaded, when its devices are gone. The module is dropped right
    /// after.
    fn cleanup(&mut self, driver: Driver);
}

/// The kernel's object for this driver.
#[derive(Debug)]
pub struct Driver {
    object: NonNull<DRIVER_OBJECT>,
}

impl Driver {
    /// The driver that this object stands for.
    ///
    /// # Safety
    ///
    /// `object` is this driver's own, and not null.
    #[must_use]
    pub unsafe fn from_raw(object: *mut DRIVER_OBJECT) -> Self {
        Self {
            // SAFETY: not null, by the caller's promise.
            object: unsafe { NonNull::new_unchecked(object) },
        }
    }

    /// The kernel's object.
    ///
    /// # Safety
    ///
    /// Nobody, the kernel included, changes the object while the reference lives.
    #[must_use]
    pub unsafe fn as_raw(&self) -> &DRIVER_OBJECT {
        // SAFETY: the object lives as long as this driver is loaded; the rest is the caller's
        // promise.
        unsafe { self.object.as_ref() }
    }

    /// The kernel's object, to be changed.
    ///
    /// # Safety
    ///
    /// Nobody, the kernel included, reads or changes the object while the reference lives; and what
    /// is written there is what the kernel expects. With devices made by
    /// [`create_device`](Self::create_device), the driver has no others, and `MajorFunction` stays
    /// as it is for what they answer.
    pub unsafe fn as_raw_mut(&mut self) -> &mut DRIVER_OBJECT {
        // SAFETY: as above.
        unsafe { self.object.as_mut() }
    }

    /// Makes a device that programs can open, at once and by a link.
    ///
    /// `name` is the kernel's, such as `\Device\Echo`, and `link` what leads there, `\??\Echo` for
    /// what programs call `\\.\Echo`. The value lives in the device's extension, at its own
    /// alignment; one of nearly 64 KiB does not compile, and as a kernel's stack is small and the
    /// value passes over it, far less is right.
    ///
    /// The framework keeps the device. When the driver is unloaded, and when `init` fails, first all
    /// links are deleted. What is open may be closed for up to half a second more: on Wine, which unloads
    /// a driver all the same, the close comes a little after the last handle's end. Then the devices
    /// refuse whatever is asked of them, with `STATUS_DELETE_PENDING`; and one device after the other,
    /// the newest first, waits for the end of the requests in it, its value is dropped, and it is
    /// deleted. [`cleanup`](KernelModule::cleanup) comes after.
    ///
    /// The link comes last, so that programs find a device that is ready. Who opens it by its own name
    /// before gets `STATUS_DEVICE_NOT_READY`.
    ///
    /// Anybody may open it: its security is what the kernel gives to a device without one of its
    /// own. Who may do what has to be asked in [`Device::create`] or by the [`Access`] of a control
    /// code.
    ///
    /// [`Access`]: crate::device::Access
    ///
    /// # Errors
    ///
    /// [`Error::OBJECT_NAME_COLLISION`] if name or link is taken; [`Error::DELETE_PENDING`] in
    /// `cleanup`, for devices come before; when there is not enough memory, or the kernel refuses.
    pub fn create_device<D: Device>(
        &mut self,
        name: &str,
        link: &str,
        device: D,
    ) -> Result<(), Error> {
        // SAFETY: our own live object. Who has it is in `init` or `cleanup`: it goes to no other
        // thread, and ends with them.
        unsafe { device_list::create(self.object.as_ptr(), name, link, device) }
    }

    /// From now on this driver cannot be unloaded: it has no `DriverUnload`.
    ///
    /// To be called in `init`. Its [`cleanup`](KernelModule::cleanup) will never run, and its
    /// module is never dropped.
    pub fn refuse_unload(&mut self) {
        // SAFETY: one aligned field of a live object; the kernel reads it when somebody asks for
        // the unload, which finds the old or the new value.
        unsafe { (&raw mut (*self.object.as_ptr()).DriverUnload).write_volatile(None) }
    }
}
