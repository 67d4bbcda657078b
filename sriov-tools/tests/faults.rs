//! Whatever write fails: afterwards all is as it was before.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use common::{Fault, Faulty, Tree, run};
use nix::libc::{EBUSY, EIO};
use sriov_tools::apply::{Applier, Undone};
use sriov_tools::file::Wanted;
use sriov_tools::host::Host;
use sriov_tools::plan::plan;

/// Each way of failing at each write of `toml`, from what `first` has made of a tree.
fn every_write(name: &str, first: &str, toml: &str) {
    for fault in [Fault::Before, Fault::After] {
        for errno in [EBUSY, EIO] {
            let mut n = 0;
            loop {
                let tree = Tree::new(name);
                tree.apply(first);
                let before = tree.state();
                let steps = plan(&before, &toml::from_str::<Wanted>(toml).unwrap()).unwrap().steps;
                let host = Faulty { inner: tree.host.clone(), n, fault, errno, count: AtomicUsize::new(0) };
                let host = Arc::new(host);
                match run(host.clone(), &before, &steps) {
                    Ok(()) => {
                        assert!(n >= 5, "{name}: only {n} writes");
                        let done = host.count.load(std::sync::atomic::Ordering::Relaxed);
                        assert_eq!(done, n, "{name}: all writes have failed once");
                        break;
                    }
                    Err(e) => {
                        assert!(matches!(e.undone, Undone::All), "{name}, write {n} {fault:?}: {e}");
                        assert_eq!(tree.state(), before, "{name}, write {n} {fault:?}: {e}");
                        let said = e.to_string();
                        assert!(!said.contains('\n') && said.contains("all is as it was before"), "{said}");
                    }
                }
                n += 1;
            }
        }
    }
}

#[test]
fn a_nic_whose_vfs_are_made() {
    let vfs = "vfs = 3\nautoprobe = false\n[[pf.vf]]\nindex = 0\ndriver = \"vfio-pci\"\nmac = \"52:54:00:00:00:01\"\nvlan = 7\n[[pf.vf]]\nindex = 2\ntrust = true";
    every_write("nic", "", &format!("[[pf]]\naddress = \"01:00.0\"\n{vfs}"));
}

#[test]
fn a_nic_whose_vfs_are_made_anew() {
    let first = "vfs = 2\n[[pf.vf]]\nindex = 0\ndriver = \"vfio-pci\"\nmac = \"52:54:00:00:00:01\"\nspoofchk = false\n[[pf.vf]]\nindex = 1\nvlan = 3\nqos = 1";
    let then = "vfs = 4\n[[pf.vf]]\nindex = 0\ndriver = \"default\"\n[[pf.vf]]\nindex = 3\ndriver = \"none\"\nmax-rate = 50";
    let pf = "[[pf]]\naddress = \"01:00.0\"";
    every_write("nic", &format!("{pf}\n{first}"), &format!("{pf}\n{then}"));
}

#[test]
fn two_ports_at_once() {
    let toml = "[[pf]]\naddress = \"05:00.0\"\nvfs = 2\n[[pf]]\naddress = \"05:00.1\"\nup = true\nvfs = 2\n[[pf.vf]]\nindex = 1\ndriver = \"vfio-pci\"";
    every_write("dual-port", "", toml);
}

#[test]
fn a_switch_and_its_vectors() {
    let pf = "[[pf]]\naddress = \"81:00.0\"\nvfs = 2";
    let then = format!(
        "{pf}\neswitch = \"switchdev\"\n[[pf.vf]]\nindex = 0\nmsix = 20\n[[pf.vf]]\nindex = 1\ndriver = \"vfio-pci\""
    );
    every_write("switchdev", pf, &then);
}

#[test]
fn mediated_devices_beside_vfs() {
    let mdev = |uuid: &str| {
        format!("[[mdev]]\nuuid = \"{uuid}\"\nparent = \"03:00.0\"\ntype = \"i915-GVTg_V5_4\"\n")
    };
    let vf = "[[pf]]\naddress = \"03:00.0\"\nvfs = 1\n[[pf.vf]]\nindex = 0\ndriver = \"vfio-pci\"\n";
    every_write("gpu", "", &format!("{vf}{}{}", mdev("a"), mdev("b")));
}

#[test]
fn a_refusal_says_what_the_kernel_said_and_what_to_do() {
    let tree = Tree::new("nic");
    for (vf, says) in [
        (
            "link-state = \"enable\"",
            "rtnetlink (ip link set eth0 vf 0 state enable): Operation not supported; this driver does not have it",
        ),
        ("min-rate = 10", "Invalid argument; the driver takes no such rate"),
        ("vlan = 5\nproto = \"802.1ad\"", "Protocol not supported; the driver puts on 802.1Q tags only"),
        ("driver = \"igb\"", "bus/pci/drivers_probe: taken, but 0000:01:10.0 is bound to nothing"),
    ] {
        let before = tree.state();
        let toml = format!("[[pf]]\naddress = \"01:00.0\"\nvfs = 1\n[[pf.vf]]\nindex = 0\n{vf}");
        let steps = plan(&before, &toml::from_str::<Wanted>(&toml).unwrap()).unwrap().steps;
        let said = run(tree.host.clone(), &before, &steps).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
        assert_eq!(tree.state(), before);
    }
}

fn faulty(tree: &Tree, n: usize, fault: Fault) -> Arc<Faulty> {
    Arc::new(Faulty { inner: tree.host.clone(), n, fault, errno: EBUSY, count: AtomicUsize::new(0) })
}

