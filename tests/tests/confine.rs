//! What is left of its rights to a daemon that serves: nothing that whoever has got into one of its threads could use. A
//! build with fault points has a thread of it try.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::daemon::{Daemon, Medium, Options};
use kickless_tests::process::{Process, built, faulty, no_fault_points};
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::libc::{EACCES, ENOSYS, SIGSYS};
use nix::unistd::geteuid;

const LIMIT: Duration = Duration::from_secs(60);

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused(i32),
    Killed,
}
use Outcome::{Done, Killed, Refused};

/// A thread, what it tries, and what becomes of it.
const ATTEMPTS: &[(&str, &str, Outcome)] = &[
    ("reactor", "open", Refused(ENOSYS)),
    ("reactor", "create", Refused(ENOSYS)),
    ("reactor", "remove", Refused(ENOSYS)),
    // Where no filter of system calls sees it.
    ("reactor", "uring-open", Refused(EACCES)),
    ("reactor", "uring-socket", Refused(EACCES)),
    ("reactor", "ring", Killed),
    ("reactor", "socket", Killed),
    ("reactor", "local-socket", Killed),
    ("reactor", "process", Killed),
    ("reactor", "program", Killed),
    ("reactor", "trace", Killed),
    ("reactor", "signal", Refused(ENOSYS)),
    ("reactor", "user", Killed),
    ("reactor", "code", Killed),
    ("session", "open", Refused(ENOSYS)),
    ("session", "remove", Refused(EACCES)),
    ("session", "socket", Killed),
    // It would have UDP where neither filters nor Landlock see it.
    ("session", "ring", Killed),
    ("session", "process", Killed),
    ("session", "program", Killed),
    ("session", "code", Killed),
    ("starter", "open", Refused(ENOSYS)),
    ("starter", "socket", Killed),
    ("starter", "process", Killed),
    ("starter", "program", Killed),
    ("starter", "code", Killed),
    ("main", "open", Refused(EACCES)),
    ("main", "create", Refused(EACCES)),
    ("main", "remove", Refused(EACCES)),
    ("main", "ring", Killed),
    ("main", "socket", Killed),
    ("main", "process", Killed),
    ("main", "program", Killed),
    ("main", "trace", Killed),
    ("main", "user", Killed),
];

/// A daemon, and what it serves.
type Serving = (&'static str, &'static [&'static str]);
const DISK: Serving = ("vhost-blk", &["--backend=null:1M"]);
const CARD: Serving = ("vhost-net", &["--switch", "--poll=event"]);

/// Starts a daemon of which `thread` tries `what`.
fn attempt(
    scene: &Scene,
    (program, serving): Serving,
    thread: &str,
    what: &str,
    args: &[&str],
) -> Result<Outcome> {
    let program = faulty(program).context("no daemon with fault points")?;
    let log = scene.path("hijacked.log");
    // Its sockets are in a directory of their own.
    let socket = scene.path("sockets/s");
    std::fs::create_dir_all(scene.path("sockets"))?;
    std::fs::write(scene.path("victim"), "to be removed")?;
    let mut child = Command::new(program)
        .args(serving)
        .arg(format!("--socket-path={}", socket.display()))
        .args(args)
        .current_dir(scene.path(""))
        .env("KICKLESS_HIJACK", format!("{thread}:{what}"))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log)?)
        .spawn()?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let prefix = format!("hijack {what}: ");
    let outcome = wait::until("what becomes of it", LIMIT, || {
        let text = said();
        let result = text.split_once(&prefix).and_then(|(_, rest)| rest.split_once('\n'));
        if let Some((number, _)) = result {
            return Ok(Some(match number.parse::<i32>()? {
                0 => Done,
                errno => Refused(-errno),
            }));
        }
        match child.try_wait()? {
            Some(status) if status.signal() == Some(SIGSYS) => Ok(Some(Killed)),
            // A program in the place of the daemon.
            Some(status) if status.success() && what == "program" => Ok(Some(Done)),
            Some(status) => bail!("{status}: {text}"),
            None => Ok(None),
        }
    });
    let _ = child.kill();
    child.wait()?;
    outcome.with_context(|| format!("{thread}, {what}: {}", said()))
}

/// Whether the kernel limits what is done with files by their names: a daemon says what it has found.
fn has_landlock(scene: &Scene) -> Result<bool> {
    let mut daemon = Options::default().spawn(scene, "asked", Medium::Null(1 << 20))?;
    // Its sockets are there before it has said so.
    daemon.stats()?;
    Ok(daemon.times_said(", Landlock ABI ") == 1)
}

