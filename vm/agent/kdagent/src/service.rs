//! The agent as a Windows service, at a port.

use core::ffi::c_void;
use core::ptr::null;

use crate::end::{Choice, End};
use crate::failure::{Answer, Failure, check};
use crate::handle::Owned;
use crate::requests::files;
use crate::server::Server;
use crate::{runtime, sys, thread};

/// Serves until the service control manager stops it; an error if it was not that which started us.
pub fn run(name: &[u16]) -> Answer {
    let table = [(name.as_ptr(), Some(main as _)), (null(), None)]
        .map(|(name, main)| sys::ServiceEntry { name, main });
    // SAFETY: the table ends with an empty entry, and the name with a NUL.
    let result = unsafe { sys::StartServiceCtrlDispatcherW(table.as_ptr()) };
    check(result, "run as a service")?;
    runtime::exit(0)
}

/// What the service control manager calls, in a thread of its own.
unsafe extern "system" fn main(_count: u32, _arguments: *mut *mut u16) {
    let Some(choice) = Choice::from_command_line() else {
        return;
    };
    let Choice::Service { name, .. } = &choice else {
        return;
    };
    let Ok(service) = Service::new(name) else {
        return; // who would have to be told is the one that does not answer
    };
    let code = match service.serve(&choice) {
        Ok(()) => 0,
        Err(failure) => failure.to_message().code,
    };
    files::forget_all();
    service.tell(sys::SERVICE_STOPPED, code);
}

/// The service, as the service control manager has it.
struct Service {
    status: sys::Handle,
    stopped: Owned,
}

impl Service {
    fn new(name: &[u16]) -> Answer<Self> {
        // SAFETY: null stands for nothing.
        let event = unsafe { sys::CreateEventW(null(), sys::TRUE, 0, null()) };
        let stopped = Owned::new(event, "make an event")?;
        // SAFETY: the name ends with a NUL; the event lives as long as there is a service to be stopped.
        let status = unsafe {
            sys::RegisterServiceCtrlHandlerExW(name.as_ptr(), handle_control, stopped.raw())
        };
        if status.is_null() {
            return Err(Failure::last("register the service's handler"));
        }
        Ok(Service { status, stopped })
    }

    /// Serves until it is stopped; an error if it can't begin.
    fn serve(&self, choice: &Choice) -> Answer {
        let end = End::open(choice)?;
        // It returns for an error alone; the service control manager sees that the process is gone.
        thread::spawn(move || {
            let _ = Server::serve(end);
            runtime::exit(1);
        })?;
        self.tell(sys::SERVICE_RUNNING, 0);
        // SAFETY: the handle is an event's.
        unsafe { sys::WaitForSingleObject(self.stopped.raw(), sys::INFINITE) };
        Ok(())
    }

    fn tell(&self, state: u32, code: u32) {
        let status = sys::ServiceStatus {
            kind: sys::SERVICE_WIN32_OWN_PROCESS,
            state,
            controls: sys::SERVICE_ACCEPT_STOP | sys::SERVICE_ACCEPT_SHUTDOWN,
            win32_exit_code: code,
            ..Default::default()
        };
        // SAFETY: the handle is the service's, which is closed by nobody.
        unsafe { sys::SetServiceStatus(self.status, &status) };
    }
}

/// Takes what the service control manager tells; `stopped` is the event of `Service`.
unsafe extern "system" fn handle_control(
    control: u32,
    _event: u32,
    _data: *mut c_void,
    stopped: *mut c_void,
) -> u32 {
    match control {
        sys::SERVICE_CONTROL_STOP | sys::SERVICE_CONTROL_SHUTDOWN => {
            // SAFETY: the handle is an event's.
            unsafe { sys::SetEvent(stopped) };
            0
        }
        sys::SERVICE_CONTROL_INTERROGATE => 0,
        _ => sys::ERROR_CALL_NOT_IMPLEMENTED,
    }
}
