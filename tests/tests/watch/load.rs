//! A daemon whose disks are loaded by guests until the test is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use kickless_tests::wait;

use crate::front::{End, Front};
use crate::rig::{LIMIT, Rig};

pub struct Load {
    pub rig: Rig,
    over: Arc<AtomicBool>,
    guests: Vec<JoinHandle<Result<End>>>,
}

impl Load {
    /// With these disks, each under load.
    pub fn start(disks: &[&str]) -> Result<Load> {
        let rig = Rig::start("poll = 'adaptive'\n", &[]);
        let mut load = Load { rig, over: Arc::default(), guests: Vec::new() };
        for name in disks {
            load.rig.add(name, "backend=ram:1M,num-queues=2");
            let (socket, over) = (load.rig.scene.path(&format!("{name}.sock")), Arc::clone(&load.over));
            let seed = load.guests.len() as u64;
            load.guests.push(std::thread::spawn(move || {
                let mut front = Front::new(seed, seed % 2 == 1);
                // The disk is gone when the daemon is.
                front.model.may_tear = true;
                front.connect(&socket)?;
                front.load(|| over.load(Ordering::Acquire))
            }));
        }
        for name in disks {
            wait::until("requests", LIMIT, || Ok((load.requests(name) > 100).then_some(())))?;
        }
        Ok(load)
    }

    /// Requests of a disk so far.
    pub fn requests(&self, disk: &str) -> u64 {
        self.rig.disk(disk)["all"]["requests"].as_u64().unwrap()
    }

    /// Ends the load; what was answered was right.
    pub fn stop(&mut self) -> Result<()> {
        self.over.store(true, Ordering::Release);
        for guest in self.guests.drain(..) {
            let end = guest.join().ok().context("a guest panicked")??;
            ensure!(end == End::Done, "the daemon hung up");
        }
        Ok(())
    }

    /// Ends it all.
    pub fn end(mut self) -> Result<()> {
        self.stop()?;
        self.rig.end();
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}
