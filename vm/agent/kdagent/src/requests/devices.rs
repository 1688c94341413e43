//! Devices of drivers, by the native calls.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicU32, Ordering};

use frames::{DeviceOpened, Ioctl, OpenDevice, ReadDevice, WriteDevice};

use super::calls::{Calls, Outcome, Target};
use super::transfer::{Transfer, new_event};
use crate::failure::{Answer, Failure};
use crate::handle::Owned;
use crate::server::Reply;
use crate::session::Session;
use crate::sync::Mutex;
use crate::{sys, text};

/// The most devices that are open at a time.
const MAX_DEVICES: usize = 256;

/// The most bytes that one call may ask for.
const MAX_OUTPUT: u32 = 16 << 20;

/// Where on the device a transfer begins: a driver may ask, but few have places.
const OFFSET: i64 = 0;

const NO_DEVICE: Failure = Failure::Refused("no such device is open");

/// The devices that are open, and the calls to them.
pub struct Devices {
    next: AtomicU32,
    /// A call that is going on shares its file: whoever closes it, no call is made on a handle that is
    /// another file's meanwhile.
    open: Mutex<BTreeMap<u32, Arc<Owned>>>,
    calls: Calls,
    /// To make one for each call, and to close it, costs two more round trips to the wineserver, on Wine.
    idle_events: Mutex<Vec<Owned>>,
}

impl Devices {
    pub const fn new() -> Self {
        Devices {
            next: AtomicU32::new(1),
            open: Mutex::new(BTreeMap::new()),
            calls: Calls::new(),
            idle_events: Mutex::new(Vec::new()),
        }
    }

    /// Opens a device for overlapped input and output.
    ///
    /// One that was given up at the time limit is closed as soon as it is open after all.
    pub fn open(&'static self, request: &OpenDevice<'_>, reply: &mut Reply) -> Answer {
        let path = text::wide(request.path)?;
        let transfer = self.transfer(&[], 0)?;
        self.calls
            .begin(&transfer, Target::Opening, request.time_limit, reply)?;
        let result = if self.calls.issue(&transfer) {
            create(&path, transfer.status_block())
        } else {
            Ok(Err(sys::STATUS_CANCELLED))
        };
        let Some(outcome) = self.calls.end(&transfer) else {
            return Ok(());
        };
        self.take_back(transfer);
        let (status, device) = match result? {
            Ok(file) => (0, self.keep(file, reply.session())?),
            Err(status) => (status, 0),
        };
        reply.send(&DeviceOpened {
            status,
            outcome: outcome as u32,
            device,
        });
        Ok(())
    }

    fn keep(&self, file: Owned, session: &Session) -> Answer<u32> {
        let mut open = self.open.lock();
        if session.is_over() {
            drop(open);
            return Err(NO_DEVICE);
        }
        if open.len() == MAX_DEVICES {
            drop(open);
            return Err(Failure::Refused("too many devices are open"));
        }
        let device = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(device, Arc::new(file));
        Ok(device)
    }

    pub fn read(&'static self, request: &ReadDevice, reply: &mut Reply) -> Answer {
        let transfer = self.transfer(&[], request.length)?;
        self.call(
            request.device,
            request.time_limit,
            transfer,
            reply,
            // SAFETY: see `call`.
            |file, transfer| unsafe {
                let (output, size) = transfer.output();
                sys::NtReadFile(
                    file,
                    transfer.event(),
                    null(),
                    null(),
                    transfer.status_block(),
                    output,
                    size,
                    &OFFSET,
                    null(),
                )
            },
        )
    }

    pub fn write(&'static self, request: &WriteDevice<'_>, reply: &mut Reply) -> Answer {
        let transfer = self.transfer(request.data, 0)?;
        self.call(
            request.device,
            request.time_limit,
            transfer,
            reply,
            // SAFETY: see `call`.
            |file, transfer| unsafe {
                let (input, size) = transfer.input();
                sys::NtWriteFile(
                    file,
                    transfer.event(),
                    null(),
                    null(),
                    transfer.status_block(),
                    input,
                    size,
                    &OFFSET,
                    null(),
                )
            },
        )
    }

    pub fn control(&'static self, request: &Ioctl<'_>, reply: &mut Reply) -> Answer {
        let transfer = self.transfer(request.data, request.output_size)?;
        self.call(
            request.device,
            request.time_limit,
            transfer,
            reply,
            // SAFETY: see `call`.
            |file, transfer| unsafe {
                let (input, input_size) = transfer.input();
                let (output, output_size) = transfer.output();
                sys::NtDeviceIoControlFile(
                    file,
                    transfer.event(),
                    null(),
                    null(),
                    transfer.status_block(),
                    request.code,
                    input,
                    input_size,
                    output,
                    output_size,
                )
            },
        )
    }

    fn transfer(&self, input: &[u8], output_size: u32) -> Answer<Arc<Transfer>> {
        if output_size > MAX_OUTPUT {
            return Err(Failure::Refused("above 16 MiB can't be asked for"));
        }
        let idle = self.idle_events.lock().pop();
        let event = idle.map_or_else(new_event, Ok)?;
        Ok(Arc::new(Transfer::new(event, input, output_size as usize)))
    }

