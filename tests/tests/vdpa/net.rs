//! A network card of the guest's own kernel, joined to a tap in another network namespace.

use anyhow::{Context, Result, ensure};
use kickless_tests::qemu::Vm;
use kickless_tests::scene::Scene;
use serde_json::Value;

use crate::datagrams;
use crate::guest::{LIMIT, compare_with_iproute2, guest, prepare, said, serve, signal};

pub fn network_card(scene: &Scene) -> Result<Option<String>> {
    let mut vm = guest(scene)?.boot(scene)?;
    prepare(&mut vm)?;
    for more in ["", " --packed off"] {
        let args = format!(
            "serve net --name card --tap t0 --mac 52:54:00:12:34:56 --mtu 1400 --driver virtio{more}"
        );
        let interface = serve(&mut vm, "card", &args)?;
        vm.check(&format!(
            "(ip netns list | grep -q far || ip netns add far) && ip link set t0 netns far && \
             ip -n far addr add 10.0.0.2/24 dev t0 && ip -n far link set t0 up && ip -n far link set lo up && \
             ip addr add 10.0.0.1/24 dev {interface} && ip link set {interface} up"
        ))?;
        let about = vm.check(&format!("ip link show {interface}"))?;
        ensure!(about.contains("mtu 1400") && about.contains("52:54:00:12:34:56"), "{about}");
        compare_with_iproute2(&mut vm, "card")?;
        let config: Value = serde_json::from_str(&vm.check("vdpactl config --json")?)?;
        ensure!(config["config"]["card"]["mac"] == "52:54:00:12:34:56", "{config}");
        vm.check("ping -c 3 -W 10 10.0.0.2").with_context(|| said(&mut vm, "card"))?;
        vm.check("ping -c 2 -W 10 -s 6000 10.0.0.2")?;
        iperf(&mut vm, "", "far", "10.0.0.2").with_context(|| said(&mut vm, "card"))?;
        signal(&mut vm, "card", "TERM")?;
        vm.check("! test -e /dev/vduse/card && ! ip link show eth0 2>/dev/null")?;
    }
    switched(&mut vm)?;
    driven(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

/// Has iperf3 send some megabytes from the namespace `from` (the first one without a name) to `to`.
fn iperf(vm: &mut Vm, from: &str, to: &str, address: &str) -> Result<()> {
    vm.check(&format!("ip netns exec {to} iperf3 -s -D -1"))?;
    vm.check_soon(&format!("ip netns exec {to} grep -q ':1451 .* 0A ' /proc/net/tcp /proc/net/tcp6"), LIMIT)?;
    let within = if from.is_empty() { String::new() } else { format!("ip netns exec {from}") };
    let said = vm.run_for(&format!("{within} iperf3 -c {address} -n 8M -J"), 2 * LIMIT)?;
    let result: Value = serde_json::from_str(&said.stdout).with_context(|| said.stdout.clone())?;
    let bytes = result["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0);
    ensure!(bytes > 4e6, "{bytes} of 8 MiB have come: {result}");
    Ok(())
}

/// Two cards of the guest's kernel and one for a virtual machine on the switch, with a tap as its uplink.
fn switched(vm: &mut Vm) -> Result<()> {
    let cards =
        "--name a --mac 52:54:00:00:00:0a --port name=b,mac=52:54:00:00:00:0b --port socket-path=/tmp/vm";
    let args = format!("serve net {cards} --uplink tap=up0 --driver virtio");
    serve(vm, "switch", &args)?;
    vm.check_soon("test $(wc -l </tmp/switch.node) = 2", LIMIT).with_context(|| said(vm, "switch"))?;
    vm.check("test -S /tmp/vm && ip addr add 10.1.0.9/24 dev up0 && ip link set up0 up")?;
    for (line, name) in [(1, "a"), (2, "b")] {
        vm.check(&format!(
            "n=$(sed -n {line}p /tmp/switch.node) && ip link show $n | grep -q 52:54:00:00:00:0{name} && ip netns add {name} && \
             ip link set $n netns {name} && ip -n {name} addr add 10.1.0.{line}/24 dev $n && ip -n {name} link set $n up"
        ))?;
    }
    compare_with_iproute2(vm, "b")?;
    for (from, to) in [("a", 2), ("b", 1), ("a", 9), ("b", 9)] {
        let ping = vm.check(&format!("ip netns exec {from} ping -c 2 -W 10 10.1.0.{to}"));
        ping.with_context(|| said(vm, "switch"))?;
    }
    iperf(vm, "a", "b", "10.1.0.2").with_context(|| said(vm, "switch"))?;
    datagrams_in_one_piece(vm)?;
    // What has crossed is counted at both ports.
    vm.check("kill -USR1 $(cat /tmp/switch.pid)")?;
    vm.check_soon("grep -q '^uplink up0 up' /tmp/switch.node", LIMIT)?;
    let report = vm.check("cat /tmp/switch.node")?;
    ensure!(["port a", "port b", "port /tmp/vm"].iter().all(|port| report.contains(port)), "{report}");
    signal(vm, "switch", "TERM")?;
    vm.check("! test -e /dev/vduse/a && ! test -e /dev/vduse/b && ! test -e /tmp/vm && ! ip link show up0 2>/dev/null")?;
    vm.check("ip netns del a && ip netns del b")?;
    Ok(())
}

/// UDP that is to be segmented (USO), which drivers of the guest's kernel have and QEMU keeps from its own: pieces cross
/// whole, or cut where the sender's card is not to do it.
fn datagrams_in_one_piece(vm: &mut Vm) -> Result<()> {
    let device = |line: u8| format!("$(sed -n {line}p /tmp/switch.node)");
    let count = format!("ip netns exec b cat /sys/class/net/{}/statistics/rx_packets", device(2));
    for (address, off) in [("10.1.0.2", false), ("[fd01::2]", false), ("10.1.0.2", true), ("[fd01::2]", true)]
    {
        // Linux leaves it off until somebody wants it.
        let on = if off { "off" } else { "on" };
        vm.check(&format!("ip netns exec a ethtool -K {} tx-udp-segmentation {on}", device(1)))?;
        for (namespace, line) in [("a", 1), ("b", 2)] {
            let device = device(line);
            vm.check(&format!("ip -n {namespace} -6 addr replace fd01::{line}/64 dev {device} nodad"))?;
        }
        let before: usize = vm.check(&count)?.trim().parse()?;
        vm.start("receive", "ip netns exec b client datagrams receive")?;
        vm.check_soon("ip netns exec b grep -q ':1B5A ' /proc/net/udp6", LIMIT)?;
        let sent =
            vm.check(&format!("ip netns exec a client datagrams send '{address}:{}'", datagrams::PORT))?;
        let received = vm.join("receive", LIMIT)?;
        ensure!(received.code == 0, "{received:?}");
        let again: usize = sent.trim().parse()?;
        let packets = vm.check(&count)?.trim().parse::<usize>()? - before;
        let cut = datagrams::PIECES * datagrams::SEGMENTS;
        // Some of them are the neighbourhood's.
        let is_whole = packets < cut / 2 + again * datagrams::SEGMENTS;
        ensure!(is_whole != off, "{address}: {packets} packets; segmentation by the sender's kernel: {off}");
    }
    Ok(())
}

/// Cards for drivers in user space: our load generator from one to the other, through the switch.
fn driven(vm: &mut Vm) -> Result<()> {
    serve(vm, "pair", "serve net --name x --port name=y --driver vhost")?;
    vm.check_soon("test $(wc -l </tmp/pair.node) = 2", LIMIT).with_context(|| said(vm, "pair"))?;
    let nodes = vm.check("cat /tmp/pair.node")?;
    let nodes: Vec<_> = nodes.lines().map(|node| format!("--socket-path {node}")).collect();
    for more in ["", "--packed"] {
        let run = format!(
            "vbench net {} --direction both --iodepth 16 --runtime 1 --completion interrupt",
            nodes.join(" ")
        );
        let done = vm.run_for(&format!("{run} {more} --json=-"), LIMIT)?;
        ensure!(done.code == 0, "{more}: {}\n{}", done.stdout, said(vm, "pair"));
        let result: Value = serde_json::from_str(&done.stdout)?;
        let received = result["result"]["received"].as_u64().unwrap_or(0);
        ensure!(received > 100, "{result}");
    }
    let refused = vm.run(&format!("vbench net {} --direction echo --queue-pairs 2", nodes[0]))?;
    ensure!(refused.code == 1 && refused.stdout.contains("1 queues"), "{}", refused.stdout);
    let refused = vm.run(&format!("vbench run {}", nodes[0]))?;
    ensure!(refused.code == 1 && refused.stdout.contains("vbench net drives those"), "{}", refused.stdout);
    signal(vm, "pair", "TERM")
}
