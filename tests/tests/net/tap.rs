//! One guest and the host: a tap of the guest's own, and one that its switch has as uplink, on a router beyond which is
//! somebody else.
//!
//! ```text
//!              ┌ router ────────────────────────────┐ ┌ far ────────┐
//! eth0 ── kl0 ─┤ 10.0.0.254                         │ │             │
//! guest        │               10.9.0.1, fd00:9::1 ─┼─┼─ 10.9.0.2   │
//! eth1 ── kl1 ─┤ 10.0.1.254    10.9.1.1             │ │  10.9.1.2   │
//!              └────────────────────────────────────┘ └─────────────┘
//! ```
//!
//! On the taps checksums of what guest and router send are partial and segments uncut, as they are on any card that is to
//! do that, and tcpdump calls them incorrect there. The wire between router and far has no offloads: what is on it the
//! kernel has completed and cut by what the guest's headers say, and tcpdump must have nothing to say against it.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use kickless_tests::daemon::Daemon;
use kickless_tests::net::{Kind, Options};
use kickless_tests::netns::Netns;
use kickless_tests::process::{self, Process};
use kickless_tests::qemu::nic::Nic;
use kickless_tests::qemu::{BOOT_LIMIT, Vm};
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::guests::{Host, LIMIT, PORT, ping};
use super::switch::Scenario;

/// All scenarios with their names.
pub const ALL: &[(&str, Scenario)] = &[("a_guest_and_the_host", a_guest_and_the_host)];

/// Why there is no tap.
pub fn missing_needs() -> Option<String> {
    if Kind::from_env() != Kind::VhostNet {
        return Some("another back end has no taps".to_owned());
    }
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    tun.err().map(|e| format!("no /dev/net/tun: {e}"))
}

struct Town {
    router: Netns,
    far: Netns,
    guest: Host,
    daemon: Daemon,
    /// What the host sends, and its checksum.
    file: PathBuf,
    sum: String,
}

impl Town {
    fn new(scene: &Scene) -> Result<Town> {
        let (router, far) = (Netns::new(scene, "router")?, Netns::new(scene, "far")?);
        router.check(&format!("ip link add r0 type veth peer name f0 netns {}", far.pid()))?;
        let up = |netns: &Netns, device: &str, addresses: &[&str]| {
            netns.check(&format!(
                "echo 0 >/proc/sys/net/ipv6/conf/{device}/accept_dad; ip link set {device} up"
            ))?;
            addresses.iter().try_for_each(|a| netns.check(&format!("ip addr add {a} dev {device}")).map(drop))
        };
        for (netns, device) in [(&router, "r0"), (&far, "f0")] {
            netns.check(&format!("ethtool -K {device} tx off gro off >/dev/null"))?;
        }
        up(&router, "r0", &["10.9.0.1/24", "10.9.1.1/24", "fd00:9::1/64"])?;
        up(&far, "f0", &["10.9.0.2/24", "10.9.1.2/24", "fd00:9::2/64"])?;
        router
            .check("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")?;
        far.check("ip route add default via 10.9.0.1; ip -6 route add default via fd00:9::1")?;
        let options = Options::switch().first("tap=kl0").queues(2).args(&["--uplink=tap=kl1"]);
        let daemon = options.spawn_in(scene, "net", &router)?;
        up(&router, "kl0", &["10.0.0.254/24", "fd00:0::254/64"])?;
        up(&router, "kl1", &["10.0.1.254/24", "fd00:1::254/64"])?;
        let mut vm = Vm::builder().memory_mib(256);
        for (at, socket) in daemon.sockets().iter().enumerate() {
            let nic = Nic::new(&format!("nic{}", at + 1), socket).queues(2);
            vm = vm.nic(if at == 0 { nic.prop("packed", true) } else { nic });
        }
        let mut vm = vm.start(scene)?;
        vm.wait_ready(BOOT_LIMIT)?;
        // QEMU reads its cards' configuration from nobody, and says so to whoever offers it.
        vm.tolerate("VHOST_USER_PROTOCOL_F_CONFIG");
        let mut guest = Host::new(vm, 2)?;
        guest.up("eth1", 1)?;
        guest
            .vm
            .check("ip route add 10.9.0.0/24 via 10.0.0.254 && ip route add 10.9.1.0/24 via 10.0.1.254")?;
        guest.vm.check("ip -6 route add fd00:9::/64 via fd00:0::254")?;
        let file = scene.path("random");
        let mut random = Random(1);
        let bytes: Vec<u8> = (0..400_000).flat_map(|_| random.number().to_le_bytes()).collect();
        std::fs::write(&file, bytes)?;
        let sum = sum(&file)?;
        Ok(Town { router, far, guest, daemon, file, sum })
    }

