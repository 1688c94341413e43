//! Leaks pool memory, on purpose.
//!
//! | parameter | type | default | meaning |
//! | --- | --- | --- | --- |
//! | `Blocks` | `REG_DWORD` | 1 | how many blocks are leaked |
//! | `Names` | `REG_DWORD` | 0 | how many more are leaked, allocated at another place in the source |
//! | `Bytes` | `REG_DWORD` | 64 | the size of each, at least 1 |
//! | `Tags` | `REG_MULTI_SZ` | `leak` | their tags, taken in turn |
//! | `Where` | `REG_SZ` | `init` | or `cleanup` |
//! | `Fault` | `REG_SZ` | | `double-free` or `wrong-tag`: in the same place, one more block is freed so |
//!
//! Blocks with the driver's own tag come from Rust's allocator, others straight from the pool. An
//! init that fails leaks nothing.

#![no_std]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::mem;
use core::ptr::NonNull;
use windows_kernel_rs::{Driver, Error, KernelModule, Parameters, PoolTag, kernel_module};
use windows_kernel_sys::base::NonPagedPoolNx;
use windows_kernel_sys::ntoskrnl::{ExAllocatePoolWithTag, ExFreePoolWithTag};

const OWN_TAG: PoolTag = PoolTag::new(*b"leak");
const WRONG_TAG: PoolTag = PoolTag::new(*b"Wrng");

struct Module {
    at_cleanup: Option<Plan>,
}

impl KernelModule for Module {
    fn init(_: Driver, registry_path: &str) -> Result<Self, Error> {
        let parameters = Parameters::open(registry_path)?;
        let plan = Plan::read(&parameters)?;
        let at_cleanup = match parameters.string("Where")?.as_deref() {
            None | Some("init") => {
                plan.carry_out()?;
                None
            }
            Some("cleanup") => Some(plan),
            Some(_) => return Err(Error::INVALID_PARAMETER),
        };
        Ok(Module { at_cleanup })
    }

    fn cleanup(&mut self, _: Driver) {
        if let Some(plan) = self.at_cleanup.take() {
            // A cleanup cannot fail. A test sees that nothing leaked.
            let _ = plan.carry_out();
        }
    }
}

kernel_module!(Module, tag = *b"leak");

/// What is to go wrong.
struct Plan {
    buffers: usize,
    names: usize,
    bytes: usize,
    tags: Vec<PoolTag>,
    fault: Option<Fault>,
}

impl Plan {
    fn read(parameters: &Parameters) -> Result<Self, Error> {
        Ok(Self {
            buffers: parameters.u32("Blocks")?.unwrap_or(1) as usize,
            names: parameters.u32("Names")?.unwrap_or(0) as usize,
            bytes: parameters.u32("Bytes")?.unwrap_or(64).max(1) as usize,
            tags: tags(parameters.multi_string("Tags")?)?,
            fault: Fault::read(parameters)?,
        })
    }

    /// All of it or, with an error, nothing.
    fn carry_out(self) -> Result<(), Error> {
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(self.buffers + self.names)?;
        self.allocate_buffers(&mut blocks)?;
        self.allocate_names(&mut blocks)?;
        if let Some(fault) = self.fault {
            fault.commit()?;
        }
        blocks.into_iter().for_each(mem::forget);
        Ok(())
    }

    // Here and below each block is allocated by the function itself and not by one that both share:
    // whoever looks for the leak finds the place that it is of.
    #[inline(never)]
    fn allocate_buffers(&self, blocks: &mut Vec<Block>) -> Result<(), Error> {
        for _ in 0..self.buffers {
            let tag = self.tag(blocks.len());
            blocks.push(if tag == OWN_TAG {
                let mut buffer = Vec::new();
                buffer.try_reserve_exact(self.bytes)?;
                Block::Buffer(buffer)
            } else {
                // SAFETY: neither the size nor the tag is zero.
                let pool =
                    unsafe { ExAllocatePoolWithTag(NonPagedPoolNx, self.bytes, tag.to_ulong()) };
                Block::Pool(PoolBlock::new(pool, tag)?)
            });
        }
        Ok(())
    }

    #[inline(never)]
    fn allocate_names(&self, blocks: &mut Vec<Block>) -> Result<(), Error> {
        for _ in 0..self.names {
            let tag = self.tag(blocks.len());
            blocks.push(if tag == OWN_TAG {
                let mut name = String::new();
                name.try_reserve_exact(self.bytes)?;
                Block::Name(name)
            } else {
                // SAFETY: neither the size nor the tag is zero.
                let pool =
                    unsafe { ExAllocatePoolWithTag(NonPagedPoolNx, self.bytes, tag.to_ulong()) };
                Block::Pool(PoolBlock::new(pool, tag)?)
            });
        }
        Ok(())
    }

    fn tag(&self, index: usize) -> PoolTag {
        match self.tags.len() {
            0 => OWN_TAG,
            count => self.tags[index % count],
        }
    }
}

fn tags(names: Option<Vec<String>>) -> Result<Vec<PoolTag>, Error> {
    let names = names.unwrap_or_default();
    let mut tags = Vec::new();
    tags.try_reserve_exact(names.len())?;
    for name in names {
        let letters = name
            .as_bytes()
            .try_into()
            .map_err(|_| Error::INVALID_PARAMETER)?;
        tags.push(PoolTag::try_new(letters).ok_or(Error::INVALID_PARAMETER)?);
    }
    Ok(tags)
}

/// Memory that is freed when it is dropped, and leaks when it is forgotten.
#[allow(dead_code)] // owned, and never looked at
enum Block {
    Buffer(Vec<u8>),
    Name(String),
    Pool(PoolBlock),
}

struct PoolBlock {
    address: NonNull<c_void>,
    tag: PoolTag,
}

impl PoolBlock {
    /// What the pool gave for this tag, if it is not null.
    fn new(address: *mut c_void, tag: PoolTag) -> Result<Self, Error> {
        let address = NonNull::new(address).ok_or(Error::INSUFFICIENT_RESOURCES)?;
        Ok(Self { address, tag })
    }
}

impl Drop for PoolBlock {
    fn drop(&mut self) {
        // SAFETY: allocated with this tag, and not freed before.
        unsafe { ExFreePoolWithTag(self.address.as_ptr(), self.tag.to_ulong()) }
    }
}

/// What this driver does wrong with one more block.
enum Fault {
    DoubleFree,
    WrongTag,
}

impl Fault {
    fn read(parameters: &Parameters) -> Result<Option<Self>, Error> {
        match parameters.string("Fault")?.as_deref() {
            None => Ok(None),
            Some("double-free") => Ok(Some(Self::DoubleFree)),
            Some("wrong-tag") => Ok(Some(Self::WrongTag)),
            Some(_) => Err(Error::INVALID_PARAMETER),
        }
    }

    fn commit(self) -> Result<(), Error> {
        // SAFETY: neither the size nor the tag is zero.
        let pool = unsafe { ExAllocatePoolWithTag(NonPagedPoolNx, 64, OWN_TAG.to_ulong()) };
        let mut block = PoolBlock::new(pool, OWN_TAG)?;
        match self {
            Self::DoubleFree => {
                // SAFETY: none; the drop frees it again, which is the fault that was asked for.
                unsafe { ExFreePoolWithTag(block.address.as_ptr(), block.tag.to_ulong()) }
            }
            Self::WrongTag => block.tag = WRONG_TAG,
        }
        Ok(())
    }
}
