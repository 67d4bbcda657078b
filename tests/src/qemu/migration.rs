//! Moving a guest to another QEMU on this host, with its disks served there by other back ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Vm;
use crate::qmp::Qmp;
use crate::scene::Scene;
use crate::wait;

/// How long a migration may take.
const LIMIT: Duration = Duration::from_secs(90);
/// Bytes a second that keep a migration from being over before anything can happen to it.
const SLOW: u64 = 1 << 20;
/// Bytes a second where nothing is to be seen on the way.
const FAST: u64 = 1 << 30;

/// How a guest is to move.
#[derive(Debug, Clone)]
pub struct Migration {
    pub(crate) sockets: Vec<PathBuf>,
    post_copy: bool,
    /// Bytes a second that come without having been asked for, once the guest has gone before its memory.
    background: u64,
}

/// What QEMU says of a migration that is over.
#[derive(Debug, Clone, Copy)]
pub struct Migrated {
    /// How long the guest stood still.
    pub downtime: Duration,
    /// How long it took.
    pub total: Duration,
    /// Pages that the destination has asked for, since it needed them before they had come.
    pub requested: u64,
}

/// What becomes of each attempt to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Memory comes first, then the guest.
    PreCopy,
    /// The guest comes first, and memory as it is needed.
    PostCopy,
    /// Given up when some of the memory has gone over.
    Cancelled,
}

/// How often a guest moves in each way: `KICKLESS_MIGRATIONS`, or 3.
pub fn rounds() -> Result<usize> {
    match std::env::var("KICKLESS_MIGRATIONS") {
        Ok(number) => number.parse().context("KICKLESS_MIGRATIONS is no number"),
        Err(_) => Ok(3),
    }
}

/// How long the guest stood still: prints the distribution for each way, to be recorded.
pub fn print_downtimes(moves: &[(Way, Migrated)]) {
    for way in [Way::PreCopy, Way::PostCopy] {
        let of_way = moves.iter().filter(|(w, _)| *w == way);
        let mut downtimes: Vec<_> = of_way.map(|(_, moved)| moved.downtime).collect();
        downtimes.sort();
        if let (Some(least), Some(most)) = (downtimes.first(), downtimes.last()) {
            let (count, median) = (downtimes.len(), downtimes[downtimes.len() / 2]);
            println!("{way:?}: {count} moves; downtime: least {least:?}, median {median:?}, most {most:?}");
        }
    }
}

impl Migration {
    /// To back ends at these sockets, one for each disk and then for each network card, in order. Memory comes
    /// first, then the guest.
    pub fn to(sockets: &[&Path]) -> Migration {
        let sockets = sockets.iter().map(|&s| s.to_owned()).collect();
        Migration { sockets, post_copy: false, background: 4 * SLOW }
    }

    /// The guest comes first, and memory as it is needed.
    #[must_use]
    pub fn post_copy(mut self) -> Migration {
        self.post_copy = true;
        self
    }

    /// Sets how many bytes a second come without having been asked for, once the guest has gone before its memory.
    #[must_use]
    pub fn background(mut self, bytes: u64) -> Migration {
        self.background = bytes;
        self
    }

    /// Moves the guest from one QEMU to another, which has been started with `-incoming defer`.
    pub(crate) fn run(&self, here: &mut Qmp, there: &mut Qmp, scene: &Scene) -> Result<Migrated> {
        self.begin(here, there, scene, if self.post_copy { SLOW } else { FAST })?;
        if self.post_copy {
            wait_for(here, "active")?;
            here.execute("migrate-start-postcopy", &json!({}))?;
        }
        let state = wait_for(here, "completed")?;
        wait::until("the guest to run", LIMIT, || {
            Ok((there.execute("query-status", &json!({}))?["status"] == "running").then_some(()))
        })?;
        let ms = |name: &str| state[name].as_u64().map(Duration::from_millis).context(state.to_string());
        let requested = state["ram"]["postcopy-requests"].as_u64().unwrap_or(0);
        Ok(Migrated { downtime: ms("downtime")?, total: ms("total-time")?, requested })
    }

