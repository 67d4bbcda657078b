//! Takes a device away: from the bus, from whoever serves it, from the kernel.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cli::{Detach, name_of};
use crate::netlink::{Bus, NetlinkError};
use crate::sysfs;
use crate::vduse::node::{Control, Node, VduseError};
use crate::vduse::state;
use crate::vduse::uapi::{Answer, Request};

/// How long a process may take to finish what is in flight.
const FINISH: Duration = Duration::from_secs(60);

/// `vdpactl detach`.
pub fn detach(cli: &Detach) -> Result<()> {
    let root = cli.state_dir.as_path();
    let name = match &cli.name {
        Some(name) if state::names(root).contains(name) => name.clone(),
        // Of an image.
        Some(name) if name.contains(['/', '.']) => name_of(Path::new(name)),
        Some(name) => name.clone(),
        None => match state::names(root).as_slice() {
            [] => bail!("there is nothing to detach in {}", root.display()),
            [one] => one.clone(),
            all => bail!("name one of {}", all.join(", ")),
        },
    };
    if let Some(outcome) = sysfs::outcome(&name)
        && !cli.force
        && outcome.is_in_use()
    {
        bail!("{outcome} is in use: unmount or close it first, or take it away as it is with --force");
    }
    let owner = state::owner(root, &name);
    // A kernel without the bus has no device on it.
    let on_bus = match Bus::open() {
        Ok(mut bus) => bus.has(&name)?.then_some(bus),
        Err(NetlinkError::NoBus) => None,
        Err(e) => return Err(e.into()),
    };
    let was_there = on_bus.is_some() || owner.is_some();
    if let Some(mut bus) = on_bus {
        // Somebody has to answer the kernel: whoever serves it, or we.
        let answers =
            if owner.is_none() { Node::open(&name)?.map(Undertaker::start).transpose()? } else { None };
        bus.delete(&name)?;
        drop(answers);
    }
    if let Some(pid) = owner {
        end(pid).with_context(|| format!("process {pid}, which serves {name}"))?;
    }
    let gone = match Control::open()?.destroy(&name) {
        Ok(()) => true,
        Err(VduseError::Unknown(_)) => false,
        Err(e) => return Err(e.into()),
    };
    state::forget(root, &name);
    if !gone && !was_there {
        bail!("there is no device {name}");
    }
    Ok(())
}

/// Has a process finish and waits for its end.
fn end(pid: i32) -> Result<()> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    pidfd_send_signal(&process, Signal::TERM)?;
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(FINISH).unwrap_or(PollTimeout::MAX);
    if poll(&mut fds, timeout)? == 0 {
        bail!("it has not ended within {FINISH:?}");
    }
    Ok(())
}

/// Answers the kernel for a process that has died, so that its driver can let go of the device at once instead of after
/// 30 seconds. Nothing of the device is touched.
struct Undertaker {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Undertaker {
    fn start(node: Node) -> std::io::Result<Undertaker> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("undertaker".into()).spawn(move || {
            while !told.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(node.fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::from(20u8));
                while let Ok(Some(request)) = node.request() {
                    let answer = match request.request() {
                        Request::VqState(index) => Answer::VqState(index, [0; 4]),
                        _ => Answer::Done,
                    };
                    let _ = node.answer(request.id, answer);
                }
            }
        })?;
        Ok(Undertaker { stop, thread: Some(thread) })
    }
}

impl Drop for Undertaker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
