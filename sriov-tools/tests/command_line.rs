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
    let row = list.lines().find(|line| line.contains("0000:01:00.0")).unwrap();
    let words = ["0000:01:00.0", "network", "8086:10c9", "igb", "0", "1", "0/7", "eth0", "up", "1000", "-"];
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), words, "{list}");
    good(&tree, &["create", "eth0", "2", "--unbound"]);
    good(&tree, &["set", "eth0", "0", "mac=52:54:00:00:00:01", "vlan=7", "qos=2", "trust=on"]);
    assert!(bad(&tree, &["export", "eth0/0", "qemu"]).contains("bound to nothing"));
    good(&tree, &["bind", "eth0/0", "vfio-pci"]);
    good(&tree, &["bind", "01:10.2", "default"]);
    let show = good(&tree, &["show", "01:00.0"]);
    for line in [
        "NUMA node    0",
        "IOMMU group  1: 0000:01:00.0 (igb)",
        "interface    eth0 52:54:00:00:01:00 up 1000",
    ] {
        assert!(show.lines().any(|l| l.trim() == line), "{line}: {show}");
    }
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
    let file = tree.dir.path().join("host.toml");
    std::fs::write(&file, "[[pf]]\naddress = \"05:00.0\"\nvfs = 2").unwrap();
    assert_eq!(
        good(&tree, &["plan", file.to_str().unwrap()]).lines().collect::<Vec<_>>(),
        [
            "0000:05:00.0: make 2 VFs",
            "! 0000:05:00.0 carries the default route (enp5s0f0): drivers may reset it",
            "! apply refuses this without --force",
        ]
    );
    good(&tree, &["create", "enp5s0f0", "2", "--force"]);
    let addresses: Vec<_> =
        tree.state().pfs[0].vfs.iter().map(|vf| vf.function.address.to_string()).collect();
    assert_eq!(addresses, ["0000:05:10.0", "0000:05:10.2"]);
}

#[test]
fn what_not_every_card_has() {
    let tree = Tree::new("switchdev");
    let nic = "enp129s0";
    good(&tree, &["create", nic, "2"]);
    let all = ["vlan=5", "proto=802.1ad", "link-state=enable", "min-rate=10", "max-rate=100"];
    good(&tree, &[&["set", nic, "1"], &all[..]].concat());
    let show = good(&tree, &["show", nic]);
    let row = show.lines().find(|line| line.contains("0000:81:00.3")).unwrap();
    for word in ["5 qos 0 802.1ad", "enable", "10-100"] {
        assert!(row.contains(word), "{word}: {row}");
    }
    good(&tree, &["set", nic, "0", "msix=20"]);
    good(&tree, &["eswitch", nic, "switchdev"]);
    let state = tree.state();
    assert_eq!(state.pfs[0].vfs[0].function.msix, Some(20));
    assert_eq!(state.pfs[0].eswitch, Some(sriov_tools::host::EswitchMode::Switchdev));

    let ports = |tree: &Tree| serde_json::from_str::<serde_json::Value>(&good(tree, &["port", nic])).unwrap();
    let port = ports(&tree);
    assert_eq!((&port[0]["index"], &port[0]["flavour"]), (&65535.into(), &"physical".into()), "{port}");
    good(&tree, &["port", nic, "65535", "mac=52:54:00:00:00:07", "state=active"]);
    let port = ports(&tree);
    assert_eq!((&port[0]["mac"], &port[0]["active"]), (&"52:54:00:00:00:07".into(), &true.into()), "{port}");
    let said = bad(&tree, &["port", nic, "7", "state=inactive"]);
    assert!(said.contains("devlink (pci/0000:81:00.0/7): No such device; `sriov port"), "{said}");
    assert!(good(&Tree::new("shared-group"), &["list"]).contains(" 2+4 "), "a group with four others in it");
}

/// Whoever is not root is told so, and not that somebody else is at work.
#[test]
fn who_may_not_change_anything_is_told_so() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    // Where anybody may run it.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("sriov");
    // By another process: what this one has open for writing, a child that another test starts meanwhile has as well, and
    // nobody may run it for so long.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_sriov")).arg(&program).status().unwrap();
    assert!(copied.success());
    let mut command = Command::new(&program);
    if nix::unistd::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let output = command.args(["remove", "no-such-interface"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert_eq!(said, "sriov: /run/sriov.lock: Permission denied (os error 13); run it as root\n");
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
