//! `sriov` on a real kernel: Linux 6.12 in QEMU 10, with an emulated network card and an NVMe disk that have VFs, behind
//! an IOMMU.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::accel::Accel;
use kickless_tests::process;
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::release::Release;
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use serde_json::Value;

fn main() -> std::process::ExitCode {
    let test = Test {
        name: "virtual_functions_of_a_card_and_a_disk".into(),
        needs: Box::new(missing_needs),
        run: Box::new(|scene| life(scene).map(|()| None)),
    };
    runner::run(vec![test], "KICKLESS_REQUIRE_QEMU")
}

const PROGRAMS: [&str; 3] = ["sriov", "hold-vf", "vhost-net"];

fn missing_needs() -> Option<String> {
    let missing = PROGRAMS.iter().find(|name| process::built(name).is_none());
    let missing = missing.map(|name| format!("no {name}: run cargo build, or set KICKLESS_BIN_DIR"));
    missing.or_else(|| Release::Backports.missing_needs())
}

/// What the unit does at boot, here by the guest's init: the file is on a disk of its own.
const START: &str = "#!/bin/sh
for m in igb igbvf nvme vfio_pci vfio_iommu_type1; do modprobe $m; done
until [ -d /sys/bus/pci/drivers/igb/0000:01:00.0/net ] && [ -b /dev/vda ]; do sleep 0.1; done
tr -d '\\0' </dev/vda >/run/sriov.toml
if [ -s /run/sriov.toml ]; then sriov apply --timeout 60 /run/sriov.toml >/run/apply.log 2>&1; echo $? >/run/apply.code; fi
";

/// A port for each function, and what is behind it.
fn machine(scene: &Scene) -> Result<VmBuilder> {
    let files = Overlay::new(scene, "overlay")?;
    for name in PROGRAMS {
        files.program(&process::built(name).context(name)?)?;
    }
    files.text("/etc/start", START)?;
    let disk = scene.path("file.img");
    std::fs::write(&disk, vec![0; 65536])?;
    let disk = format!("driver=file,node-name=file,filename={}", disk.display());
    // The default of KVM's interrupt controller does not go with remapping.
    let vm = Vm::builder().release(Release::Backports).accel(Accel::Tcg).iommu().cpus(2).memory_mib(768);
    Ok(vm
        .kernel_arg("intel_iommu=on")
        .boot_limit(Duration::from_secs(240))
        .overlay(files)
        .arg("device", "pcie-root-port,id=port1,chassis=1,slot=1,bus=pcie.0,addr=10.0")
        .arg("netdev", "hubport,id=cable,hubid=0")
        .arg("device", "igb,bus=port1,netdev=cable,mac=52:54:00:00:01:00")
        .arg("device", "pcie-root-port,id=port2,chassis=2,slot=2,bus=pcie.0,addr=11.0")
        .arg("device", "nvme-subsys,id=subsystem")
        .arg(
            "device",
            "nvme,id=disk,bus=port2,subsys=subsystem,serial=kickless,sriov_max_vfs=4,sriov_vq_flexible=8,\
             sriov_vi_flexible=4,max_ioqpairs=10,msix_qsize=7",
        )
        .arg("blockdev", &disk)
        .arg("device", "virtio-blk-pci,drive=file"))
}

/// The life of VFs: made, set, bound, refused, held, lost, saved, restored, removed.
fn life(scene: &Scene) -> Result<()> {
    let mut vm = machine(scene)?.boot(scene)?;
    recorded(&mut vm)?;
    made_and_set(&mut vm)?;
    agrees_with_others(&mut vm)?;
    refused(&mut vm)?;
    bound(&mut vm)?;
    held(&mut vm)?;
    uplink(&mut vm)?;
    lost(&mut vm)?;
    let saved = restored(&mut vm)?;
    removed(&mut vm, &saved)?;
    vm.quit()
}

const CARD: &str = "0000:01:00.0";
const DISK: &str = "0000:02:00.0";

fn state(vm: &mut Vm) -> Result<Value> {
    Ok(serde_json::from_str(&vm.check("sriov list --json 2>/dev/null")?)?)
}

