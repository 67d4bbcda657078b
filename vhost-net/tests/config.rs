//! The daemon and its file: what is wrong is said before anything is opened.
#![allow(clippy::unwrap_used)]

#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use peer::{Peer, readable_within, until, words};
use vhost_net::cli::Options;
use vhost_net::switch::vlan::Vlan;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-net")).args(args).output().unwrap()
}

/// A file with this in it.
fn file(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("net.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn the_example_in_the_documentation_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vhost-net.toml");
    let options = Options::read(&path).unwrap();
    let ports = options.ports();
    let names: Vec<String> = ports.iter().map(vhost_net::spec::PortSpec::name).collect();
    assert_eq!(names, ["web", "router", "spare", "store"]);
    assert_eq!(ports[0].rules().ingress.bits, Some(100_000_000));
    assert_eq!(ports[0].rules().vlan, Vlan::Access(10));
    assert!(matches!(ports[1].rules().vlan, Vlan::Trunk { native: Some(5), .. }));
    assert!(ports[2].link_down && ports[3].switch.as_deref() == Some("backup"));
    let ageing: Vec<_> = options.switch.iter().map(|switch| options.ageing(switch)).collect();
    assert_eq!((ageing, options.uplink.len()), (vec![300, 60], 2));
    let out = run(&["--check", "--config", path.to_str().unwrap()]);
    assert!(out.status.success(), "{out:?}");
}

#[test]
fn mistakes_are_one_line_with_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("switch = true\n[[port]]\nsocket-path = 'SOCK'\nvlan = 4095\n", ":4: vlan: '4095' is no VLAN"),
        ("switch = true\n[[port]]\nsocket-path = 'SOCK'\nvlans = 5\n", ":4: unknown field `vlans`"),
        (
            "switch = true\n\n[[port]]\nsocket-path = 'SOCK'\nguard = true\n",
            ":5: port SOCK: guard=on needs its mac=",
        ),
        ("switch = true\nwire = true\n[[port]]\nsocket-path = 'SOCK'\n", ":2: ports are joined in one way"),
        ("switch = yes\n", ":1: "),
        (
            "[[switch]]\nname = 'a'\n[[switch]]\nname = 'a'\n[[port]]\nsocket-path = 'SOCK'\nswitch = 'a'\n",
            ":4: two switches have the name a; give each its own",
        ),
        (
            "[switch]\nname = 'a'\n[[port]]\nsocket-path = 'SOCK'\nswitch = 'b'\n",
            ":5: port SOCK: there is no switch b; there are a",
        ),
        (
            "switch = true\n[[uplink]]\ntap = 't'\n[[uplink]]\ntap = 'u'\n[[port]]\nsocket-path = 'SOCK'\n",
            ":4: uplink: the switch without a name has the uplink t already; a switch has one at most",
        ),
        (
            "switch = true\n[[uplink]]\ntap = 't'\n[[port]]\nsocket-path = 'SOCK'\nname = 't'\n",
            ":2: uplink: a port has the name t as well; give one of them another (name=)",
        ),
        (
            "mac-ageing = 9\n[switch]\nname = 'a'\n[[port]]\nsocket-path = 'SOCK'\nswitch = 'a'\n",
            ":1: mac-ageing is each switch's own where switches have keys; say it there",
        ),
        ("[switch]\nvlan = 5\n[[port]]\nsocket-path = 'SOCK'\n", ":2: unknown field `vlan`"),
        ("switch = true\n", ": nothing to serve"),
    ] {
        let socket = dir.path().join("port.sock");
        let text = text.replace("SOCK", socket.to_str().unwrap());
        let path = file(dir.path(), &text);
        let said = format!("vhost-net: {}{}", path.display(), said.replace("SOCK", socket.to_str().unwrap()));
        for args in [&["--config"][..], &["--check", "--config"]] {
            let out = run(&[args, &[path.to_str().unwrap()]].concat());
            let stderr = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(1), "{text}: {stderr}");
            assert!(
                stderr.starts_with(&said) && stderr.lines().count() == 1,
                "{text}: {stderr} is not {said}"
            );
        }
        assert!(!socket.exists(), "nothing was opened");
    }
    let missing = run(&["--config", "/nonexistent/net.toml"]);
    assert!(
        String::from_utf8(missing.stderr)
            .unwrap()
            .contains("cannot read /nonexistent/net.toml: No such file")
    );
}

