//! The calls into drivers that are going on, and the thread that keeps their time.
//!
//! A driver may hold a call's thread, or pend its request, for ever. At its time limit a call is cancelled.
//! One that has not ended a while later is given up: the host gets its answer, and the driver keeps the
//! memory.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::transfer::Transfer;
use crate::clock::now;
use crate::failure::Answer;
use crate::server::Reply;
use crate::sync::{Condition, Mutex};
use crate::{sys, thread};

/// How long a call may take to end after it was cancelled, in milliseconds.
const GRACE: u64 = 2000;

/// A call that is going on.
struct Call {
    transfer: Arc<Transfer>,
    target: Target,
    /// When something has to be done about it.
    due: u64,
    cancelled: bool,
    reply: Reply,
}

/// What a call is made on, and so what can be done about it.
#[derive(Clone, Copy)]
pub enum Target {
    /// A file that is being opened; there is nothing to cancel yet.
    Opening,
    /// A device that is open.
    Device { number: u32, file: sys::Handle },
}

// SAFETY: a handle is a number that all threads of the process may use.
unsafe impl Send for Target {}

impl Target {
    fn cancel(self, transfer: &Transfer) {
        if let Target::Device { file, .. } = self {
            transfer.cancel(file);
        }
    }
}

/// How a call ended.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Outcome {
    Completed = 0,
    Cancelled = 1,
    Stuck = 2,
}

/// All calls that are going on.
pub struct Calls {
    state: Mutex<State>,
    sooner: Condition,
    ended: Condition,
}

struct State {
    running: Vec<Call>,
    watched: bool,
    /// When the thread that keeps the time looks next.
    looks_at: u64,
}

impl Calls {
    pub const fn new() -> Self {
        Calls {
            state: Mutex::new(State {
                running: Vec::new(),
                watched: false,
                looks_at: 0,
            }),
            sooner: Condition::new(),
            ended: Condition::new(),
        }
    }

    /// Notes a call that is about to be made. `time_limit` is in milliseconds.
    pub fn begin(
        &'static self,
        transfer: &Arc<Transfer>,
        target: Target,
        time_limit: u32,
        reply: &Reply,
    ) -> Answer {
        let due = now() + u64::from(time_limit);
        let mut state = self.state.lock();
        if !state.watched {
            thread::spawn(|| self.watch())?;
            state.watched = true;
        }
        state.running.push(Call {
            transfer: transfer.clone(),
            target,
            due,
            cancelled: matches!(target, Target::Opening),
            reply: reply.clone(),
        });
        if due < state.looks_at {
            self.sooner.wake_one();
        }
        Ok(())
    }

    /// Notes that a call is over, and says how; None if it was given up before, and has its answer.
    pub fn end(&self, transfer: &Arc<Transfer>) -> Option<Outcome> {
        let mut state = self.state.lock();
        let is_it = |call: &Call| Arc::ptr_eq(&call.transfer, transfer);
        let place = state.running.iter().position(is_it)?;
        let call = state.running.swap_remove(place);
        drop(state);
        self.ended.wake_all();
        match call.target {
            Target::Device { .. } if call.cancelled => Some(Outcome::Cancelled),
            _ => Some(Outcome::Completed),
        }
    }

    /// Cancels a device's calls, and waits until the last of them has ended or is given up.
    pub fn cancel_all(&self, device: u32) {
        let is_its =
            |call: &Call| matches!(call.target, Target::Device { number, .. } if number == device);
        let mut state = self.state.lock();
        for call in state.running.iter_mut().filter(|call| is_its(call)) {
            if !call.cancelled {
                call.due = 0;
                self.sooner.wake_one();
            }
        }
        while state.running.iter().any(is_its) {
            self.ended.wait(&mut state);
        }
    }

    fn watch(&self) {
        loop {
            let mut state = self.state.lock();
            let late = state.cancel_late(now());
            if late.is_empty() {
                let due = state.running.iter().map(|call| call.due).min();
                state.looks_at = due.unwrap_or(u64::MAX);
                let left = u32::try_from(state.looks_at.saturating_sub(now()));
                self.sooner
                    .wait_for(&mut state, left.unwrap_or(sys::INFINITE));
            }
            drop(state);
            for call in late {
                call.give_up();
                self.ended.wake_all();
            }
        }
    }
}

impl State {
    /// Cancels the calls that are due, and takes away those that were cancelled in vain.
    fn cancel_late(&mut self, now: u64) -> Vec<Call> {
        for call in &mut self.running {
            if call.due <= now && !call.cancelled {
                call.cancelled = true;
                call.due = now + GRACE;
                call.cancel();
            }
        }
        let running = core::mem::take(&mut self.running);
        let (late, running) = running.into_iter().partition(|call| call.due <= now);
        self.running = running;
        late
    }
}

impl Call {
    /// Has the call cancelled, by a thread of its own: a driver's cancel routine may hang, too.
    fn cancel(&self) {
        let (target, transfer) = (self.target, self.transfer.clone());
        // Without a thread it will be given up.
        let _ = thread::spawn(move || target.cancel(&transfer));
    }

    /// Answers in its place, and lets its thread go if that waits for the end.
    fn give_up(mut self) {
        match self.target {
            Target::Opening => self.reply.send(&frames::DeviceOpened {
                status: sys::STATUS_PENDING,
                outcome: Outcome::Stuck as u32,
                device: 0,
            }),
            Target::Device { .. } => self.reply.send(&frames::IoEnded {
                status: sys::STATUS_PENDING,
                outcome: Outcome::Stuck as u32,
                count: 0,
                data: &[],
            }),
        }
        self.transfer.release();
    }
}
