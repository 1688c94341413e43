//! A box that says so when there is no memory for it.

use crate::error::Error;
use alloc::alloc::alloc;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

/// An owned value on the heap. `Box::try_new` does the same, and is not stable.
#[derive(Debug)]
pub struct TryBox<T>(Box<T>);

impl<T> TryBox<T> {
    /// Moves a value to the heap; without memory for it, the value is dropped.
    ///
    /// The value is made on the stack first, once or, without optimisation, more than once. What is
    /// larger than a few hundred bytes is better a `Vec`, grown by `try_reserve`.
    ///
    /// # Errors
    ///
    /// [`Error::INSUFFICIENT_RESOURCES`].
    pub fn try_new(value: T) -> Result<Self, Error> {
        let layout = Layout::new::<T>();
        let place = if layout.size() == 0 {
            NonNull::<T>::dangling().as_ptr()
        } else {
            // SAFETY: the layout is not empty.
            unsafe { alloc(layout) }.cast::<T>()
        };
        if place.is_null() {
            return Err(Error::INSUFFICIENT_RESOURCES);
        }
        // SAFETY: the place is writable and of the right layout, and it is what `Box` would have
        // used itself: from the global allocator, or dangling for a value without size.
        unsafe {
            place.write(value);
            Ok(Self(Box::from_raw(place)))
        }
    }

    /// The ordinary box.
    #[must_use]
    pub fn into_box(self) -> Box<T> {
        self.0
    }
}

impl<T> Deref for TryBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for TryBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
