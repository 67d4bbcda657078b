//! A newer daemon in the place of the one that runs. It is started from here: a daemon that guests talk to has given up the
//! right to start programs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use control::client::Client;
use control::common::Succession;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};

/// How long the new one may take to be in the old one's place: a little longer than the old one waits for it.
const START: Duration = Duration::from_secs(150);
/// How long the old one may take to leave after that.
const LEAVE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

/// What is to be new.
#[derive(Args, Debug)]
pub struct Upgrade {
    /// The new program; without it, the file that the running one was started from, as it is now
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,

    /// Have the running one write what has changed into its configuration file first: the new one starts with that
    #[arg(long)]
    save: bool,

    /// Options of the new one, in the place of those that the running one was started with
    #[arg(last = true, value_name = "OPTION")]
    options: Vec<String>,
}

/// A daemon, and what it serves: whether somebody is attached.
struct Serving {
    pid: u32,
    exports: BTreeMap<String, bool>,
}

impl Serving {
    fn read(client: &Client) -> Result<Serving> {
        let daemon = client.call("GET", "/v1/daemon", None)?.done()?;
        let pid = daemon["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        let list = super::list_of(&daemon);
        let exports = client.call("GET", list, None)?.done()?;
        let export =
            |e: &Value| Some((e["name"].as_str()?.to_owned(), e["attached"].as_bool().unwrap_or(false)));
        Ok(Serving {
            pid: pid.context("a daemon without a number")?,
            exports: exports.as_array().into_iter().flatten().filter_map(export).collect(),
        })
    }

    fn attached(&self) -> usize {
        self.exports.values().filter(|attached| **attached).count()
    }
}

/// Starts it, waits until it serves all that the running one has served, and until that one has left.
pub fn run(client: &Client, upgrade: &Upgrade) -> Result<Value> {
    let before = Serving::read(client)?;
    if upgrade.save {
        client.call("POST", "/v1/save", None)?.done()?;
    }
    let how = client.call("POST", "/v1/takeover", None)?.done()?;
    let how: Succession = serde_json::from_value(how).context("the daemon does not say how")?;
    let program = upgrade.program.clone().unwrap_or_else(|| how.program.clone().into());
    let options = if upgrade.options.is_empty() { own(&how.options) } else { upgrade.options.clone() };
    let mut command = Command::new(&program);
    command.args(options).current_dir(&how.directory).stdin(Stdio::null());
    check(&mut command).with_context(|| program.display().to_string())?;

    command.arg("--takeover").arg(&how.socket).process_group(0);
    let [out, err] =
        [1, 2].map(|fd| descriptor(before.pid, fd).map_or_else(|_| Stdio::inherit(), Stdio::from));
    let child = command.stdout(out).stderr(err).spawn();
    let mut child = child.with_context(|| format!("cannot start {}", program.display()))?;
    let after = settled(client, &mut child).inspect_err(|_| {
        // One that stands still: the running one goes on.
        let _ = child.kill();
    })?;
    let until = Instant::now() + LEAVE;
    while Path::new(&how.socket).exists() && how.socket.ends_with(".takeover") && Instant::now() < until {
        std::thread::sleep(LOOK);
    }
    let lost: Vec<_> = before.exports.keys().filter(|name| !after.exports.contains_key(*name)).collect();
    ensure!(lost.is_empty(), "process {} goes on for {}, without {lost:?}", after.pid, before.pid);
    Ok(json!({
        "pid": after.pid,
        "was": before.pid,
        "exports": after.exports.len(),
        "attached": after.attached(),
        "attached-before": before.attached(),
    }))
}

/// Options without those of an earlier time.
fn own(options: &[String]) -> Vec<String> {
    let mut all = options.iter();
    let mut own = Vec::new();
    while let Some(option) = all.next() {
        match option.as_str() {
            "--takeover" => drop(all.next()),
            other if other.starts_with("--takeover=") => {}
            other => own.push(other.to_owned()),
        }
    }
    own
}

/// Has the new program say whether it can make sense of its options.
fn check(command: &mut Command) -> Result<()> {
    let mut check = Command::new(command.get_program());
    check.args(command.get_args()).arg("--check").stdin(Stdio::null());
    if let Some(directory) = command.get_current_dir() {
        check.current_dir(directory);
    }
    let out = check.output().context("cannot be started")?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "does not take its options: {}", said.trim());
    Ok(())
}

/// A descriptor of a process that may be looked at (ptrace(2), "access mode"): where it writes, so that another one does too.
fn descriptor(pid: u32, fd: i32) -> Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no such process")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?)
}

/// Waits until it answers in the place of the other one: what it serves.
fn settled(client: &Client, child: &mut Child) -> Result<Serving> {
    let until = Instant::now() + START;
    loop {
        let now = Serving::read(client);
        if let Ok(now) = now
            && now.pid == child.id()
        {
            return Ok(now);
        }
        if let Some(status) = child.try_wait()? {
            return Err(anyhow!(
                "the new process has ended ({status}), and the running one goes on; their log says why. What was added over the \
                 API has to be among the options (--save)"
            ));
        }
        if Instant::now() > until {
            bail!(
                "the new process has not taken over after {START:?}, and was ended; the running one goes on"
            );
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_an_earlier_time_are_left_out() {
        let options = ["--takeover", "/a", "--api=/b", "--takeover=/c", "--poll", "event"].map(String::from);
        assert_eq!(own(&options), ["--api=/b", "--poll", "event"]);
    }
}
