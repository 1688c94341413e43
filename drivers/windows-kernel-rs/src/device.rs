//! Devices: what a program opens, reads, writes and controls.

use crate::error::Error;
pub use kernel_device::{Access, ControlBuffer, ControlCode, Method};

/// What a device does. [`Driver::create_device`](crate::Driver::create_device) makes a device of it.
///
/// A request is answered by the time its handler returns: a handler that waits keeps the program
/// waiting. A program's request runs its handler at `PASSIVE_LEVEL`: on Windows several at once, on
/// several processors; on Wine one at a time, all in one thread of the driver's process. So nothing
/// of the thread, its process included, says who asks. Another driver may call at
/// `DISPATCH_LEVEL`, where a handler must not wait. Hence `&self` and `Sync`; what handlers change is
/// in atomics or in a [`SpinLock`](crate::SpinLock). Data are copied by the kernel
/// (`DO_BUFFERED_IO`), so a handler never sees a program's own memory, and nothing of the kernel's
/// memory reaches a program: buffers are zeroed first. A handler's count is cut to its buffer.
///
/// When the driver is unloaded, a device waits for the requests in it, before
/// [`cleanup`](crate::KernelModule::cleanup) runs. So a handler that waits for something that `cleanup`,
/// or a value's `Drop`, would do makes the unload hang: let it wait for a bounded time only.
///
/// What is not implemented answers `STATUS_INVALID_DEVICE_REQUEST`; to open and to close always
/// succeed. An error that means success, or a request that waits (`STATUS_PENDING`), becomes
/// `STATUS_UNSUCCESSFUL`. With any error, no data reach the program.
///
/// ```no_run
/// use windows_kernel_rs::device::{Access, ControlBuffer, ControlCode, Device, Method};
/// use windows_kernel_rs::{Driver, Error, KernelModule, SpinLock, kernel_module};
///
/// const RESET: ControlCode = ControlCode::new(0x22, 0x800, Method::Buffered, Access::Any);
///
/// /// Sums up the bytes that are written; a read gives the sum.
/// struct Sum(SpinLock<u64>);
///
/// impl Device for Sum {
///     fn write(&self, data: &[u8]) -> Result<usize, Error> {
///         let sum: u64 = data.iter().copied().map(u64::from).sum();
///         self.0.with(|total| *total += sum);
///         Ok(data.len())
///     }
///
///     fn read(&self, buffer: &mut [u8]) -> Result<usize, Error> {
///         let total = self.0.with(|total| *total).to_le_bytes();
///         let buffer = buffer.get_mut(..8).ok_or(Error::BUFFER_TOO_SMALL)?;
///         buffer.copy_from_slice(&total);
///         Ok(8)
///     }
///
///     fn ioctl(&self, code: ControlCode, _: ControlBuffer<'_>) -> Result<usize, Error> {
///         match code {
///             RESET => self.0.with(|total| *total = 0),
///             _ => return Err(Error::INVALID_DEVICE_REQUEST),
///         }
///         Ok(0)
///     }
/// }
///
/// struct Module;
///
/// impl KernelModule for Module {
///     fn init(mut driver: Driver, _: &str) -> Result<Self, Error> {
///         driver.create_device(r"\Device\Sum", r"\??\Sum", Sum(SpinLock::new(0)))?;
///         Ok(Module)
///     }
///
///     fn cleanup(&mut self, _: Driver) {}
/// }
///
/// kernel_module!(Module);
/// ```
///
/// A device that is not `Sync` does not compile:
///
/// ```compile_fail,E0277
/// # use core::cell::Cell;
/// # use windows_kernel_rs::device::Device;
/// struct Sum(Cell<u64>);
///
/// impl Device for Sum {}
/// ```
///
/// Nor does one that borrows what may go before it:
///
/// ```compile_fail,E0477
/// # use windows_kernel_rs::device::Device;
/// struct Sum<'module>(&'module u64);
///
/// impl<'module> Device for Sum<'module> {}
/// ```
pub trait Device: Sized + Send + Sync + 'static {
    /// A program opens the device. What the name says behind the device's own does not count.
    ///
    /// # Errors
    ///
    /// The status with which the opening fails. [`close`](Self::close) is not called then. Wine does
    /// not wait for the answer: there the opening succeeds, and what is asked next fails with it.
    fn create(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What was opened is closed, by the last of its handles, after all of its requests. Not called
    /// for what is still open when the device goes.
    fn close(&self) {}

    /// A program reads: how much of the buffer, from its start, it gets.
    ///
    /// # Errors
    ///
    /// The status with which the read fails.
    fn read(&self, _buffer: &mut [u8]) -> Result<usize, Error> {
        Err(Error::INVALID_DEVICE_REQUEST)
    }

    /// A program writes: how much of the data was taken.
    ///
    /// # Errors
    ///
    /// The status with which the write fails.
    fn write(&self, _data: &[u8]) -> Result<usize, Error> {
        Err(Error::INVALID_DEVICE_REQUEST)
    }

    /// A program sends a control code of [`Method::Buffered`]; others fail before they come here. How
    /// much of the output, from its start, it gets.
    ///
    /// # Errors
    ///
    /// The status with which the control fails.
    fn ioctl(&self, _code: ControlCode, _buffer: ControlBuffer<'_>) -> Result<usize, Error> {
        Err(Error::INVALID_DEVICE_REQUEST)
    }
}
