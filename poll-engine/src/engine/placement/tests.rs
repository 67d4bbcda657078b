//! Lists, and where reactors go on machines that are directories.

use std::fs;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::CpuList;
use super::auto::{Cpus, Plan, Wish, choose};
use super::topology::{Cpu, SYSFS, Topology, node_of_block, node_of_file, node_of_interface};
use std::path::Path;

#[test]
fn lists_are_read_as_the_kernel_writes_them() {
    assert_eq!("0".parse(), Ok(CpuList(vec![0])));
    assert_eq!("3,1".parse(), Ok(CpuList(vec![1, 3])));
    assert_eq!("0-2,8".parse(), Ok(CpuList(vec![0, 1, 2, 8])));
    for bad in ["", "x", "2-1", "1,,2", "-", "99999999"] {
        assert!(bad.parse::<CpuList>().is_err(), "{bad}");
    }
    for list in ["0", "0-2,8", "1,3,5-6"] {
        assert_eq!(list.parse::<CpuList>().unwrap().to_string(), list);
    }
}

#[test]
fn cpus_are_named_or_left_to_us() {
    assert_eq!("1,3".parse(), Ok(Cpus::These(CpuList(vec![1, 3]))));
    assert_eq!("auto".parse(), Ok(Cpus::Auto(None)));
    assert_eq!("auto:3".parse(), Ok(Cpus::Auto(Some(3))));
    for bad in ["auto:", "auto:0", "auto:x", "automatic", "auto3", ""] {
        assert!(bad.parse::<Cpus>().is_err(), "{bad}");
    }
}

/// A sysfs.
struct Tree(TempDir);

impl Tree {
    /// With these CPUs online, siblings of a core so far apart (0: none), and these CPUs and distances of its nodes.
    fn new(online: &str, apart: usize, nodes: &[(&str, &str)]) -> Tree {
        let tree = Tree(TempDir::new().unwrap());
        tree.file("devices/system/cpu/online", online);
        tree.file("devices/system/cpu/isolated", "");
        for cpu in online.parse::<CpuList>().unwrap().0 {
            let core = if apart > 0 { cpu % apart } else { cpu };
            let siblings = if apart > 0 { format!("{core},{}", core + apart) } else { core.to_string() };
            tree.file(&format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), &siblings);
        }
        if !nodes.is_empty() {
            tree.file("devices/system/node/online", &format!("0-{}", nodes.len() - 1));
        }
        for (node, (cpus, distance)) in nodes.iter().enumerate() {
            tree.file(&format!("devices/system/node/node{node}/cpulist"), cpus);
            tree.file(&format!("devices/system/node/node{node}/distance"), distance);
        }
        tree
    }

    /// Two nodes of four cores with two threads each, numbered as such machines number them.
    fn two_nodes() -> Tree {
        Tree::new("0-15", 8, &[("0-3,8-11", "10 21"), ("4-7,12-15", "21 10")])
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn link(&self, link: &str, to: &str) {
        let (link, to) = (self.root().join(link), self.root().join(to));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        fs::create_dir_all(&to).unwrap();
        symlink(to, link).unwrap();
    }

    fn choose(&self, wish: &Wish<'_>) -> Result<Plan, String> {
        choose(&Topology::read(self.root()), wish).map_err(|e| e.to_string())
    }

    /// Where so many reactors for these devices go; all CPUs may be used that are online.
    fn place(&self, count: usize, devices: &[Option<usize>], housekeeping: &str, guests: &str) -> Vec<usize> {
        let list = |s: &str| s.parse::<CpuList>().map(|list| list.0).unwrap_or_default();
        let usable: Vec<_> = Topology::read(self.root()).cpus.into_keys().collect();
        let devices: Vec<_> = devices.iter().map(|node| ("disk".to_owned(), *node)).collect();
        let (housekeeping, guests) = (list(housekeeping), list(guests));
        let wish = Wish {
            count: (count > 0).then_some(count),
            devices: &devices,
            usable: &usable,
            housekeeping: &housekeeping,
            guests: &guests,
        };
        self.choose(&wish).unwrap().cpus.0
    }
}

#[test]
fn reactors_go_where_the_devices_are() {
    let tree = Tree::two_nodes();
    assert_eq!(tree.place(0, &[Some(1)], "", ""), [4]);
    assert_eq!(tree.place(0, &[Some(1), Some(0), Some(1)], "", ""), [4, 1]);
    // Two of three disks are on node 1, and one whose place nobody knows.
    assert_eq!(tree.place(3, &[Some(0), Some(1), Some(1), None], "", ""), [4, 1, 5]);
    // One for each node, however many more devices the other one has; and then by that.
    let many = [Some(1), Some(1), Some(1), Some(1), Some(1), Some(0)];
    assert_eq!(tree.place(0, &many, "", ""), [4, 1]);
    assert_eq!(tree.place(1, &many, "", ""), [4]);
    assert_eq!(tree.place(4, &many, "", ""), [4, 1, 5, 6]);
    // Nobody knows anything: as anywhere, not on CPU 0.
    assert_eq!(tree.place(0, &[None, None], "", ""), [1]);
    assert_eq!(tree.place(0, &[], "", ""), [1]);
}

