//! A device that gives back what it gets, and misbehaves as it is told.
//!
//! It is `\Device\Echo`, for programs `\\.\Echo`. A write keeps its data, in the place of what was
//! kept before, and takes no more than fits. A read gives the kept data from their start.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Capacity` | `REG_DWORD` | 4096 | how many bytes are kept at most; above 65536 the start fails |
//!
//! | control code | name | input | what it does |
//! | --- | --- | --- | --- |
//! | 0x00222000 | `ECHO` | bytes | gives them back, as many as there is room for |
//! | 0x00222004 | `COUNT` | | gives how many are open now, the one that asks included |
//! | 0x00222008 | `RESET` | | forgets what is kept |
//! | 0x0022200C | `FAIL` | a status | fails with it |
//! | 0x00222010 | `PRINT` | UTF-8 text | prints it as a line |
//! | 0x00222014 | `HANG` | milliseconds | prints `hanging`, sleeps so long, and prints `done`; with 0xFFFFFFFF for ever |
//! | 0x00222018 | `LEAK` | bytes | leaks a block of so many |
//! | 0x0022201C | `CRASH` | how | 0: panics; 1: writes to address 0x10; 2: bug-checks with 0xE2E2 and 1, 2, 3, 4 |
//!
//! Numbers are 32 bits, little-endian, in and out. The codes are
//! `CTL_CODE(FILE_DEVICE_UNKNOWN, 0x800 + n, METHOD_BUFFERED, FILE_ANY_ACCESS)`.

#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use core::arch::asm;
use core::mem;
use core::str;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use windows_kernel_rs::device::{Access, ControlBuffer, ControlCode, Device, Method};
use windows_kernel_rs::time::sleep;
use windows_kernel_rs::{
    Driver, Error, KernelModule, Parameters, SpinLock, kernel_module, println,
};
use windows_kernel_sys::ntoskrnl::KeBugCheckEx;

const ECHO: ControlCode = code(0);
const COUNT: ControlCode = code(1);
const RESET: ControlCode = code(2);
const FAIL: ControlCode = code(3);
const PRINT: ControlCode = code(4);
const HANG: ControlCode = code(5);
const LEAK: ControlCode = code(6);
const CRASH: ControlCode = code(7);

const fn code(number: u16) -> ControlCode {
    const FILE_DEVICE_UNKNOWN: u16 = 0x22;
    ControlCode::new(
        FILE_DEVICE_UNKNOWN,
        0x800 + number,
        Method::Buffered,
        Access::Any,
    )
}

/// A read copies what is kept at `DISPATCH_LEVEL`, where nothing may take long.
const MOST_KEPT: u32 = 64 << 10;

struct Module;

impl KernelModule for Module {
    fn init(mut driver: Driver, registry_path: &str) -> Result<Self, Error> {
        let capacity = Parameters::open(registry_path)?
            .u32("Capacity")?
            .unwrap_or(4096);
        if capacity > MOST_KEPT {
            return Err(Error::INVALID_PARAMETER);
        }
        let echo = Echo {
            capacity: capacity as usize,
            kept: SpinLock::new(Vec::new()),
            open: AtomicU32::new(0),
        };
        driver.create_device(r"\Device\Echo", r"\??\Echo", echo)?;
        Ok(Module)
    }

    fn cleanup(&mut self, _: Driver) {}
}

kernel_module!(Module);

struct Echo {
    capacity: usize,
    kept: SpinLock<Vec<u8>>,
    open: AtomicU32,
}

impl Device for Echo {
    fn create(&self) -> Result<(), Error> {
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize, Error> {
        Ok(self.kept.with(|kept| copy(kept, buffer)))
    }

    fn write(&self, data: &[u8]) -> Result<usize, Error> {
        let data = &data[..data.len().min(self.capacity)];
        let mut kept = Vec::new();
        kept.try_reserve_exact(data.len())?;
        kept.extend_from_slice(data);
        self.keep(kept);
        Ok(data.len())
    }

    fn ioctl(&self, code: ControlCode, buffer: ControlBuffer<'_>) -> Result<usize, Error> {
        match code {
            ECHO => return Ok(buffer.input().len().min(buffer.output_len())),
            COUNT => return answer(buffer, self.open.load(Ordering::Relaxed)),
            RESET => self.keep(Vec::new()),
            FAIL => {
                let status = number(&buffer)?;
                return Err(Error::from_kernel_errno(i32::from_ne_bytes(
                    status.to_ne_bytes(),
                )));
            }
            PRINT => {
                let text = str::from_utf8(buffer.input()).map_err(|_| Error::INVALID_PARAMETER)?;
                println!("{text}");
            }
            HANG => hang(number(&buffer)?),
            LEAK => leak(number(&buffer)? as usize)?,
            CRASH => crash(number(&buffer)?)?,
            _ => return Err(Error::INVALID_DEVICE_REQUEST),
        }
        Ok(0)
    }
}

impl Echo {
    /// What was kept before is freed after the lock is given back.
    fn keep(&self, data: Vec<u8>) {
        drop(self.kept.with(|kept| mem::replace(kept, data)));
    }
}

/// Copies as much as fits; how much that is.
fn copy(from: &[u8], to: &mut [u8]) -> usize {
    let length = from.len().min(to.len());
    to[..length].copy_from_slice(&from[..length]);
    length
}

fn number(buffer: &ControlBuffer<'_>) -> Result<u32, Error> {
    match buffer.input().try_into() {
        Ok(bytes) => Ok(u32::from_le_bytes(bytes)),
        Err(_) => Err(Error::INVALID_PARAMETER),
    }
}

fn answer(buffer: ControlBuffer<'_>, number: u32) -> Result<usize, Error> {
    let bytes = number.to_le_bytes();
    if buffer.output_len() < bytes.len() {
        return Err(Error::BUFFER_TOO_SMALL);
    }
    Ok(copy(&bytes, buffer.into_output()))
}

fn hang(milliseconds: u32) {
    const FOR_EVER: u32 = u32::MAX;

    println!("hanging");
    if milliseconds == FOR_EVER {
        loop {
            sleep(Duration::from_secs(1));
        }
    }
    sleep(Duration::from_millis(milliseconds.into()));
    println!("done");
}

fn leak(bytes: usize) -> Result<(), Error> {
    let mut block: Vec<u8> = Vec::new();
    block.try_reserve_exact(bytes)?;
    mem::forget(block);
    Ok(())
}

fn crash(how: u32) -> Result<(), Error> {
    match how {
        0 => panic!("as it was told"),
        1 => {
            // SAFETY: none; the fault is what was asked for. In assembly, so that the compiler does
            // not know better.
            unsafe { asm!("mov byte ptr [{address}], 1", address = in(reg) 0x10_usize) };
            Ok(())
        }
        // SAFETY: it may be called at any time; there is no way back.
        2 => unsafe { KeBugCheckEx(0xE2E2, 1, 2, 3, 4) },
        _ => Err(Error::INVALID_PARAMETER),
    }
}
