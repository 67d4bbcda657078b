//! Probes: that the daemons have those that the scripts for bpftrace name, and that the scripts run on a daemon under load.
#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::process::{Process, built, find_program};
use kickless_tests::runner::{self, Test};
use kickless_tests::scenario::{Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;
use kickless_tests::vmm::device::Device;
use kickless_tests::wait;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, geteuid};

const LIMIT: Duration = Duration::from_secs(90);
const GIB: u64 = 1 << 30;
/// With this set, what cannot be had fails.
const REQUIRE: &str = "KICKLESS_REQUIRE_BPFTRACE";
/// Scripts, and the daemons that they are for.
const SCRIPTS: [(&str, &[&str]); 4] = [
    ("latency", &["vhost-blk", "vhost-net"]),
    ("depth", &["vhost-blk", "vhost-net"]),
    ("exits", &["vhost-blk", "vhost-net"]),
    ("bursts", &["vhost-net"]),
];

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/bpf").join(name)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<usize> {
    let mut all = [0; 8];
    all[..N].copy_from_slice(bytes.get(at..at + N).context("the file ends")?);
    Ok(u64::from_le_bytes(all) as usize)
}

/// The contents of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &str) -> Result<&'a [u8]> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "no such ELF file");
    let (headers, size, count, names) =
        (number::<8>(elf, 40)?, number::<2>(elf, 58)?, number::<2>(elf, 60)?, number::<2>(elf, 62)?);
    let contents = |index: usize| -> Result<&'a [u8]> {
        let header = headers + index * size;
        let (at, len) = (number::<8>(elf, header + 24)?, number::<8>(elf, header + 32)?);
        elf.get(at..at + len).context("a section outside")
    };
    let strings = contents(names)?;
    for index in 1..count {
        let name = number::<4>(elf, headers + index * size)?;
        if strings.get(name..).is_some_and(|rest| rest.split(|b| *b == 0).next() == Some(wanted.as_bytes())) {
            return contents(index);
        }
    }
    anyhow::bail!("there is no section {wanted}")
}

/// The probes of a program: how many arguments each has, at every place.
fn probes(program: &Path) -> Result<HashMap<String, HashSet<usize>>> {
    let elf = std::fs::read(program)?;
    let notes = section(&elf, ".note.stapsdt")?;
    let (mut found, mut at) = (HashMap::<_, HashSet<_>>::new(), 0);
    while at < notes.len() {
        let (name, desc) = (number::<4>(notes, at)?, number::<4>(notes, at + 4)?);
        let begin = at + 12 + name.next_multiple_of(4);
        // Three addresses, and three strings: provider, name, arguments.
        let strings = notes.get(begin + 24..begin + desc).context("a note that is cut off")?;
        let texts: Vec<_> = strings.split(|b| *b == 0).map(|s| std::str::from_utf8(s).unwrap()).collect();
        if texts[0] == "kickless" {
            let arguments = texts[2].split_whitespace().count();
            found.entry(texts[1].to_owned()).or_default().insert(arguments);
        }
        at = begin + desc.next_multiple_of(4);
    }
    Ok(found)
}

/// What a script asks of each probe: so many arguments at least.
fn asked(text: &str) -> HashMap<String, usize> {
    let mut asked = HashMap::new();
    for block in text.split("usdt:PROGRAM:kickless:").skip(1) {
        let (name, rest) = block.split_once([' ', '\n', ',']).unwrap();
        let body = &rest[..rest.find("\n}").unwrap_or(rest.find('\n').unwrap_or(rest.len()))];
        let arguments = (0..6).rev().find(|n| body.contains(&format!("arg{n}"))).map_or(0, |n| n + 1);
        let most = asked.entry(name.to_owned()).or_default();
        *most = arguments.max(*most);
    }
    asked
}

