//! Any alignment out of a pool that knows only its own.

use core::alloc::Layout;
use core::ptr;

/// The alignment that the pool gives by itself, on 64-bit Windows.
pub const POOL_ALIGNMENT: usize = 16;

/// Where blocks come from.
///
/// # Safety
///
/// `allocate` gives null, or a block of that many bytes, aligned to [`POOL_ALIGNMENT`], which
/// nobody else uses until it is freed.
pub unsafe trait Pool {
    /// A block of `bytes`, or null. `bytes` is never zero.
    fn allocate(&self, bytes: usize) -> *mut u8;

    /// Takes a block back.
    ///
    /// # Safety
    ///
    /// `block` came from [`allocate`](Self::allocate) of this pool, and is not used again.
    unsafe fn free(&self, block: *mut u8);
}

/// A block for `layout`, or null.
///
/// Where the pool's own alignment does not do, the block is larger by the alignment asked for. The
/// address to be freed stands right before the address given out: both are multiples of 16 and
/// differ, so there is room for it.
///
/// # Safety
///
/// The size of `layout` is not zero.
pub unsafe fn allocate(pool: &impl Pool, layout: Layout) -> *mut u8 {
    if layout.align() <= POOL_ALIGNMENT {
        return pool.allocate(layout.size());
    }
    let Some(bytes) = layout.size().checked_add(layout.align()) else {
        return ptr::null_mut();
    };
    let block = pool.allocate(bytes);
    if block.is_null() {
        return block;
    }
    let past_block = layout.align() - block.addr() % layout.align();
    // SAFETY: `past_block` is at least 16 and at most the alignment, by which the block is larger
    // than what was asked for; so both the address and the room before it lie in the block.
    unsafe {
        let aligned = block.add(past_block);
        origin_of(aligned).write(block);
        aligned
    }
}

/// Frees what [`allocate`] gave.
///
/// # Safety
///
/// `address` came from [`allocate`] with the same pool and layout, and is not used again.
pub unsafe fn free(pool: &impl Pool, address: *mut u8, layout: Layout) {
    let block = if layout.align() <= POOL_ALIGNMENT {
        address
    } else {
        // SAFETY: `allocate` wrote the block's address there, and it is nobody else's.
        unsafe { origin_of(address).read() }
    };
    // SAFETY: this is the address that the pool gave, by the caller's promise.
    unsafe { pool.free(block) }
}

/// Where the address of the block is kept that an over-aligned address lies in.
#[allow(clippy::cast_ptr_alignment)] // over-aligned is more than a pointer needs
fn origin_of(address: *mut u8) -> *mut *mut u8 {
    address.cast::<*mut u8>().wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use core::cell::RefCell;
    use std::alloc;
    use std::collections::HashMap;

    /// A pool that gives blocks aligned to 16 and, on purpose, to no more.
    #[derive(Default)]
    struct Meagre {
        blocks: RefCell<HashMap<*mut u8, (*mut u8, Layout)>>,
    }

    // SAFETY: each block lies 16 bytes into an allocation of its own that is 16 bytes larger.
    unsafe impl Pool for Meagre {
        fn allocate(&self, bytes: usize) -> *mut u8 {
            let Ok(layout) = Layout::from_size_align(bytes.saturating_add(16), 4096) else {
                return ptr::null_mut();
            };
            // SAFETY: the layout is not empty, and 16 bytes into it lie within.
            let (origin, block) = unsafe {
                let origin = alloc::alloc(layout);
                (origin, origin.add(16))
            };
            self.blocks.borrow_mut().insert(block, (origin, layout));
            block
        }

        unsafe fn free(&self, block: *mut u8) {
            let (origin, layout) = self.blocks.borrow_mut().remove(&block).unwrap();
            // SAFETY: allocated above, with this layout.
            unsafe { alloc::dealloc(origin, layout) }
        }
    }

    #[test]
    fn each_alignment_is_kept_and_each_block_comes_back() {
        let pool = Meagre::default();
        for align in (0..=13).map(|power| 1 << power) {
            for size in [1, 7, 16, 100, 5000] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: the size is not zero; the bytes are ours until freed.
                unsafe {
                    let address = allocate(&pool, layout);
                    assert_eq!(address.addr() % align, 0);
                    address.write_bytes(0xA5, size);
                    free(&pool, address, layout);
                }
                assert!(pool.blocks.borrow().is_empty());
            }
        }
    }

    #[test]
    fn neighbours_do_not_touch() {
        let pool = Meagre::default();
        let layout = Layout::from_size_align(64, 64).unwrap();
        // SAFETY: as above.
        unsafe {
            let first = allocate(&pool, layout);
            let second = allocate(&pool, layout);
            first.write_bytes(1, 64);
            second.write_bytes(2, 64);
            assert!((0..64).all(|index| first.add(index).read() == 1));
            free(&pool, first, layout);
            free(&pool, second, layout);
        }
        assert!(pool.blocks.borrow().is_empty());
    }

    struct Empty;

    // SAFETY: null is always allowed.
    unsafe impl Pool for Empty {
        fn allocate(&self, _: usize) -> *mut u8 {
            ptr::null_mut()
        }

        unsafe fn free(&self, _: *mut u8) {
            unreachable!("nothing was given out");
        }
    }

    #[test]
    fn no_memory_is_null_for_every_alignment() {
        for align in [1, 16, 32, 4096] {
            let layout = Layout::from_size_align(8, align).unwrap();
            // SAFETY: the size is not zero.
            assert!(unsafe { allocate(&Empty, layout) }.is_null());
        }
    }
}
