//! What two guests say to each other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::net::Options;
use kickless_tests::qemu::nic::Nic;
use kickless_tests::qemu::{BOOT_LIMIT, Vm};
use kickless_tests::scene::Scene;
use kickless_tests::{daemon::Daemon, net};
use serde_json::Value;

/// How long something may take in a guest.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The port that data goes to: 7000, and as `/proc/net/tcp` has it.
pub const PORT: (u16, &str) = (7000, ":1B58");

/// A guest, and what its address ends in.
pub struct Host {
    pub vm: Vm,
    pub number: u8,
    /// Checksum of `/tmp/random`.
    pub sum: String,
}

impl Host {
    /// A guest that has booted, or has just rebooted: it has something to send.
    pub fn new(vm: Vm, number: u8) -> Result<Host> {
        let mut host = Host { vm, number, sum: String::new() };
        host.prepare()?;
        Ok(host)
    }

    /// After a boot: something to send, and an address.
    pub fn prepare(&mut self) -> Result<()> {
        // As long as no segment, window or ring is.
        self.vm.check("head -c 3333333 /dev/urandom >/tmp/random")?;
        // A standard input that does not end: nc would close the connection with it.
        self.vm.check("mkfifo /tmp/hold")?;
        self.sum = self.vm.check("sha256sum </tmp/random")?;
        self.up("eth0", 0)
    }

    /// Gives an interface its addresses in a network.
    pub fn up(&mut self, device: &str, net: u8) -> Result<()> {
        let (v4, v6) = (address(net, self.number), address6(net, self.number));
        // Duplicate address detection would take a second.
        self.vm.check(&format!(
            "echo 0 >/proc/sys/net/ipv6/conf/{device}/accept_dad && ip addr add {v4}/24 dev {device} && \
             ip -6 addr add {v6}/64 dev {device} && ip link set {device} up"
        ))?;
        Ok(())
    }

    /// What an interface has counted.
    pub fn counter(&mut self, device: &str, name: &str) -> Result<u64> {
        Ok(self.vm.check(&format!("cat /sys/class/net/{device}/statistics/{name}"))?.parse()?)
    }

    /// Packets that the kernel has found to have wrong checksums, of all protocols.
    pub fn bad_checksums(&mut self) -> Result<u64> {
        let text = self.vm.check("cat /proc/net/snmp /proc/net/snmp6")?;
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let mut sum = 0;
        for (i, words) in lines.iter().enumerate() {
            for (at, word) in words.iter().enumerate().filter(|(_, word)| word.ends_with("InCsumErrors")) {
                // Names in a line and numbers in the next; or, for IPv6, a name and a number.
                let number = if word.contains('6') { words.get(1) } else { lines[i + 1].get(at) };
                sum += number.context("a number")?.parse::<u64>()?;
            }
        }
        Ok(sum)
    }
}

/// The address of a guest in one of the networks.
pub fn address(net: u8, number: u8) -> String {
    format!("10.0.{net}.{number}")
}

/// The same for IPv6.
pub fn address6(net: u8, number: u8) -> String {
    format!("fd00:{net}::{number}")
}

/// Two guests on a switch.
pub struct Pair {
    pub daemon: Daemon,
    pub a: Host,
    pub b: Host,
    pub nics: [Nic; 2],
}

impl Pair {
    /// Boots both with these cards.
    pub fn boot(scene: &Scene, options: &Options, nic: impl Fn(Nic) -> Nic) -> Result<Pair> {
        let daemon = options.spawn(scene, "switch")?;
        let nics = [1, 2].map(|i| nic(Nic::new(&format!("nic{i}"), &daemon.sockets()[i - 1])));
        let start = |nic: &Nic| Vm::builder().memory_mib(256).nic(nic.clone()).start(scene);
        let (mut a, mut b) = (start(&nics[0])?, start(&nics[1])?);
        for vm in [&mut a, &mut b] {
            vm.wait_ready(BOOT_LIMIT)?;
            // QEMU reads its cards' configuration from nobody, and says so to whoever offers it.
            vm.tolerate("VHOST_USER_PROTOCOL_F_CONFIG");
        }
        Ok(Pair { daemon, a: Host::new(a, 1)?, b: Host::new(b, 2)?, nics })
    }

