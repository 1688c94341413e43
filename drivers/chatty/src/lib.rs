//! Prints a lot.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Lines` | `REG_DWORD` | 10 | how many lines |
//! | `Length` | `REG_DWORD` | 40 | the characters of each, if its number has no more |
//! | `Where` | `REG_SZ` | `init` | or `cleanup` |
//!
//! A line is its number, counted from 1, a space, and filler.

#![no_std]

use core::fmt::{self, Write};
use windows_kernel_rs::{Driver, Error, KernelModule, Parameters, kernel_module, println};

struct Module {
    at_cleanup: Option<Speech>,
}

impl KernelModule for Module {
    fn init(_: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        let speech = Speech {
            lines: parameters.u32("Lines")?.unwrap_or(10),
            length: parameters.u32("Length")?.unwrap_or(40) as usize,
        };
        let at_cleanup = match parameters.string("Where")?.as_deref() {
            None | Some("init") => {
                speech.give();
                None
            }
            Some("cleanup") => Some(speech),
            Some(_) => return Err(Error::INVALID_PARAMETER),
        };
        Ok(Module { at_cleanup })
    }

    fn cleanup(&mut self, _: Driver) {
        if let Some(speech) = &self.at_cleanup {
            speech.give();
        }
    }
}

kernel_module!(Module);

struct Speech {
    lines: u32,
    length: usize,
}

impl Speech {
    fn give(&self) {
        for number in 1..=self.lines {
            println!(
                "{}",
                Line {
                    number,
                    length: self.length
                }
            );
        }
    }
}

struct Line {
    number: u32,
    length: usize,
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const FILLER: &str = "abcdefghijklmnopqrstuvwxyz";

        write!(formatter, "{}", self.number)?;
        let mut missing = self.length.saturating_sub(digits(self.number));
        if missing > 0 {
            formatter.write_char(' ')?;
            missing -= 1;
        }
        while missing > 0 {
            let part = &FILLER[..missing.min(FILLER.len())];
            formatter.write_str(part)?;
            missing -= part.len();
        }
        Ok(())
    }
}

fn digits(number: u32) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}
