//! Where a real daemon's reactors run, and what it says when memory is short.
#![allow(clippy::unwrap_used)]

mod guest;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::image::{Image, MIB};
use kickless_tests::process::{Process, built};
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, geteuid};
use poll_engine::engine::placement::{CpuList, usable_cpus};

const LIMIT: Duration = Duration::from_secs(60);

fn vhost_blk(scene: &Scene) -> Result<(String, Vec<String>)> {
    let socket = scene.path("disk").display().to_string();
    let program = built("vhost-blk").context("not built")?.display().to_string();
    Ok((program, vec!["--backend=null:64M".into(), "--poll=event".into(), format!("--socket-path={socket}")]))
}

/// Starts `wrapped`, a program and its arguments, and waits for the disk's socket.
fn start(scene: &Scene, wrapped: &[String]) -> Result<Process> {
    let mut process = Process::spawn(scene, "daemon", Path::new(&wrapped[0]), &wrapped[1..])?;
    wait::until("the socket", LIMIT, || {
        ensure!(process.poll_exit()?.is_none(), "{}", process.stderr());
        Ok(scene.path("disk").exists().then_some(()))
    })?;
    Ok(process)
}

fn end(process: &mut Process) -> Result<()> {
    process.signal(Signal::SIGTERM)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    Ok(())
}

/// On which CPUs each reactor may run, by the kernel's word.
fn reactors(of: Pid) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{of}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if field("Name:").is_some_and(|name| name.starts_with("reactor")) {
            found.push(field("Cpus_allowed_list:").unwrap_or_default().to_owned());
        }
    }
    found.sort();
    Ok(found)
}

fn says(program: &str, args: &[String], more: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(program).args(args).args(more).output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).trim().to_owned()))
}

fn reactors_are_placed(scene: &Scene) -> Result<Option<String>> {
    let usable = usable_cpus()?;
    let (program, args) = vhost_blk(scene)?;
    let last = usable.last().context("no CPU")?.to_string();
    let others = CpuList(usable[..usable.len() - 1].to_vec()).to_string();
    // All but the last CPU are somebody else's; of one that has but one, nobody's.
    let off: Vec<String> =
        if usable.len() > 1 { vec![format!("--housekeeping={others}")] } else { Vec::new() };
    let off: Vec<&str> = off.iter().map(String::as_str).collect();
    let auto = [&["--cpus=auto"], &off[..]].concat();
    let (well, said) = says(&program, &args, &[&auto[..], &["--check"]].concat())?;
    let chosen = format!("reactors on CPU {last}");
    ensure!(well && said.starts_with("nothing is wrong, 1 disks; ") && said.contains(&chosen), "{said}");

    let all: Vec<String> = [program.clone()].into_iter().chain(args.clone()).collect();
    let mut daemon =
        start(scene, &[&all[..], &auto.iter().map(|&s| s.to_owned()).collect::<Vec<_>>()].concat())?;
    ensure!(daemon.stderr().contains(&chosen), "{}", daemon.stderr());
    ensure!(reactors(daemon.pid())? == [last.clone()], "{:?}", reactors(daemon.pid()));
    end(&mut daemon)?;

    // The mask that it was started with bounds the choice.
    let first = usable[0].to_string();
    let bound = ["taskset".into(), "-c".into(), first.clone(), program.clone()];
    let bound = [&bound[..], &args, &["--cpus=auto:1".to_owned()]].concat();
    let mut daemon = start(scene, &bound)?;
    ensure!(reactors(daemon.pid())? == [first], "{:?}", reactors(daemon.pid()));
    end(&mut daemon)?;

    let many = format!("--cpus=auto:{}", usable.len() + 1);
    let (well, said) = says(&program, &args, &[&many, "--check"])?;
    ensure!(!well && said.contains("reactors need a CPU each"), "{said}");
    let (well, said) = says(&program, &args, &["--guest-cpus=0", "--cpus=0", "--check"])?;
    ensure!(!well && said.contains("--guest-cpus goes with --cpus auto"), "{said}");
    // And in a file.
    let file = scene.path("blk.toml");
    let toml = format!(
        "cpus = 'auto:1'\nhousekeeping = '{others}'\nsocket-path = '{}'\nbackend = 'null:1M'\n",
        scene.path("x").display()
    );
    if usable.len() > 1 {
        std::fs::write(&file, toml)?;
        let (well, said) = says(&program, &[], &["--config", file.to_str().unwrap(), "--check"])?;
        ensure!(well && said.contains(&chosen), "{said}");
    }
    Ok(None)
}