    /// Begins to move it, and gives up when some of its memory has gone over.
    pub(crate) fn give_up(&self, here: &mut Qmp, there: &mut Qmp, scene: &Scene) -> Result<()> {
        self.begin(here, there, scene, SLOW)?;
        wait::until("memory to go over", LIMIT, || {
            let state = here.execute("query-migrate", &json!({}))?;
            Ok((state["ram"]["transferred"].as_u64() > Some(SLOW / 2)).then_some(()))
        })?;
        here.execute("migrate_cancel", &json!({}))?;
        wait_for(here, "cancelled")?;
        Ok(())
    }

    fn begin(&self, here: &mut Qmp, there: &mut Qmp, scene: &Scene, bandwidth: u64) -> Result<()> {
        let post_copy =
            json!({ "capabilities": [{ "capability": "postcopy-ram", "state": self.post_copy }] });
        for qmp in [&mut *here, &mut *there] {
            qmp.execute("migrate-set-capabilities", &post_copy)?;
        }
        let parameters = json!({ "max-bandwidth": bandwidth, "max-postcopy-bandwidth": self.background });
        here.execute("migrate-set-parameters", &parameters)?;
        let socket = scene.fresh_log("migration");
        // Taken, so that the next one has another name.
        std::fs::write(&socket, "")?;
        let uri = json!({ "uri": format!("unix:{}", socket.with_extension("sock").display()) });
        there.execute("migrate-incoming", &uri)?;
        here.execute("migrate", &uri)?;
        Ok(())
    }
}

/// Fails when something keeps the guest from moving. To be asked before another QEMU is started.
pub(crate) fn expect_possible(qmp: &mut Qmp) -> Result<()> {
    let blocked = &qmp.execute("query-migrate", &json!({}))?["blocked-reasons"];
    ensure!(blocked.is_null(), "migration is blocked: {blocked}");
    Ok(())
}

fn wait_for(qmp: &mut Qmp, status: &str) -> Result<Value> {
    wait::until(&format!("migration to be {status}"), LIMIT, || {
        let state = qmp.execute("query-migrate", &json!({}))?;
        match state["status"].as_str() {
            Some(now) if now == status => Ok(Some(state)),
            Some("failed" | "cancelled" | "completed" | "postcopy-paused") => bail!("migration: {state}"),
            _ => Ok(None),
        }
    })
}

impl Vm {
    /// Migrates the guest, live. When that fails, it goes on where it is, and why is the error. What was plugged in
    /// since booting cannot come along.
    pub fn migrate(&mut self, scene: &Scene, how: &Migration) -> Result<Migrated> {
        let mut there = self.destination(scene, how)?;
        let moved = how.run(&mut self.qmp, &mut there.qmp, scene)?;
        there.agent.go_on_after(&self.agent);
        self.expect_no_complaints()?;
        there.tolerated.append(&mut self.tolerated);
        // The old one holds a guest that must not run again.
        *self = there;
        Ok(moved)
    }

    /// Begins to migrate the guest and gives up.
    pub fn cancel_migration(&mut self, scene: &Scene, how: &Migration) -> Result<()> {
        let mut there = self.destination(scene, how)?;
        how.give_up(&mut self.qmp, &mut there.qmp, scene)
    }

    fn destination(&mut self, scene: &Scene, how: &Migration) -> Result<Vm> {
        expect_possible(&mut self.qmp)?;
        let mut builder = self.builder.clone();
        let devices = builder.disks.len() + builder.nics.len();
        ensure!(devices == how.sockets.len(), "a back end for each disk and each network card");
        let disks = builder.disks.iter_mut().map(|disk| &mut disk.socket);
        let nics = builder.nics.iter_mut().map(|nic| &mut nic.socket);
        disks.chain(nics).zip(&how.sockets).for_each(|(socket, to)| socket.clone_from(to));
        builder.spawn(scene, self.accel, true)
    }
}
