//! Tries the framework where no test on the host can: in a kernel.
//!
//! Init prints a line for each check that passed, and fails with `STATUS_INTERNAL_ERROR` at the
//! first that did not. It wants these parameters: `Dword` (`REG_DWORD` 7), `Qword` (`REG_QWORD`
//! 2^32 + 8), `Text` (`REG_SZ` `text`), `Texts` (`REG_MULTI_SZ` `one`, `two`), `Bytes`
//! (`REG_BINARY` of 100 times 0xA5); and `Expandable` (`REG_EXPAND_SZ` `%text%`), if it is there.
//! With `Status` (`REG_DWORD`) it fails so in the end, all done. With `Quiet` (`REG_DWORD` 1) its devices
//! ask for nothing when they go.
//!
//! It leaves two devices, `\Device\Checks1` and `\Device\Checks2`, for programs `\\.\Checks1` and so on.
//! They take whatever they are asked, touch no buffer, and claim to have filled it, and far more;
//! but the second refuses to be opened. `WAIT`, the control code 0x00222004, comes back a second after
//! the link to the first is gone: when somebody unloads the driver all the same, as Wine lets him.
//! When they go they say so and, unless they are quiet, what comes of opening and reading them now.

#![no_std]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ptr;
use core::time::Duration;
use kernel_text::utf16;
use windows_kernel_rs::device::{Access, ControlBuffer, ControlCode, Device, Method};
use windows_kernel_rs::time::{sleep, system_time};
use windows_kernel_rs::{
    Driver, Error, KernelModule, Parameters, TryBox, dbg, kernel_module, print, println, try_format,
};
use windows_kernel_sys::base::{
    HANDLE, IO_STATUS_BLOCK, NT_SUCCESS, NTSTATUS, OBJ_CASE_INSENSITIVE, OBJ_KERNEL_HANDLE,
    OBJECT_ATTRIBUTES, SYMBOLIC_LINK_QUERY, UNICODE_STRING,
};
use windows_kernel_sys::ntoskrnl::{ZwClose, ZwOpenFile, ZwOpenSymbolicLinkObject, ZwReadFile};

struct Module {
    _dropped_after_cleanup: Goodbye,
}

impl KernelModule for Module {
    fn init(mut driver: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        passed("parameters", parameters_are_read(&parameters)?)?;
        passed("mismatches", mismatches_are_errors(&parameters))?;
        passed("alignment", every_alignment_is_kept()?)?;
        passed("growth", growing_keeps_alignment_and_content()?)?;
        passed("no memory", no_memory_is_an_error())?;
        passed("stack", large_frames_work())?;
        passed("format", formatting_is_fallible()?)?;
        passed("print", printing_gives_back_what_it_shows())?;
        passed("sleep", sleeping_takes_time()?)?;
        let quiet = parameters.u32("Quiet")?.is_some();
        passed("devices", devices_are_made(&mut driver, quiet)?)?;
        if let Some(status) = parameters.u32("Status")? {
            let status = i32::from_ne_bytes(status.to_ne_bytes());
            return Err(Error::from_kernel_errno(status));
        }
        Ok(Module {
            _dropped_after_cleanup: Goodbye,
        })
    }

    fn cleanup(&mut self, mut driver: Driver) {
        println!("cleanup");
        let late = driver.create_device(r"\Device\Late", r"\??\Late", Claimer::new(3, false));
        println!("a device in cleanup: {late:?}");
    }
}

kernel_module!(Module, tag = *b"Chck");

struct Goodbye;

impl Drop for Goodbye {
    fn drop(&mut self) {
        println!("dropped");
    }
}

fn passed(what: &str, whether: bool) -> Result<(), Error> {
    if !whether {
        println!("failed: {what}");
        return Err(Error::INTERNAL_ERROR);
    }
    println!("passed: {what}");
    Ok(())
}

fn parameters_are_read(parameters: &Parameters) -> Result<bool, Error> {
    Ok(parameters.u32("Dword")? == Some(7)
        && parameters.u64("Qword")? == Some(0x1_0000_0008)
        && parameters.string("Text")?.as_deref() == Some("text")
        && parameters
            .string("Expandable")?
            .is_none_or(|text| text == "%text%")
        && parameters.bytes("Bytes")?.as_deref() == Some(&[0xA5; 100])
        && parameters
            .multi_string("Texts")?
            .is_some_and(|texts| texts == ["one", "two"])
        && parameters.u32("Nothing")?.is_none()
        && parameters.string("Nothing")?.is_none())
}

