//! The calls into drivers that are going on, and the thread that keeps their time.
//!
//! A driver may hold a call's thread, or pend its request, for ever. At its time limit a call is cancelled,
//! again and again, since a cancel that comes before the request is lost. One that has not ended a while
//! later is given up: the host gets its answer, and the driver keeps the memory.

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

/// How long until it is cancelled again, in milliseconds.
const AGAIN: u32 = 50;

/// A call that is going on.
struct Call {
    transfer: Arc<Transfer>,
    target: Target,
    stage: Stage,
    /// Whether its thread went on to make it.
    issued: bool,
    /// When something has to be done about it.
    due: u64,
    reply: Reply,
}

/// What was done about a call.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Going,
    /// It is being cancelled.
    Cancelled,
    /// It gets its answer without having ended.
    GivenUp,
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
            stage: Stage::Going,
            issued: false,
            due,
            reply: reply.clone(),
        });
        if due < state.looks_at {
            self.sooner.wake_one();
        }
        Ok(())
    }

    /// Whether the call is still to be made: nobody has cancelled it or given it up.
    pub fn issue(&self, transfer: &Arc<Transfer>) -> bool {
        let mut state = self.state.lock();
        match state.find(transfer) {
            Some(call) if call.stage == Stage::Going => {
                call.issued = true;
                true
            }
            _ => false,
        }
    }

    /// Whether nobody waits for the call any more.
    pub fn is_given_up(&self, transfer: &Arc<Transfer>) -> bool {
        let mut state = self.state.lock();
        state
            .find(transfer)
            .is_none_or(|call| call.stage == Stage::GivenUp)
    }

    /// Notes that a call is over, and says how; None if it was given up before, and has its answer.
    pub fn end(&self, transfer: &Arc<Transfer>) -> Option<Outcome> {
        let mut state = self.state.lock();
        let outcome = match state.find(transfer)?.stage {
            Stage::Going => Outcome::Completed,
            Stage::Cancelled => Outcome::Cancelled,
            Stage::GivenUp => return None,
        };
        state.remove(transfer);
        drop(state);
        self.ended.wake_all();
        Some(outcome)
    }

    /// Cancels a device's calls, and waits until the last of them has ended, or has its answer.
    pub fn cancel_all(&self, device: u32) {
        let is_its =
            |call: &Call| matches!(call.target, Target::Device { number, .. } if number == device);
        let mut state = self.state.lock();
        for call in state.running.iter_mut().filter(|call| is_its(call)) {
            if call.stage == Stage::Going {
                call.due = 0;
                self.sooner.wake_one();
            }
        }
        while state.running.iter().any(is_its) {
            self.ended.wait(&mut state);
        }
    }

    fn watch(&'static self) {
        loop {
            let mut state = self.state.lock();
            let now = now();
            for call in state.running.iter_mut().filter(|call| call.due <= now) {
                self.rescue(call, now);
            }
            let due = state.running.iter().map(|call| call.due).min();
            state.looks_at = due.unwrap_or(u64::MAX);
            let left = u32::try_from(state.looks_at.saturating_sub(now));
            self.sooner
                .wait_for(&mut state, left.unwrap_or(sys::INFINITE));
        }
    }

    /// Cancels a call that is due, or gives up one that was cancelled in vain; each by a thread of its own,
    /// for a driver's cancel routine may hang, and so may a host that does not read its answers.
    fn rescue(&'static self, call: &mut Call, now: u64) {
        let transfer = call.transfer.clone();
        match (call.target, call.stage) {
            (target @ Target::Device { .. }, Stage::Going) => {
                call.stage = Stage::Cancelled;
                call.due = now + GRACE;
                // Without a thread it will be given up.
                let _ = thread::spawn(move || self.cancel(&transfer, target));
            }
            (target, _) => {
                let (issued, mut reply) = (call.issued, call.reply.clone());
                let answered = thread::spawn(move || {
                    // Its thread goes, if that waits for the end.
                    transfer.release();
                    target.give_up(issued, &mut reply);
                    self.state.lock().remove(&transfer);
                    self.ended.wake_all();
                });
                match answered {
                    Ok(()) => {
                        call.stage = Stage::GivenUp;
                        call.due = u64::MAX;
                    }
                    // There may be a thread for it later.
                    Err(_) => call.due = now + u64::from(AGAIN),
                }
            }
        }
    }

    fn cancel(&self, transfer: &Arc<Transfer>, target: Target) {
        let mut state = self.state.lock();
        while state
            .find(transfer)
            .is_some_and(|call| call.stage == Stage::Cancelled)
        {
            drop(state);
            target.cancel(transfer);
            state = self.state.lock();
            self.ended.wait_for(&mut state, AGAIN);
        }
    }
}

impl State {
    fn find(&mut self, transfer: &Arc<Transfer>) -> Option<&mut Call> {
        self.running
            .iter_mut()
            .find(|call| Arc::ptr_eq(&call.transfer, transfer))
    }

    fn remove(&mut self, transfer: &Arc<Transfer>) {
        self.running
            .retain(|call| !Arc::ptr_eq(&call.transfer, transfer));
    }
}

impl Target {
    fn cancel(self, transfer: &Transfer) {
        if let Target::Device { file, .. } = self {
            transfer.cancel(file);
        }
    }

    /// Answers in the place of a call that has not ended.
    fn give_up(self, issued: bool, reply: &mut Reply) {
        let (status, outcome) = match self {
            Target::Device { .. } if !issued => (sys::STATUS_CANCELLED, Outcome::Cancelled),
            _ => (sys::STATUS_PENDING, Outcome::Stuck),
        };
        match self {
            Target::Opening => reply.send(&frames::DeviceOpened {
                status,
                outcome: outcome as u32,
                device: 0,
            }),
            Target::Device { .. } => reply.send(&frames::IoEnded {
                status,
                outcome: outcome as u32,
                count: 0,
                data: &[],
            }),
        }
    }
}
