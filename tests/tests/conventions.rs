//! The conventions that QEMU's documentation sets for back ends (docs/interop/vhost-user.rst, "Backend program
//! conventions"), and those of service managers.
#![allow(clippy::unwrap_used)]

mod blk;

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blk::{LIMIT, program};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

/// A child that is killed when the test is over, however it ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Killed {
    /// Starts the daemon with `fd` left open for it.
    fn inheriting(fd: OwnedFd, args: &[&str]) -> Killed {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let number = format!("--fd={}", fd.as_raw_fd());
        let child = Command::new(program()).arg(number).args(args).stderr(Stdio::null()).spawn().unwrap();
        // Ours would keep the connection alive.
        drop(fd);
        Killed(child)
    }

    fn exit_code(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(begun.elapsed() < LIMIT, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A front end that negotiates, and hears the same features every time.
fn negotiate(stream: UnixStream) -> u64 {
    let front = Frontend::from_stream(stream, 1);
    front.set_owner().unwrap();
    let features = front.get_features().unwrap();
    assert_ne!(features & (1 << 32), 0, "VIRTIO_F_VERSION_1 is offered");
    features
}

#[test]
fn a_connected_descriptor_serves_its_front_end_and_then_the_daemon_exits() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Killed::inheriting(theirs.into(), &["--backend=null:1M"]);
    negotiate(ours);
    // Its socket is closed now: no other front end can come.
    assert_eq!(daemon.exit_code(), 0);
}

#[test]
fn a_listening_descriptor_serves_one_front_end_after_another() {
    let scene = Scene::new().unwrap();
    let path = scene.path("listening");
    let listener = UnixListener::bind(&path).unwrap();
    let mut daemon = Killed::inheriting(listener.into(), &["--backend=null:1M"]);
    for _ in 0..3 {
        negotiate(UnixStream::connect(&path).unwrap());
    }
    kill(Pid::from_raw(daemon.0.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.exit_code(), 0);
    assert!(path.exists(), "the socket is its maker's to remove");
}

#[test]
fn capabilities_are_what_the_discovery_file_promises() {
    let output = Command::new(program()).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["type"], "block");
    assert_eq!(said["features"], serde_json::json!(["read-only", "blk-file"]));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/vhost-user/50-kickless-vhost-blk.json");
    let discovery: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(discovery["type"], said["type"]);
    assert!(discovery["binary"].as_str().is_some_and(|b| b.ends_with("/vhost-blk")));
    assert!(discovery["description"].is_string());
}

#[test]
fn service_managers_hear_when_it_is_ready_and_when_it_stops() {
    let scene = Scene::new().unwrap();
    let notify = UnixDatagram::bind(scene.path("notify")).unwrap();
    notify.set_read_timeout(Some(LIMIT)).unwrap();
    let socket = scene.path("s");
    let mut command = Command::new(program());
    command.args(["--backend=null:1M", &format!("--socket-path={}", socket.display())]);
    let mut daemon =
        Killed(command.env("NOTIFY_SOCKET", scene.path("notify")).stderr(Stdio::null()).spawn().unwrap());
    let hears = |what: &str| {
        let mut bytes = [0; 256];
        let n = notify.recv(&mut bytes).unwrap();
        let said = String::from_utf8_lossy(&bytes[..n]).into_owned();
        assert!(said.contains(what), "{said}");
    };
    hears("READY=1");
    // Ready means that a front end is served at once.
    negotiate(UnixStream::connect(&socket).unwrap());
    kill(Pid::from_raw(daemon.0.id() as i32), Signal::SIGTERM).unwrap();
    hears("STOPPING=1");
    assert_eq!(daemon.exit_code(), 0);
    assert!(!socket.exists());
}

#[test]
fn idle_disks_cost_next_to_nothing() {
    let scene = Scene::new().unwrap();
    let mut command = Command::new(program());
    let socket = |i: usize| scene.path(&format!("s{i}"));
    for i in 0..256 {
        command.arg(format!("--disk=socket-path={},backend=null:1G", socket(i).display()));
    }
    let daemon = Killed(command.stderr(Stdio::null()).spawn().unwrap());
    wait::until("256 sockets", LIMIT, || Ok(socket(255).exists().then_some(()))).unwrap();
    let fronts: Vec<_> = (0..256).map(|i| UnixStream::connect(socket(i)).unwrap()).collect();
    for stream in &fronts {
        negotiate(stream.try_clone().unwrap());
    }
    let mut status = String::new();
    let path = format!("/proc/{}/status", daemon.0.id());
    fs::File::open(path).unwrap().read_to_string(&mut status).unwrap();
    let resident = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 64 << 10, "256 idle disks are {kib} KiB resident");
}

#[test]
fn the_scenario_in_the_documentation_is_one_that_runs() {
    let source = include_str!("kvm/ten_lines.rs");
    let start = source.find("pub fn restart").unwrap();
    let page = include_str!("../../docs/kvm-harness.md");
    assert!(page.contains(source[start..].trim_end()), "docs/kvm-harness.md shows something else");
}