fn mismatches_are_errors(parameters: &Parameters) -> bool {
    const MISMATCH: Error = Error::OBJECT_TYPE_MISMATCH;
    parameters.u32("Qword") == Err(MISMATCH)
        && parameters.u32("Bytes") == Err(MISMATCH)
        && parameters.u64("Dword") == Err(MISMATCH)
        && parameters.string("Dword") == Err(MISMATCH)
        && parameters.multi_string("Text") == Err(MISMATCH)
        && parameters.bytes("Text") == Err(MISMATCH)
}

#[repr(align(64))]
struct CacheLine([u8; 64]);

#[allow(dead_code)] // where it would lie is all that matters
#[repr(align(4096))]
struct Page([u8; 4096]);

fn every_alignment_is_kept() -> Result<bool, Error> {
    let byte = TryBox::try_new(1_u8)?;
    let line = TryBox::try_new(CacheLine([2; 64]))?;
    let nothing = TryBox::try_new(())?;
    // Room for a page, and no page: it would lie on the stack first, of which a kernel has 24 KiB.
    let mut pages: Vec<Page> = Vec::new();
    pages.try_reserve_exact(1)?;
    Ok(is_aligned(&*line)
        && pages.as_ptr().is_aligned()
        && *byte == 1
        && line.0 == [2; 64]
        && size_of_val(&*nothing) == 0)
}

fn growing_keeps_alignment_and_content() -> Result<bool, Error> {
    let mut lines = Vec::new();
    for number in 0..100 {
        lines.try_reserve(1)?;
        lines.push(CacheLine([number; 64]));
        if !is_aligned(&lines[0]) {
            return Ok(false);
        }
    }
    Ok((0..100)
        .zip(&lines)
        .all(|(number, line)| line.0 == [number; 64]))
}

fn is_aligned<T>(value: &T) -> bool {
    (&raw const *value).addr() % align_of::<T>() == 0
}

fn no_memory_is_an_error() -> bool {
    let too_much = usize::MAX / 4;
    Vec::<u8>::new().try_reserve_exact(too_much).is_err()
        && Vec::<CacheLine>::new()
            .try_reserve_exact(too_much / 64)
            .is_err()
}

/// A frame above a page calls `__chkstk`, and so does a sort.
fn large_frames_work() -> bool {
    let mut numbers = [0_u32; 1100];
    for (number, slot) in (0..).zip(numbers.iter_mut().rev()) {
        *slot = number;
    }
    numbers.sort_unstable();
    (0..).zip(&numbers).all(|(number, slot)| number == *slot)
}

struct Unwilling;

impl fmt::Display for Unwilling {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Err(fmt::Error)
    }
}

fn formatting_is_fallible() -> Result<bool, Error> {
    let text: String = try_format!("{} {:?}", 1, "two")?;
    Ok(text == "1 \"two\"" && try_format!("{Unwilling}") == Err(Error::UNSUCCESSFUL))
}

fn printing_gives_back_what_it_shows() -> bool {
    print!("100%s of {}\0{}\n", "this", "is text");
    dbg!(21 * 2) == 42
}

fn sleeping_takes_time() -> Result<bool, Error> {
    let start = system_time()?;
    sleep(Duration::from_millis(50));
    Ok(system_time()?.saturating_sub(start) >= Duration::from_millis(49))
}

fn devices_are_made(driver: &mut Driver, quiet: bool) -> Result<bool, Error> {
    driver.create_device(r"\Device\Checks1", r"\??\Checks1", Claimer::new(1, quiet))?;
    driver.create_device(r"\Device\Checks2", r"\??\Checks2", Claimer::new(2, quiet))?;
    let taken = Err(Error::OBJECT_NAME_COLLISION);
    let name = driver.create_device(r"\Device\Checks1", r"\??\Checks3", Claimer::new(3, quiet));
    let link = driver.create_device(r"\Device\Checks3", r"\??\Checks1", Claimer::new(3, quiet));
    Ok((name, link) == (taken, taken))
}

const WAIT: ControlCode = ControlCode::new(0x22, 0x801, Method::Buffered, Access::Any);

/// Wants an alignment that no kernel gives to a device's extension by itself.
#[repr(align(256))]
struct Claimer {
    number: u32,
    quiet: bool,
}

impl Claimer {
    fn new(number: u32, quiet: bool) -> Self {
        Self { number, quiet }
    }
}

impl Device for Claimer {
    /// Only the first can be opened, and only if it lies where it should.
    fn create(&self) -> Result<(), Error> {
        match self.number {
            1 if is_aligned(self) => Ok(()),
            1 => Err(Error::INTERNAL_ERROR),
            _ => Err(Error::ACCESS_DENIED),
        }
    }