    /// Takes the event of a call that has ended, unless somebody is still about to cancel it.
    fn take_back(&self, transfer: Arc<Transfer>) {
        if let Some(transfer) = Arc::into_inner(transfer) {
            self.idle_events.lock().push(transfer.into_event());
        }
    }

    /// Makes a call and answers when it has ended, unless it was given up.
    ///
    /// What the call is handed stays as long as the kernel may use it: a transfer that has not ended is
    /// never freed.
    fn call(
        &'static self,
        device: u32,
        time_limit: u32,
        transfer: Arc<Transfer>,
        reply: &mut Reply,
        call: impl FnOnce(sys::Handle, &Transfer) -> u32,
    ) -> Answer {
        // Under one lock, so that `close` sees each call that found its device.
        let open = self.open.lock();
        let file = open.get(&device).ok_or(NO_DEVICE)?.clone();
        let target = Target::Device {
            number: device,
            file: file.raw(),
        };
        self.calls.begin(&transfer, target, time_limit, reply)?;
        drop(open);
        let returned = if self.calls.issue(&transfer) {
            call(file.raw(), &transfer)
        } else {
            sys::STATUS_CANCELLED
        };
        if returned == sys::STATUS_PENDING {
            if self.calls.is_given_up(&transfer) {
                // The call has reset the event that would end a wait.
                transfer.cancel(file.raw());
            } else {
                transfer.wait();
            }
        }
        // Before `close` learns that the call is over, and so is the last to close it.
        drop(file);
        match self.calls.end(&transfer) {
            Some(outcome) => {
                answer(returned, &transfer, outcome, reply);
                self.take_back(transfer);
            }
            None if returned == sys::STATUS_PENDING => core::mem::forget(transfer),
            None => {}
        }
        Ok(())
    }

    /// Closes a device. Its calls are cancelled before, and given up if they do not end. One that does not
    /// even return keeps the file open until it does.
    pub fn close(&'static self, device: u32) -> Answer {
        let file = self.open.lock().remove(&device).ok_or(NO_DEVICE)?;
        self.calls.cancel_all(device);
        drop(file);
        Ok(())
    }

    /// All that are open, which nobody finds any more. Those of a session that is over stay away.
    pub fn take_all(&self) -> BTreeMap<u32, Arc<Owned>> {
        core::mem::take(&mut *self.open.lock())
    }

    /// Closes devices that were taken.
    pub fn close_all(&'static self, devices: BTreeMap<u32, Arc<Owned>>) {
        for (device, file) in devices {
            self.calls.cancel_all(device);
            drop(file);
        }
    }
}

fn answer(returned: u32, transfer: &Transfer, outcome: Outcome, reply: &mut Reply) {
    // SAFETY: the call has ended.
    let (block, output) = unsafe { transfer.result() };
    // Of a call that fails at once, Windows leaves the block as it was.
    let status = match returned {
        sys::STATUS_PENDING => block.status,
        status => status,
    };
    let length = if is_error(status) {
        0
    } else {
        block.information.min(output.len())
    };
    reply.send(&frames::IoEnded {
        status,
        outcome: outcome as u32,
        count: block.information as u64,
        data: &output[..length],
    });
}

/// NT_ERROR. What was transferred is then nothing; a warning, such as STATUS_BUFFER_OVERFLOW, has data.
fn is_error(status: u32) -> bool {
    status >> 30 == 3
}

/// NtCreateFile; the inner error is the NTSTATUS that it gave.
fn create(path: &[u16], block: *mut sys::IoStatusBlock) -> Answer<Result<Owned, u32>> {
    let maximum_length = u16::try_from(2 * path.len())
        .map_err(|_| Failure::Refused("the device's path is too long"))?;
    let name = sys::UnicodeString {
        length: maximum_length - 2,
        maximum_length,
        buffer: path.as_ptr(),
    };
    let attributes = sys::ObjectAttributes {
        length: size_of::<sys::ObjectAttributes>() as u32,
        root: null_mut(),
        name: &name,
        attributes: sys::OBJ_CASE_INSENSITIVE,
        security_descriptor: null_mut(),
        security_quality: null_mut(),
    };
    let mut file = null_mut();
    // SAFETY: all that is named stays during the call, and null stands for nothing.
    let status = unsafe {
        sys::NtCreateFile(
            &mut file,
            sys::GENERIC_READ | sys::GENERIC_WRITE | sys::SYNCHRONIZE,
            &attributes,
            block,
            null(),
            sys::FILE_ATTRIBUTE_NORMAL,
            sys::FILE_SHARE_READ | sys::FILE_SHARE_WRITE | sys::FILE_SHARE_DELETE,
            sys::FILE_OPEN,
            sys::FILE_NON_DIRECTORY_FILE,
            null(),
            0,
        )
    };
    // It is open if there is a handle: a warning may come with one or without.
    Ok(Owned::new(file, "open the device").map_err(|_| status))
}
