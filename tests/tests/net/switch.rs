//! Two guests on a switch.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use kickless_tests::net::{Kind, Options};
use kickless_tests::qemu::migration::Migration;
use kickless_tests::qemu::nic::Nic;
use kickless_tests::scene::Scene;
use kickless_tests::wait;

use super::guests::{LIMIT, Pair, address, address6, iperf, iperf_all, ping, transfer};

/// A scenario: `Ok(Some(reason))` means that this machine has not what it takes.
pub type Scenario = fn(&Scene) -> Result<Option<String>>;

/// All scenarios with their names.
pub const ALL: &[(&str, Scenario)] = &[
    ("two_guests_talk", two_guests_talk),
    ("offloads_that_one_side_has_not", offloads_that_one_side_has_not),
    ("interruptions", interruptions),
    ("guest_moves_and_does_not_say_so", moves_unannounced),
];

/// All that is agreed on, and what a guest changes while it runs.
fn two_guests_talk(scene: &Scene) -> Result<Option<String>> {
    let mut pair = Pair::boot(scene, &Options::switch(), |nic| nic.queues(4))?;
    pair.step("ping", |pair| {
        pair.each_way(|from, to| {
            ping(from, &address(0, to.number), 56)?;
            ping(from, &address(0, to.number), 1472)?;
            ping(from, &address6(0, to.number), 56)
        })
    })?;
    pair.step("files", |pair| {
        pair.each_way(|from, to| {
            let before = [to.counter("eth0", "rx_packets")?, to.counter("eth0", "rx_bytes")?];
            transfer(from, to, &address(0, to.number))?;
            let packets = to.counter("eth0", "rx_packets")? - before[0];
            let bytes = to.counter("eth0", "rx_bytes")? - before[1];
            // Segments cross in one piece, of up to 64 KiB.
            let cut = from.vm.run("ethtool -k eth0 | grep -q '^tcp-segmentation-offload: off'")?.code == 0;
            ensure!(cut || bytes / packets > 3000, "{packets} packets for {bytes} bytes");
            transfer(from, to, &address6(0, to.number))
        })
    })?;
    pair.step("iperf3", |pair| iperf_all(&mut pair.a, &mut pair.b, &address(0, 2)))?;
    pair.step("offloads the guest leaves off", |pair| {
        for off in ["gro off", "tso off", "gso off", "sg off", "tx off"] {
            for host in [&mut pair.a, &mut pair.b] {
                host.vm.check(&format!("ethtool -K eth0 {off}"))?;
            }
            pair.each_way(|from, to| transfer(from, to, &address(0, to.number)))?;
        }
        iperf(&mut pair.a, &mut pair.b, &address(0, 2), "-u -b 20M -l 1400 -t 1")?;
        for host in [&mut pair.a, &mut pair.b] {
            host.vm.check("ethtool -K eth0 tx on sg on tso on gso on gro on; true")?;
        }
        Ok(())
    })?;
    pair.step("VLANs", |pair| {
        for host in [&mut pair.a, &mut pair.b] {
            // One in the other, as well.
            for (under, device, id, net) in [("eth0", "eth0.100", 100, 1), ("eth0.100", "inner", 7, 2)] {
                host.vm.check(&format!("ip link add link {under} name {device} type vlan id {id}"))?;
                host.up(device, net)?;
            }
        }
        pair.each_way(|from, to| {
            for net in [1, 2] {
                ping(from, &address(net, to.number), 56)?;
                transfer(from, to, &address(net, to.number))?;
            }
            Ok(())
        })
    })?;
    pair.step("MTU 9000", |pair| {
        for host in [&mut pair.a, &mut pair.b] {
            host.vm.check("ip link set eth0 mtu 9000 && ethtool -K eth0 tso off gso off")?;
        }
        pair.each_way(|from, to| {
            ping(from, &address(0, to.number), 8972)?;
            transfer(from, to, &address(0, to.number))
        })?;
        for host in [&mut pair.a, &mut pair.b] {
            host.vm.check("ip link set eth0 mtu 1500; ethtool -K eth0 tso on gso on; true")?;
        }
        Ok(())
    })?;
    pair.step("queues", |pair| {
        for queues in [4, 1, 3, 4] {
            for host in [&mut pair.a, &mut pair.b] {
                host.vm.check(&format!("ethtool -L eth0 combined {queues}"))?;
            }
            // One stream for each queue, and more.
            iperf(&mut pair.a, &mut pair.b, &address(0, 2), "-P 8 -n 1M")?;
            pair.each_way(|from, to| transfer(from, to, &address(0, to.number)))?;
        }
        // All of them have been used.
        let stats = pair.a.vm.check("ethtool -S eth0")?;
        for queue in 0..4 {
            let name = format!("tx_queue_{queue}_packets: ");
            let packets = stats.lines().find_map(|line| line.trim().strip_prefix(&name)?.parse::<u64>().ok());
            ensure!(packets > Some(0), "queue {queue} has sent nothing:\n{stats}");
        }
        Ok(())
    })?;
    pair.finish()?;
    Ok(None)
}