#[test]
fn the_line_of_a_busy_function_is_whole() {
    let tree = Tree::new("nic");
    let before = tree.state();
    let steps = tree.plan("[[pf]]\naddress = \"01:00.0\"\nvfs = 1").steps;
    let said = run(faulty(&tree, 0, Fault::Before), &before, &steps).unwrap_err().to_string();
    let file = tree.dir.path().join("bus/pci/devices/0000:01:00.0/sriov_numvfs");
    assert_eq!(
        said,
        format!(
            "0000:01:00.0: make 1 VF: {}: Device or resource busy; VFs are there or in use: `sriov show` says by whom \
             (all is as it was before)",
            file.display()
        )
    );
}

/// A driver that is reset meanwhile goes on with the address that it had, and has said yes to another.
#[test]
fn an_address_that_was_set_is_read_back() {
    let tree = Tree::new("nic");
    let before = tree.state();
    let toml = "[[pf]]\naddress = \"01:00.0\"\nvfs = 1\n[[pf.vf]]\nindex = 0\nmac = \"52:54:00:00:00:01\"";
    let steps = tree.plan(toml).steps;
    let said = run(faulty(&tree, usize::MAX, Fault::Address), &before, &steps).unwrap_err().to_string();
    let says = "(ip link set eth0 vf 0 mac 52:54:00:00:00:01): taken, but the driver has 52:54:00:00:00:99 for it \
                (all is as it was before)";
    assert!(said.ends_with(says), "{said}");
    assert_eq!(tree.state(), before);
}

/// bnxt_en: its interface is set up first, and a yes is not taken for VFs.
#[test]
fn vfs_are_counted() {
    let tree = Tree::new("bnxt");
    let pf = "[[pf]]\naddress = \"07:00.0\"\nvfs = 2";
    let plan = tree.plan(pf);
    let steps: Vec<_> = plan.steps.iter().map(ToString::to_string).collect();
    assert_eq!(steps, ["0000:07:00.0: set the interface up", "0000:07:00.0: make 2 VFs"]);
    let before = tree.state();
    let steps = tree.plan(&format!("{pf}\nup = false")).steps;
    let said = run(tree.host.clone(), &before, &steps).unwrap_err().to_string();
    assert!(
        said.contains("sriov_numvfs: taken, but there are 0 VFs: some drivers want their interface up"),
        "{said}"
    );
    assert_eq!(tree.state(), before);
    tree.apply(pf);
    assert_eq!(tree.state().pfs[0].vfs.len(), 2);
}

/// Removing VFs waits for who holds one: for longer than anybody wants to wait.
#[test]
fn a_removal_that_blocks_is_told_of_and_given_up() {
    struct Slow(Arc<sriov_tools::host::dir::DirHost>, u32);
    impl Host for Slow {
        fn sysfs(&self) -> &std::path::Path {
            self.0.sysfs()
        }
        fn facts(&self) -> std::io::Result<sriov_tools::host::Facts> {
            self.0.facts()
        }
        fn holders(&self) -> std::collections::BTreeMap<u32, Vec<sriov_tools::host::Process>> {
            let process = sriov_tools::host::Process { pid: 17, command: "qemu".into() };
            [(self.1, vec![process])].into()
        }
        fn write(&self, path: &str, text: &str) -> Result<(), sriov_tools::host::Refused> {
            if path.ends_with("sriov_numvfs") {
                std::thread::sleep(Duration::from_secs(3600));
            }
            self.0.write(path, text)
        }
        fn set_vf(
            &self,
            _: &str,
            _: u32,
            _: sriov_tools::host::VfSet,
        ) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is set here")
        }
        fn set_up(&self, _: &str, _: bool) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is set here")
        }
        fn wait_link(&self, _: &str) {}
        fn set_eswitch(
            &self,
            _: sriov_tools::pci::PciAddr,
            _: sriov_tools::host::EswitchMode,
        ) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is set here")
        }
        fn set_port(
            &self,
            _: sriov_tools::pci::PciAddr,
            _: u32,
            _: sriov_tools::host::PortSet,
        ) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is set here")
        }
        fn load_module(&self, _: &str) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is loaded here")
        }
        fn reclaim(&self, _: &sriov_tools::host::Elsewhere) -> Result<(), sriov_tools::host::Refused> {
            unreachable!("nothing is elsewhere")
        }
    }

    let tree = Tree::new("nic");
    tree.apply("[[pf]]\naddress = \"01:00.0\"\nvfs = 1");
    let before = tree.state();
    let steps = plan(&before, &toml::from_str::<Wanted>("[[pf]]\naddress = \"01:00.0\"\nvfs = 0").unwrap())
        .unwrap()
        .steps;
    let group = before.pfs[0].vfs[0].function.iommu_group.as_ref().unwrap().number;
    let (told, tells) = std::sync::mpsc::channel();
    let applier = Applier {
        host: Arc::new(Slow(tree.host.clone(), group)),
        limit: Duration::from_millis(700),
        every: Duration::from_millis(200),
        say: Box::new(move |what| told.send(what.to_owned()).unwrap()),
    };
    let begun = Instant::now();
    let said = applier.run(&before, &steps).unwrap_err().to_string();
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert!(said.contains("no answer within 0 s: process 17 (qemu) holds 0000:01:10.0"), "{said}");
    assert!(said.contains("NOT all is as it was before"), "{said}");
    let told: Vec<String> = tells.try_iter().collect();
    assert!(
        told.iter().any(|line| line.contains("waiting") && line.contains("process 17 (qemu) holds")),
        "{told:?}"
    );
}