proptest::proptest! {
    #[test]
    fn a_good_file_with_a_change_is_read_or_refused(
        changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0..12usize, "\\PC{0,6}"), 1..4)
    ) {
        let mut text: Vec<char> = include_str!("../../docs/vhost-net.toml").chars().collect();
        for (at, len, with) in changes {
            let at = at.index(text.len().max(1));
            let end = (at + len).min(text.len());
            text.splice(at..end, with.chars());
        }
        let file = daemon::file::File::new(Path::new("f"), text.into_iter().collect());
        if let Err(e) = Options::of(&file) {
            let said = format!("{e:#}");
            assert!(said.starts_with("f:") && !said.contains('\n'), "{said}");
        }
    }
}

#[test]
fn capabilities_are_what_the_discovery_file_promises() {
    let out = run(&["--print-capabilities"]);
    assert!(out.status.success());
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(said.trim(), r#"{"features":[],"type":"net"}"#);
    let file = include_str!("../../packaging/vhost-user/50-kickless-vhost-net.json");
    for part in [r#""type": "net""#, r#""binary": "/usr/bin/vhost-net""#, r#""description": ""#] {
        assert!(file.contains(part), "{part}");
    }
}

/// A daemon with a file, which is killed when the test is over.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(ports: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let path = Daemon::write(dir.path(), ports);
        let log = File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-net"));
        command.args(["--config", path.to_str().unwrap()]).stderr(log);
        let daemon = Daemon { child: command.spawn().unwrap(), dir };
        daemon.expect("serving a");
        daemon
    }

    fn write(dir: &Path, ports: &str) -> PathBuf {
        file(dir, &format!("switch = true\npoll = 'event'\n{}", ports.replace("DIR", dir.to_str().unwrap())))
    }

    /// Has it read another file.
    fn reload(&self, ports: &str) {
        Daemon::write(self.dir.path(), ports);
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGHUP).unwrap();
    }

    /// It says so.
    fn expect(&self, what: &str) {
        let log = self.dir.path().join("log");
        until(what, || std::fs::read_to_string(&log).unwrap().contains(what));
    }
}

#[test]
fn a_front_end_that_reads_configuration_space_hears_of_the_link() {
    const PORT: &str = "[[port]]\nsocket-path = 'DIR/a'\nname = 'a'\n";
    let daemon = Daemon::start(PORT);
    let mut peer = Peer::new(UnixStream::connect(daemon.dir.path().join("a")).unwrap());
    peer.negotiate();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(peer.ack(21, &[], &[theirs.as_raw_fd()]));
    let status = |peer: &mut Peer| {
        let space = peer.ask(24, &[words(&[0, 12, 0]), vec![0; 12]].concat());
        u16::from_le_bytes([space[12 + 6], space[12 + 7]])
    };
    assert_eq!(status(&mut peer), 1);
    for (line, up) in [("link = 'down'", 0), ("", 1), ("link = 'down'\nvlan = 5", 0)] {
        daemon.reload(&format!("{PORT}{line}\n"));
        let mut notice = [0; 12];
        assert!(readable_within(&ours, 10_000), "no notice with '{line}'");
        std::io::Read::read_exact(&mut &ours, &mut notice).unwrap();
        assert_eq!(notice[..], words(&[2, 1, 0]), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
        assert_eq!(status(&mut peer), up, "{line}");
    }
    daemon.expect("port a: other rules from now on");
}

#[test]
fn what_cannot_be_done_is_said_and_the_daemon_goes_on() {
    const PORT: &str = "[[port]]\nsocket-path = 'DIR/a'\nname = 'a'\n";
    let mut daemon = Daemon::start(PORT);
    daemon.reload(&format!("mtu = 9000\n{PORT}link = 'down'\n[[port]]\nsocket-path = 'DIR/b'\nname = 'b'\n"));
    daemon.expect("net.toml: mtu cannot change while it runs: start it anew for that");
    daemon.expect("net.toml: port b: it cannot come while it runs: start it anew for that");
    daemon.expect("port a: its link is down");
    daemon.expect("was read again");
    daemon.reload(&format!("{PORT}vlan = 0\n"));
    daemon.expect("net.toml:6: vlan: '0' is no VLAN (write a number from 1 to 4094); nothing was changed");
    assert!(daemon.dir.path().join("a").exists(), "nobody was connected who had to be told so");
    kill(Pid::from_raw(daemon.child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(daemon.child.wait().unwrap().success());
    assert!(!daemon.dir.path().join("a").exists());
}