    fn step(&mut self, name: &str, step: impl FnOnce(&mut Town) -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        let outcome = step(self).and_then(|()| {
            self.daemon.expect_alive()?;
            let bad = self.guest.bad_checksums()?;
            ensure!(bad == 0, "the guest has seen {bad} wrong checksums");
            Ok(())
        });
        println!("  {name}: {:.1} s", begun.elapsed().as_secs_f64());
        outcome.with_context(|| format!("step {name}"))
    }

    /// A file from the guest to somebody on the host, and another one back, arrive as they were sent.
    fn transfer_both_ways(&mut self, scene: &Scene, far: bool, host: &str) -> Result<()> {
        let netns = if far { &self.far } else { &self.router };
        let received = scene.path("received");
        let to = received.clone();
        let receive = serve(netns, host, move |mut from| {
            from.set_read_timeout(Some(LIMIT))?;
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes)?;
            Ok(std::fs::write(to, bytes)?)
        })?;
        let sent = self.guest.vm.run_for(&format!("nc {host} {} </tmp/random", PORT.0), LIMIT)?;
        ensure!(sent.code == 0, "nc: {sent:?}");
        receive.join().map_err(|_| anyhow!("a panic"))??;
        let (has, wants) = (sum(&received)?, &self.guest.sum);
        ensure!(has == *wants, "what the guest sent has {wants}, what arrived at {host} {has}");
        let file = self.file.clone();
        let send = serve(netns, host, move |mut to| {
            to.set_write_timeout(Some(LIMIT))?;
            Ok(to.write_all(&std::fs::read(file)?)?)
        })?;
        // A standard input that does not end: nc would close the connection with it.
        let command = format!("nc {host} {} <>/tmp/hold >/tmp/received && sha256sum </tmp/received", PORT.0);
        let has = self.guest.vm.run_for(&command, LIMIT)?.stdout;
        send.join().map_err(|_| anyhow!("a panic"))??;
        ensure!(has.trim() == self.sum, "what {host} sent has {}, what arrived at the guest {has}", self.sum);
        Ok(())
    }

    /// TCP and UDP from the guest to the far end, and back.
    fn iperf(&mut self, scene: &Scene, host: &str) -> Result<()> {
        for (args, sum) in [
            ("-n 8M", "sum_received"),
            ("-n 8M -R", "sum_received"),
            ("-u -b 20M -l 1400 -t 1", "sum"),
            ("-u -b 20M -l 1400 -t 1 -R", "sum"),
        ] {
            // Of its addresses it is to answer from this one.
            let serve = format!("iperf3 -s -1 -B {host} --idle-timeout 60");
            let mut server = self.far.start(scene, "iperf", &serve)?;
            let listens = "grep -q ':1451 .* 0A ' /proc/net/tcp /proc/net/tcp6 && echo yes || true";
            wait::until("iperf3", LIMIT, || Ok((self.far.check(listens)? == "yes").then_some(())))?;
            let said = self.guest.vm.run_for(&format!("iperf3 -J -c {host} {args} 2>/dev/null"), LIMIT)?;
            let report: Value = serde_json::from_str(&said.stdout).with_context(|| said.stdout.clone())?;
            ensure!(said.code == 0 && report["error"].is_null(), "iperf3 {args}: {}", said.stdout);
            let sum = &report["end"][sum];
            let lost = sum["lost_percent"].as_f64().unwrap_or(0.0);
            // An emulated guest may not take as many datagrams as are sent.
            ensure!(sum["bytes"].as_f64() > Some(1e6) && lost < 50.0, "iperf3 {args}: {sum}");
            server.wait_exit(LIMIT)?;
        }
        Ok(())
    }
}

/// Starts tcpdump on an interface, with options and a filter; [`stop`] says what it has seen.
fn witness(scene: &Scene, netns: &Netns, what: &str) -> Result<Process> {
    let mut witness = netns.start(scene, "tcpdump", &format!("tcpdump -nn -l --immediate-mode -i {what}"))?;
    let listens = || {
        ensure!(witness.poll_exit()?.is_none(), "tcpdump: {}", witness.stderr_tail());
        Ok(witness.stderr().contains("listening on").then_some(()))
    };
    wait::until("tcpdump", LIMIT, listens)?;
    Ok(witness)
}

