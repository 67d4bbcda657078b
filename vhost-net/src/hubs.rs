//! The hubs of a process, one for each switch, and their shards: how they begin, follow reactors that come and go, and end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use poll_engine::engine::station::Station;
use poll_engine::engine::{Engine, EngineError, Retiring, RunningStation};

use crate::hub::{Hub, HubError};
use crate::join::Joint;
use crate::outside::Outside;
use crate::seats::{Left, Reserved, locked};
use crate::witness::Witness;

/// Who notes what crosses a hub on one reactor.
pub type Notes<'a> = &'a dyn Fn(&Hub) -> Witness;

/// A hub with a shard on each reactor.
pub struct RunningHub {
    /// The hub.
    pub hub: Arc<Hub>,
    /// By the numbers of their reactors.
    shards: HashMap<usize, RunningStation>,
}

impl RunningHub {
    /// Starts its shards. No reactor comes or goes meanwhile.
    pub fn start(Joint { hub, mut uplink }: Joint, engine: &Engine, notes: Notes<'_>) -> Result<RunningHub> {
        let mut shards = HashMap::new();
        for (place, reactor) in engine.list().into_iter().enumerate() {
            let seat = hub.reserve(engine)?;
            let mut shard = seat.shard(reactor.number, engine.waker(place), notes(&hub));
            if let (Some(number), Some((uplink, _))) =
                (hub.uplink, uplink.take_if(|(_, home)| *home == place))
            {
                shard = shard.with_outside(Outside::new(number.into(), uplink));
            }
            let shard = engine.add_station(place, Box::new(shard)).context("cannot start a shard")?;
            shards.insert(reactor.number, shard);
        }
        Ok(RunningHub { hub, shards })
    }
}

/// All of them. Whoever changes which there are, or where their shards are, is the only one.
pub struct Hubs(Mutex<Vec<RunningHub>>);

impl Hubs {
    /// These.
    pub fn new(all: Vec<RunningHub>) -> Hubs {
        Hubs(Mutex::new(all))
    }

    /// In their order.
    pub fn all(&self) -> Vec<Arc<Hub>> {
        locked(&self.0).iter().map(|running| Arc::clone(&running.hub)).collect()
    }

    /// The one whose switch has this name, or none.
    pub fn find(&self, name: Option<&str>) -> Option<Arc<Hub>> {
        locked(&self.0).iter().map(|running| &running.hub).find(|hub| hub.name.as_deref() == name).cloned()
    }

    /// One more.
    pub fn add(&self, hub: RunningHub) {
        locked(&self.0).push(hub);
    }

    /// One less, which has no ports any more: returns when its shards are gone.
    pub fn remove(&self, name: Option<&str>) {
        let mut all = locked(&self.0);
        let at = all.iter().position(|running| running.hub.name.as_deref() == name);
        let gone = at.map(|at| all.remove(at));
        drop(all);
        drop(gone);
    }

    /// Starts one reactor more, which has a shard of each.
    pub fn add_reactor(&self, engine: &Engine, cpu: Option<usize>, notes: Notes<'_>) -> Result<(), AddError> {
        let hubs = self.all();
        let seats = hubs.iter().map(|hub| hub.reserve(engine)).collect::<Result<Vec<_>, _>>()?;
        let witnesses: Vec<_> = hubs.iter().map(|hub| notes(hub)).collect();
        let (number, shards) = engine.add_reactor_with(cpu, |number, waker| {
            let shard = |(seat, witness): (Reserved, _)| {
                Box::new(seat.shard(number, waker.clone(), witness)) as Box<dyn Station>
            };
            seats.into_iter().zip(witnesses).map(shard).collect()
        })?;
        for (running, shard) in locked(&self.0).iter_mut().zip(shards) {
            running.shards.insert(number, shard);
        }
        Ok(())
    }

    /// No shard is any more on a reactor that has no queues left and is about to end, or all stay there.
    pub fn leave(&self, retiring: &Retiring, engine: &Engine) -> Result<(), HubError> {
        let hubs = self.all();
        let mut left: Vec<Left> = Vec::new();
        for hub in &hubs {
            match hub.leave(retiring, engine) {
                Ok(one) => left.push(one),
                Err(e) => {
                    left.into_iter().zip(&hubs).for_each(|(one, hub)| one.undo(hub));
                    return Err(e);
                }
            }
        }
        let taken = |running: &mut RunningHub| running.shards.remove(&retiring.number());
        let gone: Vec<_> = locked(&self.0).iter_mut().map(taken).collect();
        // Returns when the shards are gone.
        drop(gone);
        left.iter().zip(&hubs).for_each(|(one, hub)| one.count(hub));
        Ok(())
    }
}

/// Why a reactor does not come.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// Because of a hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Because of itself.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
