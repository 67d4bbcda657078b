//! What back ends are driven with: a disk's load, or a network's.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::matrix::RingKind;
use crate::net::spec::{NetLoad, NetSpec};
use crate::report::Summary;
use crate::{Load, front_end, net};

/// Kinds of workloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Requests to a disk.
    #[default]
    Block,
    /// Packets.
    Net,
}

impl Kind {
    /// What a rate is called.
    pub fn rate(self) -> &'static str {
        match self {
            Kind::Block => "IOPS",
            Kind::Net => "packets/s",
        }
    }

    /// What is counted.
    pub fn unit(self) -> &'static str {
        match self {
            Kind::Block => "request",
            Kind::Net => "packet",
        }
    }
}

/// A load.
#[derive(Clone, Debug)]
pub enum Drive {
    /// Of a disk.
    Block(Load),
    /// Of one network port or two.
    Net(Box<NetLoad>),
}

impl Drive {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Drive::Block(_) => Kind::Block,
            Drive::Net(_) => Kind::Net,
        }
    }

    /// Sockets that it takes.
    pub fn sockets(&self) -> usize {
        match self {
            Drive::Block(_) => 1,
            Drive::Net(load) => load.direction.map_or(1, net::spec::Direction::ports),
        }
    }

    /// Requests or packets under way for each queue; 0 without a limit.
    pub fn iodepth(&self) -> u16 {
        match self {
            Drive::Block(load) => load.iodepth,
            Drive::Net(load) => load.iodepth.map_or(0, |n| n.try_into().unwrap_or(u16::MAX)),
        }
    }

    /// Requests that arrive a second for each queue, if that does not depend on the back end.
    pub fn arrival_rate(&self) -> Option<u64> {
        match self {
            Drive::Block(load) => load.arrival_rate,
            Drive::Net(_) => None,
        }
    }

    /// Queues, or queue pairs.
    pub fn queues(&self) -> u16 {
        match self {
            Drive::Block(load) => load.numjobs,
            Drive::Net(load) => load.queue_pairs,
        }
    }

    /// In words.
    pub fn title(&self) -> String {
        let (what, depth) = match self {
            Drive::Block(Load { bs, iodepth, rw, arrival_rate, .. }) => {
                let rw = format!("{rw:?}").to_lowercase();
                let rate = arrival_rate.map_or(String::new(), |n| format!(", {n} a second arrive"));
                (format!("{rw}, {bs} bytes"), format!("depth {iodepth}{rate}"))
            }
            Drive::Net(load) => {
                let direction = load.direction.map_or("echo", net::spec::Direction::name);
                let depth = load.iodepth.map_or("as fast as it goes".into(), |n| format!("depth {n}"));
                (format!("{direction}, {} bytes", load.size.text()), depth)
            }
        };
        let queues = if self.queues() == 1 { String::new() } else { format!(", {} queues", self.queues()) };
        format!("{what}, {depth}{queues}")
    }

    /// The same with the first of its threads on this CPU; the next on the next.
    #[must_use]
    pub fn on(&self, cpu: usize) -> Drive {
        match self {
            Drive::Block(load) => Drive::Block(Load { cpu: Some(cpu), ..load.clone() }),
            Drive::Net(load) => {
                let mut load = load.clone();
                load.shared.0.0.push(("cpu", cpu.to_string()));
                Drive::Net(load)
            }
        }
    }

    /// The same through rings of this kind.
    #[must_use]
    pub fn through(&self, ring: RingKind) -> Drive {
        let (packed, in_order) = ring.traits();
        match self {
            Drive::Block(load) => Drive::Block(Load { packed, in_order, ..load.clone() }),
            Drive::Net(load) => Drive::Net(load.clone()),
        }
    }

    /// The same with requests in flight recorded; packets are not.
    #[must_use]
    pub fn recorded(&self) -> Drive {
        match self {
            Drive::Block(load) => Drive::Block(Load { inflight: true, ..load.clone() }),
            Drive::Net(load) => Drive::Net(load.clone()),
        }
    }

    /// What is wrong with it, if something is.
    pub fn check(&self) -> Result<()> {
        match self {
            Drive::Block(_) => Ok(()),
            Drive::Net(load) => spec(load, &["a".into(), "b".into()]).map(|_| ()),
        }
    }

    /// Runs it. `mark` is called when measuring begins and when it ends.
    pub fn run(&self, sockets: &[PathBuf], mark: impl FnMut()) -> Result<Summary> {
        match self {
            Drive::Block(load) => front_end::run(&sockets[0], load, mark).map(|jobs| Summary::of(&jobs)),
            Drive::Net(load) => net::run(&spec(load, sockets)?, mark),
        }
    }
}

fn spec(load: &NetLoad, sockets: &[PathBuf]) -> Result<Arc<NetSpec>> {
    let ports = load.direction.map_or(1, net::spec::Direction::ports);
    NetSpec::new(sockets[..ports].to_vec(), false, load).map(Arc::new).map_err(|e| anyhow!(e))
}
