//! Runs a program to its end, or to its time limit.

use alloc::vec;
use alloc::vec::Vec;
use core::ptr::{null, null_mut};

use frames::{Completed, Run};

use super::pipe::Pipe;
use super::processes::exit_code;
use crate::clock::now;
use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::server::Reply;
use crate::session::Session;
use crate::{sys, text};

/// How long, in milliseconds, the outputs of a program that has ended may be silent and still be waited for.
/// Only a process that it left behind keeps them open.
const QUIET: u64 = 50;

/// How long such a process can make us wait by writing on, in milliseconds.
const LAST_OUTPUT: u64 = 1000;

/// How long a program may take to end after it was told to, in milliseconds.
const ENDING: u32 = 2000;

/// Runs the program and answers.
pub fn run(request: &Run<'_>, reply: &mut Reply) -> Answer {
    let limit = request.output_limit as usize;
    let (input, their_input) = Pipe::to_program(request.stdin)?;
    let (output, their_output) = Pipe::from_program(limit)?;
    let (error, their_error) = Pipe::from_program(limit)?;
    let program = Program::start(request, [their_input, their_output, their_error])?;
    let mut pipes = [input, output, error];
    let timed_out = program
        .follow(&mut pipes, u64::from(request.time_limit), reply.session())
        .inspect_err(|_| program.end())?;
    let exit_code = match &program.process {
        Some(process) if !timed_out => Some(exit_code(process)?),
        _ => None,
    };
    let [_, output, error] = pipes;
    let (stdout, stdout_truncated) = output.into_output();
    let (stderr, stderr_truncated) = error.into_output();
    reply.send(&Completed {
        exit_code,
        stdout: &stdout,
        stderr: &stderr,
        timed_out,
        truncated: stdout_truncated || stderr_truncated,
    });
    Ok(())
}

/// A program that runs, in a job of its own where that can be had.
struct Program {
    /// None on Wine for a Unix program: there is nothing to wait for but the end of its outputs.
    process: Option<Owned>,
    job: Option<Job>,
}

impl Program {
    /// Starts it. Of our handles it inherits these three alone, and they are closed here.
    fn start(request: &Run<'_>, ends: [Owned; 3]) -> Answer<Self> {
        let mut command_line = text::wide(request.command_line)?;
        let directory = request.directory.map(text::wide).transpose()?;
        let handles = ends.each_ref().map(Owned::raw);
        let mut attributes = Attributes::inherit(&handles)?;
        let startup = sys::StartupInfoEx {
            size: size_of::<sys::StartupInfoEx>() as u32,
            reserved: null_mut(),
            desktop: null_mut(),
            title: null_mut(),
            position_and_size: [0; 7],
            flags: sys::STARTF_USESTDHANDLES,
            show_window: 0,
            reserved_size: 0,
            reserved_bytes: null_mut(),
            input: handles[0],
            output: handles[1],
            error: handles[2],
            attributes: attributes.list(),
        };
        let mut information = sys::ProcessInformation {
            process: null_mut(),
            thread: null_mut(),
            pid: 0,
            tid: 0,
        };
        // SAFETY: the strings end with a NUL, the attributes stay during the call, and null stands for
        // nothing.
        let result = unsafe {
            sys::CreateProcessW(
                null(),
                command_line.as_mut_ptr(),
                null(),
                null(),
                sys::TRUE,
                sys::CREATE_SUSPENDED | sys::CREATE_NO_WINDOW | sys::EXTENDED_STARTUPINFO_PRESENT,
                null(),
                directory.as_ref().map_or(null(), |path| path.as_ptr()),
                &startup,
                &mut information,
            )
        };
        check(result, "start the program")?;
        let Ok(process) = Owned::new(information.process, "") else {
            return Ok(Program {
                process: None,
                job: None,
            });
        };
        let program = Program {
            job: Job::of(&process),
            process: Some(process),
        };
        match resume(information.thread) {
            Ok(()) => Ok(program),
            Err(failure) => {
                program.end();
                Err(failure)
            }
        }
    }

