//! The control queue's handler: takes commands, has them done, and answers.

use std::sync::{Arc, Mutex, PoisonError};

use poll_engine::device::QueueHandler;
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;
use poll_engine::stats::ErrorKind;

use crate::control::{BadCommand, Control, LONGEST};
use crate::hub::Hub;
use crate::steering::Steering;

/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`.
const OK: u8 = 0;
const ERR: u8 = 1;
/// Most commands in one round: each may be long.
const MAX_COMMANDS: u16 = 2;

/// What a driver with a control queue has asked for, of a port of a hub. `None`: it has none, or the front end keeps it.
#[derive(Debug)]
pub struct Controlled {
    hub: Arc<Hub>,
    port: usize,
    state: Mutex<Option<Control>>,
}

impl Controlled {
    /// Nothing yet.
    pub fn new(hub: Arc<Hub>, port: usize) -> Controlled {
        Controlled { hub, port, state: Mutex::default() }
    }

    /// The control queue runs, under these features: with what was asked for before, if they are the same.
    pub fn begin(&self, features: u64, pairs: u16, mac: Option<[u8; 6]>) {
        self.with(|state| {
            if state.as_ref().is_none_or(|control| control.features() != features) {
                let control = state.insert(Control::new(features, pairs, mac));
                self.hub.steer(self.port, control.steering());
            }
        });
    }

    /// The device was reset.
    pub fn reset(&self) {
        self.with(|state| {
            if state.take().is_some() {
                self.hub.steer(self.port, Steering::default());
            }
        });
    }

    /// Looks at the state, or changes it.
    pub fn with<T>(&self, act: impl FnOnce(&mut Option<Control>) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn command(&self, bytes: &[u8]) -> Result<(), BadCommand> {
        self.with(|state| {
            let Some(control) = state else { return Err(BadCommand::Length) };
            let is_guarded = || {
                let switch = self.hub.switch.as_ref()?;
                Some(!switch.rules(crate::switch::PortId(self.port as u16)).guard.macs.is_empty())
            };
            // What it would send from that would go nowhere.
            if bytes.starts_with(&[1, 1]) && is_guarded() == Some(true) {
                return Err(BadCommand::Guarded);
            }
            control.command(bytes)?;
            self.hub.steer(self.port, control.steering());
            Ok(())
        })
    }
}

/// The handler.
pub struct ControlQueue {
    controlled: Arc<Controlled>,
    bytes: Vec<u8>,
}

impl ControlQueue {
    /// Of the queue by which this is controlled.
    pub fn new(controlled: Arc<Controlled>) -> ControlQueue {
        ControlQueue { controlled, bytes: Vec::new() }
    }
}

impl QueueHandler for ControlQueue {
    fn attach(&mut self, _: &mut Io<'_>) {}

    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        let ready = queue.ready().min(MAX_COMMANDS);
        for done in 0..ready {
            let Some(request) = queue.take() else { return done.into() };
            let chain = queue.chain();
            let len = (chain.readable_len() as usize).min(LONGEST);
            self.bytes.resize(len, 0);
            chain.readable(0, len as u32).read(&mut self.bytes);
            // What cannot be answered is not done.
            let outcome = if chain.writable_len() == 0 {
                Err(BadCommand::Length)
            } else {
                self.controlled.command(&self.bytes)
            };
            let written = chain.writable(0, 1).write(&[if outcome.is_ok() { OK } else { ERR }]);
            if let Err(bad) = outcome {
                queue.count_error(ErrorKind::Malformed, &bad);
            }
            queue.complete(request, written as u32);
        }
        ready.into()
    }

    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}

    fn detach(&mut self, _: &mut Io<'_>) {}
}
