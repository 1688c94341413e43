//! The devices of this driver: how they come, what they answer, how they go.
//!
//! A device object's extension holds a [`Slot`] and, behind it, the author's value. The gate in the
//! slot is what keeps the value alive: nobody touches the value, or the rest of the slot, but from
//! inside, and the value is dropped when the gate is closed and nobody is inside. No handle that is
//! still open changes that: Windows does not unload a driver then; Wine does.
//!
//! What the gate cannot keep alive is itself, in the device object, and the code before and behind it.
//! They have to outlive a request that the kernel has already fetched. Windows promises that. Wine
//! does not wait for such a request, nor for the close of a file whose last handle is gone; so the
//! end of the devices does, for a bounded time.

use crate::device::Device;
use crate::error::Error;
use crate::request::{self, MAJOR_FUNCTIONS, OpenFile, Request, Serve};
use crate::time;
use crate::unicode::{self, UnicodeString};
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
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

/// How many files are open on the devices, as far as they were let in.
static OPEN_FILES: AtomicUsize = AtomicUsize::new(0);

/// Whether anything was ever asked of a device.
static USED: AtomicBool = AtomicBool::new(false);

/// How often the end of what is waited for is looked for when the devices go.
const PAUSE: Duration = Duration::from_millis(1);

/// How long the devices wait for the close of the files that are open. On Wine it comes a little after
/// the last handle's end, or not at all, from a program that keeps its handle.
const CLOSING: Duration = Duration::from_millis(500);

/// What a request may need from being fetched to the gate, and from the gate back to the kernel.
const PASSAGE: Duration = Duration::from_millis(10);

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
    for major in MAJOR_FUNCTIONS {
        // SAFETY: one aligned entry of a live table; the kernel, which may read it in between, finds
        // the old or the new value.
        unsafe {
            (&raw mut (*driver).MajorFunction[usize::from(major)]).write_volatile(Some(dispatch));
        }
    }
    // SAFETY: the device is ours. Its extension is zeroed, aligned as pointers are, and long enough for
    // both, the value at any alignment. Nobody but us looks beyond the gate before it is open.
    let slot = unsafe {
        let slot = slot(device);
        let place = slot
            .add(1)
            .map_addr(|address| address.next_multiple_of(align_of::<D>()))
            .cast::<D>();
        place.write(value);
        (&raw mut (*slot).device).write(place);
        (*device).Flags |= DO_BUFFERED_IO;
        (*slot).gate.open();
        slot
    };
    // Behind the gate, so that no program finds a device that is not ready.
    match Link::create(link, &name) {
        Ok(link) => {
            // SAFETY: nobody but this thread touches these two.
            unsafe {
                (&raw mut (*slot).link).write(Some(link));
                (&raw mut (*slot).older).write(NEWEST.load(Ordering::Relaxed));
            }
            NEWEST.store(device, Ordering::Relaxed);
            Ok(())
        }
        Err(error) => {
            // SAFETY: the device is on no list yet, so it is not deleted again.
            unsafe {
                (*slot).gate.close();
                let_pass();
                delete(device);
            }
            Err(error)
        }
    }
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
/// First the links go. What is open may still be closed, for a while. Then all devices are closed to new
/// requests; and each, when the last request in it has ended, is dropped and deleted.
///
/// # Safety
///
/// As for [`create`].
pub(crate) unsafe fn delete_all() {
    GOING.store(true, Ordering::Relaxed);
    // SAFETY: only `DriverEntry` and `DriverUnload` touch the links, and one of them is the caller.
    unsafe { for_each(|slot| (*slot).link = None) };
    let mut left = CLOSING;
    while OPEN_FILES.load(Ordering::Relaxed) != 0 && !left.is_zero() {
        time::sleep(PAUSE);
        left -= PAUSE;
    }
    // SAFETY: the gates are there.
    unsafe { for_each(|slot| (*slot).gate.close()) };
    let_pass();
    let mut device = NEWEST.swap(ptr::null_mut(), Ordering::Relaxed);
    while !device.is_null() {
        // SAFETY: a device that `create` made, and whose gate is closed; it is on the list no more.
        device = unsafe {
            let older = (*slot(device)).older;
            delete(device);
            older
        };
    }
    let_pass();
}

/// Does something with the slot of each device.
///
/// # Safety
///
/// As for [`create`].
unsafe fn for_each(operation: impl Fn(*mut Slot)) {
    let mut device = NEWEST.load(Ordering::Relaxed);
    while !device.is_null() {
        // SAFETY: a device that `create` made; only `DriverEntry` and `DriverUnload` touch the list,
        // and one of them is the caller.
        unsafe {
            let slot = slot(device);
            operation(slot);
            device = (*slot).older;
        }
    }
}

/// Lets those pass that are on their way to a gate that was closed, or from there.
fn let_pass() {
    if USED.load(Ordering::Relaxed) {
        time::sleep(PASSAGE);
    }
}

/// Drops and deletes a device when the last request in it has ended.
///
/// # Safety
///
/// [`create`] made the device, its gate is closed, and nobody deletes it again.
unsafe fn delete(device: *mut DEVICE_OBJECT) {
    // SAFETY: the value is there, and dropped once, with nobody inside and nobody coming in.
    unsafe {
        let slot = slot(device);
        if !(*slot).gate.is_empty() {
            while !(*slot).gate.is_empty() {
                time::sleep(PAUSE);
            }
            // On Wine an answer that is still on its way goes with the device: STATUS_FILE_DELETED.
            let_pass();
        }
        (*slot).device.drop_in_place();
        IoDeleteDevice(device);
    }
}

/// The dispatch routine of all devices.
///
/// # Safety
///
/// The kernel calls it, for a device that [`create`] made.
unsafe extern "system" fn dispatch(device: *mut DEVICE_OBJECT, irp: *mut IRP) -> NTSTATUS {
    USED.store(true, Ordering::Relaxed);
    // SAFETY: the device is live while a request for it is: see this module's head.
    let slot = unsafe { slot(device) };
    // To the very end: behind it the device may go and, on Wine, soon the image with this code.
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

/// What comes of a request; a device that is not there is coming or going.
fn answer(
    device: Option<&dyn Serve>,
    file: &OpenFile,
    request: Request<'_>,
) -> Result<usize, Error> {
    let device = device.ok_or_else(|| {
        if GOING.load(Ordering::Relaxed) {
            Error::DELETE_PENDING
        } else {
            Error::DEVICE_NOT_READY
        }
    });
    match request {
        Request::Create => device
            .and_then(|device| device.serve(request))
            .inspect(|_| {
                OPEN_FILES.fetch_add(1, Ordering::Relaxed);
            })
            .inspect_err(|&error| file.refuse(error)),
        // They cannot fail, and are not for what was never open.
        Request::Cleanup => match (file.check(), device) {
            (Ok(()), Ok(device)) => device.serve(request),
            _ => Ok(0),
        },
        Request::Close => {
            if file.check().is_ok() {
                if let Ok(device) = device {
                    device.serve(request)?;
                }
                OPEN_FILES.fetch_sub(1, Ordering::Relaxed);
            }
            Ok(0)
        }
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
