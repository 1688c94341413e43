//! The devices of this driver: how they come, what they answer, how they go.
//!
//! A device object's extension holds a [`Slot`] and, behind it, the author's value. The gate in the
//! slot is what keeps the value alive: nobody touches the value, or the rest of the slot, but from
//! inside, and the value is dropped when the gate is closed and nobody is inside. That rests on no
//! promise of the kernel's. Windows does not unload a driver while something is open on its
//! devices; Wine does.

use crate::device::Device;
use crate::error::Error;
use crate::request::{self, MAJOR_FUNCTIONS, OpenFile, Request, Serve};
use crate::time;
use crate::unicode::{self, UnicodeString};
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use core::time::Duration;
use kernel_device::Gate;
use windows_kernel_sys::base::{
    DEVICE_OBJECT, DO_BUFFERED_IO, DRIVER_OBJECT, FILE_DEVICE_SECURE_OPEN, FILE_DEVICE_UNKNOWN,
    IRP, NTSTATUS, OBJ_CASE_INSENSITIVE, OBJ_KERNEL_HANDLE, OBJECT_ATTRIBUTES, SYMBOLIC_LINK_QUERY,
};
use windows_kernel_sys::ntoskrnl::{
    IoCreateDevice, IoCreateSymbolicLink, IoDeleteDevice, IoDeleteSymbolicLink, ZwClose,
    ZwOpenSymbolicLinkObject,
};

/// The newest device, or null. Changed by `DriverEntry` and `DriverUnload` alone, one after the
/// other.
static NEWEST: AtomicPtr<DEVICE_OBJECT> = AtomicPtr::new(ptr::null_mut());

/// Whether the devices are going, or gone. There are no new ones then.
static GOING: AtomicBool = AtomicBool::new(false);

/// How often the end of the last request is looked for when a device goes.
const PAUSE: Duration = Duration::from_millis(1);

/// What the extension begins with.
///
/// The kernel zeroes it, so the gate is there, and closed, before anybody can ask for anything; the
/// rest is there once the gate is open.
struct Slot {
    gate: Gate,
    link: Option<Link>,
    older: *mut DEVICE_OBJECT,
    device: *mut dyn Serve,
}

/// Makes a device, and the link that programs open it by.
///
/// # Safety
///
/// `driver` is this driver's own, and live; `DriverEntry` or `DriverUnload` is running, and this is
/// its thread.
pub(crate) unsafe fn create<D: Device>(
    driver: *mut DRIVER_OBJECT,
    name: &str,
    link: &str,
    value: D,
) -> Result<(), Error> {
    if GOING.load(Ordering::Relaxed) {
        return Err(Error::DELETE_PENDING);
    }
    let name = unicode::try_encode(name)?;
    let name = UnicodeString::new(&name)?;
    let link = Link::create(link, &name)?;
    for major in MAJOR_FUNCTIONS {
        // SAFETY: one aligned entry of a live table; the kernel, which may read it in between, finds
        // the old or the new value.
        unsafe {
            (&raw mut (*driver).MajorFunction[usize::from(major)]).write_volatile(Some(dispatch));
        }
    }
    let mut device = ptr::null_mut();
    // SAFETY: the name is well formed and outlives the call.
    Error::check(unsafe {
        IoCreateDevice(
            driver,
            const { extension_bytes::<D>() },
            name.as_raw(),
            FILE_DEVICE_UNKNOWN,
            FILE_DEVICE_SECURE_OPEN,
            0,
            &raw mut device,
        )
    })?;
    // SAFETY: the device is ours. Its extension is zeroed, aligned as pointers are, and long enough for
    // both, the value at any alignment. Nobody but us looks beyond the gate before it is open.
    unsafe {
        let slot = slot(device);
        let place = slot
            .add(1)
            .map_addr(|address| address.next_multiple_of(align_of::<D>()))
            .cast::<D>();
        place.write(value);
        (&raw mut (*slot).link).write(Some(link));
        (&raw mut (*slot).older).write(NEWEST.load(Ordering::Relaxed));
        (&raw mut (*slot).device).write(place);
        (*device).Flags |= DO_BUFFERED_IO;
        NEWEST.store(device, Ordering::Relaxed);
        (*slot).gate.open();
    }
    Ok(())
}

/// Room for the slot, and for the value wherever the extension lies: Wine aligns it to 8.
const fn extension_bytes<D>() -> u32 {
    /// A device object counts its bytes, which are 0x150 and the extension's, in 16 bits.
    const MOST: usize = u16::MAX as usize - 0x150;
    assert!(align_of::<Slot>() <= 8);
    let bytes = size_of::<Slot>() + align_of::<D>() + size_of::<D>();
    assert!(
        bytes <= MOST,
        "the device is too large: keep its data on the heap"
    );
    #[allow(clippy::cast_possible_truncation)] // it has 16
    {
        bytes as u32
    }
}

/// # Safety
///
/// The device is one that [`create`] made.
unsafe fn slot(device: *mut DEVICE_OBJECT) -> *mut Slot {
    // SAFETY: the object is live.
    unsafe { (*device).DeviceExtension.cast() }
}

