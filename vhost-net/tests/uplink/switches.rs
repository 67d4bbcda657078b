//! A daemon with two switches, each with guests and an uplink of its own: what is on one never comes to the other, whatever
//! becomes of reactors, of the daemon, and of the switches beside them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use control::client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::{Value, json};
use vhost_net::features::MRG_RXBUF;
use vhost_net::mac::MacAddr;
use vhost_net::port::Uplink;
use vhost_net::port::af_packet::AfPacket;

use crate::Test;
use crate::guest::{Guest, mac};
use crate::pair::{ip, receive, until};
use crate::switched::{FAR, frame, send};

pub const TESTS: &[Test] = &[
    ("switches::nothing_passes_from_one_to_the_other", nothing_passes),
    ("switches::they_are_handed_over_and_saved", handed_over),
    ("switches::a_reload_changes_ports_and_uplinks_of_each", reloaded),
];

const NAMES: [&str; 2] = ["blue", "green"];

/// Two switches with two ports each, and a pair of interfaces for each of them.
const FILE: &str = "poll = 'event'\napi = 'DIR/api'\n\
    [[switch]]\nname = 'blue'\n[[switch]]\nname = 'green'\nmac-ageing = 60\n\
    [[uplink]]\naf-packet = 'near0'\nswitch = 'blue'\n[[uplink]]\naf-packet = 'near1'\nswitch = 'green'\n\
    [[port]]\nsocket-path = 'DIR/blue0'\nname = 'blue0'\nswitch = 'blue'\n\
    [[port]]\nsocket-path = 'DIR/blue1'\nname = 'blue1'\nswitch = 'blue'\n\
    [[port]]\nsocket-path = 'DIR/green0'\nname = 'green0'\nswitch = 'green'\n\
    [[port]]\nsocket-path = 'DIR/green1'\nname = 'green1'\nswitch = 'green'\n";

/// It is killed when the test is over.
struct Daemon {
    child: Child,
    dir: PathBuf,
    client: Client,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(dir: &Path, args: &[&str]) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-net"));
        command.arg("--config").arg(dir.join("net.toml"));
        command.args(args.iter().map(|arg| arg.replace("DIR", dir.to_str().unwrap())));
        let (child, client) = (command.spawn().unwrap(), Client::new(&dir.join("api")));
        let daemon = Daemon { child, dir: dir.to_owned(), client };
        let pid = json!(daemon.child.id());
        let answers = || daemon.client.call("GET", "/v1/daemon", None).ok()?.json().ok();
        until(|| answers().is_some_and(|said| said["pid"] == pid));
        daemon
    }

    fn does(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let answer = self.client.call(method, path, body).unwrap();
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        assert!((200..300).contains(&answer.status), "{method} {path}: {said}");
        if answer.body.is_empty() { Value::Null } else { answer.json().unwrap() }
    }

    fn get(&self, path: &str) -> Value {
        self.does("GET", path, None)
    }

    /// The queues of all guests run, and uplinks are up.
    fn await_up(&self) {
        let runs = |port: &Value| {
            let name = port["name"].as_str().unwrap();
            let queues = self.get(&format!("/v1/ports/{name}"))["queues"].clone();
            port["kind"] == "uplink" && port["up"] == true
                || (0..2).all(|at| !queues[at]["reactor"].is_null())
        };
        until(|| {
            let ports = self.get("/v1/ports");
            let those = ports.as_array().unwrap().iter().filter(|port| port["name"] != "red0");
            those.into_iter().all(runs)
        });
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn end(mut self) {
        self.signal(Signal::SIGTERM);
        assert!(self.child.wait().unwrap().success());
    }
}

/// What is joined to one switch.
struct Side {
    guests: [Guest; 2],
    far: AfPacket,
}

impl Side {
    fn connect(dir: &Path, switch: usize) -> Side {
        // Memory and secrets of each guest's own; addresses of cards are the same on both sides.
        let guest = |at: usize| {
            let socket = dir.join(format!("{}{at}", NAMES[switch]));
            Guest::connect(&socket, 2 * switch + at, 1, (MRG_RXBUF, None), 64)
        };
        let far = AfPacket::open(&format!("far{switch}")).unwrap();
        Side { guests: [guest(0), guest(1)], far }
    }

    /// A guest sends, and those get it who are to.
    fn says(&mut self, from: usize, frame: &[u8], others: [bool; 2]) {
        self.guests[from].send(0, frame);
        let [other, far] = others;
        if other {
            assert_eq!(self.guests[1 - from].await_frames(1), [frame]);
        }
        if far {
            assert_eq!(receive(&mut self.far, 1)[0].1, frame);
        }
    }

