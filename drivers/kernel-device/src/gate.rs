//! Who is inside, and whether anybody may still come in.

use core::sync::atomic::{AtomicUsize, Ordering};

/// Lets requests in while it is open, and knows when the last one has left after it was closed.
///
/// A closed gate is all zeros: memory that the kernel has just zeroed is one.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Gate {
    /// [`OPEN`], and [`ONE_INSIDE`] for each one inside.
    state: AtomicUsize,
}

const OPEN: usize = 1;
const ONE_INSIDE: usize = 2;

impl Gate {
    /// A closed gate.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: AtomicUsize::new(0),
        }
    }

    /// From now on it can be entered. Who enters sees all that was done before.
    pub fn open(&self) {
        self.state.fetch_or(OPEN, Ordering::Release);
    }

    /// From now on nobody comes in. Who is inside stays there.
    pub fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::Relaxed);
    }

    /// Goes in until the pass is dropped; `None` if it is closed.
    pub fn enter(&self) -> Option<Pass<'_>> {
        self.state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |state| {
                (state & OPEN != 0).then_some(state + ONE_INSIDE)
            })
            .ok()
            .map(|_| Pass { gate: self })
    }

    /// Whether nobody is inside. Who asks sees all that was done inside.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.load(Ordering::Acquire) < ONE_INSIDE
    }
}

/// Somebody is inside.
#[derive(Debug)]
pub struct Pass<'gate> {
    gate: &'gate Gate,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.state.fetch_sub(ONE_INSIDE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn it_is_closed_at_first() {
        assert!(Gate::new().enter().is_none());
    }

    #[test]
    fn many_may_be_inside() {
        let gate = Gate::new();
        gate.open();
        let (first, second) = (gate.enter(), gate.enter());
        assert!(first.is_some() && second.is_some());
        drop(first);
        assert!(!gate.is_empty());
        drop(second);
        assert!(gate.is_empty());
    }

    #[test]
    fn closed_it_keeps_who_is_inside_and_lets_nobody_in() {
        let gate = Gate::new();
        gate.open();
        let inside = gate.enter();
        gate.close();
        assert!(gate.enter().is_none());
        assert!(!gate.is_empty());
        drop(inside);
        assert!(gate.is_empty());
    }

    #[test]
    fn nobody_is_inside_after_it_was_closed_and_found_empty() {
        for _ in 0..200 {
            let gate = Gate::new();
            let gone = AtomicBool::new(false);
            gate.open();
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        while let Some(_pass) = gate.enter() {
                            assert!(!gone.load(Ordering::Relaxed));
                        }
                    });
                }
                gate.close();
                while !gate.is_empty() {
                    thread::yield_now();
                }
                gone.store(true, Ordering::Relaxed);
            });
        }
    }
}
