//! The capture of a daemon's ports: who notes what, at the start or from when it is asked for.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use poll_engine::engine::Engine;

use crate::hub::{Hub, HubError};
use crate::pcap::{Capture, CaptureConfig};
use crate::witness::Witness;

/// What is to be captured.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The file to be made.
    pub file: PathBuf,
    /// What of which frames.
    pub config: CaptureConfig,
}

/// A port of a hub: the name of its switch, and its number there.
pub type OfHub = (Option<String>, u16);

/// A capture, and the numbers that ports have in it.
#[derive(Debug)]
pub struct Captured {
    capture: Arc<Capture>,
    names: Vec<String>,
    /// By the names of switches, and the numbers of each hub.
    of_hubs: HashMap<Option<String>, Vec<u32>>,
}

impl Captured {
    /// Makes its file, which goes again unless it is to be [kept](Capture::keep). Of each port the name, and which one of a hub
    /// it is, if it is one.
    pub fn begin(wish: Wish, ports: impl Iterator<Item = (String, Option<OfHub>)>) -> Result<Captured> {
        let (names, numbers): (Vec<_>, Vec<_>) = ports.unzip();
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let capture = Arc::new(Capture::create(&wish.file, &all, wish.config)?);
        let mut captured = Captured { capture, names, of_hubs: HashMap::new() };
        for (index, number) in (0..).zip(numbers) {
            if let Some(port) = number {
                captured.joins(port, index);
            }
        }
        Ok(captured)
    }

    /// The capture.
    pub fn capture(&self) -> Arc<Capture> {
        Arc::clone(&self.capture)
    }

    /// The number of a port that was there at the beginning.
    pub fn index_of(&self, name: &str) -> Option<u32> {
        self.names.iter().position(|n| n == name).map(|at| at as u32)
    }

    /// This port has this number in the capture.
    pub fn joins(&mut self, (switch, number): OfHub, index: u32) {
        let (of_hub, at) = (self.of_hubs.entry(switch).or_default(), usize::from(number));
        if of_hub.len() <= at {
            // Of ports that were removed: nothing comes from them.
            of_hub.resize(at + 1, 0);
        }
        of_hub[at] = index;
    }

    /// Who notes what crosses a hub on one reactor.
    pub fn one(&self, hub: &Hub) -> Witness {
        Witness::new(self.capture.probe(0), self.of_hubs.get(&hub.name).cloned().unwrap_or_default())
    }

    /// Has what crosses a hub noted from now on.
    pub fn witness(&self, hub: &Hub, engine: &Engine) -> Result<(), HubError> {
        hub.set_witnesses(|| self.one(hub), engine)
    }

    /// Has nothing noted any more.
    pub fn nobody(hub: &Hub, engine: &Engine) -> Result<(), HubError> {
        hub.set_witnesses(Witness::default, engine)
    }
}