fn daemons_have_the_probes_that_scripts_name(_: &Scene) -> Result<Option<String>> {
    let documented = std::fs::read_to_string(script("../../docs/tracing.md"))?;
    for program in ["vhost-blk", "vhost-net"] {
        let has = probes(&built(program).context("not built")?)?;
        for (name, places) in &has {
            ensure!(places.len() == 1, "{program}: {name} has {places:?} arguments");
            ensure!(documented.contains(&format!("`{name}`")), "docs/tracing.md has nothing of {name}");
        }
        for (file, _) in SCRIPTS.iter().filter(|(_, programs)| programs.contains(&program)) {
            let wants = asked(&std::fs::read_to_string(script(&format!("{file}.bt")))?);
            ensure!(wants.len() >= 3, "{file}: {wants:?}");
            for (name, arguments) in wants {
                let there = has.get(&name).and_then(|places| places.iter().max());
                let enough = there.is_some_and(|there| *there >= arguments);
                ensure!(enough, "{file}.bt wants {arguments} arguments of {name}, {program} has {there:?}");
            }
        }
    }
    Ok(None)
}

/// A script that runs on a process, from when it sees it.
fn trace(scene: &Scene, name: &str, of: Pid, machine: &str) -> Result<Process> {
    let args = [name, &of.to_string(), machine].map(str::to_owned);
    let mut process = Process::spawn(scene, name, &script("run.sh"), &args)?;
    wait::until("bpftrace", LIMIT, || {
        ensure!(process.poll_exit()?.is_none(), "{name}: {}", process.stderr());
        Ok(process.stdout().contains("looking on").then_some(()))
    })?;
    Ok(process)
}

/// Waits until a script has said all of this; it must end well. All that it said.
fn expect(mut process: Process, wanted: &[&str]) -> Result<String> {
    let missing = |said: &str| wanted.iter().copied().find(|what| !said.contains(what));
    let seen = wait::until("what the script sees", LIMIT, || {
        ensure!(process.poll_exit()?.is_none(), "{}", process.stderr());
        Ok(missing(&process.stdout()).is_none().then_some(()))
    });
    seen.with_context(|| format!("{:?} is missing in {}", missing(&process.stdout()), process.stdout()))?;
    end(&mut process)
}

/// Ends a script as Ctrl-C does: what it has said to the end.
fn end(process: &mut Process) -> Result<String> {
    process.signal(Signal::SIGINT)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    Ok(process.stdout())
}

fn vbench(scene: &Scene, args: &[&str]) -> Result<Process> {
    let program = built("vbench").context("vbench is not built")?;
    Process::spawn(scene, "vbench", &program, &args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
}

fn scripts_see_a_disk_under_load(scene: &Scene) -> Result<Option<String>> {
    let daemon = Options::default().spawn(scene, "daemon", Medium::Null(GIB))?;
    let socket = format!("--socket-path={}", daemon.socket().display());
    // Few enough for a machine with one CPU: a kick, an interrupt and a sleep for each.
    let closed =
        ["--iodepth=4", "--completion=interrupt", "--rate-iops=500", "--time-based", "--runtime=3600"];
    let scripts = [trace(scene, "latency", daemon.pid(), "0")?, trace(scene, "depth", daemon.pid(), "0")?];
    let mut load = vbench(scene, &[&["run", "--rw=randread", &socket], &closed[..]].concat())?;
    let [latency, depth] = scripts;
    let hops = ["1 kick to take", "2 take to complete", "3 complete to show", "4 show to signal", "5 asleep"];
    expect(latency, &hops)?;
    // By the queue's name, which it has from when it began.
    expect(depth, &["null queue 0]", "@submitted:", "@reaped:"])?;
    load.kill9()?;
    daemon.terminate()?;
    Ok(None)
}

fn scripts_see_packets(scene: &Scene) -> Result<Option<String>> {
    let sockets = ["a", "b"].map(|name| scene.path(name));
    let port = |socket: &PathBuf| format!("--port=socket-path={}", socket.display());
    let args =
        [vec!["--switch".into(), "--poll=adaptive".into()], sockets.iter().map(port).collect()].concat();
    let program = built("vhost-net").context("not built")?;
    let mut daemon = Process::spawn(scene, "vhost-net", &program, &args)?;
    wait::until("the switch", LIMIT, || {
        ensure!(daemon.poll_exit()?.is_none(), "{}", daemon.stderr());
        Ok(sockets.iter().all(|socket| socket.exists()).then_some(()))
    })?;
    let bursts = trace(scene, "bursts", daemon.pid(), "0")?;
    let sockets = sockets.map(|socket| format!("--socket-path={}", socket.display()));
    let mut load = vbench(scene, &["net", &sockets[0], &sockets[1], "--rate-pps=2000", "--runtime=3600"])?;
    expect(bursts, &["@taken[", "@done[", " queue 1]"])?;
    load.kill9()?;
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait_exit(LIMIT)?.success(), "{}", daemon.stderr());
    Ok(None)
}