    /// Frames of all kinds, of addresses that are the same on both sides.
    fn talks(&mut self, fill: u8) {
        let to = |to: MacAddr, from: usize| frame(to, mac(from), fill, 60);
        for from in 0..2 {
            self.says(from, &to(MacAddr::BROADCAST, from), [true, true]);
        }
        self.says(0, &to(MacAddr([1, 0, 0x5e, 0, 0, 7]), 0), [true, true]);
        self.says(0, &to(mac(9), 0), [true, true]);
        let mut tagged = to(MacAddr::BROADCAST, 0);
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        self.says(0, &tagged, [true, true]);
        self.says(1, &to(mac(0), 1), [true, false]);
        self.says(0, &to(mac(1), 0), [true, false]);
        let out = frame(MacAddr::BROADCAST, FAR, fill, 60);
        send(&mut self.far, &out);
        for guest in &mut self.guests {
            assert_eq!(guest.await_frames(1), [out.as_slice()]);
        }
        let out = frame(mac(1), FAR, fill, 60);
        send(&mut self.far, &out);
        assert_eq!(self.guests[1].await_frames(1), [out]);
        self.says(0, &to(FAR, 0), [false, true]);
    }

    /// Nothing has come that nobody has waited for.
    fn is_quiet(&mut self) {
        for guest in &mut self.guests {
            guest.receive();
            assert!(guest.got.is_empty(), "guest {}: {:x?}", guest.at, guest.got);
        }
        assert_eq!(self.far.receive(1, &mut |_, frame| panic!("{frame:x?}")), 0);
    }
}

/// One side talks after the other, and only that one hears anything.
fn talk(daemon: &Daemon, sides: &mut [Side; 2], fill: u8) {
    daemon.await_up();
    for at in 0..2 {
        sides[at].talks(2 * fill + at as u8);
        std::thread::sleep(Duration::from_millis(20));
        sides.iter_mut().for_each(Side::is_quiet);
    }
}