    /// Serves the pipes until the program has ended; says whether its time was up, by the session's end too.
    fn follow(
        &self,
        pipes: &mut [Pipe<'_>; 3],
        time_limit: u64,
        session: &Session,
    ) -> Answer<bool> {
        let limit = now() + time_limit;
        let mut ended_at: Option<u64> = None;
        let mut timed_out = false;
        loop {
            let mut handles: Vec<sys::Handle> = pipes.iter_mut().filter_map(Pipe::begin).collect();
            let left = match ended_at {
                Some(then) => QUIET.min((then + LAST_OUTPUT).saturating_sub(now())),
                None => limit.saturating_sub(now()),
            };
            match &self.process {
                Some(process) if ended_at.is_none() => handles.push(process.raw()),
                _ if handles.is_empty() => return Ok(timed_out),
                _ => {}
            }
            if ended_at.is_none() {
                handles.push(session.over());
            }
            // SAFETY: there are as many handles as told, one to five, all open.
            let woken = unsafe {
                sys::WaitForMultipleObjects(
                    handles.len() as u32,
                    handles.as_ptr(),
                    0,
                    u32::try_from(left).unwrap_or(sys::INFINITE - 1),
                )
            };
            pipes.iter_mut().for_each(Pipe::poll);
            match ended_at {
                Some(_) if woken == sys::WAIT_TIMEOUT || left == 0 => return Ok(timed_out),
                Some(_) => {}
                None if self.has_ended() => {
                    if let Some(job) = &self.job {
                        job.let_go();
                    }
                    ended_at = Some(now());
                }
                None if now() >= limit || session.is_over() => {
                    timed_out = true;
                    self.end();
                    ended_at = Some(now());
                }
                None if woken > sys::WAIT_TIMEOUT => {
                    return Err(Failure::last("wait for the program"));
                }
                None => {}
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            // SAFETY: the handle is a process's.
            unsafe { sys::WaitForSingleObject(process.raw(), 0) == sys::WAIT_OBJECT_0 }
        })
    }

    /// Ends the program, and where it has a job all that it started.
    fn end(&self) {
        let Some(process) = &self.process else {
            return;
        };
        // SAFETY: the handles are a job's and a process's.
        unsafe {
            if let Some(job) = &self.job {
                sys::TerminateJobObject(job.0.raw(), 1);
            }
            sys::TerminateProcess(process.raw(), 1);
            sys::WaitForSingleObject(process.raw(), ENDING);
        }
    }
}

/// Lets a program begin; takes the handle of its first thread.
fn resume(thread: sys::Handle) -> Answer {
    const DOING: &str = "let the program begin";
    let thread = Owned::new(thread, DOING)?;
    // SAFETY: the handle is a thread's.
    match unsafe { sys::ResumeThread(thread.raw()) } {
        u32::MAX => Err(Failure::last(DOING)),
        _ => Ok(()),
    }
}

/// A job whose processes end with its handle, so with the agent too.
struct Job(Owned);

impl Job {
    /// None where the system refuses; the program then runs without.
    fn of(process: &Owned) -> Option<Self> {
        // SAFETY: null stands for nothing.
        let job = unsafe { sys::CreateJobObjectW(null(), null()) };
        let job = Job(Owned::new(job, "make a job").ok()?);
        job.limit(sys::JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE);
        // SAFETY: the handles are a job's and a process's.
        let result = unsafe { sys::AssignProcessToJobObject(job.0.raw(), process.raw()) };
        (result != 0).then_some(job)
    }

    fn limit(&self, flags: u32) {
        let limits = sys::JobLimits {
            flags,
            ..sys::JobLimits::default()
        };
        // SAFETY: the structure is the class's.
        unsafe {
            sys::SetInformationJobObject(
                self.0.raw(),
                sys::JOB_OBJECT_EXTENDED_LIMIT_INFORMATION,
                &limits,
                size_of::<sys::JobLimits>() as u32,
            )
        };
    }

    /// What the program left running stays when the job's handle is closed.
    fn let_go(&self) {
        self.limit(0);
    }
}

/// A PROC_THREAD_ATTRIBUTE_LIST that says which handles a program inherits.
///
/// Without it, a program would inherit the pipes of another that is being started at the same time, and keep
/// them open.
struct Attributes<'a> {
    list: Vec<usize>,
    handles: core::marker::PhantomData<&'a [sys::Handle; 3]>,
}

impl<'a> Attributes<'a> {
    fn inherit(handles: &'a [sys::Handle; 3]) -> Answer<Self> {
        const DOING: &str = "say what the program inherits";
        let mut size = 0;
        // SAFETY: null asks for the size.
        unsafe { sys::InitializeProcThreadAttributeList(null_mut(), 1, 0, &mut size) };
        let mut list = vec![0usize; size.div_ceil(size_of::<usize>())];
        let pointer = list.as_mut_ptr().cast();
        // SAFETY: the list is as long as was asked for.
        let result = unsafe { sys::InitializeProcThreadAttributeList(pointer, 1, 0, &mut size) };
        check(result, DOING)?;
        let attributes = Attributes {
            list,
            handles: core::marker::PhantomData,
        };
        // SAFETY: the list was initialised; the handles outlive it.
        let result = unsafe {
            sys::UpdateProcThreadAttribute(
                pointer,
                0,
                sys::PROC_THREAD_ATTRIBUTE_HANDLE_LIST,
                handles.as_ptr().cast(),
                size_of_val(handles),
                null_mut(),
                null_mut(),
            )
        };
        check(result, DOING).map(|()| attributes)
    }

    fn list(&mut self) -> *mut core::ffi::c_void {
        self.list.as_mut_ptr().cast()
    }
}

impl Drop for Attributes<'_> {
    fn drop(&mut self) {
        // SAFETY: the list was initialised.
        unsafe { sys::DeleteProcThreadAttributeList(self.list()) };
    }
}
