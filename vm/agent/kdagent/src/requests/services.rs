//! Drivers as the service control manager knows them.

use core::ptr::{null, null_mut};

use frames::{Code, OptionalServiceStatus, ServiceStatus};

use crate::failure::{Answer, Failure, check};
use crate::{sys, text};

/// A handle of the service control manager's.
struct Service(sys::Handle);

impl Service {
    fn new(handle: sys::Handle, doing: &'static str) -> Answer<Self> {
        if handle.is_null() {
            Err(Failure::last(doing))
        } else {
            Ok(Service(handle))
        }
    }

    fn manager(access: u32) -> Answer<Self> {
        // SAFETY: null stands for this machine and its database.
        let manager = unsafe { sys::OpenSCManagerW(null(), null(), access) };
        Self::new(manager, "open the service control manager")
    }

    fn open(name: &str, access: u32) -> Answer<Self> {
        let name = text::wide(name)?;
        let manager = Self::manager(sys::SC_MANAGER_CONNECT)?;
        // SAFETY: the handle is the manager's, the name ends with a NUL.
        let service = unsafe { sys::OpenServiceW(manager.0, name.as_ptr(), access) };
        Self::new(service, "open the service")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // SAFETY: the handle is ours.
        unsafe { sys::CloseServiceHandle(self.0) };
    }
}

/// Registers a kernel driver, to be started on demand.
///
/// It gets no load-order group: on Wine, drivers of one group share a process, and one that crashes takes
/// the others with it.
pub fn create(name: &str, image_path: &str) -> Answer {
    let name = text::wide(name)?;
    let image_path = text::wide(image_path)?;
    let manager = Service::manager(sys::SC_MANAGER_CONNECT | sys::SC_MANAGER_CREATE_SERVICE)?;
    // SAFETY: the handle is the manager's, the strings end with a NUL, and null stands for nothing.
    let service = unsafe {
        sys::CreateServiceW(
            manager.0,
            name.as_ptr(),
            name.as_ptr(),
            sys::SERVICE_QUERY_STATUS,
            sys::SERVICE_KERNEL_DRIVER,
            sys::SERVICE_DEMAND_START,
            sys::SERVICE_ERROR_NORMAL,
            image_path.as_ptr(),
            null(),
            null_mut(),
            null(),
            null(),
            null(),
        )
    };
    Service::new(service, "create the service").map(drop)
}

/// Removes a registration.
pub fn delete(name: &str) -> Answer {
    let service = Service::open(name, sys::DELETE)?;
    // SAFETY: the handle is the service's.
    check(
        unsafe { sys::DeleteService(service.0) },
        "delete the service",
    )
}

/// Starts a service; the code of whatever said no is the answer.
pub fn start(name: &str) -> Answer<Code> {
    to_code(Service::open(name, sys::SERVICE_START).and_then(|service| {
        // SAFETY: the handle is the service's; there are no arguments.
        let result = unsafe { sys::StartServiceW(service.0, 0, null()) };
        check(result, "start the service")
    }))
}

/// Stops a service; the code of whatever said no is the answer.
pub fn stop(name: &str) -> Answer<Code> {
    to_code(Service::open(name, sys::SERVICE_STOP).and_then(|service| {
        let mut status = sys::ServiceStatus::default();
        // SAFETY: the handle is the service's; the status is longer than what is written there.
        let result =
            unsafe { sys::ControlService(service.0, sys::SERVICE_CONTROL_STOP, &mut status) };
        check(result, "stop the service")
    }))
}

fn to_code(result: Answer) -> Answer<Code> {
    match result {
        Ok(()) => Ok(Code { code: 0 }),
        Err(Failure::Win32 { code, .. }) => Ok(Code { code }),
        Err(failure) => Err(failure),
    }
}

/// What the service control manager knows of a service.
pub fn query(name: &str) -> Answer<OptionalServiceStatus> {
    let service = match Service::open(name, sys::SERVICE_QUERY_STATUS) {
        Err(failure) if failure.win32_code() == Some(sys::ERROR_SERVICE_DOES_NOT_EXIST) => {
            return Ok(OptionalServiceStatus { status: None });
        }
        service => service?,
    };
    let mut status = sys::ServiceStatus::default();
    let mut needed = 0;
    // SAFETY: the handle is the service's; the status is as long as told.
    let result = unsafe {
        sys::QueryServiceStatusEx(
            service.0,
            sys::SC_STATUS_PROCESS_INFO,
            &mut status,
            size_of::<sys::ServiceStatus>() as u32,
            &mut needed,
        )
    };
    check(result, "query the service")?;
    Ok(OptionalServiceStatus {
        status: Some(ServiceStatus {
            state: status.state,
            win32_exit_code: status.win32_exit_code,
            service_exit_code: status.service_exit_code,
            pid: status.pid,
        }),
    })
}