fn no_rights_to_give_up() -> Option<String> {
    (!geteuid().is_root()).then(|| "needs root, to take CAP_IPC_LOCK away".into())
}

/// With a limit that is too low the daemon says which one it needs, and with that one it is content.
fn the_memlock_limit_that_is_named_is_enough(scene: &Scene) -> Result<Option<String>> {
    // Of disks that the kernel serves.
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    if !image.takes_direct_io() {
        return Ok(Some("files of this directory take no direct I/O, and so no registered memory".into()));
    }
    let (program, mut args) = vhost_blk(scene)?;
    args[0] = format!("--blk-file={}", image.path().display());
    let limited = |limit_kib: u64| -> Vec<String> {
        let memlock = format!("--memlock={}", limit_kib << 10);
        let bound = ["setpriv", "--bounding-set=-ipc_lock", "prlimit", &memlock, &program].map(str::to_owned);
        [&bound[..], &args, &["--fixed-buffers=on".to_owned()]].concat()
    };
    let serve = |limit_kib: u64| -> Result<Process> {
        let mut daemon = start(scene, &limited(limit_kib))?;
        let socket = format!("--socket-path={}", scene.path("disk").display());
        let vbench = built("vbench").context("vbench is not built")?;
        let load = ["run", "--rw=randread", "--number-ios=100", "--iodepth=64", "--bs=64k", &socket]
            .map(str::to_owned);
        let mut load = Process::spawn(scene, "vbench", &vbench, &load)?;
        let status = load.wait_exit(LIMIT)?;
        ensure!(status.success(), "{}\n{}", load.stderr(), daemon.stderr());
        end(&mut daemon)?;
        Ok(daemon)
    };
    // KiB, of the line that has this in it.
    let figure = |said: &str, what: &str| -> Result<u64> {
        let line = said.lines().find(|line| line.contains(what)).with_context(|| said.to_owned())?;
        let (_, rest) = line.split_once("set LimitMEMLOCK=").with_context(|| line.to_owned())?;
        let (_, kib) = rest.split_once("ulimit -l ").with_context(|| line.to_owned())?;
        Ok(kib.chars().take_while(char::is_ascii_digit).collect::<String>().parse()?)
    };
    // Too little for a reactor's own ring; kernels before 6.x may not count that.
    let mut limit = 4;
    let bound = limited(limit);
    let mut daemon = Process::spawn(scene, "short", Path::new(&bound[0]), &bound[1..])?;
    let ended = wait::until("a daemon", LIMIT, || {
        Ok(daemon.poll_exit()?.map(Some).or_else(|| scene.path("disk").exists().then_some(None)))
    })?;
    if ended.is_some() {
        limit = figure(&daemon.stderr(), "cannot start a reactor")?;
    } else {
        end(&mut daemon)?;
    }
    // Enough for that, and too little for a guest.
    let said = serve(limit)?.stderr();
    ensure!(said.contains(&format!("and is {limit} KiB: ")), "{said}");
    let enough = figure(&said, "stays unregistered")?;
    let said = serve(enough)?.stderr();
    ensure!(!said.contains("unregistered"), "with {enough} KiB: {said}");
    Ok(None)
}

fn main() -> ExitCode {
    let tests = vec![
        Test::new("reactors_are_placed", reactors_are_placed, || None),
        Test::new(
            "the_memlock_limit_that_is_named_is_enough",
            the_memlock_limit_that_is_named_is_enough,
            no_rights_to_give_up,
        ),
        Test::new("a_machine_of_two_nodes", guest::two_nodes, guest::missing_needs),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_PLACEMENT")
}
