//! A mailbox: what one program writes another one reads, in order, message by message.
//!
//! It is `\Device\Mailbox`, for programs `\\.\Mailbox`. A write posts a message; into a full mailbox it
//! fails with `STATUS_DEVICE_BUSY`. A read takes the oldest message; where there is none it fails with
//! `STATUS_NO_MORE_ENTRIES`, and with less room than the message needs with `STATUS_BUFFER_TOO_SMALL`,
//! and leaves it.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Capacity` | `REG_DWORD` | 16 | how many messages there can be, 1 to 1024; else the start fails |
//! | `Forget` | `REG_DWORD` | 0 | a bug to look at: if not 0, `CLEAR` forgets the messages and does not free them |
//!
//! | control code | name | what it does |
//! | --- | --- | --- |
//! | 0x00222000 | `COUNT` | gives the number of messages: 32 bits, little-endian |
//! | 0x00222004 | `CLEAR` | throws all messages away |

#![no_std]

extern crate alloc;

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::mem;
use windows_kernel_rs::device::{Access, ControlBuffer, ControlCode, Device, Method};
use windows_kernel_rs::{
    Driver, Error, KernelModule, Parameters, SpinLock, kernel_module, println,
};

const COUNT: ControlCode = code(0);
const CLEAR: ControlCode = code(1);

const fn code(number: u16) -> ControlCode {
    const FILE_DEVICE_UNKNOWN: u16 = 0x22;
    ControlCode::new(
        FILE_DEVICE_UNKNOWN,
        0x800 + number,
        Method::Buffered,
        Access::Any,
    )
}

struct Module;

impl KernelModule for Module {
    fn init(mut driver: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        let capacity = parameters.u32("Capacity")?.unwrap_or(16);
        if !(1..=1024).contains(&capacity) {
            println!("a mailbox of {capacity} messages can't be had");
            return Err(Error::INVALID_PARAMETER);
        }
        let mailbox = Mailbox {
            messages: SpinLock::new(room_for(capacity as usize)?),
            capacity: capacity as usize,
            forgets: parameters.u32("Forget")?.unwrap_or(0) != 0,
        };
        driver.create_device(r"\Device\Mailbox", r"\??\Mailbox", mailbox)?;
        println!("mailbox: room for {capacity} messages");
        Ok(Module)
    }

    fn cleanup(&mut self, _: Driver) {
        println!("mailbox: closed");
    }
}

kernel_module!(Module, tag = *b"Mail");

type Message = Vec<u8>;

struct Mailbox {
    messages: SpinLock<VecDeque<Message>>,
    capacity: usize,
    forgets: bool,
}

// Under the lock messages are only moved: to allocate and to free is for before and after it.
impl Device for Mailbox {
    fn write(&self, data: &[u8]) -> Result<usize, Error> {
        let message = copy_of(data)?;
        self.messages
            .with(|messages| {
                if messages.len() == self.capacity {
                    return Err(message);
                }
                messages.push_back(message); // there is room: nothing is allocated
                Ok(())
            })
            .map_err(|_refused| Error::DEVICE_BUSY)?;
        Ok(data.len())
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize, Error> {
        let message = self.messages.with(|messages| match messages.front() {
            None => Err(Error::NO_MORE_ENTRIES),
            Some(oldest) if oldest.len() > buffer.len() => Err(Error::BUFFER_TOO_SMALL),
            Some(_) => messages.pop_front().ok_or(Error::INTERNAL_ERROR),
        })?;
        buffer[..message.len()].copy_from_slice(&message);
        Ok(message.len())
    }

    fn ioctl(&self, code: ControlCode, buffer: ControlBuffer<'_>) -> Result<usize, Error> {
        match code {
            COUNT => self.count(buffer),
            CLEAR => self.clear(),
            _ => Err(Error::INVALID_DEVICE_REQUEST),
        }
    }
}

impl Mailbox {
    fn count(&self, buffer: ControlBuffer<'_>) -> Result<usize, Error> {
        let count = self.messages.with(|messages| messages.len());
        let answer = u32::try_from(count)
            .map_err(|_| Error::INTEGER_OVERFLOW)?
            .to_le_bytes();
        if buffer.output_len() < answer.len() {
            return Err(Error::BUFFER_TOO_SMALL);
        }
        buffer.into_output()[..answer.len()].copy_from_slice(&answer);
        Ok(answer.len())
    }

    fn clear(&self) -> Result<usize, Error> {
        let empty = room_for(self.capacity)?;
        let old = self.messages.with(|messages| mem::replace(messages, empty));
        if self.forgets {
            old.into_iter().for_each(mem::forget);
        }
        Ok(0)
    }
}

fn room_for(messages: usize) -> Result<VecDeque<Message>, Error> {
    let mut room = VecDeque::new();
    room.try_reserve_exact(messages)?;
    Ok(room)
}

fn copy_of(data: &[u8]) -> Result<Message, Error> {
    let mut message = Vec::new();
    message.try_reserve_exact(data.len())?;
    message.extend_from_slice(data);
    Ok(message)
}
