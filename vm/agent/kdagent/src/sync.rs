//! A mutex and a condition variable, on Windows's slim ones.

use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use crate::sys;

/// A value that one thread at a time sees.
pub struct Mutex<T> {
    lock: UnsafeCell<usize>,
    value: UnsafeCell<T>,
}

// SAFETY: the lock lets one thread at a time at the value.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Mutex {
            lock: UnsafeCell::new(0),
            value: UnsafeCell::new(value),
        }
    }

    pub fn lock(&self) -> Guard<'_, T> {
        // SAFETY: the lock was initialised to SRWLOCK_INIT, which is 0. A guard cannot be moved out of this
        // borrow, so neither can the lock while it is held.
        unsafe { sys::AcquireSRWLockExclusive(self.lock.get()) };
        Guard {
            mutex: self,
            not_send: PhantomData,
        }
    }
}

/// The right to the value of a mutex. It stays with its thread: Windows lets none but the one that took a
/// slim lock give it back.
pub struct Guard<'a, T> {
    mutex: &'a Mutex<T>,
    not_send: PhantomData<*const ()>,
}

// SAFETY: a shared guard gives shared references to the value, and nothing else.
unsafe impl<T: Sync> Sync for Guard<'_, T> {}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard holds the lock, and is borrowed by one alone.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        unsafe { sys::ReleaseSRWLockExclusive(self.mutex.lock.get()) };
    }
}

/// Lets threads wait for a change of what a mutex holds.
pub struct Condition(UnsafeCell<usize>);

// SAFETY: Windows's condition variables are made to be shared.
unsafe impl Sync for Condition {}

impl Condition {
    pub const fn new() -> Self {
        Condition(UnsafeCell::new(0))
    }

    /// Waits to be woken, or for nothing at all: the caller looks again.
    pub fn wait<T>(&self, guard: &mut Guard<'_, T>) {
        self.wait_for(guard, sys::INFINITE);
    }

    /// The same for at most so many milliseconds.
    pub fn wait_for<T>(&self, guard: &mut Guard<'_, T>, milliseconds: u32) {
        // SAFETY: both were initialised, and the guard holds the lock, before and after.
        unsafe {
            sys::SleepConditionVariableSRW(self.0.get(), guard.mutex.lock.get(), milliseconds, 0)
        };
    }

    pub fn wake_one(&self) {
        // SAFETY: it was initialised to CONDITION_VARIABLE_INIT, which is 0.
        unsafe { sys::WakeConditionVariable(self.0.get()) };
    }

    pub fn wake_all(&self) {
        // SAFETY: as above.
        unsafe { sys::WakeAllConditionVariable(self.0.get()) };
    }
}
