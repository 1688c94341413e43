//! The threads that requests run on.

use alloc::collections::VecDeque;

use frames::Frame;

use crate::requests::may_hang;
use crate::server::Server;
use crate::sync::{Condition, Mutex};
use crate::thread;

/// The most requests at a time that may hang. One costs a thread and no more, so there may be some of them.
const MAX_HANGING: usize = 64;

/// The most requests at a time. The threads above those that may hang stay for what is to be done about
/// them.
const MAX_WORKERS: usize = 2 * MAX_HANGING;

/// The most refusals that wait for a host that does not read.
const MAX_REFUSALS: usize = 4096;

/// Threads that stay, since to start one for each request doubles the time of a short one.
pub struct Workers {
    state: Mutex<State>,
    wake: Condition,
}

struct State {
    requests: VecDeque<Frame>,
    idle: usize,
    threads: usize,
    /// How many requests that may hang are being served or waiting for it.
    hanging: usize,
    refusals: VecDeque<Frame>,
    refusing: bool,
}

impl Workers {
    pub const fn new() -> Self {
        Workers {
            state: Mutex::new(State {
                requests: VecDeque::new(),
                idle: 0,
                threads: 0,
                hanging: 0,
                refusals: VecDeque::new(),
                refusing: false,
            }),
            wake: Condition::new(),
        }
    }

    /// Has the request served, or refused where too many threads are busy. Waits for neither.
    ///
    /// An error says that even the refusals are too many.
    pub fn submit(server: &'static Server, request: Frame) -> Result<(), ()> {
        let workers = &server.workers;
        let hangs = usize::from(may_hang(&request));
        let mut state = workers.state.lock();
        if state.hanging + hangs <= MAX_HANGING && workers.find_thread(server, &mut state) {
            state.hanging += hangs;
            state.requests.push_back(request);
            return Ok(());
        }
        if state.refusals.len() == MAX_REFUSALS {
            return Err(());
        }
        state.refusals.push_back(Frame {
            body: Default::default(),
            ..request
        });
        if !state.refusing {
            state.refusing = thread::spawn(move || workers.refuse(server)).is_ok();
        }
        Ok(())
    }

    /// Wakes or starts a thread for one more request; says whether there is one.
    fn find_thread(&'static self, server: &'static Server, state: &mut State) -> bool {
        if state.idle > state.requests.len() {
            self.wake.wake_one();
            return true;
        }
        let started =
            state.threads < MAX_WORKERS && thread::spawn(move || self.work(server)).is_ok();
        state.threads += usize::from(started);
        started
    }

    fn work(&self, server: &'static Server) {
        let mut hung = 0;
        loop {
            let mut state = self.state.lock();
            state.hanging -= hung;
            let request = loop {
                if let Some(request) = state.requests.pop_front() {
                    break request;
                }
                state.idle += 1;
                self.wake.wait(&mut state);
                state.idle -= 1;
            };
            drop(state);
            hung = usize::from(may_hang(&request));
            server.serve_request(&request);
        }
    }

    fn refuse(&self, server: &'static Server) {
        loop {
            let mut state = self.state.lock();
            let Some(request) = state.refusals.pop_front() else {
                state.refusing = false;
                return;
            };
            drop(state);
            server.refuse(&request);
        }
    }
}
