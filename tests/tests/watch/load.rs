//! A daemon whose disks are loaded by guests until the test is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use kickless_tests::process::{Process, built};
use kickless_tests::wait;
use serde_json::Value;

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

/// A switch with ports `a` and `b`, whose guests send each other packets until the test is over, and `idle`.
pub struct NetLoad {
    pub rig: Rig,
    guests: Option<Process>,
}

impl NetLoad {
    pub fn start() -> Result<NetLoad> {
        let rig = Rig::start_net("switch = true\npoll = 'event'\n", &[]);
        for name in ["a", "b", "idle"] {
            rig.add_port(name, "");
        }
        let vbench = built("vbench").context("vbench is not built: cargo build -p vbench")?;
        let socket = |name| format!("--socket-path={}", rig.path(&format!("{name}.sock")));
        let mut args = vec!["net".to_owned(), socket("a"), socket("b")];
        // Longer than any test; what is sent does not wait for what has come.
        args.extend(["--rate-pps=2000", "--runtime=3600", "--completion=interrupt"].map(str::to_owned));
        let guests = Process::spawn(&rig.scene, "vbench", &vbench, &args)?;
        let load = NetLoad { rig, guests: Some(guests) };
        for name in ["a", "b"] {
            let moved = |port: &Value| port["rx"]["packets"].as_u64().min(port["tx"]["packets"].as_u64());
            wait::until("packets", LIMIT, || Ok((moved(&load.rig.port(name)) > Some(100)).then_some(())))?;
        }
        Ok(load)
    }

    /// Keeps a port to these limits.
    pub fn limit(&self, port: &str, limits: Value) {
        self.rig.does(200, "PUT", &format!("/v1/ports/{port}/limits"), Some(limits));
    }

    pub fn metrics(&self) -> Result<String> {
        Ok(String::from_utf8(self.rig.call("GET", "/metrics", None).body)?)
    }

    /// Waits until this metric is so much.
    pub fn metric(&self, sample: &str, least: f64) -> Result<f64> {
        wait::until(sample, LIMIT, || Ok(value(&self.metrics()?, sample).filter(|n| *n >= least)))
    }

    /// The guests leave.
    pub fn stop(&mut self) -> Result<()> {
        drop(self.guests.take());
        let left = || ["a", "b"].iter().all(|name| self.rig.port(name)["attached"] == false);
        wait::until("the guests to be gone", LIMIT, || Ok(left().then_some(())))
    }

    pub fn end(mut self) -> Result<Option<String>> {
        self.stop()?;
        self.rig.end();
        Ok(None)
    }
}

/// What a sample is, of those that a daemon tells.
pub fn value(metrics: &str, sample: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(sample)?.trim().parse().ok())
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}
