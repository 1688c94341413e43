//! The threads that requests run on.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use frames::Frame;

use crate::requests::Kind;
use crate::server::Server;
use crate::session::Session;
use crate::sync::{Condition, Mutex};
use crate::thread;

/// The most requests of each kind at a time. One costs a thread and no more, so there may be some of them;
/// and however many hang, there is room for what is to be done about them.
const MAX_OF_A_KIND: usize = 64;

/// The most refusals that wait for a host that does not read.
const MAX_REFUSALS: usize = 4096;

/// Threads that stay, since to start one for each request doubles the time of a short one.
pub struct Workers {
    state: Mutex<State>,
    wake: Condition,
}

struct State {
    requests: VecDeque<(Kind, Job)>,
    threads: usize,
    /// How many requests of each kind are being served or waiting for it.
    busy: [usize; Kind::COUNT],
    refusals: VecDeque<Job>,
    refusing: bool,
}

/// A request, and whose it is.
type Job = (Arc<Session>, Frame);

impl Workers {
    pub const fn new() -> Self {
        Workers {
            state: Mutex::new(State {
                requests: VecDeque::new(),
                threads: 0,
                busy: [0; Kind::COUNT],
                refusals: VecDeque::new(),
                refusing: false,
            }),
            wake: Condition::new(),
        }
    }

    /// Has the request served, or refused where too many threads are busy. Waits for neither.
    ///
    /// An error says that even the refusals are too many.
    pub fn submit(
        server: &'static Server,
        session: &Arc<Session>,
        request: Frame,
    ) -> Result<(), ()> {
        let workers = &server.workers;
        let kind = Kind::of(&request);
        let mut state = workers.state.lock();
        if state.busy[kind as usize] < MAX_OF_A_KIND && workers.find_thread(server, &mut state) {
            state.busy[kind as usize] += 1;
            state.requests.push_back((kind, (session.clone(), request)));
            return Ok(());
        }
        if state.refusals.len() == MAX_REFUSALS {
            return Err(());
        }
        let refused = Frame {
            body: Default::default(),
            ..request
        };
        state.refusals.push_back((session.clone(), refused));
        if !state.refusing {
            state.refusing = thread::spawn(move || workers.refuse(server)).is_ok();
        }
        Ok(())
    }

    /// Wakes or starts a thread for one more request; says whether there is one.
    fn find_thread(&'static self, server: &'static Server, state: &mut State) -> bool {
        // Who is not busy waits, or looks for requests before he does.
        if state.threads > state.busy.iter().sum() {
            self.wake.wake_one();
            return true;
        }
        let started = thread::spawn(move || self.work(server)).is_ok();
        state.threads += usize::from(started);
        started
    }

    fn work(&self, server: &'static Server) {
        let mut state = self.state.lock();
        loop {
            let Some((kind, (session, request))) = state.requests.pop_front() else {
                self.wake.wait(&mut state);
                continue;
            };
            drop(state);
            server.serve_request(&session, &request);
            drop(session);
            state = self.state.lock();
            state.busy[kind as usize] -= 1;
        }
    }

    fn refuse(&self, server: &'static Server) {
        loop {
            let mut state = self.state.lock();
            let Some((session, request)) = state.refusals.pop_front() else {
                state.refusing = false;
                return;
            };
            drop(state);
            server.refuse(&session, &request);
        }
    }
}