    /// Runs `step` from one guest to the other and then the other way.
    pub fn each_way(&mut self, step: impl Fn(&mut Host, &mut Host) -> Result<()>) -> Result<()> {
        step(&mut self.a, &mut self.b).context("from the first guest to the second")?;
        step(&mut self.b, &mut self.a).context("from the second guest to the first")
    }

    /// A step of a scenario, by name, with what it took.
    pub fn step(&mut self, name: &str, step: impl FnOnce(&mut Pair) -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        let outcome = step(self).and_then(|()| {
            self.daemon.expect_alive()?;
            for host in [&mut self.a, &mut self.b] {
                let bad = host.bad_checksums()?;
                ensure!(bad == 0, "guest {} has seen {bad} wrong checksums", host.number);
            }
            Ok(())
        });
        println!("  {name}: {:.1} s", begun.elapsed().as_secs_f64());
        outcome.with_context(|| format!("step {name}"))
    }

    /// Ends all in good order.
    pub fn finish(self) -> Result<()> {
        self.a.vm.quit()?;
        self.b.vm.quit()?;
        // testpmd ends by the signal.
        if net::Kind::from_env() == net::Kind::VhostNet { self.daemon.terminate() } else { Ok(()) }
    }
}

/// Every ping is answered.
pub fn ping(from: &mut Host, to: &str, bytes: u32) -> Result<()> {
    // The first waits for the neighbour's address.
    let said = from.vm.check(&format!("ping -c 4 -i 0.2 -W 5 -s {bytes} {to}"))?;
    ensure!(said.contains("4 packets received") && !said.contains("duplicates"), "{said}");
    Ok(())
}

/// A file from one guest to the other over TCP arrives as it was sent.
pub fn transfer(from: &mut Host, to: &mut Host, address: &str) -> Result<()> {
    let (port, hex) = PORT;
    to.vm.start(
        "receive",
        &format!(
            "nc -l -p {port} <>/tmp/hold >/tmp/received; sha256sum </tmp/received; wc -c </tmp/received"
        ),
    )?;
    to.vm.check_soon(&format!("cat /proc/net/tcp /proc/net/tcp6 | grep -q '{hex} .* 0A '"), LIMIT)?;
    let sent = from.vm.run_for(&format!("nc {address} {port} </tmp/random"), LIMIT)?;
    ensure!(sent.code == 0, "nc: {sent:?}");
    let received = to.vm.join("receive", LIMIT)?;
    ensure!(
        received.stdout.starts_with(&from.sum),
        "what was sent has {}, what has arrived {}",
        from.sum,
        received.stdout
    );
    Ok(())
}

/// iperf3 from one guest to the other. Its report.
pub fn iperf(from: &mut Host, to: &mut Host, address: &str, args: &str) -> Result<Value> {
    to.vm.start("iperf", "iperf3 -s -1 --idle-timeout 60")?;
    to.vm.check_soon("cat /proc/net/tcp /proc/net/tcp6 | grep -q ':1451 .* 0A '", LIMIT)?;
    let said = from.vm.run_for(&format!("iperf3 -J -c {address} {args} 2>/dev/null"), LIMIT)?;
    let served = to.vm.join("iperf", LIMIT)?;
    let report: Value = serde_json::from_str(&said.stdout).with_context(|| said.stdout.clone())?;
    ensure!(
        said.code == 0 && served.code == 0 && report["error"].is_null(),
        "iperf3 {args}: {}\n{}",
        said.stdout,
        served.stdout
    );
    Ok(report)
}

/// TCP from one to the other and back, and UDP; bytes have arrived.
pub fn iperf_all(from: &mut Host, to: &mut Host, address: &str) -> Result<()> {
    for (args, sum) in [
        ("-n 8M", "sum_received"),
        ("-n 8M -R", "sum_received"),
        ("-u -b 40M -l 1400 -t 1", "sum"),
        ("-u -b 40M -l 1400 -t 1 -R", "sum"),
    ] {
        let report = iperf(from, to, address, args)?;
        let sum = &report["end"][sum];
        let bytes = sum["bytes"].as_f64().unwrap_or(0.0);
        let lost = sum["lost_percent"].as_f64().unwrap_or(0.0);
        // An emulated guest may not take as many datagrams as are sent.
        ensure!(bytes > 1e6 && lost < 50.0, "iperf3 {args}: {bytes} bytes, {lost} % lost");
    }
    Ok(())
}
