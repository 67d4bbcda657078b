//! What a daemon gives up once it is ready to serve: system calls, files, rights. Each thread gives up what its kind does
//! not need, as it begins; the first one, last, what nobody needs any more.
//!
//! | Thread | System calls | Files by name |
//! |---|---|---|
//! | reactor | its io_uring (of 12 operations), memory, descriptors that are open | none |
//! | session | as much, and what comes with messages; further sessions | its socket, to move and remove it |
//! | writer of a capture | writing | none |
//! | worker of an image | reading, writing, giving up space | none |
//! | of Ceph's library | all | all that its user may |
//! | opener of interfaces, where there are any | all but what ends the process | devices |
//! | starter | what those need that it starts: rings of reactors, giving up still more | as sessions |
//! | main, and what it starts later | opening, local sockets | the [`Places`] it is given |

mod files;
mod filter;
mod install;
mod rights;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, setrlimit};
use poll_engine::confine::{self, Role};
use poll_engine::fault_point::hijack;
use serde::Deserialize;
use tracing::{info, warn};

pub use files::Places;
use files::{Rules, support};
use filter::{Filters, Verdict, Who, filters};
use install::{has_seccomp, install};
pub use rights::Identity;
use rights::{forgo_new, reduce};
pub use rustix::thread::CapabilitySet;

use crate::from_text;

/// Whether a daemon confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// With all that the kernel has for it.
    #[default]
    On,
    /// System calls pass that would not, and the kernel's audit log tells of them.
    Log,
    /// Not at all.
    Off,
}

/// The options.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[group(id = "confine")]
#[serde(default, rename_all = "kebab-case")]
pub struct Options {
    /// Once ready, give up all rights that serving does not need: on; log (do not refuse system calls, but have the
    /// kernel's audit log tell of them); or off [default: on]
    #[arg(long, value_enum, value_name = "MODE")]
    #[serde(deserialize_with = "mode")]
    pub sandbox: Option<Mode>,

    /// Once everything is open, be this user (name or number) instead of root
    #[arg(long, value_name = "USER")]
    #[serde(deserialize_with = "user")]
    pub user: Option<String>,

    /// Before anything is opened, make this directory the root: all paths are below it
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub chroot: Option<PathBuf>,
}

from_text! {
    mode: Option<Mode> = |s| Mode::from_str(s, false).map(Some).map_err(|_| format!("'{s}' is none of on, log, off"));
    user: Option<String> = |s| Ok::<_, String>(Some(s.to_owned()));
}

/// What is to be given up, and by whom.
struct Plan {
    mode: Mode,
    identity: Option<Identity>,
    /// Of the first thread. The others have none, but those that open interfaces, and whoever starts them.
    keep: CapabilitySet,
    opens: bool,
    /// Of each kind of thread.
    threads: Vec<(Role, Option<Filters>, Rules)>,
    main: Option<(Option<Filters>, Rules)>,
    /// For the log. Asking is among what is given up.
    telling: String,
    /// Whether the threads that begin now are started by one that is nobody any more.
    sealed: AtomicBool,
}

/// A process on its way to giving up its rights.
pub struct Confinement(Arc<Plan>);

impl Options {
    /// Changes the root, if that is asked for, and finds out who to become. Before anything is opened.
    pub fn enter(&self) -> Result<Option<Identity>> {
        let identity = self.identity()?;
        if let Some(root) = &self.chroot {
            let done = nix::unistd::chroot(root).and_then(|()| nix::unistd::chdir("/"));
            done.with_context(|| format!("--chroot {}", root.display()))?;
        }
        Ok(identity)
    }

    /// Whether the program confines itself.
    pub fn mode(&self) -> Mode {
        self.sandbox.unwrap_or_default()
    }

    /// Who to become.
    pub fn identity(&self) -> Result<Option<Identity>> {
        let identity = self.user.as_deref().map(Identity::of).transpose()?;
        if identity.is_some() && !nix::unistd::geteuid().is_root() {
            bail!("--user: only root can become somebody else; start the program as that user instead");
        }
        Ok(identity)
    }

