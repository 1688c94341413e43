//! A request of the kernel's, as a device sees it.

use crate::device::{ControlBuffer, ControlCode, Device, Method};
use crate::error::Error;
use core::mem::MaybeUninit;
use core::ptr;
use core::slice;
use kernel_device::buffer;
use windows_kernel_sys::base::{
    FILE_OBJECT, IO_NO_INCREMENT, IO_STATUS_BLOCK, IRP, IRP_MJ_CLEANUP, IRP_MJ_CLOSE,
    IRP_MJ_CREATE, IRP_MJ_DEVICE_CONTROL, IRP_MJ_READ, IRP_MJ_WRITE, NTSTATUS, STATUS_SUCCESS,
};
use windows_kernel_sys::ntoskrnl::IofCompleteRequest;

/// The major functions that [`Request`] knows.
pub(crate) const MAJOR_FUNCTIONS: [u8; 6] = [
    IRP_MJ_CREATE,
    IRP_MJ_CLOSE,
    IRP_MJ_READ,
    IRP_MJ_WRITE,
    IRP_MJ_DEVICE_CONTROL,
    IRP_MJ_CLEANUP,
];

/// What is asked of a device.
pub(crate) enum Request<'irp> {
    Create,
    Cleanup,
    Close,
    Read(&'irp mut [u8]),
    Write(&'irp [u8]),
    Control(ControlCode, ControlBuffer<'irp>),
}

impl Request<'_> {
    /// What a request asks.
    ///
    /// # Safety
    ///
    /// The kernel has handed the request to a dispatch routine of a device with `DO_BUFFERED_IO`, and
    /// until the answer is dropped nobody completes it or touches its buffer.
    pub(crate) unsafe fn of(irp: *mut IRP) -> Result<Self, Error> {
        // SAFETY: a request that is being dispatched has a current stack location.
        let location = unsafe { &*(*irp).CurrentStackLocation };
        Ok(match location.MajorFunction {
            IRP_MJ_CREATE => Self::Create,
            IRP_MJ_CLEANUP => Self::Cleanup,
            IRP_MJ_CLOSE => Self::Close,
            major @ (IRP_MJ_READ | IRP_MJ_WRITE) => {
                // SAFETY: reads and writes have this in the union.
                let length = unsafe { location.Parameters.Transfer.Length } as usize;
                // SAFETY: buffered, so the kernel has made a buffer of that length.
                let memory = unsafe { system_buffer(irp, length) }?;
                if major == IRP_MJ_READ {
                    Self::Read(buffer::zeroed(memory))
                } else {
                    // SAFETY: the kernel has put the program's data there, all of that length.
                    Self::Write(unsafe {
                        slice::from_raw_parts(memory.as_ptr().cast(), memory.len())
                    })
                }
            }
            IRP_MJ_DEVICE_CONTROL => {
                // SAFETY: device controls have this in the union.
                let control = unsafe { location.Parameters.DeviceIoControl };
                let code = ControlCode::from_raw(control.IoControlCode);
                if code.method() != Method::Buffered {
                    return Err(Error::INVALID_DEVICE_REQUEST);
                }
                let input = control.InputBufferLength as usize;
                let output = control.OutputBufferLength as usize;
                // SAFETY: with this method the kernel has made one buffer, as long as the longer of the
                // two, and put the input there.
                Self::Control(code, unsafe {
                    let memory = system_buffer(irp, input.max(output))?;
                    ControlBuffer::new(memory, input, output)
                })
            }
            _ => return Err(Error::INVALID_DEVICE_REQUEST),
        })
    }

    /// How many bytes its answer can count.
    pub(crate) fn limit(&self) -> usize {
        match self {
            Self::Create | Self::Cleanup | Self::Close => 0,
            Self::Read(buffer) => buffer.len(),
            Self::Write(data) => data.len(),
            Self::Control(_, buffer) => buffer.output_len(),
        }
    }
}

/// # Safety
///
/// The request has a system buffer of at least that length, unless the length is zero, and nobody
/// else uses it.
unsafe fn system_buffer<'irp>(
    irp: *const IRP,
    length: usize,
) -> Result<&'irp mut [MaybeUninit<u8>], Error> {
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the request is live.
    let buffer = unsafe { (*irp).SystemBuffer };
    if buffer.is_null() {
        return Err(Error::INVALID_USER_BUFFER);
    }
    // SAFETY: not null, and the rest is the caller's promise.
    Ok(unsafe { slice::from_raw_parts_mut(buffer.cast(), length) })
}

/// What a request goes to: something that a program has open, or tried to.
///
/// Wine opens it without waiting for the device's answer, and closes it whatever that was. So a
/// refusal is kept with it, and whatever else is asked fails the same way.
pub(crate) struct OpenFile {
    object: *mut FILE_OBJECT,
}

/// The upper half of what is kept with a refused file, above the status: neither a pointer of the
/// kernel's nor anything else that another driver would put there.
const REFUSED: usize = 0x5255_5354;

impl OpenFile {
    /// # Safety
    ///
    /// The kernel has handed the request to a dispatch routine.
    pub(crate) unsafe fn of(irp: *const IRP) -> Self {
        Self {
            // SAFETY: a request that is being dispatched has a current stack location.
            object: unsafe { (*(*irp).CurrentStackLocation).FileObject },
        }
    }

    /// Fails as the opening did. Whoever asks without having opened anything was not refused.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.object.is_null() {
            return Ok(());
        }
        // SAFETY: the object is live while a request for it is, and the field is ours.
        let kept = unsafe { (*self.object).FsContext }.addr();
        if kept >> 32 != REFUSED {
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation)] // the lower half
        let status = kept as u32;
        Err(Error::from_kernel_errno(i32::from_ne_bytes(
            status.to_ne_bytes(),
        )))
    }

    pub(crate) fn refuse(&self, error: Error) {
        let status = u32::from_ne_bytes(error.to_failure().to_ne_bytes());
        if !self.object.is_null() {
            let kept = ptr::without_provenance_mut(REFUSED << 32 | status as usize);
            // SAFETY: as above; while it is being opened nobody else asks anything of it.
            unsafe { (*self.object).FsContext = kept };
        }
    }
}

/// Gives the request back to the kernel; the status is the dispatch routine's as well.
///
/// # Safety
///
/// The kernel has handed the request to a dispatch routine, and nobody uses it any more.
pub(crate) unsafe fn complete(irp: *mut IRP, outcome: Result<usize, Error>) -> NTSTATUS {
    let (status, count) = match outcome {
        Ok(count) => (STATUS_SUCCESS, count),
        Err(error) => (error.to_failure(), 0),
    };
    // SAFETY: the request is the driver's until it is completed.
    unsafe {
        (*irp).IoStatus = IO_STATUS_BLOCK {
            Status: status,
            Information: count,
        };
        IofCompleteRequest(irp, IO_NO_INCREMENT);
    }
    status
}

/// A device of any type.
pub(crate) trait Serve: Send + Sync {
    fn serve(&self, request: Request<'_>) -> Result<usize, Error>;
}

impl<D: Device> Serve for D {
    fn serve(&self, request: Request<'_>) -> Result<usize, Error> {
        match request {
            Request::Create => self.create().map(|()| 0),
            Request::Cleanup => Ok(0),
            Request::Close => {
                self.close();
                Ok(0)
            }
            Request::Read(buffer) => self.read(buffer),
            Request::Write(data) => self.write(data),
            Request::Control(code, buffer) => self.ioctl(code, buffer),
        }
    }
}
