//! The daemons as services: what a service manager hears, what its units say, and what the package has in it.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::process::{built, find_program, no_fault_points, run};
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::libc::SIGABRT;

const LIMIT: Duration = Duration::from_secs(60);

/// A daemon that is not left behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `program` under a service manager whose socket this is; its watchdog wants to hear of it every 0.3 s.
fn start(program: &Path, args: &[String], manager: &Path, hijack: &str) -> Result<Running> {
    let child = Command::new(program)
        .args(args)
        .env("NOTIFY_SOCKET", manager)
        .env("WATCHDOG_USEC", "300000")
        .env_remove("WATCHDOG_PID")
        .env("KICKLESS_HIJACK", hijack)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(Running(child))
}

/// The next message that has `what` in it.
fn hears(manager: &UnixDatagram, what: &str, within: Duration) -> Result<bool> {
    let until = Instant::now() + within;
    let mut bytes = [0; 512];
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        manager.set_read_timeout(Some(left))?;
        let Ok(n) = manager.recv(&mut bytes) else { continue };
        if std::str::from_utf8(&bytes[..n])?.lines().any(|line| line == what) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn socket(scene: &Scene) -> Result<(PathBuf, UnixDatagram)> {
    let path = scene.path("notify");
    let _ = std::fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path)?;
    Ok((path, socket))
}

fn disk(scene: &Scene) -> Vec<String> {
    let socket = format!("--socket-path={}", scene.path("s").display());
    ["--backend=null:1M".to_owned(), socket].into()
}

fn the_watchdog_hears_that_reactors_turn(scene: &Scene) -> Result<Option<String>> {
    let port = format!("--port=socket-path={},name=a", scene.path("n").display());
    let card = vec!["--switch".to_owned(), "--poll=event".into(), port];
    for (program, args) in [("vhost-blk", disk(scene)), ("vhost-net", card)] {
        let (path, manager) = socket(scene)?;
        let program = built(program).context("not built")?;
        let _running = start(&program, &args, &path, "")?;
        ensure!(hears(&manager, "READY=1", LIMIT)?, "it does not say that it is ready");
        for _ in 0..3 {
            ensure!(hears(&manager, "WATCHDOG=1", LIMIT)?, "it does not say that all is well");
        }
    }
    Ok(None)
}

fn the_watchdog_hears_nothing_of_a_reactor_that_hangs(scene: &Scene) -> Result<Option<String>> {
    let (path, manager) = socket(scene)?;
    let program = built("vhost-blk").context("vhost-blk is not built")?;
    let _running = start(&program, &disk(scene), &path, "reactor:hang")?;
    ensure!(hears(&manager, "READY=1", LIMIT)?, "it does not say that it is ready");
    ensure!(!hears(&manager, "WATCHDOG=1", Duration::from_secs(1))?, "all is said to be well");
    Ok(None)
}

fn a_thread_that_panics_ends_its_daemon(scene: &Scene) -> Result<Option<String>> {
    let program = built("vhost-blk").context("vhost-blk is not built")?;
    for thread in ["reactor", "session"] {
        let (path, _manager) = socket(scene)?;
        let mut running = start(&program, &disk(scene), &path, &format!("{thread}:panic"))?;
        let status = wait::until("the end", LIMIT, || {
            // Some front end, for there to be a session.
            let _ = UnixStream::connect(scene.path("s"));
            Ok(running.0.try_wait()?)
        })?;
        ensure!(status.signal() == Some(SIGABRT), "{thread}: {status}");
    }
    Ok(None)
}

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
}

/// Everything as it would lie on a host.
fn lay_out(root: &Path) -> Result<()> {
    let script = packaging().join("../scripts/install.sh");
    let profile = built("packaging").context("packaging is not built")?;
    let dir = profile.parent().and_then(Path::file_name).context("a profile")?.to_string_lossy();
    let profile = if dir == "debug" { "dev" } else { &dir };
    let (code, said) = run(script.to_str().unwrap(), &[root.to_str().unwrap(), profile])?;
    ensure!(code == 0, "{said}");
    Ok(())
}

/// Names of what is in a directory, in their order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut names =
        entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn no_systemd() -> Option<String> {
    ["systemd-analyze", "systemd-sysusers", "systemd-tmpfiles"]
        .into_iter()
        .find(|program| find_program(program).is_none())
        .map(|program| format!("{program} is missing (package systemd)"))
}