/// What `exits` has said of five seconds.
#[derive(Debug, Default)]
struct Interval {
    /// Exits by reason.
    exits: HashMap<u64, u64>,
    /// Of these, doorbells.
    doorbells: HashMap<u64, u64>,
    kicks: u64,
    /// Of these, kicks with an exit before them.
    timed: u64,
    requests: u64,
    interrupts: u64,
}

/// The intervals that a script has told of, the last of them perhaps not to the end.
fn intervals(said: &str) -> Vec<Interval> {
    let mut all = Vec::new();
    for line in said.lines() {
        // The time of day.
        if line.len() == 8 && line.as_bytes()[2] == b':' {
            all.push(Interval::default());
        }
        let Some(interval) = all.last_mut() else { continue };
        // `@name[key, key]: value`, or a bar, `[from, to) value |`.
        let Some((key, value)) = [": ", ") ", "] "].iter().find_map(|&end| line.split_once(end)) else {
            continue;
        };
        let (name, keys) = key.split_once('[').unwrap_or((key, ""));
        let keys: Vec<u64> =
            keys.trim_end_matches(']').split(", ").filter_map(|key| key.parse().ok()).collect();
        let value = value.split_whitespace().next().and_then(|value| value.parse().ok()).unwrap_or(0);
        match (name, &keys[..]) {
            ("@exits", &[reason]) => drop(interval.exits.insert(reason, value)),
            ("@written", &[address, reason]) if address == Device::doorbell(0) => {
                interval.doorbells.insert(reason, value);
            }
            ("@kicks", _) => interval.kicks = value,
            ("@requests", _) => interval.requests = value,
            ("@interrupts", _) => interval.interrupts = value,
            ("", _) => interval.timed += value,
            _ => {}
        }
    }
    all
}

/// Waits for an interval from beginning to end.
fn interval(mut exits: Process) -> Result<Interval> {
    wait::until("an interval", LIMIT, || {
        ensure!(exits.poll_exit()?.is_none(), "{}", exits.stderr());
        Ok((intervals(&exits.stdout()).len() > 2).then_some(()))
    })?;
    let said = end(&mut exits)?;
    // In the first one it began.
    let interval = intervals(&said).swap_remove(1);
    println!("{interval:?}");
    Ok(interval)
}

