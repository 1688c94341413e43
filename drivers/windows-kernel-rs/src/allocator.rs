//! Rust's heap in the kernel's pool.

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::c_void;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use kernel_pool::PoolTag;
use kernel_pool::placement::{self, Pool};
use kernel_text::utf16;
use windows_kernel_sys::base::{
    NonPagedPoolNx, POOL_FLAG_NON_PAGED, POOL_FLAG_UNINITIALIZED, POOL_FLAGS,
};
use windows_kernel_sys::ntoskrnl::{
    ExAllocatePoolWithTag, ExFreePoolWithTag, MmGetSystemRoutineAddress,
};

use crate::unicode::UnicodeString;

type ExAllocatePool2 = unsafe extern "system" fn(POOL_FLAGS, usize, u32) -> *mut c_void;

/// Where the kernel has `ExAllocatePool2`, or null: Windows 10 has it from version 2004 on.
static ALLOCATE_POOL_2: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Which allocation fails on demand.
#[cfg(feature = "fail-allocation")]
pub(crate) static FAILURE: kernel_pool::failure::FailNth = kernel_pool::failure::FailNth::new();

/// Looks for `ExAllocatePool2`, once and before the first allocation.
///
/// Not at the first allocation: the lookup is allowed at `PASSIVE_LEVEL` only, where `DriverEntry`
/// runs, and an allocation up to `DISPATCH_LEVEL`.
pub(crate) fn find_pool_functions() {
    const NAME: [u16; 15] = utf16::literal(b"ExAllocatePool2");
    let name = UnicodeString::of_literal(&NAME);
    // SAFETY: the string is well formed and outlives the call.
    let address = unsafe { MmGetSystemRoutineAddress(name.as_raw()) };
    ALLOCATE_POOL_2.store(address, Ordering::Relaxed);
}

/// The global allocator: non-paged memory that nothing can be executed in, under one tag.
///
/// [`kernel_module!`](crate::kernel_module) makes one. Any alignment is honoured. When there is no
/// memory it gives null: it never panics. To be used at or below `DISPATCH_LEVEL`.
pub struct KernelAllocator {
    tag: PoolTag,
}

impl KernelAllocator {
    /// An allocator whose blocks bear this tag.
    #[must_use]
    pub const fn new(tag: PoolTag) -> Self {
        Self { tag }
    }
}

// SAFETY: both functions give null or a block of that size, aligned to 16, which is the caller's
// until freed.
unsafe impl Pool for KernelAllocator {
    fn allocate(&self, bytes: usize) -> *mut u8 {
        let tag = self.tag.to_ulong();
        let pool2 = ALLOCATE_POOL_2.load(Ordering::Relaxed);
        let block = if pool2.is_null() {
            // SAFETY: the size and the tag are not zero.
            unsafe { ExAllocatePoolWithTag(NonPagedPoolNx, bytes, tag) }
        } else {
            // SAFETY: what the kernel exports under this name has this type.
            let allocate = unsafe { mem::transmute::<*mut c_void, ExAllocatePool2>(pool2) };
            // SAFETY: as above.
            unsafe { allocate(POOL_FLAG_NON_PAGED | POOL_FLAG_UNINITIALIZED, bytes, tag) }
        };
        #[cfg(feature = "capture-stacks")]
        if !block.is_null() {
            crate::stack::record(block.cast());
        }
        block.cast()
    }

    unsafe fn free(&self, block: *mut u8) {
        // SAFETY: the block came from `allocate`, which used the same tag, and both functions there
        // free by this one.
        unsafe { ExFreePoolWithTag(block.cast(), self.tag.to_ulong()) }
    }
}

// SAFETY: `placement` gives null or a block that satisfies the layout. `realloc` is the default: a
// new block, a copy, and the old one freed, which is right for every alignment.
unsafe impl GlobalAlloc for KernelAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        #[cfg(feature = "fail-allocation")]
        if FAILURE.strikes() {
            return ptr::null_mut();
        }
        // SAFETY: nobody asks a global allocator for no bytes.
        unsafe { placement::allocate(self, layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller had the address from `alloc`, with this layout.
        unsafe { placement::free(self, address, layout) }
    }
}
