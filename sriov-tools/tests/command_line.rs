//! The program, on hosts in directories.

mod common;

use std::process::{Command, Output};

use common::Tree;

fn sriov(tree: &Tree, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sriov")).arg("--sysfs").arg(tree.dir.path()).args(args).output().unwrap()
}

fn good(tree: &Tree, args: &[&str]) -> String {
    let output = sriov(tree, args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

fn bad(tree: &Tree, args: &[&str]) -> String {
    let output = sriov(tree, args);
    assert!(!output.status.success(), "{args:?}: {output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("sriov: "), "{said}");
    last.to_owned()
}

#[test]
fn from_nothing_to_a_virtual_machine() {
    let tree = Tree::new("nic");
    let list = good(&tree, &["list"]);
    assert!(list.contains("0000:01:00.0") && list.contains("network") && list.contains("0/7"), "{list}");
    good(&tree, &["create", "eth0", "2", "--unbound"]);
    good(&tree, &["set", "eth0", "0", "mac=52:54:00:00:00:01", "vlan=7", "qos=2", "trust=on"]);
    assert!(bad(&tree, &["export", "eth0/0", "qemu"]).contains("bound to nothing"));
    good(&tree, &["bind", "eth0/0", "vfio-pci"]);
    good(&tree, &["bind", "01:10.2", "default"]);
    let show = good(&tree, &["show", "01:00.0"]);
    let row = show.lines().find(|line| line.contains("0000:01:10.0")).unwrap();
    for word in ["vfio-pci!", "52:54:00:00:00:01", "7 qos 2 802.1Q", "on"] {
        assert!(row.contains(word), "{word}: {row}");
    }
    let tree_text = good(&tree, &["list", "--tree"]);
    assert!(tree_text.contains("├─ 0 0000:01:10.0 vfio-pci 52:54:00:00:00:01"), "{tree_text}");
    assert!(tree_text.contains("└─ 1 0000:01:10.2 igbvf eth0v1"), "{tree_text}");
    let json: serde_json::Value = serde_json::from_str(&good(&tree, &["list", "--json"])).unwrap();
    assert_eq!(json["pfs"][0]["vfs"][0]["settings"]["vlan"], 7);
    assert_eq!(json["pfs"][0]["vfs"][0]["driver"], "vfio-pci");

    assert_eq!(good(&tree, &["export", "eth0/0", "qemu"]), "-device vfio-pci,host=0000:01:10.0");
    let libvirt = good(&tree, &["export", "eth0/0", "libvirt"]);
    assert!(
        libvirt.contains("<address domain='0x0000' bus='0x01' slot='0x10' function='0x0'/>"),
        "{libvirt}"
    );
    let ch = good(&tree, &["export", "eth0/0", "cloud-hypervisor"]);
    assert_eq!(ch, "--device path=/sys/bus/pci/devices/0000:01:10.0/");
    assert!(good(&tree, &["export", "eth0/1", "vhost-net"]).contains("eth0v1"));

    // Saved, removed, planned, applied: all is back.
    let file = tree.dir.path().join("saved.toml");
    std::fs::write(&file, good(&tree, &["save"])).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(good(&tree, &["plan", file]), "nothing to do");
    let before = tree.state();
    good(&tree, &["remove", "eth0"]);
    assert!(tree.state().pfs[0].vfs.is_empty());
    let plan = good(&tree, &["plan", file]);
    assert!(plan.contains("0000:01:00.0: make 2 VFs"), "{plan}");
    assert!(tree.state().pfs[0].vfs.is_empty(), "a plan changes nothing");
    good(&tree, &["apply", file]);
    assert_eq!(tree.state(), before);
    let again = sriov(&tree, &["apply", file]);
    assert_eq!(String::from_utf8_lossy(&again.stderr), "sriov: nothing to do\n");
}

#[test]
fn risks_are_refused_unless_forced() {
    let tree = Tree::new("dual-port");
    let said = bad(&tree, &["create", "enp5s0f0", "2"]);
    assert!(said.contains("carries the default route (enp5s0f0)") && said.contains("--force"), "{said}");
    assert!(tree.state().pfs[0].vfs.is_empty());
    good(&tree, &["create", "enp5s0f0", "2", "--force"]);
    let addresses: Vec<_> =
        tree.state().pfs[0].vfs.iter().map(|vf| vf.function.address.to_string()).collect();
    assert_eq!(addresses, ["0000:05:10.0", "0000:05:10.2"]);
}

#[test]
fn mistakes_are_one_line() {
    let tree = Tree::new("nic");
    assert!(bad(&tree, &["show", "eth9"]).contains("'eth9' is neither"));
    assert!(bad(&tree, &["create", "eth0", "8"]).contains("it has 7 at most"));
    assert!(bad(&tree, &["set", "eth0", "0", "mac=1"]).contains("no Ethernet address"));
    assert!(bad(&tree, &["set", "eth0", "0", "vlan=1"]).contains("vf 0 is not among the 0 VFs"));
    assert!(bad(&tree, &["eswitch", "eth0", "switchdev"]).contains("no embedded switch"));
    assert!(bad(&tree, &["port", "eth0"]).contains("has no ports"));
    assert!(bad(&tree, &["apply", "/nonexistent.toml"]).contains("cannot read /nonexistent.toml"));
    let file = tree.dir.path().join("wrong.toml");
    for (text, says) in [
        ("[[pf]]\naddress = \"01:00\"\nvfs = 1", "wrong.toml:2: "),
        ("[[pf]]\naddress = \"01:00.0\"", "missing field `vfs`"),
        ("[[pf]]\naddress = \"01:00.0\"\nvfs = 1\nvlan = 3", "wrong.toml:4: unknown field `vlan`"),
        (
            "[[pf]]\naddress = \"01:00.0\"\nvfs = 1\n[[pf.vf]]\nindex = 0\nmack = \"x\"",
            "unknown field `mack`",
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        let said = bad(&tree, &["plan", file.to_str().unwrap()]);
        assert!(said.contains(says), "{said}");
    }
    assert!(bad(&tree, &["create", "eth0", "x"]).contains("invalid value 'x'"));
}

#[test]
fn mediated_devices() {
    let tree = Tree::new("gpu");
    let uuid = "4b20d080-1b54-4048-85b3-a6a62d165c01";
    assert!(good(&tree, &["mdev", "list"]).contains("0000:03:00.0 i915-GVTg_V5_4 2 more (GVTg_V5_4)"));
    good(&tree, &["mdev", "create", "03:00.0", "i915-GVTg_V5_4", uuid]);
    let list = good(&tree, &["mdev", "list"]);
    assert!(list.contains("1 more") && list.contains(uuid), "{list}");
    good(&tree, &["mdev", "remove", uuid]);
    assert!(good(&tree, &["mdev", "list"]).contains("2 more"));
    assert!(bad(&tree, &["mdev", "remove", uuid]).contains("there is no mediated device"));
}

#[test]
fn a_recorded_host_is_the_same_host() {
    let tree = Tree::new("shared-group");
    let copy = tree.dir.path().join("copy");
    good(&tree, &["record", copy.to_str().unwrap()]);
    let read = |dir: &std::path::Path| {
        sriov_tools::state::read(&sriov_tools::host::dir::DirHost::new(dir)).unwrap().0
    };
    assert_eq!(read(&copy), tree.state());
}

#[test]
fn this_machine_can_be_listed() {
    let output = Command::new(env!("CARGO_BIN_EXE_sriov")).args(["list", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
}
