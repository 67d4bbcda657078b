//! The control queue's handler: takes commands, has them done, and answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use poll_engine::device::{QueueHandler, StateRefused};
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;
use poll_engine::ring::inflight::Memento;
use poll_engine::stats::ErrorKind;
use tracing::warn;

use crate::control::{BadCommand, Control, LONGEST};
use crate::control_state;
use crate::hub::Hub;

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
    pairs: u16,
    asked: Mutex<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    state: Option<Control>,
    /// Where it is left to the next process.
    memento: Option<Memento>,
}

impl Controlled {
    /// Nothing yet, of a card with so many pairs of queues.
    pub fn new(hub: Arc<Hub>, port: usize, pairs: u16) -> Controlled {
        Controlled { hub, port, pairs, asked: Mutex::default() }
    }

    /// The control queue runs, under these features: with what was asked for before, if they are the same.
    pub fn begin(&self, features: u64, mac: Option<[u8; 6]>) {
        if self.look(|state| state.is_none_or(|control| control.features() != features)) {
            self.set(Some(Control::new(features, self.pairs, mac)));
        }
    }

    /// The device was reset.
    pub fn reset(&self) {
        if self.look(|state| state.is_some()) {
            self.set(None);
        }
    }

    /// What another process is told: see [`control_state`].
    pub fn save(&self) -> Vec<u8> {
        self.look(control_state::save)
    }

    /// What another process has told. No queue runs.
    pub fn load(&self, bytes: &[u8]) -> Result<(), StateRefused> {
        self.set(control_state::load(bytes, self.pairs)?);
        Ok(())
    }

    /// Goes on with what is left there, if anything is, and leaves there what the driver asks for from now on. No queue
    /// runs.
    pub fn keep(&self, memento: Option<Memento>) {
        if let Some(left) = memento.as_ref().map(Memento::read).filter(|left| !left.is_empty())
            && let Err(refused) = self.load(&left)
        {
            warn!("{}: {refused}; what its driver had asked for is forgotten", self.hub.port(self.port).name);
        }
        let mut asked = self.asked();
        asked.memento = memento;
        asked.leave();
    }

    /// Looks at what was asked for.
    pub fn look<T>(&self, at: impl FnOnce(Option<&Control>) -> T) -> T {
        at(self.asked().state.as_ref())
    }

    /// Asks the driver to announce its guest; false if it has no control queue to say that it has.
    pub fn ask_to_announce(&self) -> bool {
        let mut asked = self.asked();
        let can = asked.state.as_mut().map(|control| control.announcing = true).is_some();
        asked.leave();
        can
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: Option<Control>) {
        let mut asked = self.asked();
        asked.state = state;
        self.hub.steer(self.port, asked.state.as_ref().map(Control::steering).unwrap_or_default());
        asked.leave();
    }

    fn command(&self, bytes: &[u8]) -> Result<(), BadCommand> {
        let mut asked = self.asked();
        let Some(control) = &mut asked.state else { return Err(BadCommand::Length) };
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
        // Before the driver hears that it is done; a command that was not answered is given again.
        asked.leave();
        Ok(())
    }
}

impl Asked {
    fn leave(&self) {
        self.memento.iter().for_each(|memento| memento.write(&control_state::save(self.state.as_ref())));
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