fn stop(witness: &mut Process) -> Result<String> {
    witness.signal(Signal::SIGINT)?;
    witness.wait_exit(LIMIT)?;
    Ok(witness.stdout())
}

/// Has somebody there wait for a connection and do this with it.
fn serve(
    netns: &Netns,
    address: &str,
    act: impl FnOnce(TcpStream) -> Result<()> + Send + 'static,
) -> Result<JoinHandle<Result<()>>> {
    let address: IpAddr = address.parse()?;
    let listener = netns.within(move || Ok(TcpListener::bind((address, PORT.0))?))?;
    let listener = listener.join().map_err(|_| anyhow!("a panic"))??;
    Ok(std::thread::spawn(move || act(listener.accept()?.0)))
}

fn sum(file: &Path) -> Result<String> {
    let (code, said) = process::run("sh", &["-c", &format!("sha256sum <{}", file.display())])?;
    ensure!(code == 0, "sha256sum: {said}");
    Ok(said.trim().to_owned())
}

fn a_guest_and_the_host(scene: &Scene) -> Result<Option<String>> {
    let mut town = Town::new(scene)?;
    town.step("ping", |town| {
        for host in
            ["10.0.0.254", "10.9.0.2", "fd00:0::254", "fd00:9::2", "10.0.1.254", "10.9.1.2", "fd00:1::254"]
        {
            ping(&mut town.guest, host, 1400)?;
        }
        Ok(())
    })?;
    town.step("files and iperf3 by way of the router, seen by tcpdump", |town| {
        let mut witness = witness(scene, &town.far, "f0 -vv")?;
        for host in ["10.9.0.2", "10.9.1.2", "fd00:9::2"] {
            town.transfer_both_ways(scene, true, host)?;
        }
        for host in ["10.9.0.2", "10.9.1.2"] {
            town.iperf(scene, host)?;
        }
        let said = stop(&mut witness)?;
        // A checksum may itself end in "bad".
        let is_wrong = |l: &&str| ["incorrect", "[bad", "bad cksum"].iter().any(|bad| l.contains(bad));
        let wrong: Vec<&str> = said.lines().filter(is_wrong).take(5).collect();
        ensure!(wrong.is_empty(), "tcpdump at the far end: {}", wrong.join("\n"));
        let right = said.matches("(correct)").count();
        let datagrams = said.matches("udp sum ok").count();
        ensure!(
            right > 5000 && datagrams > 500,
            "tcpdump has seen {right} segments and {datagrams} datagrams"
        );
        Ok(())
    })?;
    town.step("files with the router itself, in large segments", |town| {
        for (device, host) in [("kl0", "10.0.0.254"), ("kl1", "10.0.1.254")] {
            // How long they are on average is up to TCP, and how much it has lost; ten times what a wire takes is
            // a segment that was left whole.
            let mut witness = witness(scene, &town.router, &format!("{device} -s 128 greater 15000"))?;
            town.transfer_both_ways(scene, false, host)?;
            let here = format!("{host}.{}", PORT.0);
            let ways = [format!(" > {here}: "), format!("{here} > ")];
            let counts = || ways.each_ref().map(|way| witness.stdout().matches(way).count());
            wait::until("large segments", LIMIT, || Ok((counts().iter().min() >= Some(&5)).then_some(())))
                .with_context(|| format!("{device}: {:?} from the guest and to it", counts()))?;
            stop(&mut witness)?;
        }
        Ok(())
    })?;
    town.step("interfaces down and up", |town| {
        for (device, host) in [("kl0", "10.0.0.254"), ("kl1", "10.0.1.254")] {
            town.router.check(&format!("ip link set {device} down"))?;
            ensure!(town.guest.vm.run(&format!("ping -c 1 -W 1 {host}"))?.code != 0, "{device} is down");
            town.router.check(&format!("ip link set {device} up"))?;
            town.guest.vm.check_soon(&format!("ping -c 1 -W 1 {host}"), LIMIT)?;
        }
        Ok(())
    })?;
    town.guest.vm.quit()?;
    town.daemon.terminate()?;
    Ok(None)
}