fn pf<'a>(state: &'a Value, address: &str) -> Result<&'a Value> {
    let pfs = state["pfs"].as_array().context("pfs")?;
    pfs.iter().find(|pf| pf["address"] == address).with_context(|| format!("no {address}: {state}"))
}

/// A command that is to fail with these words, in one line behind what it has done.
fn fails(vm: &mut Vm, command: &str, says: &str) -> Result<()> {
    let output = vm.run(command)?;
    ensure!(output.code != 0, "`{command}` has not failed: {}", output.stdout);
    let last = output.stdout.trim_end().lines().last().unwrap_or_default();
    ensure!(last.starts_with("sriov: ") && last.contains(says), "`{command}` says: {}", output.stdout);
    Ok(())
}

/// A directory as a text of `sriov-tools/tests/trees`.
const AS_TEXT: &str = "cd /tmp/recorded && find . -type d | sort | while read -r dir; do echo \"[${dir#./}]\"; \
     for file in \"$dir\"/*; do name=${file##*/}; \
     if [ -L \"$file\" ]; then echo \"$name -> $(readlink \"$file\")\"; \
     elif [ -f \"$file\" ] && [ \"$name\" != config ]; then echo \"$name = $(cat \"$file\")\"; fi; done; done";

/// What is recorded is what is there. `KICKLESS_RECORD=FILE` keeps it.
fn recorded(vm: &mut Vm) -> Result<()> {
    vm.check("ip link set eth0 up")?;
    // The card finds its link in its own time, and its speed with it.
    vm.check_soon("grep -q up /sys/class/net/eth0/operstate", Duration::from_secs(60))?;
    vm.check("sriov record /tmp/recorded")?;
    let list = |vm: &mut Vm, options: &str| vm.check(&format!("sriov {options} list --json 2>/dev/null"));
    let (there, kept) = (list(vm, "")?, list(vm, "--sysfs /tmp/recorded")?);
    ensure!(there == kept, "there is:\n{there}\nrecorded is:\n{kept}");
    if let Some(path) = std::env::var_os("KICKLESS_RECORD") {
        std::fs::write(path, vm.check(AS_TEXT)?)?;
    }
    Ok(())
}

fn made_and_set(vm: &mut Vm) -> Result<()> {
    let state = state(vm)?;
    ensure!(pf(&state, CARD)?["total_vfs"] == 7 && pf(&state, DISK)?["total_vfs"] == 4, "{state}");
    ensure!(state["iommu"] == true, "no IOMMU: {state}");
    vm.check("sriov create eth0 2")?;
    vm.check(&format!("sriov create {DISK} 2 --unbound"))?;
    vm.check("sriov set eth0 0 mac=52:54:00:00:00:01 vlan=7 qos=3 spoofchk=off trust=on")?;
    // All are made anew, and those that were there are as they were: what others print below.
    vm.check("sriov create eth0 3 --unbound")?;
    vm.check_soon("grep -q up /sys/class/net/eth0/operstate", Duration::from_secs(30))?;
    vm.check("sriov set eth0 1 max-rate=100")?;
    for (command, says) in [("sriov list", [CARD, DISK]), ("sriov list --tree", [CARD, "52:54:00:00:00:01"])]
    {
        let said = vm.check(command)?;
        ensure!(says.iter().all(|words| said.contains(words)), "`{command}` says:\n{said}");
    }
    let said = vm.check(&format!("sriov show {DISK}"))?;
    ensure!(said.contains("2 of 4") && said.contains(&format!("{DISK} (nvme)")), "{said}");
    Ok(())
}