/// Deletes all devices, the newest first. From now on none can be made.
///
/// First the links go, and all devices are closed to new requests. Then each, when the last request
/// in it has ended, is dropped and deleted.
///
/// # Safety
///
/// As for [`create`].
pub(crate) unsafe fn delete_all() {
    GOING.store(true, Ordering::Relaxed);
    let mut device = NEWEST.load(Ordering::Relaxed);
    while !device.is_null() {
        // SAFETY: a device that `create` made; only `DriverEntry` and `DriverUnload` touch the link and
        // the list, and one of them is the caller.
        unsafe {
            let slot = slot(device);
            (*slot).link = None;
            (*slot).gate.close();
            device = (*slot).older;
        }
    }
    let mut device = NEWEST.swap(ptr::null_mut(), Ordering::Relaxed);
    while !device.is_null() {
        // SAFETY: as above. The value is dropped once, with nobody inside and nobody coming in.
        device = unsafe {
            let slot = slot(device);
            while !(*slot).gate.is_empty() {
                time::sleep(PAUSE);
            }
            let older = (*slot).older;
            (*slot).device.drop_in_place();
            IoDeleteDevice(device);
            older
        };
    }
}

/// The dispatch routine of all devices.
///
/// # Safety
///
/// The kernel calls it, for a device that [`create`] made.
unsafe extern "system" fn dispatch(device: *mut DEVICE_OBJECT, irp: *mut IRP) -> NTSTATUS {
    // SAFETY: the device is live while a request for it is.
    let slot = unsafe { slot(device) };
    // To the very end: behind it the device may go and, on Wine, the image with this code.
    // SAFETY: the gate is there from the device's first moment.
    let pass = unsafe { (*slot).gate.enter() };
    // SAFETY: the value is there while somebody is inside.
    let device = pass.as_ref().map(|_| unsafe { &*(*slot).device });
    // SAFETY: the kernel's own request, which nobody else completes; the device is buffered.
    let (file, request) = unsafe { (OpenFile::of(irp), Request::of(irp)) };
    let outcome = request.and_then(|request| answer(device, &file, request));
    // SAFETY: the request is ours, and what refers to its buffer is gone.
    unsafe { request::complete(irp, outcome) }
}

/// What comes of a request; a device that is not there is going.
fn answer(
    device: Option<&dyn Serve>,
    file: &OpenFile,
    request: Request<'_>,
) -> Result<usize, Error> {
    let device = device.ok_or(Error::DELETE_PENDING);
    match request {
        Request::Create => device
            .and_then(|device| device.serve(request))
            .inspect_err(|&error| file.refuse(error)),
        // They cannot fail, and are not for what was never open.
        Request::Cleanup | Request::Close => match (file.check(), device) {
            (Ok(()), Ok(device)) => device.serve(request),
            _ => Ok(0),
        },
        Request::Read(_) | Request::Write(_) | Request::Control(..) => {
            file.check()?;
            let limit = request.limit();
            device?.serve(request).map(|count| count.min(limit))
        }
    }
}

/// A symbolic link, there until it is dropped.
struct Link {
    units: Vec<u16>,
}

impl Link {
    fn create(link: &str, target: &UnicodeString<'_>) -> Result<Self, Error> {
        let units = unicode::try_encode(link)?;
        let name = UnicodeString::new(&units)?;
        // Wine lets a link be that is there, and says that all is well.
        if is_link(&name) {
            return Err(Error::OBJECT_NAME_COLLISION);
        }
        // SAFETY: both strings are well formed and outlive the call.
        Error::check(unsafe { IoCreateSymbolicLink(name.as_raw(), target.as_raw()) })?;
        Ok(Self { units })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Ok(name) = UnicodeString::new(&self.units) {
            // SAFETY: the string is well formed and outlives the call. It fails if the link is gone.
            unsafe {
                IoDeleteSymbolicLink(name.as_raw());
            }
        }
    }
}

/// Whether there is a symbolic link of this name.
fn is_link(name: &UnicodeString<'_>) -> bool {
    let attributes = OBJECT_ATTRIBUTES {
        #[allow(clippy::cast_possible_truncation)]
        Length: size_of::<OBJECT_ATTRIBUTES>() as u32,
        RootDirectory: ptr::null_mut(),
        ObjectName: name.as_raw(),
        Attributes: OBJ_CASE_INSENSITIVE | OBJ_KERNEL_HANDLE,
        SecurityDescriptor: ptr::null(),
        SecurityQualityOfService: ptr::null(),
    };
    let mut link = ptr::null_mut();
    // SAFETY: both pointers outlive the call, and the attributes are well formed.
    let status = unsafe {
        ZwOpenSymbolicLinkObject(&raw mut link, SYMBOLIC_LINK_QUERY, &raw const attributes)
    };
    if Error::check(status).is_err() {
        return false;
    }
    // SAFETY: it was just opened, and nobody else has it.
    unsafe { ZwClose(link) };
    true
}