    /// Has threads that begin from now on give up what their kind does not need. `places` is what the first thread still
    /// does by name once it is sealed, and openers do with devices; without such there is nobody who opens interfaces.
    /// `keep` are the capabilities that are left to the first thread alone.
    pub fn threads(
        &self,
        identity: Option<Identity>,
        places: &Places,
        keep: CapabilitySet,
    ) -> Result<Confinement> {
        let mode = self.mode();
        let verdict = if mode == Mode::Log { Verdict::Log } else { Verdict::Enforce };
        let of = |who, places: &Places| {
            let filters = has_seccomp().then(|| filters(who, verdict)).transpose().context("--sandbox")?;
            anyhow::Ok((filters, Rules::new(places).context("--sandbox")?))
        };
        let mut plan = Plan {
            mode,
            identity,
            keep,
            opens: !places.devices.is_empty(),
            threads: Vec::new(),
            main: None,
            telling: String::new(),
            sealed: AtomicBool::new(false),
        };
        if mode != Mode::Off {
            keep_locking()?;
            forgo_new().context("no_new_privs")?;
            for role in
                [Role::Reactor, Role::Session, Role::Writer, Role::Worker, Role::Opener, Role::Starter]
            {
                let (who, places) = match role {
                    Role::Opener => (role, places.of_devices()),
                    // Nobody can do more than who has started him.
                    Role::Starter if plan.opens => {
                        (Role::Opener, Places { sockets: places.sockets.clone(), ..places.of_devices() })
                    }
                    Role::Session | Role::Starter => (role, places.of_sockets()),
                    _ => (role, Places::default()),
                };
                let (filters, rules) = of(Who::Thread(who), &places)?;
                plan.threads.push((role, filters, rules));
            }
            plan.main = Some(of(Who::Main, places)?);
        }
        plan.telling = plan.telling();
        let plan = Arc::new(plan);
        let of_threads = Arc::clone(&plan);
        let first = confine::threads_with(move |role| of_threads.begin(role));
        if !first.context("cannot start a thread")? {
            bail!("this process is confined already");
        }
        Ok(Confinement(plan))
    }
}

impl Confinement {
    /// Gives up, for the calling thread and all that it starts from now on, what nobody needs any more.
    pub fn seal(&self) -> Result<()> {
        let plan = &self.0;
        let limits_calls = plan.mode != Mode::Off;
        confine::seal(limits_calls)
            .context("the thread that starts others cannot be confined (see --sandbox)")?;
        plan.reduce(plan.identity.as_ref(), plan.keep).context("cannot give up rights")?;
        if let Some((filters, rules)) = &plan.main {
            apply(filters.as_ref(), rules).context("cannot be confined (see --sandbox)")?;
        }
        plan.sealed.store(true, Ordering::Release);
        hijack("main");
        match plan.mode {
            Mode::Off => warn!("not confined, by --sandbox off"),
            Mode::On | Mode::Log => info!("{}", plan.telling),
        }
        Ok(())
    }
}

/// What opening an interface takes: a tap, a packet socket, one of AF_XDP with its program and memory that is locked.
const OPENING: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::IPC_LOCK);

impl Plan {
    fn begin(&self, role: Role) -> io::Result<()> {
        // What the thread that starts it has given up is given up.
        let is_somebody = !self.sealed.load(Ordering::Acquire);
        if is_somebody || self.opens {
            let opens = self.opens && matches!(role, Role::Opener | Role::Starter);
            let keep = if opens { OPENING } else { CapabilitySet::empty() };
            self.reduce(self.identity.as_ref().filter(|_| is_somebody), keep)?;
        }
        let of_role = self.threads.iter().find(|(r, ..)| *r == role);
        of_role.map_or(Ok(()), |(_, filters, rules)| apply(filters.as_ref(), rules))
    }

    fn reduce(&self, identity: Option<&Identity>, keep: CapabilitySet) -> io::Result<()> {
        if self.mode == Mode::Off && self.identity.is_none() {
            return Ok(());
        }
        reduce(identity, keep)
    }

    /// One line: what is going to be in force, and what the kernel lacks for more.
    fn telling(&self) -> String {
        let seccomp = match (has_seccomp(), self.mode) {
            (true, Mode::Log) => (Some("seccomp (which only logs)".to_owned()), None),
            (true, _) => (Some("seccomp".to_owned()), None),
            (false, _) => (None, Some("seccomp (CONFIG_SECCOMP_FILTER)")),
        };
        let (on, lacks): (Vec<_>, Vec<_>) = [seccomp, support()].into_iter().unzip();
        let on: String = on.into_iter().flatten().map(|part| part + ", ").collect();
        let lacks: Vec<_> = lacks.into_iter().flatten().collect();
        let names = |set: CapabilitySet| {
            set.iter_names().map(|(name, _)| format!("CAP_{name}")).collect::<Vec<_>>().join(", ")
        };
        let kept = if self.keep.is_empty() { String::new() } else { format!(" but {}", names(self.keep)) };
        let opens = if self.opens {
            format!(" (for opening interfaces again {})", names(OPENING))
        } else {
            String::new()
        };
        let lacks = if lacks.is_empty() {
            String::new()
        } else {
            format!("; this kernel lacks {}", lacks.join(" and "))
        };
        format!("confined: {on}no capabilities{kept}{opens}, no_new_privs{lacks}")
    }
}

/// What later rings may register is not limited by what is given up, where it was not before.
fn keep_locking() -> io::Result<()> {
    if rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK) {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY, libc::RLIM_INFINITY);
    }
    Ok(())
}

/// What is allowed comes last: changing what is in force is not.
fn apply(filters: Option<&Filters>, rules: &Rules) -> io::Result<()> {
    rules.hold()?;
    let Some(Filters { allow, kill }) = filters else { return Ok(()) };
    install(kill)?;
    allow.as_deref().map_or(Ok(()), install)
}