/// What iproute2 and pciutils print is what we print.
fn agrees_with_others(vm: &mut Vm) -> Result<()> {
    let state = state(vm)?;
    let card = pf(&state, CARD)?;
    let ip = vm.check("ip -d link show dev eth0")?;
    let lines: Vec<&str> = ip.lines().map(str::trim).filter(|line| line.starts_with("vf ")).collect();
    let vfs = card["vfs"].as_array().context("vfs")?;
    ensure!(vfs.len() == 3 && lines.len() == 3, "{ip}\n{card}");
    for (vf, line) in vfs.iter().zip(&lines) {
        let s = &vf["settings"];
        let on_off = |key: &str| if s[key] == true { "on" } else { "off" };
        let mut words = vec![
            format!("link/ether {}", s["mac"].as_str().unwrap_or_default()),
            format!("spoof checking {}", on_off("spoofchk")),
            format!("trust {}", on_off("trust")),
            format!("link-state {}", s["link-state"].as_str().unwrap_or_default()),
        ];
        if s["vlan"] != 0 {
            words.push(format!("vlan {}, qos {}", s["vlan"], s["qos"]));
        }
        if s["max-rate"] != 0 {
            words.push(format!("max_tx_rate {}Mbps", s["max-rate"]));
        }
        for word in words {
            ensure!(line.contains(&word), "ip does not say `{word}`: {line}");
        }
    }
    ensure!(lines[0].contains("52:54:00:00:00:01") && lines[0].contains("vlan 7, qos 3"), "{ip}");
    ensure!(lines[1].contains("max_tx_rate 100Mbps"), "{ip}");

    for address in [CARD, DISK] {
        let pf = pf(&state, address)?;
        let lspci = vm.check(&format!("lspci -vv -n -s {address}"))?;
        // Of how many there can be, the card's driver allows one less.
        let counts = format!("Number of VFs: {},", pf["vfs"].as_array().map_or(0, Vec::len));
        ensure!(lspci.contains(&counts), "lspci does not say `{counts}`: {lspci}");
        for function in std::iter::once(pf).chain(pf["vfs"].as_array().context("vfs")?) {
            let address = function["address"].as_str().context("address")?;
            let lspci = vm.check(&format!("lspci -vv -n -k -s {address}"))?;
            let vectors = format!("Count={}", function["msix"]);
            ensure!(lspci.contains(&vectors), "{address}: lspci does not say `{vectors}`: {lspci}");
            let group = format!("IOMMU group: {}", function["iommu_group"]["number"]);
            ensure!(lspci.contains(&group), "{address}: lspci does not say `{group}`: {lspci}");
            let driver = function["driver"].as_str().map(|name| format!("Kernel driver in use: {name}"));
            ensure!(driver.is_none_or(|says| lspci.contains(&says)), "{address}: {lspci}");
        }
    }
    Ok(())
}

/// What this card does not take, and what nobody could give: each is one line, and nothing has changed.
fn refused(vm: &mut Vm) -> Result<()> {
    let before = state(vm)?;
    for (command, says) in [
        ("sriov set eth0 0 link-state=enable", "Operation not supported"),
        ("sriov set eth0 0 vlan=7 proto=802.1ad", "Protocol not supported"),
        ("sriov set eth0 1 min-rate=10", "Invalid argument; the driver takes no such rate"),
        ("sriov set eth0 1 max-rate=100000", "Invalid argument; the driver takes no such rate"),
        ("sriov eswitch eth0 switchdev", "has no embedded switch"),
        ("sriov port eth0", "has no ports"),
        ("sriov set eth0 0 msix=4", "cannot deal out MSI-X vectors"),
        ("sriov set eth0 1 mac=52:54:00:00:00:01", "would both have the address"),
        ("sriov create eth0 8", "it has 7 at most"),
        ("sriov set eth0 2 mac=52:54:00:00:00:09 vlan=9 min-rate=5", "all is as it was before"),
        ("sriov bind eth0/0 nvme", "is bound to nothing"),
    ] {
        fails(vm, command, says)?;
        let now = state(vm)?;
        ensure!(now == before, "`{command}` has changed something: {before}\n{now}");
    }
    // What its interface carries would be disturbed.
    vm.check("ip route add default dev eth0")?;
    fails(vm, "sriov create eth0 4", "0000:01:00.0 carries the default route (eth0)")?;
    vm.check("ip route del default dev eth0")?;
    Ok(())
}

