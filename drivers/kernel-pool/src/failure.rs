//! Failures on demand, to show what a driver does when memory runs out.

use core::sync::atomic::{AtomicU64, Ordering};

/// Counts events, and picks one of them to fail.
#[derive(Debug, Default)]
pub struct FailNth {
    chosen: AtomicU64,
    seen: AtomicU64,
}

impl FailNth {
    /// A counter that lets everything pass.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            chosen: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        }
    }

    /// Chooses the event to fail, counted from one and from now on. Zero chooses none.
    pub fn arm(&self, nth: u32) {
        self.seen.store(0, Ordering::Relaxed);
        self.chosen.store(nth.into(), Ordering::Relaxed);
    }

    /// Counts one event: whether it is the one to fail.
    pub fn strikes(&self) -> bool {
        let number = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        number == self.chosen.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unarmed_it_lets_everything_pass() {
        let failures = FailNth::new();
        assert!((0..100).all(|_| !failures.strikes()));
    }

    #[test]
    fn only_the_chosen_one_fails() {
        let failures = FailNth::new();
        failures.strikes();
        failures.arm(3);
        assert_eq!(
            [(); 5].map(|()| failures.strikes()),
            [false, false, true, false, false]
        );
    }

    #[test]
    fn zero_disarms() {
        let failures = FailNth::new();
        failures.arm(1);
        failures.arm(0);
        assert!((0..5).all(|_| !failures.strikes()));
    }
}
