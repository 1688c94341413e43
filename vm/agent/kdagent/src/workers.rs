//! The threads that requests run on.

use alloc::collections::VecDeque;

use frames::Frame;

use crate::server::Server;
use crate::sync::{Condition, Mutex};
use crate::thread;

/// The most requests at a time. One that hangs costs a thread and no more, so there may be some of them.
const MAX_WORKERS: usize = 64;

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
                refusals: VecDeque::new(),
                refusing: false,
            }),
            wake: Condition::new(),
        }
    }

    /// Has the request served, or refused where all threads are busy. Waits for neither.
    ///
    /// An error says that even the refusals are too many.
    pub fn submit(server: &'static Server, request: Frame) -> Result<(), ()> {
        let workers = &server.workers;
        let mut state = workers.state.lock();
        if state.idle > state.requests.len() {
            state.requests.push_back(request);
            workers.wake.wake_one();
            return Ok(());
        }
        if state.threads < MAX_WORKERS && thread::spawn(move || workers.work(server)).is_ok() {
            state.threads += 1;
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

    fn work(&self, server: &'static Server) {
        loop {
            let mut state = self.state.lock();
            let request = loop {
                if let Some(request) = state.requests.pop_front() {
                    break request;
                }
                state.idle += 1;
                self.wake.wait(&mut state);
                state.idle -= 1;
            };
            drop(state);
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
