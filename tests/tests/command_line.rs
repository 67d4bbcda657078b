//! What keeps the daemon from starting: one line that says what and what to do, a status that is not zero, and nothing
//! left behind. And who may have an image open beside whom.
#![allow(clippy::unwrap_used)]

mod blk;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use blk::{LIMIT, Served, program};
use kickless_tests::image::Image;
use kickless_tests::process::{self, Process, find_program};
use kickless_tests::scene::Scene;
use kickless_tests::wait;

/// Runs the daemon, which must fail; what it says, log lines left out.
fn failing(program: &Path, args: &[&str]) -> Vec<String> {
    let mut command = Command::new("timeout");
    command.arg("10").arg(program).args(args).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}: {}\n{text}", output.status);
    assert!(output.stdout.is_empty());
    let is_log = |line: &&str| [" INFO", " WARN"].iter().any(|level| line.contains(level));
    text.lines().filter(|l| !is_log(l)).map(str::to_owned).collect()
}

/// Fails with one line that has all of `parts` in it.
fn fails_with(args: &[&str], parts: &[&str]) {
    let said = failing(&program(), args);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("vhost-blk: ") && parts.iter().all(|p| said[0].contains(p)), "{said:?}");
}

/// As `fails_with`, for what is wrong with the command line itself: where to find help is said too.
fn is_no_usage(args: &[&str], parts: &[&str]) {
    fails_with(args, &[parts, &["(see vhost-blk --help)"]].concat());
}

struct Place {
    scene: Scene,
    image: Image,
    file: String,
    socket: String,
}

impl Place {
    fn new() -> Place {
        let scene = Scene::new().unwrap();
        let image = Image::create(&scene, "disk.img", 1 << 20).unwrap();
        let file = format!("--blk-file={}", image.path().display());
        let socket = format!("--socket-path={}", scene.path("s").display());
        Place { scene, image, file, socket }
    }

    fn fails(&self, more: &[&str], parts: &[&str]) {
        fails_with(&[&[self.socket.as_str()], more].concat(), parts);
        assert!(!self.scene.path("s").exists(), "a socket is left behind");
    }
}

#[test]
fn images_that_cannot_be_served() {
    let p = Place::new();
    let path = |name: &str| format!("--blk-file={}", p.scene.path(name).display());
    p.fails(&[&path("none.img")], &["none.img", "No such file"]);
    p.fails(&["--blk-file=/dev/null"], &["/dev/null", "neither a regular file nor a block device"]);
    fs::create_dir(p.scene.path("dir")).unwrap();
    p.fails(&[&path("dir")], &["dir"]);
    p.fails(&[&path("dir"), "--read-only"], &["dir", "neither"]);
    Image::create(&p.scene, "empty.img", 0).unwrap();
    p.fails(&[&path("empty.img")], &["empty.img", "empty", "truncate"]);
    Image::create(&p.scene, "odd.img", 1000).unwrap();
    p.fails(&[&path("odd.img")], &["odd.img", "1000 bytes", "512"]);
    Image::create(&p.scene, "odd.img", 512 * 9).unwrap();
    p.fails(&[&path("odd.img"), "--block-size=4096"], &["4608 bytes", "4096"]);
    p.fails(&["--backend=ram:512", "--block-size=4096"], &["512 bytes", "4096"]);
    nix::unistd::mkfifo(&p.scene.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    p.fails(&[&path("fifo")], &["fifo", "neither"]);
    p.fails(&[&path("fifo"), "--read-only"], &["fifo", "neither"]);
}

#[test]
fn an_image_one_may_not_open() {
    let p = Place::new();
    let scratch = p.image.path().parent().unwrap();
    fs::set_permissions(scratch, Permissions::from_mode(0o777)).unwrap();
    // Root may open anything; be somebody else.
    let root = nix::unistd::geteuid().is_root();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let copy = p.scene.path("vhost-blk");
    process::copy(&program(), &copy).unwrap();
    let copy = copy.to_str().unwrap();
    let run = |more: &[&str]| {
        let args = [&[copy, &p.socket, &p.file], more].concat();
        if root {
            failing(Path::new("setpriv"), &[&nobody[..], &args].concat())
        } else {
            failing(Path::new(copy), &args[1..])
        }
    };
    fs::set_permissions(p.image.path(), Permissions::from_mode(0o444)).unwrap();
    let said = run(&[]);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains("disk.img for writing (use --read-only to only read it): Permission denied"),
        "{said:?}"
    );
    fs::set_permissions(p.image.path(), Permissions::from_mode(0o000)).unwrap();
    for more in [&[][..], &["--read-only"]] {
        let said = run(more);
        assert!(said.len() == 1 && said[0].contains("Permission denied"), "{said:?}");
    }
    assert!(!p.scene.path("s").exists());
}

#[test]
fn sockets_in_use_and_stale_ones() {
    let p = Place::new();
    let socket = p.scene.path("s");
    let held = UnixListener::bind(&socket).unwrap();
    fails_with(&[&p.socket, &p.file], &["in use by a running process"]);
    assert!(socket.exists(), "somebody else's socket is gone");
    drop(held);
    // What a process that was killed leaves is replaced.
    assert!(socket.exists());
    fs::rename(&socket, p.scene.path("disk.sock")).unwrap();
    let served = Served::start(&p.scene, &[&p.file]);
    wait::until("an answer", LIMIT, || Ok(std::os::unix::net::UnixStream::connect(&served.socket).ok()))
        .unwrap();
    let again = format!("--socket-path={}", served.socket.display());
    fails_with(&[&again, "--backend=ram:1M"], &["in use"]);
    served.terminate();
    // Anything else is left alone.
    fs::write(&socket, "precious").unwrap();
    fails_with(&[&p.socket, &p.file], &["exists and is not a socket"]);
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    let nowhere = format!("--socket-path={}", p.scene.path("none/s").display());
    fails_with(&[&nowhere, &p.file], &["cannot listen on", "No such file"]);
    let long = format!("--socket-path={}", p.scene.path(&"x".repeat(200)).display());
    fails_with(&[&long, &p.file], &["cannot listen on"]);
}