fn bound(vm: &mut Vm) -> Result<()> {
    fails(vm, "sriov export eth0/0 qemu", "bind eth0/0 vfio-pci".replace("eth0/0", "0000:01:10.0").as_str())?;
    vm.check("sriov bind eth0/0 vfio-pci && sriov bind 0000:02:00.1 vfio-pci")?;
    let driver = "basename $(readlink /sys/bus/pci/devices/0000:01:10.4/driver)";
    for (wanted, bound) in [("default", "igbvf"), ("none", ""), ("igbvf", "igbvf")] {
        vm.check(&format!("sriov bind eth0/2 {wanted} && test \"$({driver} 2>/dev/null)\" = '{bound}'"))?;
    }
    let state = state(vm)?;
    for (pf_address, driver) in [(CARD, "vfio-pci"), (DISK, "vfio-pci")] {
        let vf = &pf(&state, pf_address)?["vfs"][0];
        ensure!(vf["driver"] == driver && vf["driver_override"] == driver, "{vf}");
        let group = vf["iommu_group"]["number"].clone();
        vm.check(&format!("test -c /dev/vfio/{group}"))?;
    }
    let qemu = vm.check("sriov export eth0/0 qemu")?;
    ensure!(qemu == "-device vfio-pci,host=0000:01:10.0", "{qemu}");
    let libvirt = vm.check("sriov export eth0/0 libvirt")?;
    ensure!(libvirt.contains("bus='0x01' slot='0x10' function='0x0'"), "{libvirt}");
    let hypervisor = vm.check("sriov export eth0/0 cloud-hypervisor")?;
    ensure!(hypervisor == "--device path=/sys/bus/pci/devices/0000:01:10.0/", "{hypervisor}");
    Ok(())
}

/// A VF that somebody has open is not taken away unless forced, and then not for ever.
fn held(vm: &mut Vm) -> Result<()> {
    let group = pf(&state(vm)?, CARD)?["vfs"][0]["iommu_group"]["number"].clone();
    vm.start("hold", &format!("hold-vf {group} 0000:01:10.0"))?;
    vm.check_soon("test -s /tmp/hold.out", Duration::from_secs(20))?;
    let said = vm.check("cat /tmp/hold.out")?;
    ensure!(said == "held", "hold-vf says: {said}");
    fails(vm, "sriov remove eth0", "held through VFIO by process")?;
    let show = vm.check("sriov show eth0")?;
    ensure!(show.contains("(hold-vf)"), "{show}");
    let output = vm.run_for("sriov remove eth0 --force --timeout 5 2>&1", Duration::from_secs(60))?;
    let said = &output.stdout;
    ensure!(output.code != 0 && said.contains("no answer within 5 s: process"), "{said}");
    ensure!(said.contains("waiting for") && said.contains("(hold-vf) holds 0000:01:10.0"), "{said}");
    // It goes on in the kernel, and nobody else may come between; what there is can still be seen.
    fails(vm, "sriov create eth0 1", "another sriov is changing something")?;
    for command in ["sriov show eth0", "sriov list"] {
        let output = vm.run_for(command, Duration::from_secs(20))?;
        ensure!(output.code == 0 && output.stdout.contains(CARD), "`{command}` says: {}", output.stdout);
    }
    vm.check("killall hold-vf")?;
    vm.check_soon("test ! -e /sys/bus/pci/devices/0000:01:10.0", Duration::from_secs(30))?;
    // All of it again, by a file, and twice.
    let file = format!(
        "[[pf]]\\naddress = \"{CARD}\"\\nvfs = 4\\nup = true\\n\
         [[pf.vf]]\\nindex = 0\\ndriver = \"vfio-pci\"\\nmac = \"52:54:00:00:00:01\"\\nvlan = 7\\nqos = 3\\ntrust = true\\nspoofchk = false\\n\
         [[pf.vf]]\\nindex = 1\\ndriver = \"vfio-pci\"\\nmax-rate = 100\\n\
         [[pf.vf]]\\nindex = 2\\ndriver = \"igbvf\"\\nmac = \"52:54:00:00:00:03\"\\n"
    );
    vm.check(&format!("printf '{file}' >/tmp/host.toml"))?;
    let plan = vm.check("sriov plan /tmp/host.toml")?;
    ensure!(plan.contains("make 4 VFs"), "{plan}");
    vm.check_soon("sriov apply /tmp/host.toml", Duration::from_secs(60))?;
    let again = vm.check("sriov apply /tmp/host.toml 2>&1")?;
    ensure!(again == "sriov: nothing to do", "twice is not once: {again}");
    Ok(())
}