/// A guest that is asked to kick leaves its CPU for each kick, and the daemon hears of it after that. One that is not
/// asked, since the daemon polls, does not, whatever else it leaves for.
fn exits_come_before_kicks(scene: &Scene) -> Result<Option<String>> {
    let seen = |poll: &'static str| -> Result<[Interval; 2]> {
        let mut daemon = Options::default().poll(poll).spawn(scene, "daemon", Medium::Null(GIB))?;
        let mut guest = Plan::new().disk(daemon.socket(), 1).boot(Platform::Bare, scene)?;
        guest.start(&Load::new(Op::Read).depth(1).wait(Wait::EveryInterrupt).unrecorded().until_told())?;
        // The machine is in this process; the daemon is none.
        let of = |machine: Pid| trace(scene, "exits", daemon.pid(), &machine.to_string());
        let scripts = [of(Pid::this())?, of(daemon.pid())?];
        let [of_guest, of_others] = scripts.map(interval);
        let seen = [of_guest?, of_others?];
        for of in &seen {
            let is_loaded = of.requests > 0 && of.interrupts > 0;
            ensure!(is_loaded, "--poll={poll}, no load: {of:?}\n{}", daemon.stats()?.text());
        }
        guest.stop()?;
        guest.finish()?.expect_clean()?;
        guest.power_off()?;
        daemon.terminate()?;
        Ok(seen)
    };
    let [asleep, others] = seen("event")?;
    let doorbells: u64 = asleep.doorbells.values().sum();
    ensure!(asleep.kicks > 0 && doorbells > 0 && asleep.timed > 0, "kicks without doorbells: {asleep:?}");
    let none = others.exits.is_empty() && others.doorbells.is_empty() && others.timed == 0;
    ensure!(none && others.kicks > 0, "exits of somebody else: {others:?}");
    let [polling, _] = seen("busy")?;
    ensure!(polling.kicks == 0 && polling.doorbells.is_empty(), "doorbells while it polls: {polling:?}");
    if asleep.exits.is_empty() {
        // A KVM that runs inside another hypervisor without its hardware leaves guests in ways of its own.
        let untold = "this KVM does not tell of kvm_exit; doorbells were seen before kicks by kvm_mmio \
                      (scripts/nested.sh tracing has one that does)";
        ensure!(std::env::var_os(REQUIRE).is_none(), "{untold}");
        return Ok(Some(untold.to_owned()));
    }
    // Counts are printed and cleared one after the other, while all goes on.
    let nearly = |count: u64, of: u64| count.abs_diff(of) * 4 <= of;
    ensure!(nearly(asleep.timed, asleep.kicks), "kicks without an exit before them: {asleep:?}");
    ensure!(nearly(doorbells, asleep.kicks), "not a doorbell for each kick: {asleep:?}");
    for (reason, doorbells) in &asleep.doorbells {
        let exits = asleep.exits.get(reason).copied().unwrap_or(0);
        ensure!(exits * 4 >= doorbells * 3, "fewer exits than doorbells by reason {reason}: {asleep:?}");
    }
    ensure!(!polling.exits.is_empty(), "a guest that never leaves its CPU: {polling:?}");
    Ok(None)
}

/// What counts the hops of requests, and checks that each comes after the one before it.
const HOPS: &str = r#"
BEGIN { printf("ready\n"); }
usdt:PROGRAM:kickless:kick { @kick = count(); }
usdt:PROGRAM:kickless:take {
    @take = count();
    if (@taken[arg0, arg1 & 0xffff]) { @wrong["taken twice"] = count(); }
    @taken[arg0, arg1 & 0xffff] = nsecs;
}
usdt:PROGRAM:kickless:complete {
    @complete = count();
    $taken = @taken[arg0, arg1 & 0xffff];
    if (!$taken) { @wrong["complete before take"] = count(); }
    if (nsecs <= $taken) { @wrong["no time from take to complete"] = count(); }
    @ns = sum(nsecs - $taken);
    delete(@taken[arg0, arg1 & 0xffff]);
    @completed[arg0] = nsecs;
}
usdt:PROGRAM:kickless:publish {
    @publish = count();
    if (!@completed[arg0]) { @wrong["publish before complete"] = count(); }
    if (nsecs <= @completed[arg0]) { @wrong["no time from complete to publish"] = count(); }
    delete(@completed[arg0]);
    @published[arg0] = nsecs;
}
usdt:PROGRAM:kickless:signal {
    @signal = count();
    if (!@published[arg0]) { @wrong["signal before publish"] = count(); }
    if (nsecs <= @published[arg0]) { @wrong["no time from publish to signal"] = count(); }
    delete(@published[arg0]);
}
END { clear(@taken); clear(@completed); clear(@published); }
"#;