#[test]
fn numbers_out_of_range() {
    let p = Place::new();
    let usage = |option: &str, values: &[&str]| {
        for value in values {
            let arg = format!("{option}={value}");
            is_no_usage(&[&p.socket, &p.file, &arg], &[option, value]);
        }
    };
    usage("--cpus", &["4096", "x", "1-0", ""]);
    usage("--num-queues", &["0", "257", "65536", "-1"]);
    usage("--queue-size", &["0", "1", "2", "3", "100", "32769", "65536"]);
    usage("--block-size", &["0", "256", "1000", "131072"]);
    usage("--backend", &["", "ram", "ram:", "ram:0", "ram:513", "disk:1M", "ram:99999999T"]);
    usage("--poll", &["often"]);
    usage("--serial", &[&"1".repeat(21)]);
    usage("--direct", &["maybe"]);
    p.fails(&[&p.file, "--cpus=1000"], &["CPU 1000 cannot be used", "may run on"]);
    p.fails(&[&p.file, "--log=a=b=c"], &["--log 'a=b=c'"]);
    p.fails(&["--backend=ram:1000000T"], &["RAM disk"]);
}

#[test]
fn too_little_and_too_much() {
    let p = Place::new();
    p.fails(&[], &["--blk-file"]);
    fails_with(&[], &["nothing to serve"]);
    fails_with(&[&p.file], &["--socket-path"]);
    fails_with(&[&p.socket, "--fd=3", &p.file], &["socket-path", "fd", "exclude each other"]);
    fails_with(&[&p.socket, &p.file, "--backend=ram:1M"], &["blk-file", "backend", "exclude each other"]);
    fails_with(&["--fd=99", &p.file], &["descriptor 99", "Unix stream socket"]);
    fails_with(&["--fd=-1", &p.file], &["descriptor -1"]);
    fails_with(&["--fd=0", &p.file], &["descriptor 0"]);
    // Of two disks, the one that fails takes the other with it, and its socket.
    let other = format!("--disk=socket-path={},blk-file=/none", p.scene.path("t").display());
    p.fails(&[&p.file, &other], &["/none"]);
    let twice = format!("--disk=socket-path={},backend=ram:1M", p.scene.path("s").display());
    p.fails(&[&p.file, &twice], &["two disks have the socket"]);
}

#[test]
fn one_image_has_one_writer_or_many_readers() {
    let p = Place::new();
    let other = Scene::new().unwrap();
    let writer = Served::start(&other, &[&p.file]);
    p.fails(&[&p.file], &["disk.img", "another process has it open for writing"]);
    p.fails(&[&p.file, "--read-only"], &["another process has it open for writing"]);
    writer.terminate();
    let reader = Served::start(&other, &[&p.file, "--read-only"]);
    p.fails(&[&p.file], &["another process reads it"]);
    let second = Scene::new().unwrap();
    Served::start(&second, &[&p.file, "--read-only"]).terminate();
    reader.terminate();
    Served::start(&second, &[&p.file]).terminate();
    // Two disks of one daemon are two users of the image all the same.
    let twice = format!("--disk=socket-path={},{}", p.scene.path("t").display(), &p.file[2..]);
    p.fails(&[&p.file, &twice], &["open for writing"]);
}

/// An export of QEMU's lets others read and write beside it; only when it writes is there a conflict.
fn storage_daemon(scene: &Scene, qsd: &Path, image: &Image) -> Process {
    let args = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=f,filename={}", image.path().display()),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={}",
            scene.path("qsd.sock").display()
        ),
    ];
    Process::spawn(scene, "qsd", qsd, &args).unwrap()
}

#[test]
fn qemu_and_the_daemon_keep_each_other_away_from_an_image() {
    let Some(qsd) = find_program("qemu-storage-daemon") else {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let p = Place::new();
    let other = Scene::new().unwrap();
    let socket = other.path("qsd.sock");
    let mut qemu = storage_daemon(&other, &qsd, &p.image);
    wait::until("QEMU's socket", LIMIT, || {
        assert!(qemu.poll_exit()?.is_none(), "{}", qemu.stderr());
        Ok(socket.exists().then_some(()))
    })
    .unwrap();
    p.fails(&[&p.file], &["disk.img", "open for writing"]);
    p.fails(&[&p.file, "--read-only"], &["disk.img", "open for writing"]);
    qemu.kill9().unwrap();
    for mode in [&[][..], &["--read-only"]] {
        let served = Served::start(&other, &[&[p.file.as_str()], mode].concat());
        let mut qemu = storage_daemon(&other, &qsd, &p.image);
        let status = qemu.wait_exit(Duration::from_secs(10)).unwrap();
        assert!(!status.success() && qemu.stderr().contains("lock"), "{status}: {}", qemu.stderr());
        served.terminate();
    }
}