/// The second guest moves while it receives: to another QEMU and another port of the switch, and back. Not a byte is lost.
fn migrate_to_and_fro(pair: &mut Pair, scene: &Scene) -> Result<()> {
    let sum = pair.a.vm.check("for i in $(seq 12); do cat /tmp/random; done | sha256sum")?;
    pair.b.vm.start("receive", "nc -l -p 7001 <>/tmp/hold | sha256sum")?;
    pair.b.vm.check_soon("grep -q ':1B59 .* 0A ' /proc/net/tcp /proc/net/tcp6", LIMIT)?;
    let send = "for i in $(seq 12); do cat /tmp/random; sleep 1; done | nc 10.0.0.2 7001";
    pair.a.vm.start("send", send)?;
    for port in [2, 1] {
        let received = pair.b.counter("eth0", "rx_bytes")?;
        let moved = pair.b.vm.migrate(scene, &Migration::to(&[&pair.daemon.sockets()[port]]))?;
        println!("    to port {port}: {moved:?}");
        pair.b.vm.tolerate("VHOST_USER_PROTOCOL_F_CONFIG");
        ensure!(pair.a.vm.is_running("send")?, "all was sent before the guest had moved");
        let more = format!("test $(cat /sys/class/net/eth0/statistics/rx_bytes) -gt {}", received + 100_000);
        pair.b.vm.check_soon(&more, LIMIT)?;
    }
    let sent = pair.a.vm.join("send", LIMIT)?;
    let received = pair.b.vm.join("receive", LIMIT)?;
    ensure!(sent.code == 0 && received.stdout.trim() == sum, "sent {sum}, received {received:?}");
    Ok(())
}