fn set_up(file: &str, args: &[&str]) -> (tempfile::TempDir, Daemon, [Side; 2]) {
    for at in 0..2 {
        ip(&format!("link add near{at} type veth peer name far{at}"));
        for name in ["near", "far"] {
            ip(&format!("link set {name}{at} addrgenmode none"));
            ip(&format!("link set {name}{at} up"));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("net.toml"), file.replace("DIR", path)).unwrap();
    let daemon = Daemon::start(dir.path(), args);
    let sides = [0, 1].map(|at| Side::connect(dir.path(), at));
    (dir, daemon, sides)
}

fn nothing_passes() {
    let (dir, daemon, mut sides) = set_up(FILE, &[]);
    talk(&daemon, &mut sides, 0);

    let ports = daemon.get("/v1/ports");
    for port in ports.as_array().unwrap() {
        let name = port["name"].as_str().unwrap();
        let on = NAMES.iter().position(|switch| port["switch"] == **switch).unwrap();
        assert!(name.starts_with(NAMES[on]) || name == format!("near{on}"), "{port}");
        assert!(port["rx"]["packets"].as_u64().unwrap() > 0, "{port}");
    }
    for (at, name) in NAMES.into_iter().enumerate() {
        let fdb = daemon.get(&format!("/v1/fdb?switch={name}"));
        let fdb = fdb.as_array().unwrap();
        let behind = |mac: MacAddr, vlan: u16| {
            let is = |s: &&Value| s["mac"] == mac.to_string() && s["vlan"] == vlan && s["switch"] == name;
            fdb.iter().find(is).map(|s| s["port"].as_str().unwrap().to_owned())
        };
        assert_eq!(behind(mac(0), 0), Some(format!("{name}0")), "{fdb:?}");
        assert_eq!(behind(mac(0), 5), Some(format!("{name}0")), "{fdb:?}");
        assert_eq!(behind(mac(1), 0), Some(format!("{name}1")), "{fdb:?}");
        assert_eq!(behind(FAR, 0), Some(format!("near{at}")), "{fdb:?}");
        let switch = &daemon.get("/v1/switches")[at];
        let ageing = [300, 60][at];
        assert_eq!(
            *switch,
            json!({ "name": name, "ports": 2, "uplink": format!("near{at}"), "mac-ageing": ageing, "addresses": fdb.len() })
        );
    }
    assert_eq!(daemon.client.call("GET", "/v1/fdb?switch=red", None).unwrap().status, 404);

    // On two reactors, and on the other one alone.
    daemon.does("POST", "/v1/reactors", Some(&json!({})));
    for name in ["blue1", "green0"] {
        daemon.does("PUT", &format!("/v1/ports/{name}/reactor"), Some(&json!({ "reactor": 1 })));
    }
    talk(&daemon, &mut sides, 1);
    daemon.does("DELETE", "/v1/reactors/0", None);
    talk(&daemon, &mut sides, 2);

    // A capture has all ports, each with what has crossed its own switch.
    let file = dir.path().join("capture");
    daemon.does("PUT", "/v1/capture", Some(&json!({ "file": file })));
    talk(&daemon, &mut sides, 3);
    daemon.does("DELETE", "/v1/capture", None);
    let mut reader = PcapNgReader::new(std::fs::File::open(&file).unwrap()).unwrap();
    let (mut names, mut seen) = (Vec::new(), [0; 6]);
    while let Some(block) = reader.next_block() {
        match block.unwrap() {
            Block::InterfaceDescription(interface) => names.push(format!("{:?}", interface.options)),
            Block::EnhancedPacket(packet) => {
                let at = packet.interface_id as usize;
                let own = NAMES.iter().position(|name| names[at].contains(name));
                let own = own.unwrap_or_else(|| usize::from(names[at].contains("near1")));
                assert_eq!(packet.data.last(), Some(&(6 + own as u8)), "{}", names[at]);
                seen[at] += 1;
            }
            _ => {}
        }
    }
    assert!(names.len() == 6 && seen.iter().all(|n| *n > 5), "{names:?}: {seen:?}");
    sides.iter().flat_map(|side| &side.guests).for_each(|guest| guest.check_memory(4));
    daemon.end();
}

fn handed_over() {
    let (dir, mut daemon, mut sides) = set_up(FILE, &["--control=DIR/control"]);
    talk(&daemon, &mut sides, 0);
    // A third one, which guests of the others see nothing of.
    daemon.does("POST", "/v1/switches", Some(&json!({ "name": "red", "mac-ageing": 7 })));
    let red = json!({ "socket-path": dir.path().join("red0"), "name": "red0", "switch": "red", "vlan": 5 });
    let added = daemon.does("POST", "/v1/ports", Some(&red));
    assert_eq!((&added["switch"], &added["kind"]), (&json!("red"), &json!("switch")));
    let mut third = Guest::connect(&dir.path().join("red0"), 5, 1, (MRG_RXBUF, None), 64);
    until(|| !daemon.get("/v1/ports/red0")["queues"][1]["reactor"].is_null());
    third.send(0, &frame(MacAddr::BROADCAST, mac(0), 99, 60));
    until(|| daemon.get("/v1/fdb?switch=red").as_array().unwrap().len() == 1);
    talk(&daemon, &mut sides, 1);
    daemon.does("POST", "/v1/save", None);

    let heir = Daemon::start(dir.path(), &["--control=DIR/control", "--takeover=DIR/control"]);
    assert!(daemon.child.wait().unwrap().success());
    daemon = heir;
    assert_eq!(daemon.get("/v1/ports").as_array().unwrap().len(), 7);
    assert_eq!(daemon.get("/v1/switches")[2]["mac-ageing"], 7);
    talk(&daemon, &mut sides, 2);
    third.receive();
    assert!(third.got.is_empty(), "{:x?}", third.got);
    daemon.end();

    // Anew, from what was saved.
    daemon = Daemon::start(dir.path(), &[]);
    let mut sides = [0, 1].map(|at| Side::connect(dir.path(), at));
    talk(&daemon, &mut sides, 3);
    let refused = |path: &str, why: &str| {
        let answer = daemon.client.call("DELETE", path, None).unwrap();
        let said = String::from_utf8_lossy(&answer.body);
        assert!(answer.status == 409 && said.contains(why), "{said}");
    };
    refused("/v1/switches/red", "red0 is on red");
    daemon.does("DELETE", "/v1/ports/red0", None);
    refused("/v1/switches/blue", "blue0 is on blue");
    daemon.does("DELETE", "/v1/switches/red", None);
    assert_eq!(daemon.client.call("DELETE", "/v1/switches/red", None).unwrap().status, 404);
    let again = daemon.client.call("POST", "/v1/switches", Some(&json!({ "name": "blue" }))).unwrap();
    assert_eq!(again.status, 409);
    talk(&daemon, &mut sides, 4);
    daemon.does("POST", "/v1/save", None);
    let saved = std::fs::read_to_string(daemon.dir.join("net.toml")).unwrap();
    assert!(!saved.contains("red") && saved.contains("green"), "{saved}");
    daemon.end();
}

fn reloaded() {
    let (dir, daemon, mut sides) = set_up(FILE, &[]);
    talk(&daemon, &mut sides, 0);
    // The uplink of one of them, and a port of the other, in a VLAN of their own.
    let file = FILE
        .replace("'near0'\n", "'near0'\nvlan = 7\n")
        .replace("name = 'green1'\n", "name = 'green1'\nvlan = 8\n");
    std::fs::write(dir.path().join("net.toml"), file.replace("DIR", dir.path().to_str().unwrap())).unwrap();
    daemon.signal(Signal::SIGHUP);
    let hello = frame(MacAddr::BROADCAST, mac(0), 9, 60);
    let [blue, green] = &mut sides;
    // What was learnt from them is forgotten once they are other ones.
    until(|| {
        let fdb = daemon.get("/v1/fdb");
        fdb.as_array().unwrap().iter().all(|s| s["port"] != "green1" && s["port"] != "near0")
    });
    blue.guests[0].send(0, &hello);
    assert_eq!(blue.guests[1].await_frames(1), [hello.as_slice()]);
    green.guests[0].send(0, &hello);
    assert_eq!(receive(&mut green.far, 1)[0].1, hello);
    std::thread::sleep(Duration::from_millis(20));
    sides.iter_mut().for_each(Side::is_quiet);
    daemon.end();
}