fn units_are_sound_and_hardened(scene: &Scene) -> Result<Option<String>> {
    lay_out(&scene.path("root"))?;
    // Programs where they are built, as nothing is installed here.
    let units = scene.path("units");
    std::fs::create_dir(&units)?;
    let bin = scene.path("root/usr/bin").display().to_string();
    for unit in std::fs::read_dir(packaging().join("systemd"))? {
        let unit = unit?;
        let text = std::fs::read_to_string(unit.path())?.replace("/usr/bin/", &format!("{bin}/"));
        std::fs::write(units.join(unit.file_name()), text)?;
    }
    for unit in ["vhost-blk@data.socket", "vhost-blk@data.service", "vhost-net@lan.service", "sriov.service"]
    {
        let path = units.join(unit);
        let template = unit.replace("data", "").replace("lan", "");
        if !path.exists() {
            std::fs::copy(units.join(template), &path)?;
        }
    }
    for unit in ["vhost-blk@data.socket", "vhost-blk@data.service", "vhost-net@lan.service", "sriov.service"]
    {
        let path = units.join(unit);
        let (code, said) = run(
            "systemd-analyze",
            &["verify", "--man=no", "--recursive-errors=one", path.to_str().unwrap()],
        )?;
        ensure!(code == 0 && !said.contains(unit), "{unit}: {code}: {said}");
    }
    // Tenths of systemd's measure from 0, nothing exposed, to 10.
    for (unit, most) in [("vhost-blk@data.service", "20"), ("vhost-net@lan.service", "40")] {
        let path = units.join(unit);
        let threshold = format!("--threshold={most}");
        let (code, said) = run(
            "systemd-analyze",
            &["security", "--offline=yes", &threshold, "--no-pager", path.to_str().unwrap()],
        )?;
        ensure!(code == 0, "{unit}: {said}");
        println!("{unit}: {}", said.lines().rfind(|line| line.contains("exposure")).unwrap_or_default());
    }
    Ok(None)
}

fn users_and_directories_are_made(scene: &Scene) -> Result<Option<String>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Some("only root can make users and directories of theirs".into()));
    }
    let root = scene.path("root");
    lay_out(&root)?;
    std::fs::create_dir_all(root.join("etc"))?;
    let at = format!("--root={}", root.display());
    let (code, said) = run("systemd-sysusers", &[&at, "kickless.conf"])?;
    ensure!(code == 0, "{said}");
    let users = std::fs::read_to_string(root.join("etc/passwd"))?;
    ensure!(users.lines().any(|line| line.starts_with("kickless:")), "{users}");
    let (code, said) = run("systemd-tmpfiles", &[&at, "--create", "kickless.conf"])?;
    ensure!(code == 0, "{said}");
    ensure!(root.join("var/lib/kickless").is_dir() && root.join("run/vhost-blk").is_dir(), "{said}");
    Ok(None)
}

fn pages_and_completions_are_made(scene: &Scene) -> Result<Option<String>> {
    let program = built("packaging").context("packaging is not built")?;
    let dir = scene.path("made");
    let (code, said) = run(program.to_str().unwrap(), &[dir.to_str().unwrap()])?;
    ensure!(code == 0, "{said}");
    // Of every program that is installed.
    let root = scene.path("root");
    lay_out(&root)?;
    let programs = names(&root.join("usr/bin"))?;
    let known = [
        ("sriov", "json"),
        ("vbench", "iodepth"),
        ("vdpactl", "sandbox"),
        ("vhost-blk", "sandbox"),
        ("vhost-net", "uplink"),
        ("vhostctl", "watch"),
    ];
    ensure!(programs == known.map(|(name, _)| name), "{programs:?}");
    for (name, option) in known {
        for file in [
            format!("completions/{name}.bash"),
            format!("completions/_{name}"),
            format!("completions/{name}.fish"),
        ] {
            let text = std::fs::read_to_string(dir.join(&file)).with_context(|| file.clone())?;
            ensure!(text.contains(option), "{file} does not know {option}");
        }
        let page = std::fs::read_to_string(dir.join(format!("man/{name}.1")))?;
        ensure!(page.contains(".TH"), "{name}.1: {page}");
        ensure!(root.join(format!("usr/share/man/man1/{name}.1.gz")).exists(), "{name}.1 is not installed");
    }
    // All completions have their place, and so has each page of a subcommand.
    let share = root.join("usr/share");
    let places = ["bash-completion/completions", "zsh/vendor-completions", "fish/vendor_completions.d"];
    let mut installed =
        places.iter().map(|place| names(&share.join(place))).collect::<Result<Vec<_>>>()?.concat();
    installed.sort();
    ensure!(installed == names(&dir.join("completions"))?, "{installed:?}");
    let pages: Vec<_> = names(&dir.join("man"))?.iter().map(|page| format!("{page}.gz")).collect();
    ensure!(names(&share.join("man/man1"))? == pages, "{pages:?}");
    let page = std::fs::read_to_string(dir.join("man/vhost-blk.1"))?;
    ensure!(page.contains("blk\\-file") && page.contains("sandbox"), "{page}");
    Ok(None)
}

fn main() -> ExitCode {
    let tests = vec![
        Test::new("the_watchdog_hears_that_reactors_turn", the_watchdog_hears_that_reactors_turn, || None),
        Test::new(
            "the_watchdog_hears_nothing_of_a_reactor_that_hangs",
            the_watchdog_hears_nothing_of_a_reactor_that_hangs,
            no_fault_points,
        ),
        Test::new(
            "a_thread_that_panics_ends_its_daemon",
            a_thread_that_panics_ends_its_daemon,
            no_fault_points,
        ),
        Test::new("units_are_sound_and_hardened", units_are_sound_and_hardened, no_systemd),
        Test::new("users_and_directories_are_made", users_and_directories_are_made, no_systemd),
        Test::new("pages_and_completions_are_made", pages_and_completions_are_made, || None),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_FAULTS")
}