/// What one side's driver has not agreed on is done for it by the switch.
fn offloads_that_one_side_has_not(scene: &Scene) -> Result<Option<String>> {
    let mut pair = Pair::boot(scene, &Options::switch(), |nic| nic)?;
    let variants: [(&str, &[&str]); 7] = [
        ("no receive offloads", &["guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"]),
        ("no segments to receive", &["guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"]),
        ("one buffer for each packet", &["mrg_rxbuf"]),
        ("one buffer, no segments", &["mrg_rxbuf", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"]),
        ("no transmit offloads", &["csum", "host_tso4", "host_tso6", "host_ecn", "host_ufo", "gso"]),
        ("no event index, nothing indirect", &["event_idx", "indirect_desc"]),
        ("nothing", &["csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "mrg_rxbuf", "event_idx"]),
    ];
    // Each by itself, and what depends on it.
    let single: [(&str, &[&str]); 7] = [
        ("no guest_tso4", &["guest_tso4"]),
        ("no guest_tso6", &["guest_tso6"]),
        ("no guest_ecn", &["guest_ecn"]),
        ("no host_tso4", &["host_tso4"]),
        ("no host_tso6", &["host_tso6"]),
        ("no host_ecn", &["host_ecn"]),
        ("packed rings", &[]),
    ];
    for (number, (name, off)) in variants.into_iter().chain(single).enumerate() {
        pair.step(name, |pair| {
            pair.b.vm.unplug_nic(&pair.nics[1])?;
            pair.nics[1] =
                off.iter().fold(Nic::new("nic2", &pair.daemon.sockets()[1]), |nic, off| nic.prop(off, false));
            if off.is_empty() {
                pair.nics[1] = pair.nics[1].clone().prop("packed", true);
            }
            pair.b.vm.hotplug_nic(&pair.nics[1])?;
            pair.b.up("eth0", 0)?;
            if off.is_empty() {
                let feature =
                    pair.b.vm.check("cut -c 35 $(readlink -f /sys/class/net/eth0/device)/features")?;
                ensure!(feature == "1", "the driver has no packed ring");
            }
            pair.each_way(|from, to| {
                ping(from, &address(0, to.number), 56)?;
                transfer(from, to, &address(0, to.number))?;
                transfer(from, to, &address6(0, to.number))
            })?;
            if (variants.len()..variants.len() + single.len() - 1).contains(&number) {
                return Ok(());
            }
            iperf(&mut pair.a, &mut pair.b, &address(0, 2), "-u -b 20M -l 4000 -t 1")?;
            Ok(())
        })?;
    }
    pair.finish()?;
    Ok(None)
}

/// Links go down, guests reboot, the daemon is killed: traffic goes on afterwards.
fn interruptions(scene: &Scene) -> Result<Option<String>> {
    // One port more, for a guest to move to.
    let options = Options::switch().ports(3).in_file();
    let mut pair = Pair::boot(scene, &options, |nic| nic.queues(2))?;
    let talk = |pair: &mut Pair| {
        pair.each_way(|from, to| {
            let to_address = address(0, to.number);
            from.vm.check_soon(&format!("ping -c 1 -W 1 {to_address}"), LIMIT)?;
            transfer(from, to, &to_address)
        })
    };
    pair.step("as it is", talk)?;
    pair.step("interface down and up", |pair| {
        for _ in 0..3 {
            pair.b.vm.check("ip link set eth0 down")?;
            ensure!(
                pair.a.vm.run("ping -c 1 -W 1 10.0.0.2")?.code != 0,
                "a reply from an interface that is down"
            );
            pair.b.vm.check("ip link set eth0 up")?;
            pair.b.vm.check("ip -6 addr add fd00:0::2/64 dev eth0")?;
            talk(pair)?;
        }
        Ok(())
    })?;
    pair.step("cable pulled and put back", |pair| {
        let nic = pair.nics[1].clone();
        pair.b.vm.set_link(&nic, false)?;
        pair.b.vm.check_soon("test $(cat /sys/class/net/eth0/carrier) = 0", LIMIT)?;
        pair.b.vm.set_link(&nic, true)?;
        pair.b.vm.check_soon("test $(cat /sys/class/net/eth0/carrier) = 1", LIMIT)?;
        talk(pair)
    })?;
    pair.step("link down and up by the daemon", |pair| {
        if !options.change(&pair.daemon, &["", "link = 'down'"])? {
            return Ok(());
        }
        // QEMU loses its back end, and says so.
        pair.b.vm.tolerate("vhost");
        pair.b.vm.check_soon("test $(cat /sys/class/net/eth0/carrier) = 0", LIMIT)?;
        ensure!(pair.a.vm.run("ping -c 1 -W 1 10.0.0.2")?.code != 0, "a reply from a link that is down");
        options.change(&pair.daemon, &[])?;
        pair.b.vm.check_soon("test $(cat /sys/class/net/eth0/carrier) = 1", LIMIT)?;
        talk(pair)
    })?;
    pair.step("VLANs by the daemon", |pair| {
        if options.change(&pair.daemon, &["vlan = 5", "vlan = 6"])? {
            pair.a.vm.check_soon("! ping -c 1 -W 1 10.0.0.2", LIMIT)?;
        }
        options.change(&pair.daemon, &["vlan = 6", "vlan = 6"])?;
        talk(pair)?;
        options.change(&pair.daemon, &[])?;
        talk(pair)
    })?;
    pair.step("driver unbound and bound under load", |pair| {
        pair.a.vm.start("load", "while ! test -e /tmp/stop; do nc -w 1 10.0.0.2 9 </tmp/random; done")?;
        pair.a.vm.start("flood", "iperf3 -c 10.0.0.2 -u -b 50M -t 3; ping -f -w 3 10.0.0.2")?;
        let device = pair.b.vm.check("basename $(readlink -f /sys/class/net/eth0/device)")?;
        for _ in 0..3 {
            let driver = "/sys/bus/virtio/drivers/virtio_net";
            pair.b.vm.check(&format!("echo {device} >{driver}/unbind && echo {device} >{driver}/bind"))?;
            pair.b.up("eth0", 0)?;
        }
        pair.a.vm.check("touch /tmp/stop")?;
        pair.a.vm.join("load", LIMIT)?;
        pair.a.vm.join("flood", LIMIT)?;
        talk(pair)
    })?;
    pair.step("guest migrates to another port and back under load", |pair| migrate_to_and_fro(pair, scene))?;
    pair.step("talk after it", talk)?;
    pair.step("guest reboots", |pair| {
        pair.b.vm.reboot()?;
        pair.b.prepare()?;
        talk(pair)
    })?;
    pair.step("daemon killed and started again", |pair| {
        for host in [&mut pair.a, &mut pair.b] {
            // QEMU loses its back end, and says so.
            host.vm.tolerate("vhost");
        }
        for _ in 0..2 {
            pair.daemon.kill_and_restart(scene)?;
            let begun = Instant::now();
            talk(pair)?;
            println!("    traffic again after {:.1} s", begun.elapsed().as_secs_f64());
        }
        Ok(())
    })?;
    pair.finish()?;
    Ok(None)
}

/// A guest with packed rings whose driver announces nothing moves from one QEMU to another: the switch hears of it all the
/// same, from the front end.
fn moves_unannounced(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() != Kind::VhostNet {
        return Ok(Some("another back end has no capture".into()));
    }
    let capture = scene.path("announced.pcapng");
    let pcap = format!("--pcap={}", capture.display());
    let options = Options::switch().ports(3).queues(1).args(&[&pcap, "--pcap-filter=ether proto 0x8035"]);
    let mut pair = Pair::boot(scene, &options, |nic| nic.prop("packed", true).prop("guest_announce", false))?;
    for (port, name) in [(2, "away"), (1, "and back")] {
        pair.step(name, |pair| {
            pair.each_way(|from, to| ping(from, &address(0, to.number), 56))?;
            let before = announced(&capture)?;
            let moved = pair.b.vm.migrate(scene, &Migration::to(&[&pair.daemon.sockets()[port]]))?;
            println!("    to port {port}: {moved:?}");
            pair.b.vm.tolerate("VHOST_USER_PROTOCOL_F_CONFIG");
            wait::until("an announcement", LIMIT, || Ok((announced(&capture)? > before).then_some(())))?;
            pair.each_way(|from, to| {
                ping(from, &address(0, to.number), 56)?;
                transfer(from, to, &address(0, to.number))
            })
        })?;
    }
    pair.finish()?;
    Ok(None)
}

/// Announcements of the second guest that a capture has.
fn announced(capture: &Path) -> Result<usize> {
    // RFC 903, request reverse, and who asks.
    let rarp = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3, 0x52, 0x54, 0, 0, 0, 2];
    Ok(std::fs::read(capture)?.windows(rarp.len()).filter(|bytes| *bytes == rarp).count())
}
