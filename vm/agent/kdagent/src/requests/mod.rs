//! The requests, each a function: message in, message out.

use frames::{Done, Frame, Request};

use crate::failure::Answer;
use crate::server::{Reply, Server};

mod calls;
pub mod devices;
mod drivers;
pub mod files;
mod pipe;
mod processes;
mod program;
mod registry;
mod services;
mod system;
mod transfer;

/// How long a request may take, and whether it is one that ends others.
#[derive(Clone, Copy)]
pub enum Kind {
    /// It waits for nobody.
    Short,
    /// It waits for a driver or a program, so perhaps for ever.
    MayHang,
    /// It may hang, too, but ends what hangs in a driver.
    Remedy,
}

impl Kind {
    /// How many there are.
    pub const COUNT: usize = 3;

    pub fn of(frame: &Frame) -> Self {
        match Request::read(frame.operation, &frame.body) {
            Some(Ok(
                Request::StartService(_)
                | Request::LoadDriver(_)
                | Request::WaitProcess(_)
                | Request::Run(_)
                | Request::OpenDevice(_)
                | Request::ReadDevice(_)
                | Request::WriteDevice(_)
                | Request::Ioctl(_),
            )) => Kind::MayHang,
            Some(Ok(
                Request::StopService(_) | Request::UnloadDriver(_) | Request::CloseDevice(_),
            )) => Kind::Remedy,
            _ => Kind::Short,
        }
    }
}

/// Does what is asked and answers; an error is the caller's to send.
pub fn serve(server: &'static Server, request: Request<'_>, reply: &mut Reply) -> Answer {
    let uploads = &server.uploads;
    let devices = &server.devices;
    match request {
        Request::Hello(_) => reply.send(&system::hello()),
        Request::PutBegin(m) => reply.send(&uploads.begin(m.path, reply.session())?),
        Request::PutData(m) => {
            uploads.write(m.upload, m.offset, m.data)?;
            reply.send(&Done {});
        }
        Request::PutEnd(m) => {
            uploads.finish(m.upload, m.sha256)?;
            reply.send(&Done {});
        }
        Request::PutAbort(m) => {
            uploads.abort(m.upload)?;
            reply.send(&Done {});
        }
        Request::Get(m) => files::get(m.path, reply)?,
        Request::Delete(m) => {
            files::delete(m.path)?;
            reply.send(&Done {});
        }
        Request::Hash(m) => {
            let sha256 = files::hash(m.path)?;
            reply.send(&frames::OptionalHash {
                sha256: sha256.as_ref().map(|hash| &hash[..]),
            });
        }
        Request::CreateService(m) => {
            services::create(m.name, m.image_path)?;
            reply.send(&Done {});
        }
        Request::DeleteService(m) => {
            services::delete(m.name)?;
            reply.send(&Done {});
        }
        Request::StartService(m) => reply.send(&services::start(m.name)?),
        Request::StopService(m) => reply.send(&services::stop(m.name)?),
        Request::QueryService(m) => reply.send(&services::query(m.name)?),
        Request::LoadDriver(m) => reply.send(&drivers::load(m.name)?),
        Request::UnloadDriver(m) => reply.send(&drivers::unload(m.name)?),
        Request::SetValue(m) => {
            registry::set_value(m.key, m.name, m.kind, m.data)?;
            reply.send(&Done {});
        }
        Request::GetValue(m) => {
            let value = registry::get_value(m.key, m.name)?;
            reply.send(&frames::OptionalValue {
                value: value
                    .as_ref()
                    .map(|(kind, data)| frames::Value { kind: *kind, data }),
            });
        }
        Request::DeleteValue(m) => {
            registry::delete_value(m.key, m.name)?;
            reply.send(&Done {});
        }
        Request::DeleteKey(m) => {
            registry::delete_key(m.key)?;
            reply.send(&Done {});
        }
        Request::Processes(_) => reply.send(&processes::list()?),
        Request::Terminate(m) => {
            processes::terminate(m.pid, m.exit_code)?;
            reply.send(&Done {});
        }
        Request::WaitProcess(m) => reply.send(&processes::wait(m.pid, reply.session())?),
        Request::SystemInformation(m) => {
            let data = system::information(m.class)?;
            reply.send(&frames::Information { data: &data });
        }
        Request::Run(m) => program::run(&m, reply)?,
        Request::Fence(m) => {
            system::fence(m.cookie)?;
            reply.send(&Done {});
        }
        Request::OpenDevice(m) => devices.open(&m, reply)?,
        Request::ReadDevice(m) => devices.read(&m, reply)?,
        Request::WriteDevice(m) => devices.write(&m, reply)?,
        Request::Ioctl(m) => devices.control(&m, reply)?,
        Request::CloseDevice(m) => {
            devices.close(m.device)?;
            reply.send(&Done {});
        }
        Request::Clock(_) => reply.send(&system::clock()),
        Request::SetClock(m) => {
            system::set_clock(m.time)?;
            reply.send(&Done {});
        }
        Request::FreeSpace(m) => reply.send(&files::free_space(m.path)?),
    }
    Ok(())
}
