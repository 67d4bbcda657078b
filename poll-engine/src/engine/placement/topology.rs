//! What is near what: CPUs, their cores and nodes, and the nodes of devices, as sysfs has it. Whatever it does not say is not
//! known, and no error.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::CpuList;

/// Where sysfs is.
pub const SYSFS: &str = "/sys";
/// Devices made of devices made of devices: no deeper than that.
const DEEPEST: usize = 8;

/// A CPU that is online.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Its memory's node.
    pub node: Option<usize>,
    /// The first CPU of its core; SMT siblings have the same.
    pub core: usize,
    /// The kernel's scheduler puts nothing there by itself (`isolcpus=`).
    pub isolated: bool,
}

/// The CPUs of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Those online, by number.
    pub cpus: BTreeMap<usize, Cpu>,
    /// From a node to each other one, in the order of their numbers: 10 is to itself.
    distances: BTreeMap<usize, BTreeMap<usize, usize>>,
}

impl Topology {
    /// Reads it from the sysfs at `root`.
    pub fn read(root: &Path) -> Topology {
        let system = root.join("devices/system");
        let isolated = list(&system.join("cpu/isolated"));
        let mut cpus: BTreeMap<_, _> = list(&system.join("cpu/online"))
            .into_iter()
            .map(|cpu| {
                let siblings = list(&system.join(format!("cpu/cpu{cpu}/topology/thread_siblings_list")));
                let core = siblings.first().copied().unwrap_or(cpu);
                (cpu, Cpu { node: None, core, isolated: isolated.contains(&cpu) })
            })
            .collect();
        let nodes = list(&system.join("node/online"));
        let mut distances = BTreeMap::new();
        for &node in &nodes {
            let dir = system.join(format!("node/node{node}"));
            for cpu in list(&dir.join("cpulist")) {
                if let Some(cpu) = cpus.get_mut(&cpu) {
                    cpu.node = Some(node);
                }
            }
            let to = fs::read_to_string(dir.join("distance")).unwrap_or_default();
            let to = to.split_whitespace().filter_map(|d| d.parse().ok());
            distances.insert(node, nodes.iter().copied().zip(to).collect());
        }
        Topology { cpus, distances }
    }

    /// The node of a CPU.
    pub fn node_of(&self, cpu: usize) -> Option<usize> {
        self.cpus.get(&cpu)?.node
    }

    /// How far it is, in the firmware's measure: 10 for the same node, and where nothing is known.
    pub(super) fn distance(&self, from: usize, to: Option<usize>) -> usize {
        const OWN: usize = 10;
        const OTHER: usize = 20;
        match to {
            Some(to) if to != from => {
                self.distances.get(&from).and_then(|d| d.get(&to)).copied().unwrap_or(OTHER)
            }
            _ => OWN,
        }
    }
}

/// The node of the device that a file is on, or that it is. None if that is not known, or there are several.
pub fn node_of_file(root: &Path, path: &Path) -> Option<usize> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = fs::metadata(path).ok()?;
    let device = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    node_of_block(root, major(device), minor(device))
}

/// The node of a block device.
pub fn node_of_block(root: &Path, major: u64, minor: u64) -> Option<usize> {
    let root = root.canonicalize().ok()?;
    let mut nodes = BTreeSet::new();
    block(&root, &root.join(format!("dev/block/{major}:{minor}")), DEEPEST, &mut nodes);
    only(&nodes)
}

/// The node of a network interface.
pub fn node_of_interface(root: &Path, name: &str) -> Option<usize> {
    let root = root.canonicalize().ok()?;
    let mut nodes = BTreeSet::new();
    interface(&root, &root.join("class/net").join(name), DEEPEST, &mut nodes);
    only(&nodes)
}

fn only(nodes: &BTreeSet<usize>) -> Option<usize> {
    nodes.first().copied().filter(|_| nodes.len() == 1)
}

fn block(root: &Path, link: &Path, depth: usize, nodes: &mut BTreeSet<usize>) {
    let Ok(dir) = link.canonicalize() else { return };
    if let Some(node) = node_above(root, &dir) {
        nodes.insert(node);
    } else if depth > 0 {
        // What it is made of: device mapper and MD say so; a namespace of several NVMe controllers is beside them.
        // A partition is in the directory of its disk.
        let under = [dir.join("slaves"), dir.join("../slaves")].into_iter().flat_map(|dir| entries(&dir));
        let beside = dir.ancestors().skip(1).take(2).filter(|dir| name_of(dir).starts_with("nvme-subsys"));
        let beside = beside.flat_map(entries).filter(|entry| entry.is_symlink());
        let controllers = beside.filter(|entry| name_of(entry).starts_with("nvme"));
        under.chain(controllers).for_each(|link| block(root, &link, depth - 1, nodes));
    }
}

fn interface(root: &Path, link: &Path, depth: usize, nodes: &mut BTreeSet<usize>) {
    let Ok(dir) = link.canonicalize() else { return };
    if let Some(node) = node_above(root, &dir) {
        nodes.insert(node);
    } else if depth > 0 {
        // A bond, a bridge, a VLAN.
        let lower = entries(&dir).filter(|entry| name_of(entry).starts_with("lower_"));
        lower.for_each(|link| interface(root, &link, depth - 1, nodes));
    }
}

/// The node of the next device above that says one; -1 is none.
fn node_above(root: &Path, dir: &Path) -> Option<usize> {
    let inside = dir.ancestors().take_while(|dir| dir.starts_with(root) && *dir != root);
    inside.into_iter().find_map(|dir| fs::read_to_string(dir.join("numa_node")).ok()?.trim().parse().ok())
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut all: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.sort();
    all.into_iter()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A list as the kernel writes it; an empty one is an empty line.
fn list(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse::<CpuList>().map(|list| list.0).unwrap_or_default()
}
