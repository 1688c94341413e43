//! Tries the framework where no test on the host can: in a kernel.
//!
//! Init prints a line for each check that passed, and fails with `STATUS_INTERNAL_ERROR` at the
//! first that did not. It wants these parameters: `Dword` (`REG_DWORD` 7), `Qword` (`REG_QWORD`
//! 2^32 + 8), `Text` (`REG_SZ` `text`), `Texts` (`REG_MULTI_SZ` `one`, `two`), `Bytes`
//! (`REG_BINARY` of 100 times 0xA5); and `Expandable` (`REG_EXPAND_SZ` `%text%`), if it is there.

#![no_std]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;
use windows_kernel_rs::time::{sleep, system_time};
use windows_kernel_rs::{
    Driver, Error, KernelModule, Parameters, TryBox, dbg, kernel_module, print, println, try_format,
};

struct Module {
    _dropped_after_cleanup: Goodbye,
}

impl KernelModule for Module {
    fn init(_: Driver, registry_path: &str) -> Result<Self, Error> {
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
        Ok(Module {
            _dropped_after_cleanup: Goodbye,
        })
    }

    fn cleanup(&mut self, _: Driver) {
        println!("cleanup");
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
