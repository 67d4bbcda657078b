//! Which CPUs reactors are to have where nobody has chosen: near the devices, off the CPUs that others need.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::str::FromStr;

use super::CpuList;
use super::topology::{Cpu, Topology};

/// Which CPUs reactors run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// One on each of these.
    These(CpuList),
    /// So many, where they fit best; without a number, one for each node that has devices.
    Auto(Option<usize>),
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(s: &str) -> Result<Cpus, String> {
        match s.strip_prefix("auto") {
            Some("") => Ok(Cpus::Auto(None)),
            Some(count) => match count.strip_prefix(':').and_then(|count| count.parse().ok()) {
                Some(count) if count > 0 => Ok(Cpus::Auto(Some(count))),
                _ => Err(format!("'{s}' is neither auto nor auto:N, N reactors")),
            },
            None => s.parse().map(Cpus::These),
        }
    }
}

/// What is to be placed, and what is taken.
#[derive(Clone, Debug, Default)]
pub struct Wish<'a> {
    /// How many reactors; `None`: one for each node that has devices.
    pub count: Option<usize>,
    /// What is served, and the node that it is on if that is known.
    pub devices: &'a [(String, Option<usize>)],
    /// CPUs that this process may run on: its affinity, and its cpuset.
    pub usable: &'a [usize],
    /// CPUs of the host's own work.
    pub housekeeping: &'a [usize],
    /// CPUs of virtual machines.
    pub guests: &'a [usize],
}

/// Why it cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{wanted} reactors need a CPU each, and of {usable} that this process may run on {left} are left{by}; {remedy}"
)]
pub struct NoRoom {
    wanted: usize,
    usable: CpuList,
    left: usize,
    by: String,
    remedy: &'static str,
}

/// Where reactors are to run, and why there: for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The CPUs, that of the first reactor first.
    pub cpus: CpuList,
    why: String,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Chooses. On the node of the devices, or the nearest to it, in this order: a core that is nobody else's, a CPU that the
/// scheduler is kept off, any but CPU 0, where the kernel does what it does somewhere.
pub fn choose(topology: &Topology, wish: &Wish<'_>) -> Result<Plan, NoRoom> {
    let taken = |cpu: &usize| wish.housekeeping.contains(cpu) || wish.guests.contains(cpu);
    let mut left: BTreeSet<usize> = wish.usable.iter().copied().filter(|cpu| !taken(cpu)).collect();
    let mut devices: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (name, node) in wish.devices {
        if let Some(node) = node {
            devices.entry(*node).or_default().push(name);
        }
    }
    let wanted = wish.count.unwrap_or(devices.len().max(1));
    if left.len() < wanted {
        return Err(no_room(wish, wanted, left.len()));
    }
    // A CPU that sysfs does not know of is a core of its own.
    let cpu_of = |cpu: usize| {
        topology.cpus.get(&cpu).cloned().unwrap_or(Cpu { node: None, core: cpu, isolated: false })
    };
    let mut cores: BTreeSet<usize> =
        [wish.housekeeping, wish.guests].concat().into_iter().map(|cpu| cpu_of(cpu).core).collect();
    let mut seats: BTreeMap<usize, usize> = BTreeMap::new();
    let (mut chosen, mut why) = (Vec::new(), String::from("reactors on "));
    for number in 0..wanted {
        // To a node that has none yet, and then to that which has the most devices for each reactor; the first of several.
        let share = |node: &usize| (devices[node].len(), seats.get(node).copied().unwrap_or(0));
        let is_better = |node: &usize, than: &usize| {
            let ((a, x), (b, y)) = (share(node), share(than));
            if (x == 0) == (y == 0) { a * (y + 1) > b * (x + 1) } else { x == 0 }
        };
        let nodes = devices.keys().copied();
        let node = nodes.reduce(|best, node| if is_better(&node, &best) { node } else { best });
        let rank = |&cpu: &usize| {
            let is = cpu_of(cpu);
            let far = node.map_or(0, |node| topology.distance(node, is.node));
            (far, cores.contains(&is.core), !is.isolated, cpu == 0, cpu)
        };
        let Some(cpu) = left.iter().copied().min_by_key(rank) else { break };
        let (is, shares) = (cpu_of(cpu), rank(&cpu).1);
        left.remove(&cpu);
        cores.insert(is.core);
        if let Some(node) = node {
            *seats.entry(node).or_default() += 1;
        }
        let comma = if number == 0 { "" } else { ", " };
        let _ = write!(why, "{comma}CPU {cpu}");
        let mut about = Vec::new();
        let place = match (is.node, node) {
            (Some(is), Some(near)) if is == near => Some(format!("node {is}, of {}", some(&devices[&near]))),
            (Some(is), Some(near)) => {
                Some(format!("node {is}; node {near}, of {}, has none left", some(&devices[&near])))
            }
            (Some(is), None) => Some(format!("node {is}")),
            (None, _) => None,
        };
        about.extend(place);
        if shares {
            about.push("shares its core".into());
        }
        if is.isolated {
            about.push("isolated".into());
        }
        if !about.is_empty() {
            let _ = write!(why, " ({})", about.join("; "));
        }
        chosen.push(cpu);
    }
    if wish.devices.iter().all(|(_, node)| node.is_none()) {
        why.push_str("; the node of no device is known");
    }
    let _ = write!(why, "; of CPUs {}{}", CpuList(wish.usable.to_vec()), by(wish));
    Ok(Plan { cpus: CpuList(chosen), why })
}

/// Who has CPUs besides.
fn by(wish: &Wish<'_>) -> String {
    let of = [("housekeeping", wish.housekeeping), ("guests", wish.guests)];
    let mut said = String::new();
    for (who, cpus) in of.into_iter().filter(|(_, cpus)| !cpus.is_empty()) {
        let _ = write!(said, ", without {} of {who}", CpuList(cpus.to_vec()));
    }
    said
}

fn no_room(wish: &Wish<'_>, wanted: usize, left: usize) -> NoRoom {
    let remedy = if wish.housekeeping.is_empty() && wish.guests.is_empty() {
        "ask for fewer (--cpus auto:N), or let it run on more (AllowedCPUs= of its unit, taskset)"
    } else {
        "ask for fewer (--cpus auto:N), or name fewer with --housekeeping and --guest-cpus"
    };
    NoRoom { wanted, usable: CpuList(wish.usable.to_vec()), left, by: by(wish), remedy }
}

/// Some names of many.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - more].join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}
