//! The capture of a daemon's ports: who notes what, at the start or from when it is asked for.

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

/// A capture, and the numbers that ports have in it.
#[derive(Debug)]
pub struct Captured {
    capture: Arc<Capture>,
    names: Vec<String>,
    /// By the numbers of the hub.
    of_hub: Vec<u32>,
}

impl Captured {
    /// Makes its file, which goes again unless it is to be [kept](Capture::keep). Of each port the name, and the number in the
    /// hub if it is one of that.
    pub fn begin(wish: Wish, ports: impl Iterator<Item = (String, Option<u16>)>) -> Result<Captured> {
        let (names, numbers): (Vec<_>, Vec<_>) = ports.unzip();
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let capture = Arc::new(Capture::create(&wish.file, &all, wish.config)?);
        let mut captured = Captured { capture, names, of_hub: Vec::new() };
        for (index, number) in (0..).zip(numbers) {
            if let Some(number) = number {
                captured.joins(number, index);
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

    /// The port of this number in the hub has this one in the capture.
    pub fn joins(&mut self, number: u16, index: u32) {
        let at = usize::from(number);
        if self.of_hub.len() <= at {
            // Of ports that were removed: nothing comes from them.
            self.of_hub.resize(at + 1, 0);
        }
        self.of_hub[at] = index;
    }

    /// Who notes what crosses the hub on one reactor.
    pub fn one(&self) -> Witness {
        Witness::new(self.capture.probe(0), self.of_hub.clone())
    }

    /// Has what crosses the hub noted from now on.
    pub fn witness(&self, hub: &Hub, engine: &Engine) -> Result<(), HubError> {
        hub.set_witnesses(|| self.one(), engine)
    }

    /// Has nothing noted any more.
    pub fn nobody(hub: &Hub, engine: &Engine) -> Result<(), HubError> {
        hub.set_witnesses(Witness::default, engine)
    }
}