/// The third VF, an uplink of the switch, gets what its card receives.
fn uplink(vm: &mut Vm) -> Result<()> {
    let interface = vm.check("ls /sys/bus/pci/devices/0000:01:10.4/net")?;
    let export = vm.check(&format!("sriov export {interface} vhost-net"))?;
    ensure!(export.contains(&format!("af-xdp = \"{interface}\"")), "{export}");
    vm.check(&format!("ip link set {interface} up; ip addr add 10.9.0.1/24 dev eth0"))?;
    let file = "(echo 'poll = \"event\"'; sed 's/^af-xdp/af-packet/; /^queue/d' /tmp/export; echo '[[port]]'; echo 'socket-path = \"/tmp/a.sock\"') >/tmp/net.toml";
    vm.check(&format!("sriov export {interface} vhost-net >/tmp/export; {file}"))?;
    vm.start("switch", "vhost-net --config /tmp/net.toml")?;
    let ready = vm.check_soon("test -S /tmp/a.sock", Duration::from_secs(30));
    let said = vm.check("cat /tmp/switch.out /tmp/net.toml")?;
    ready.with_context(|| format!("vhost-net says: {said}"))?;
    // What the port of the card broadcasts, its VFs receive.
    let counted = format!(
        "ping -c 1 -W 1 10.9.0.2; killall -USR1 vhost-net; sleep 0.5; \
         grep -A 1 '^uplink {interface} up' /tmp/switch.out | grep -q 'rx_packets [1-9]'"
    );
    let counted = vm.check_soon(&counted, Duration::from_secs(30));
    let said = vm.check("cat /tmp/switch.out")?;
    counted.with_context(|| format!("vhost-net says: {said}"))?;
    vm.check(&format!("killall vhost-net; ip link set {interface} down; ip addr flush dev eth0"))?;
    vm.join("switch", Duration::from_secs(30))?;
    Ok(())
}

/// An interface in a namespace that nobody looks after is found, and brought back.
fn lost(vm: &mut Vm) -> Result<()> {
    let interface = vm.check("ls /sys/bus/pci/devices/0000:01:10.4/net")?;
    vm.check(&format!("mkdir -p /run/netns; ip netns add lost && ip link set {interface} netns lost"))?;
    let show = vm.check("sriov show eth0")?;
    ensure!(show.contains("is in network namespace /run/netns/lost"), "{show}");
    fails(vm, "sriov remove eth0", "is in network namespace /run/netns/lost")?;
    vm.check("sriov reclaim eth0/2")?;
    vm.check(&format!("ip link show dev {interface} && ip netns del lost"))?;
    Ok(())
}

/// What was saved is there again after the reboot.
fn restored(vm: &mut Vm) -> Result<String> {
    let saved = vm.check("sriov save")?;
    vm.check("sriov save >/tmp/saved.toml; dd if=/tmp/saved.toml of=/dev/vda conv=sync,fsync 2>/dev/null")?;
    let before = state(vm)?;
    vm.reboot()?;
    let code = vm.check("cat /run/apply.code; cat /run/apply.log")?;
    ensure!(code.starts_with('0'), "{code}");
    let after = vm.check("sriov save")?;
    ensure!(after == saved, "before:\n{saved}\nafter:\n{after}");
    let plan = vm.check("sriov plan /run/sriov.toml")?;
    ensure!(plan == "nothing to do", "{plan}");
    let (before, after) = (before, state(vm)?);
    let settings = |state: &Value| -> Result<Vec<Value>> {
        Ok(pf(state, CARD)?["vfs"]
            .as_array()
            .context("vfs")?
            .iter()
            .map(|vf| vf["settings"].clone())
            .collect())
    };
    ensure!(settings(&before)? == settings(&after)?, "{before}\n{after}");
    Ok(saved)
}

fn removed(vm: &mut Vm, saved: &str) -> Result<()> {
    ensure!(saved.contains("vfs = 4") && saved.contains("vfs = 2"), "{saved}");
    vm.check(&format!("sriov remove eth0 && sriov remove {DISK}"))?;
    let state = state(vm)?;
    for address in [CARD, DISK] {
        ensure!(pf(&state, address)?["vfs"] == Value::Array(Vec::new()), "{state}");
    }
    Ok(())
}