fn each_request_passes_each_probe_once_and_in_order(scene: &Scene) -> Result<Option<String>> {
    const REQUESTS: u64 = 3000;
    let mut daemon = Options::default().spawn(scene, "daemon", Medium::Null(GIB))?;
    let pid = daemon.pid().to_string();
    let program = format!("{}", built("vhost-blk").context("not built")?.display());
    let text = HOPS.replace("PROGRAM", &program);
    let bpftrace = find_program("bpftrace").context("no bpftrace")?;
    let args = ["-B", "line", "-p", &pid, "-e", &text].map(str::to_owned);
    let mut tracer = Process::spawn(scene, "hops", &bpftrace, &args)?;
    // It reads what its script prints when all is attached.
    wait::until("bpftrace", LIMIT, || {
        ensure!(tracer.poll_exit()?.is_none(), "{}", tracer.stderr());
        Ok(tracer.stdout().contains("ready").then_some(()))
    })?;
    let socket = format!("--socket-path={}", daemon.socket().display());
    let ios = format!("--number-ios={REQUESTS}");
    let closed =
        ["run", "--rw=randread", "--iodepth=4", "--completion=interrupt", "--rate-iops=2000", "--json"];
    let mut load = vbench(scene, &[&closed[..], &[&socket, &ios]].concat())?;
    ensure!(load.wait_exit(LIMIT)?.success(), "{}", load.stderr());
    let stats = daemon.stats()?;
    let said = end(&mut tracer)?;
    ensure!(!said.contains("@wrong"), "{said}");
    let count = |name: &str| -> Result<u64> {
        let line = said.lines().find_map(|line| line.strip_prefix(&format!("@{name}: ")));
        Ok(line.with_context(|| format!("no {name} in {said}"))?.trim().parse()?)
    };
    let column = |name: &str| stats.column(name).values().sum::<u64>();
    ensure!(column("requests") == REQUESTS, "{}", stats.text());
    for (probe, requests) in
        [("take", REQUESTS), ("complete", REQUESTS), ("signal", column("signals")), ("kick", column("kicks"))]
    {
        ensure!(
            count(probe)? == requests && requests > 0,
            "{probe}: not {requests} times\n{said}{}",
            stats.text()
        );
    }
    ensure!((1..=REQUESTS).contains(&count("publish")?), "{said}");
    // A request takes the driver longer than the device.
    let report: serde_json::Value = serde_json::from_str(&load.stdout())?;
    let read = &report["jobs"][0]["read"];
    let mean = read["lat_ns"]["mean"].as_f64().with_context(|| format!("no mean in {read}"))?;
    let inside = count("ns")? as f64 / REQUESTS as f64;
    ensure!(inside > 0.0 && inside < mean, "{inside} ns in the device, {mean} ns for the driver");
    daemon.terminate()?;
    Ok(None)
}

/// Why bpftrace cannot look into processes here.
fn no_bpftrace() -> Option<String> {
    let Some(program) = find_program("bpftrace") else {
        return Some("bpftrace is not installed (scripts/setup.sh)".into());
    };
    if !geteuid().is_root() {
        return Some("bpftrace needs root".into());
    }
    let probe = format!(
        "usdt:{}:kickless:take {{ @ = count(); }} BEGIN {{ exit(); }}",
        built("vhost-blk")?.display()
    );
    let tried = Command::new(program).args(["-e", &probe]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("?").to_owned();
            Some(format!("bpftrace cannot look into programs here: {why}"))
        }
        Err(e) => Some(e.to_string()),
    }
}

/// Nor into guests.
fn no_exits() -> Option<String> {
    let none = "this kernel has no tracepoint kvm:kvm_exit".to_owned();
    let there = Command::new("bpftrace").args(["-l", "tracepoint:kvm:kvm_exit"]).output();
    let there = there.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("kvm_exit"));
    no_bpftrace().or_else(|| (!there).then_some(none)).or_else(|| Platform::Bare.missing_needs())
}

fn main() -> ExitCode {
    let tests = vec![
        Test::new(
            "daemons_have_the_probes_that_scripts_name",
            daemons_have_the_probes_that_scripts_name,
            || None,
        ),
        Test::new("scripts_see_a_disk_under_load", scripts_see_a_disk_under_load, no_bpftrace),
        Test::new("scripts_see_packets", scripts_see_packets, no_bpftrace),
        Test::new("exits_come_before_kicks", exits_come_before_kicks, no_exits),
        Test::new(
            "each_request_passes_each_probe_once_and_in_order",
            each_request_passes_each_probe_once_and_in_order,
            no_bpftrace,
        ),
    ];
    runner::run(tests, REQUIRE)
}