    fn close(&self) {
        println!("device {} closed", self.number);
    }

    fn read(&self, _: &mut [u8]) -> Result<usize, Error> {
        Ok(usize::MAX)
    }

    fn write(&self, _: &[u8]) -> Result<usize, Error> {
        Ok(usize::MAX)
    }

    fn ioctl(&self, code: ControlCode, _: ControlBuffer<'_>) -> Result<usize, Error> {
        if code == WAIT {
            println!("waiting");
            while is_link(&utf16::literal(br"\??\Checks1")) {
                sleep(Duration::from_millis(5));
            }
            sleep(Duration::from_secs(1));
            println!("waited");
        }
        Ok(usize::MAX)
    }
}

impl Drop for Claimer {
    fn drop(&mut self) {
        let name = match self.number {
            1 => utf16::literal(br"\Device\Checks1"),
            2 => utf16::literal(br"\Device\Checks2"),
            _ => return,
        };
        if self.quiet {
            println!("device {} goes", self.number);
            return;
        }
        let outcome = open_and_read(&name);
        println!(
            "device {} goes, to open and read it: {outcome:?}",
            self.number
        );
    }
}

fn unicode<const LENGTH: usize>(name: &[u16; LENGTH]) -> UNICODE_STRING {
    #[allow(clippy::cast_possible_truncation)] // a name is short
    let bytes = size_of_val(name) as u16;
    UNICODE_STRING {
        Length: bytes,
        MaximumLength: bytes,
        Buffer: name.as_ptr().cast_mut(),
    }
}

fn attributes(name: &UNICODE_STRING) -> OBJECT_ATTRIBUTES {
    #[allow(clippy::cast_possible_truncation)] // it is 48
    OBJECT_ATTRIBUTES {
        Length: size_of::<OBJECT_ATTRIBUTES>() as u32,
        RootDirectory: ptr::null_mut(),
        ObjectName: &raw const *name,
        Attributes: OBJ_CASE_INSENSITIVE | OBJ_KERNEL_HANDLE,
        SecurityDescriptor: ptr::null(),
        SecurityQualityOfService: ptr::null(),
    }
}

/// Whether there is a symbolic link of this name.
fn is_link<const LENGTH: usize>(name: &[u16; LENGTH]) -> bool {
    let name = unicode(name);
    let attributes = attributes(&name);
    let mut link = ptr::null_mut();
    // SAFETY: all of it is well formed and outlives the call.
    let status = unsafe {
        ZwOpenSymbolicLinkObject(&raw mut link, SYMBOLIC_LINK_QUERY, &raw const attributes)
    };
    if !NT_SUCCESS(status) {
        return false;
    }
    close(link);
    true
}

/// Opens a device as a program does.
fn open<const LENGTH: usize>(name: &[u16; LENGTH]) -> Result<HANDLE, Error> {
    const ACCESS: u32 = 0x10_0001; // FILE_READ_DATA, SYNCHRONIZE
    const FILE_SYNCHRONOUS_IO_NONALERT: u32 = 0x20;

    let name = unicode(name);
    let attributes = attributes(&name);
    let mut handle = ptr::null_mut();
    let mut outcome = IO_STATUS_BLOCK::default();
    // SAFETY: all of it is well formed and outlives the call.
    succeeded(unsafe {
        ZwOpenFile(
            &raw mut handle,
            ACCESS,
            &raw const attributes,
            &raw mut outcome,
            0,
            FILE_SYNCHRONOUS_IO_NONALERT,
        )
    })?;
    Ok(handle)
}

fn close(handle: HANDLE) {
    // SAFETY: it is open, and nobody else's.
    unsafe { ZwClose(handle) };
}

/// Opens a device, and reads one byte.
fn open_and_read<const LENGTH: usize>(name: &[u16; LENGTH]) -> Result<(), Error> {
    let handle = open(name)?;
    let mut outcome = IO_STATUS_BLOCK::default();
    let mut byte = 0_u8;
    // SAFETY: it is open, and the call returns when the byte is read, or will not be.
    let status = unsafe {
        ZwReadFile(
            handle,
            ptr::null_mut(),
            ptr::null(),
            ptr::null(),
            &raw mut outcome,
            (&raw mut byte).cast(),
            1,
            ptr::null(),
            ptr::null(),
        )
    };
    close(handle);
    succeeded(status)
}

fn succeeded(status: NTSTATUS) -> Result<(), Error> {
    if NT_SUCCESS(status) {
        Ok(())
    } else {
        Err(Error::from_kernel_errno(status))
    }
}
