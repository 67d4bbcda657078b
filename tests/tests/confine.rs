//! What is left of its rights to a daemon that serves: nothing that whoever has got into one of its threads could use. A
//! build with fault points has a thread of it try.

use std::fs::Permissions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::daemon::{Daemon, Medium, Options};
use kickless_tests::netns::Netns;
use kickless_tests::process::{self, Process, built, no_fault_points, run};
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
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
fn attempt(scene: &Scene, serving: Serving, thread: &str, what: &str, args: &[&str]) -> Result<Outcome> {
    let program = Command::new(built(serving.0).context("no daemon")?);
    attempt_by(scene, program, serving.1, thread, what, args)
}

/// As [`attempt`], by a command to which the daemon's options are added.
fn attempt_by(
    scene: &Scene,
    mut program: Command,
    serving: &[&str],
    thread: &str,
    what: &str,
    args: &[&str],
) -> Result<Outcome> {
    let log = scene.path("hijacked.log");
    // Its sockets are in a directory of their own.
    let socket = scene.path("sockets/s");
    std::fs::create_dir_all(scene.path("sockets"))?;
    std::fs::write(scene.path("victim"), "to be removed")?;
    let mut child = program
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

/// What joins a switch to the host, by interfaces that are there in a network namespace; what makes such an interface
/// again; and what the daemon says once it has it.
const UPLINKS: &[(&str, &str, &str)] = &[
    ("tap=up0", "ip tuntap add up0 mode tap vnet_hdr && ip link set up0 up", "is there again"),
    (
        "af-packet=up0",
        "ip link add up0 type veth peer up1 && ip link set up1 up && ip link set up0 up",
        "is back",
    ),
    (
        "af-xdp=up0,queue=0",
        "ip link add up0 type veth peer up1 && ip link set up1 up && ip link set up0 up",
        "AF_XDP on queue 0",
    ),
];

/// Interfaces of the host's are opened by threads that do nothing else, and again when they come back. Whoever has got into
/// another one has no more of it than where there are none.
fn so_they_do_where_interfaces_are_opened_again(scene: &Scene) -> Result<Option<String>> {
    let has_landlock = has_landlock(scene)?;
    let mut wrong = Vec::new();
    for &(uplink, make, back) in UPLINKS {
        let netns = Netns::new(scene, "netns")?;
        // Another one for each daemon: the kernel lets go of a dead one's when it comes to it.
        let fresh = || netns.check(&format!("ip link delete up0 2>/dev/null; {make}"));
        let option = format!("--uplink={uplink}");
        let serving = ["--switch", "--poll=event", &option];
        let program = built("vhost-net").context("no daemon")?;
        let inside = || {
            let [enter, rest @ ..] = netns.enter();
            let mut command = Command::new(enter);
            command.args(rest).arg(&program);
            command
        };
        for &(thread, what, expected) in ATTEMPTS {
            if thread == "starter" || expected == Refused(EACCES) && thread != "reactor" && !has_landlock {
                continue;
            }
            fresh()?;
            let outcome = attempt_by(scene, inside(), &serving, thread, what, &[])?;
            if outcome != expected {
                wrong.push(format!("{uplink}: {thread}, {what}: {outcome:?}, not {expected:?}"));
            }
        }
        for (what, expected) in [("program", Killed), ("process", Killed), ("user", Killed), ("code", Killed)]
        {
            fresh()?;
            let outcome = attempt_by(scene, inside(), &serving, "starter", what, &[])?;
            if outcome != expected {
                wrong.push(format!("{uplink}: starter, {what}: {outcome:?}, not {expected:?}"));
            }
        }
        fresh()?;
        comes_back(scene, &netns, &serving, (make, back)).with_context(|| uplink.to_owned())?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok((!has_landlock).then(|| "files by name: no Landlock on this kernel".to_owned()))
}

/// A daemon that is confined goes on with an interface that was deleted and is made again.
fn comes_back(scene: &Scene, netns: &Netns, serving: &[&str], (make, back): (&str, &str)) -> Result<()> {
    let program = built("vhost-net").context("no daemon")?;
    let socket = scene.path("s");
    let options = format!("{} --socket-path={}", serving.join(" "), socket.display());
    let mut process = netns.start(scene, "uplink", &format!("{} {options}", program.display()))?;
    let mut says = |what: &str, times: usize| {
        wait::until(what, LIMIT, || {
            if let Some(status) = process.poll_exit()? {
                bail!("{status}: {}", process.stderr_tail());
            }
            Ok((process.stderr().matches(what).count() >= times).then_some(()))
        })
    };
    says(" confined: seccomp, ", 1)?;
    netns.check("ip link delete up0")?;
    says("the link is down until", 1)?;
    netns.check(make)?;
    // One has said so at the start as well.
    says(back, if back.contains("AF_XDP") { 2 } else { 1 })?;
    // Capabilities are with those that open, and whoever starts them.
    for (name, capabilities) in of_threads(process.pid(), "CapPrm")? {
        let opens = ["starter", "tap-return", "uplink-return"].contains(&name.as_str());
        ensure!(opens || capabilities == "0000000000000000", "{name}: {capabilities}");
    }
    process.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr_tail());
    Ok(())
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
    // A file says it, too; and less than the command line.
    let file = scene.path("blk.toml");
    let socket = scene.path("of-file.sock");
    let text = format!(
        "user = 'root'\nsandbox = 'off'\nbackend = 'null:1M'\nsocket-path = '{}'\n",
        socket.display()
    );
    for (text, options, is_confined) in [
        (text.replace("'root'", "'nobody'"), &[][..], false),
        (text.replace("'root'", "65534").replace("'off'", "true"), &[], true),
        (text, &["--user=nobody", "--sandbox=on"], true),
    ] {
        std::fs::write(&file, text)?;
        let options = options.iter().map(|&option: &&str| option.to_owned());
        let args: Vec<_> = std::iter::once(format!("--config={}", file.display())).chain(options).collect();
        let program = built("vhost-blk").context("no daemon")?;
        let mut process = Process::spawn(scene, "of-file", &program, &args)?;
        wait::until("the socket", LIMIT, || Ok(socket.exists().then_some(())))?;
        wait::until("to be nobody", LIMIT, || {
            Ok(expect_all(process.pid(), "Uid", &["65534"; 4].join("\t")).ok())
        })?;
        let seccomp = if is_confined { "2" } else { "0" };
        wait::until("to be confined", LIMIT, || Ok(expect_all(process.pid(), "Seccomp", seccomp).ok()))?;
        process.signal(nix::sys::signal::Signal::SIGTERM)?;
        let status = process.wait_exit(LIMIT)?;
        ensure!(status.success(), "{status}: {}", process.stderr_tail());
    }
    Ok(None)
}

/// Socket and image are passed as descriptors to a user that may reach neither by a name.
fn nothing_is_opened_where_all_is_passed(scene: &Scene) -> Result<Option<String>> {
    if !geteuid().is_root() {
        return Ok(Some("only root has what another user may not open".into()));
    }
    let dir = scene.path("own");
    std::fs::create_dir(&dir)?;
    let image = dir.join("disk.img");
    std::fs::File::create(&image)?.set_len(8 << 20)?;
    std::fs::set_permissions(&image, Permissions::from_mode(0o600))?;
    std::fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    // It can be executed by that user, where what is built perhaps cannot be reached.
    let program = scene.path("vhost-blk");
    process::copy(&built("vhost-blk").context("no daemon")?, &program)?;
    std::fs::set_permissions(scene.path(""), Permissions::from_mode(0o711))?;
    let socket = dir.join("s");
    let listener = UnixListener::bind(&socket)?;
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let number = listener.as_raw_fd();
    for (mode, direct, read_only) in
        [("<>", "on", false), ("<>", "off", false), ("<", "off", true), ("<", "off", false)]
    {
        let flag = if read_only { "--read-only" } else { "" };
        let command = format!(
            "exec 9{mode}{}; exec setpriv --reuid=65534 --regid=65534 --clear-groups -- {} --fd={number} \
             --blk-file=/dev/fd/9 --direct={direct} {flag}",
            image.display(),
            program.display()
        );
        let args = ["-c".to_owned(), command];
        let mut process = Process::spawn(scene, "passed", Path::new("/bin/sh"), &args)?;
        if mode == "<" && !read_only {
            let status = process.wait_exit(LIMIT)?;
            let said = process.stderr_tail();
            ensure!(!status.success() && said.contains("use --read-only"), "{status}: {said}");
            continue;
        }
        let load: &[&str] =
            if read_only { &["--rw=randread"] } else { &["--rw=randwrite", "--verify=crc32c"] };
        let at = format!("--socket-path={}", socket.display());
        let vbench = built("vbench").context("no vbench")?;
        let (code, said) = run(
            vbench.to_str().context("a path")?,
            &[&["run", &at, "--bs=4k", "--iodepth=8", "--size=8M"], load].concat(),
        )?;
        ensure!(code == 0, "{said}: {}", process.stderr_tail());
        expect_all(process.pid(), "Uid", "65534\t65534\t65534\t65534")?;
        process.signal(nix::sys::signal::Signal::SIGTERM)?;
        let status = process.wait_exit(LIMIT)?;
        ensure!(status.success(), "{status}: {}", process.stderr_tail());
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
        Test::new(
            "so_they_do_where_interfaces_are_opened_again",
            so_they_do_where_interfaces_are_opened_again,
            || no_fault_points().or_else(Netns::missing_needs),
        ),
        Test::new("every_thread_has_given_up_its_rights", every_thread_has_given_up_its_rights, || None),
        Test::new("so_has_every_thread_of_a_switch", so_has_every_thread_of_a_switch, || None),
        Test::new("the_api_reaches_what_it_is_allowed", the_api_reaches_what_it_is_allowed, || None),
        Test::new("root_becomes_the_user", root_becomes_the_user, || None),
        Test::new("nothing_is_opened_where_all_is_passed", nothing_is_opened_where_all_is_passed, || None),
        Test::new("the_root_can_be_another_directory", the_root_can_be_another_directory, || None),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_FAULTS")
}