fn hijacked_threads_reach_nothing(scene: &Scene) -> Result<Option<String>> {
    let has_landlock = has_landlock(scene)?;
    let mut wrong = Vec::new();
    for serving in [DISK, CARD] {
        for &(thread, what, expected) in ATTEMPTS {
            if expected == Refused(EACCES) && thread != "reactor" && !has_landlock {
                continue;
            }
            let outcome = attempt(scene, serving, thread, what, &[])?;
            if outcome != expected {
                wrong.push(format!("{}: {thread}, {what}: {outcome:?}, not {expected:?}", serving.0));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let missing = (!has_landlock).then(|| "files by name: no Landlock on this kernel".to_owned());
    Ok(missing)
}

/// The attempts are such that they come off where nothing is in their way. (To trace the test is not tried.)
fn without_a_sandbox_they_reach_everything(scene: &Scene) -> Result<Option<String>> {
    for what in ["open", "create", "remove", "socket", "process", "ring", "code", "program"] {
        for serving in [DISK, CARD] {
            let outcome = attempt(scene, serving, "reactor", what, &["--sandbox=off"])?;
            ensure!(outcome == Done, "{}: {what}: {outcome:?}", serving.0);
        }
    }
    ensure!(scene.path("made").exists(), "nothing was made");
    // The ring is limited all the same.
    let outcome = attempt(scene, DISK, "reactor", "uring-open", &["--sandbox=off"])?;
    ensure!(outcome == Refused(EACCES), "{outcome:?}");
    Ok(None)
}

/// The fields of all threads of a process, by their names.
fn of_threads(pid: nix::unistd::Pid, field: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let status = std::fs::read_to_string(task.join("status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let name = std::fs::read_to_string(task.join("comm"))?.trim().to_owned();
        found.push((name, value.context("no such field")?.trim().to_owned()));
    }
    Ok(found)
}

fn expect_all(pid: nix::unistd::Pid, field: &str, expected: &str) -> Result<()> {
    let found = of_threads(pid, field)?;
    ensure!(found.len() >= 4, "{found:?}");
    ensure!(found.iter().all(|(_, value)| value == expected), "{field}, not {expected}: {found:?}");
    Ok(())
}

/// A daemon with all kinds of threads.
fn start(scene: &Scene, further: &[&str]) -> Result<Daemon> {
    let record = format!("--record={}", scene.path("capture").display());
    let args = [&[record.as_str()], further].concat();
    Options::default().upgradable().args(&args).spawn(scene, "daemon", Medium::Null(1 << 20))
}

fn every_thread_has_given_up_its_rights(scene: &Scene) -> Result<Option<String>> {
    let mut daemon = start(scene, &[])?;
    // Statistics, so that all has begun.
    daemon.stats()?;
    for field in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        // Where the bounding set was not ours to reduce, nothing can be had of it: no_new_privs.
        if field != "CapBnd" || geteuid().is_root() {
            expect_all(daemon.pid(), field, "0000000000000000")?;
        }
    }
    expect_all(daemon.pid(), "NoNewPrivs", "1")?;
    expect_all(daemon.pid(), "Seccomp", "2")?;
    ensure!(daemon.times_said("confined: seccomp, ") == 1, "it does not say so");
    daemon.terminate()?;
    Ok(None)
}

/// One that is joined to no interface of the host's needs none either; one that is keeps what it opens those again by.
fn so_has_every_thread_of_a_switch(scene: &Scene) -> Result<Option<String>> {
    let capture = format!("--pcap={}", scene.path("capture").display());
    let control = format!("--control={}", scene.path("control").display());
    let socket = format!("--socket-path={}", scene.path("s").display());
    let args = ["--switch".to_owned(), "--poll=event".into(), capture, control, socket];
    let mut process = Process::spawn(scene, "vhost-net", &built("vhost-net").context("no daemon")?, &args)?;
    let fields = [
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ];
    let outcome = wait::until("all threads, without rights", LIMIT, || {
        if let Some(status) = process.poll_exit()? {
            bail!("{status}: {}", process.stderr_tail());
        }
        // They begin one after the other.
        let pid = process.pid();
        let all = fields.iter().all(|(field, expected)| expect_all(pid, field, expected).is_ok());
        let threads = || of_threads(pid, "Seccomp").map_or(0, |all| all.len());
        // The first one, a reactor, a session, the writer of the capture, and who hands over.
        Ok((all && threads() >= 5).then_some(()))
    });
    outcome.with_context(|| format!("{:?}", of_threads(process.pid(), "CapPrm")))?;
    process.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr_tail());
    Ok(None)
}

/// What is asked for over the API is done in the directories that were named for it, and nowhere else.
fn the_api_reaches_what_it_is_allowed(scene: &Scene) -> Result<Option<String>> {
    if !has_landlock(scene)? {
        return Ok(Some("no Landlock on this kernel".into()));
    }
    for dir in ["allowed", "other"] {
        std::fs::create_dir_all(scene.path(dir))?;
        std::fs::write(scene.path(dir).join("disk.img"), [0; 4096])?;
    }
    for (program, serving, list) in
        [("vhost-blk", "", "/v1/disks"), ("vhost-net", "switch = true\npoll = 'event'\n", "/v1/ports")]
    {
        let config = scene.path("config/daemon.toml");
        std::fs::create_dir_all(scene.path("config"))?;
        let api = scene.path("config/api");
        let text =
            format!("{serving}api = '{}'\nallow = ['{}']\n", api.display(), scene.path("allowed").display());
        std::fs::write(&config, text)?;
        let args = [format!("--config={}", config.display())];
        let mut process = Process::spawn(scene, program, &built(program).context("no daemon")?, &args)?;
        let client = control::client::Client::new(&api);
        wait::until("the API", LIMIT, || {
            if let Some(status) = process.poll_exit()? {
                bail!("{status}: {}", process.stderr_tail());
            }
            Ok(client.call("GET", "/v1/daemon", None).ok())
        })?;
        let add = |images: &str, sockets: &str| -> Result<(u16, String)> {
            let path = |dir: &str, name: &str| scene.path(dir).join(name).display().to_string();
            let mut spec = serde_json::json!({ "name": "a", "socket-path": path(sockets, "a.sock") });
            if program == "vhost-blk" {
                spec["blk-file"] = path(images, "disk.img").into();
                spec["direct"] = false.into();
            }
            let answer = client.call("POST", list, Some(&spec))?;
            Ok((answer.status, String::from_utf8_lossy(&answer.body).into_owned()))
        };
        let (status, said) = add("allowed", "other")?;
        ensure!(status == 409 && said.contains("ermission denied"), "{program}: {status} {said}");
        if program == "vhost-blk" {
            let (status, said) = add("other", "allowed")?;
            ensure!(status == 409 && said.contains("ermission denied"), "{program}: {status} {said}");
        }
        let (status, said) = add("allowed", "allowed")?;
        ensure!(status == 201, "{program}: {status} {said}");
        let answer = client.call("POST", "/v1/save", None)?;
        ensure!(answer.status == 200, "{program}: {}", String::from_utf8_lossy(&answer.body));
        let answer = client.call("DELETE", &format!("{list}/a"), None)?;
        ensure!(answer.status == 204, "{program}: {}", String::from_utf8_lossy(&answer.body));
        process.signal(nix::sys::signal::Signal::SIGTERM)?;
        let status = process.wait_exit(LIMIT)?;
        ensure!(status.success(), "{status}: {}", process.stderr_tail());
    }
    Ok(None)
}

fn root_becomes_the_user(scene: &Scene) -> Result<Option<String>> {
    if !geteuid().is_root() {
        return Ok(Some("only root can become somebody else".into()));
    }
    for sandbox in ["on", "off"] {
        let _ = std::fs::remove_file(scene.path("capture"));
        let mut daemon = start(scene, &["--user=nobody", &format!("--sandbox={sandbox}")])?;
        daemon.stats()?;
        expect_all(daemon.pid(), "Uid", "65534\t65534\t65534\t65534")?;
        expect_all(daemon.pid(), "Gid", "65534\t65534\t65534\t65534")?;
        expect_all(daemon.pid(), "Groups", "65534")?;
        expect_all(daemon.pid(), "CapPrm", "0000000000000000")?;
        daemon.terminate()?;
    }
    Ok(None)
}

/// All paths are below the new root.
fn the_root_can_be_another_directory(scene: &Scene) -> Result<Option<String>> {
    if !geteuid().is_root() {
        return Ok(Some("only root can have another root".into()));
    }
    std::fs::write(scene.path("disk.img"), [0; 4096])?;
    let program = built("vhost-blk").context("no daemon")?;
    let root = format!("--chroot={}", scene.path("").display());
    let args =
        [root.as_str(), "--socket-path=/in.sock", "--blk-file=/disk.img", "--direct=off"].map(str::to_owned);
    let mut process = Process::spawn(scene, "chroot", &program, &args)?;
    wait::until("its socket", LIMIT, || {
        if let Some(status) = process.poll_exit()? {
            bail!("{status}: {}", process.stderr_tail());
        }
        Ok(scene.path("in.sock").exists().then_some(()))
    })?;
    let root = std::fs::read_link(format!("/proc/{}/root", process.pid()))?;
    ensure!(root == scene.path("").canonicalize()?, "{}", root.display());
    process.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr_tail());
    // It has taken it away, by the same name.
    ensure!(!scene.path("in.sock").exists(), "a socket is left behind");
    Ok(None)
}

fn main() -> ExitCode {
    let tests = vec![
        Test::new("hijacked_threads_reach_nothing", hijacked_threads_reach_nothing, no_fault_points),
        Test::new(
            "without_a_sandbox_they_reach_everything",
            without_a_sandbox_they_reach_everything,
            no_fault_points,
        ),
        Test::new("every_thread_has_given_up_its_rights", every_thread_has_given_up_its_rights, || None),
        Test::new("so_has_every_thread_of_a_switch", so_has_every_thread_of_a_switch, || None),
        Test::new("the_api_reaches_what_it_is_allowed", the_api_reaches_what_it_is_allowed, || None),
        Test::new("root_becomes_the_user", root_becomes_the_user, || None),
        Test::new("the_root_can_be_another_directory", the_root_can_be_another_directory, || None),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_FAULTS")
}