#[test]
fn siblings_come_last_and_the_next_node_after_them() {
    let tree = Tree::two_nodes();
    // Full cores first, of the last of them not CPU 0.
    assert_eq!(tree.place(5, &[Some(0)], "", ""), [1, 2, 3, 8, 9]);
    assert_eq!(tree.place(5, &[Some(1)], "", ""), [4, 5, 6, 7, 12]);
    assert_eq!(tree.place(9, &[Some(1)], "", "")[7..], [15, 1]);
    // The sibling of a CPU that somebody else has is half a core as well.
    assert_eq!(tree.place(2, &[Some(0)], "0", "1-2"), [3, 8]);
}

#[test]
fn housekeeping_and_guests_keep_theirs() {
    let tree = Tree::two_nodes();
    assert_eq!(tree.place(2, &[Some(0)], "0-1,8-9", "2,10"), [3, 11]);
    // A node that is all taken: the nearest other one.
    assert_eq!(tree.place(1, &[Some(0)], "0", "1-3,8-11"), [4]);
    let three = Tree::new("0-5", 0, &[("0-1", "10 40 20"), ("2-3", "40 10 30"), ("4-5", "20 30 10")]);
    assert_eq!(three.place(1, &[Some(0)], "0-1", ""), [4]);
    assert_eq!(three.place(1, &[Some(1)], "2-3", ""), [4]);
}

#[test]
fn only_cpus_that_are_ours_are_used() {
    let tree = Tree::two_nodes();
    let devices = [("a".to_owned(), Some(1))];
    let wish = |count, usable| Wish { count, devices: &devices, usable, ..Wish::default() };
    // The mask of the process, or its cpuset, has one CPU of that node.
    assert_eq!(tree.choose(&wish(Some(2), &[2, 13, 3])).unwrap().cpus.0, [13, 2]);
    let none = "2 reactors need a CPU each, and of 7 that this process may run on 1 are left; \
                ask for fewer (--cpus auto:N), or let it run on more (AllowedCPUs= of its unit, taskset)";
    assert_eq!(tree.choose(&wish(Some(2), &[7])).unwrap_err(), none);
    let wish = Wish { housekeeping: &[0], guests: &[1], usable: &[0, 1], ..Wish::default() };
    let none = "1 reactors need a CPU each, and of 0-1 that this process may run on 0 are left, without 0 of housekeeping, \
                without 1 of guests; ask for fewer (--cpus auto:N), or name fewer with --housekeeping and --guest-cpus";
    assert_eq!(tree.choose(&wish).unwrap_err(), none);
}

#[test]
fn cpus_that_are_offline_are_not_there() {
    // CPU 5 is off, and so has no topology; 1 is the only one of its core.
    let tree = Tree::new("0-4,6-7", 4, &[("0-1,4", "10 20"), ("2-3,6-7", "20 10")]);
    let topology = Topology::read(tree.root());
    assert_eq!(topology.cpus.len(), 7);
    assert_eq!(topology.cpus[&6], Cpu { node: Some(1), core: 2, isolated: false });
    assert_eq!(tree.place(3, &[Some(0)], "", ""), [1, 4, 0]);
}

#[test]
fn isolated_cpus_are_taken_first() {
    let tree = Tree::two_nodes();
    tree.file("devices/system/cpu/isolated", "3,6-7");
    assert_eq!(tree.place(2, &[Some(0)], "", ""), [3, 1]);
    assert_eq!(tree.place(2, &[Some(1)], "", ""), [6, 7]);
}

#[test]
fn machines_without_nodes_have_room_all_the_same() {
    let tree = Tree::new("0-3", 2, &[]);
    assert_eq!(tree.place(0, &[None], "", ""), [1]);
    assert_eq!(tree.place(4, &[None], "", ""), [1, 2, 3, 0]);
    // Nothing at all: what may be used is known from elsewhere.
    let nothing = TempDir::new().unwrap();
    let wish = Wish { count: Some(2), usable: &[0, 1, 2], ..Wish::default() };
    assert_eq!(choose(&Topology::read(nothing.path()), &wish).unwrap().cpus.0, [1, 2]);
}

#[test]
fn it_says_what_it_chose_and_why() {
    let tree = Tree::two_nodes();
    tree.file("devices/system/cpu/isolated", "4");
    let devices = ["a", "b", "c", "d", "e"].map(|name| (name.to_owned(), Some(usize::from(name != "e"))));
    let usable: Vec<_> = (0..16).collect();
    let wish = Wish {
        devices: &devices,
        usable: &usable,
        housekeeping: &[0, 8],
        guests: &[1, 2, 3],
        ..Wish::default()
    };
    let plan = tree.choose(&wish).unwrap();
    let said = "reactors on CPU 4 (node 1, of a, b, c and 1 more; isolated), CPU 9 (node 0, of e; shares its core); \
                of CPUs 0-15, without 0,8 of housekeeping, without 1-3 of guests";
    assert_eq!((plan.cpus.0.as_slice(), plan.to_string().as_str()), (&[4, 9][..], said));
    let wish = Wish { usable: &[2, 3], ..Wish::default() };
    let said = "reactors on CPU 2 (node 0); the node of no device is known; of CPUs 2-3";
    assert_eq!(tree.choose(&wish).unwrap().to_string(), said);
}

/// An NVMe disk on node 1, as Linux shows it, with a partition; a virtio disk that has no node; what is made of them.
#[test]
fn nodes_of_block_devices_are_found_above_and_below() {
    let tree = Tree::two_nodes();
    let nvme = "devices/pci0000:80/0000:80:01.0/0000:81:00.0";
    tree.file(&format!("{nvme}/numa_node"), "1");
    tree.file("devices/pci0000:00/0000:00:02.0/numa_node", "-1");
    tree.link("dev/block/259:0", &format!("{nvme}/nvme/nvme0/nvme0n1"));
    tree.link("dev/block/259:1", &format!("{nvme}/nvme/nvme0/nvme0n1/nvme0n1p1"));
    tree.link("dev/block/254:0", "devices/pci0000:00/0000:00:02.0/virtio1/block/vda");
    tree.link("dev/block/253:0", "devices/virtual/block/dm-0");
    tree.link("devices/virtual/block/dm-0/slaves/nvme0n1p1", &format!("{nvme}/nvme/nvme0/nvme0n1/nvme0n1p1"));
    let node = |minor, major| node_of_block(tree.root(), major, minor);
    assert_eq!([node(0, 259), node(1, 259), node(0, 254), node(0, 253)], [Some(1), Some(1), None, Some(1)]);
    // A mirror of two nodes is on none of them.
    tree.file("devices/pci0000:00/0000:00:03.0/numa_node", "0");
    tree.link("dev/block/9:0", "devices/virtual/block/md0");
    tree.link("devices/virtual/block/md0/slaves/a", "devices/pci0000:00/0000:00:03.0/ata1/block/sda");
    assert_eq!(node(0, 9), Some(0));
    tree.link("devices/virtual/block/md0/slaves/b", "devices/virtual/block/dm-0");
    assert_eq!(node(0, 9), None);
    // A namespace with its controllers beside it, and a loop of links.
    tree.link("dev/block/259:9", "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
    tree.link("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0", &format!("{nvme}/nvme/nvme0"));
    assert_eq!(node(9, 259), Some(1));
    tree.link("dev/block/253:7", "devices/virtual/block/dm-7");
    tree.link("devices/virtual/block/dm-7/slaves/dm-7", "devices/virtual/block/dm-7");
    assert_eq!([node(7, 253), node(3, 3)], [None, None]);
    assert_eq!(node_of_file(tree.root(), Path::new("/nonexistent")), None);
}

#[test]
fn nodes_of_interfaces_are_found_as_well() {
    let tree = Tree::two_nodes();
    tree.file("devices/pci0000:00/0000:00:1f.6/numa_node", "0");
    tree.link("class/net/eth0", "devices/pci0000:00/0000:00:1f.6/net/eth0");
    tree.link("class/net/bond0", "devices/virtual/net/bond0");
    tree.link("class/net/lo", "devices/virtual/net/lo");
    let of = |name| node_of_interface(tree.root(), name);
    assert_eq!([of("eth0"), of("bond0"), of("lo"), of("none")], [Some(0), None, None, None]);
    tree.link("devices/virtual/net/bond0/lower_eth0", "devices/pci0000:00/0000:00:1f.6/net/eth0");
    assert_eq!(of("bond0"), Some(0));
}

/// This machine's.
#[test]
fn a_real_sysfs_has_the_cpus_that_this_process_uses() {
    let topology = Topology::read(Path::new(SYSFS));
    let usable = super::usable_cpus().unwrap();
    assert!(usable.iter().all(|cpu| topology.cpus.contains_key(cpu)), "{usable:?} {topology:?}");
    node_of_file(Path::new(SYSFS), Path::new("/"));
}
