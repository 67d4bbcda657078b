//! `vbench run` against the real daemon: what it does, what it says, and how it ends when the back end goes wrong.
#![allow(clippy::unwrap_used)]

mod peer;

use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use peer::{DISK, Daemon, Fault, Faulty, Outcome, Started, vbench};
use serde_json::Value;
use vhost_blk::device::F_FLUSH;

fn run(socket: &str, args: &[&str]) -> Outcome {
    vbench(&[&["run", "--socket-path", socket], args].concat())
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_run_without_a_time_ends_when_its_size_is_done() {
    let daemon = Daemon::ram();
    let jobs =
        |args: &[&str]| run(&daemon.socket, &[args, &["--json"]].concat()).good().json()["jobs"].clone();
    let job = &jobs(&["--rw=randread", "--iodepth=8", "--size=16m"])[0];
    assert_eq!((&job["read"]["total_ios"], &job["read"]["io_bytes"]), (&4096.into(), &(16 << 20).into()));
    assert_eq!(job["read"]["clat_ns"]["N"], 4096);
    assert_eq!((&job["write"]["total_ios"], &job["error"]), (&0.into(), &0.into()));
    let job = &jobs(&["--rw=write", "--bs=64k", "--number-ios=10"])[0];
    assert_eq!((&job["write"]["total_ios"], &job["write"]["io_bytes"]), (&10.into(), &655_360.into()));
    // Every block once, and both directions within the size.
    let job = &jobs(&["--rw=randrw", "--rwmixread=25", "--bs=4k,8k", "--iodepth=4", "--size=8m"])[0];
    let (read, write) = (number(&job["read"]["io_bytes"]), number(&job["write"]["io_bytes"]));
    assert!((read + write - f64::from(8 << 20)).abs() <= 8192.0 && write > 4.0 * read, "{read} {write}");
    assert_eq!(jobs(&["--numjobs=3", "--size=1m"]).as_array().unwrap().len(), 3);
    let one = jobs(&["--numjobs=3", "--size=1m", "--group-reporting"]);
    assert_eq!((one.as_array().unwrap().len(), &one[0]["read"]["total_ios"]), (1, &768.into()));
}

#[test]
fn a_run_by_time_goes_on_until_it_is_over() {
    let daemon = Daemon::ram();
    let begun = Instant::now();
    let args =
        ["--rw=randread", "--size=64k", "--time-based", "--runtime=700ms", "--ramp-time=0.2", "--json=-"];
    let json = run(&daemon.socket, &args).good().json();
    assert!(begun.elapsed() >= Duration::from_millis(900));
    let read = &json["jobs"][0]["read"];
    // A loaded machine may let the job hear of it late.
    assert!(
        (300.0..1500.0).contains(&number(&read["runtime"])) && number(&read["total_ios"]) > 16.0,
        "{read}"
    );
}

#[test]
fn rates_are_kept() {
    let daemon = Daemon::ram();
    for (rate, open) in [("--rate-iops=500", false), ("--arrival-rate=500", true)] {
        let args = ["--rw=randread", "--time-based", "--runtime=1", "--completion=interrupt", "--iodepth=4"];
        let json = run(&daemon.socket, &[&args[..], &[rate, "--json"]].concat()).good().json();
        let read = &json["jobs"][0]["read"];
        // Not more, however loaded the machine is; fewer only by what it could not run. A loaded machine ends late.
        let most = 500.0 * number(&read["runtime"]) / 1000.0 + 2.0;
        assert!((300.0..=most).contains(&number(&read["total_ios"])), "{rate}: {read}");
        assert_eq!(number(&read["slat_ns"]["N"]) > 0.0, open, "{rate}");
    }
}

#[test]
fn one_thread_drives_queues_of_several_disks_in_turn() {
    let daemons = [Daemon::ram(), Daemon::ram()];
    let [one, other] = daemons.each_ref().map(|daemon| &daemon.socket);
    let file = format!(
        "[global]\none_thread\nrw=randrw\nverify=crc32c\nsize=512k\n\
         [disk0]\nsocket_path={one}\niodepth=1\n[disk1]\nsocket_path={other}\niodepth=16\n"
    );
    let path = daemons[1].dir.path().join("jobs.fio");
    std::fs::write(&path, &file).unwrap();
    let json = vbench(&["run", path.to_str().unwrap(), "--json=-"]).good().json();
    let jobs = json["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 2);
    for name in ["disk0", "disk1"] {
        let job = jobs.iter().find(|job| job["jobname"] == name).unwrap();
        let all = number(&job["read"]["total_ios"]) + number(&job["write"]["total_ios"]);
        assert!(all >= 128.0, "all of its part, and what it wrote read back: {job}");
    }
    // The thread is theirs together, and the first one's in the account.
    assert!(number(&jobs[1]["usr_cpu"]) + number(&jobs[1]["sys_cpu"]) < 1e-9);

    // One that is gone ends its own job with its name, and the others'.
    let [gone, stays] = daemons;
    let file = file.replace("size=512k", "time_based\nruntime=60");
    std::fs::write(&path, file.replace("verify=crc32c\n", "")).unwrap();
    let run = Started::new(&["run", path.to_str().unwrap(), "--json=-"]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    // Before it had begun, the socket is named.
    let socket = gone.socket.clone();
    drop(gone);
    let outcome = run.end();
    assert_eq!(outcome.code(), 1, "{}", outcome.err);
    assert!(outcome.err.contains("disk0") || outcome.err.contains(&socket), "{}", outcome.err);
    drop(stays);
}

#[test]
fn what_cannot_be_served_in_time_waits_and_the_wait_counts() {
    // More requests arrive than any disk takes.
    let daemon = Daemon::ram();
    let args = ["--rw=randread", "--arrival-rate=100m", "--time-based", "--runtime=500ms", "--json"];
    let json = run(&daemon.socket, &args).good().json();
    let clat = &json["jobs"][0]["read"]["clat_ns"];
    // After half a second without keeping up, the last requests are nearly as late, and almost all of it is waiting.
    let slat = &json["jobs"][0]["read"]["slat_ns"];
    assert!(number(&clat["max"]) > 300e6 && number(&slat["max"]) > 250e6, "{clat} {slat}");
}

#[test]
fn written_data_is_read_back_and_verified() {
    let daemon = Daemon::ram();
    let base = ["--verify=crc32c", "--iodepth=8", "--size=4m", "--json"];
    for more in [
        &["--rw=randwrite"][..],
        &["--rw=write", "--bs=64k", "--indirect"],
        &["--rw=randrw", "--bssplit=512/30:4k/40:32k/30", "--completion=interrupt"],
        &["--rw=randwrite", "--time-based", "--runtime=300ms", "--no-event-idx"],
        &["--rw=randrw", "--norandommap", "--numjobs=4", "--offset-increment=4m"],
    ] {
        let json = run(&daemon.socket, &[&base[..], more].concat()).good().json();
        for job in json["jobs"].as_array().unwrap() {
            assert!(number(&job["read"]["total_ios"]) > 0.0, "{more:?}");
        }
    }
    let json = run(&daemon.socket, &[&base[..], &["--rw=randwrite", "--do-verify=0"]].concat()).good().json();
    assert_eq!(json["jobs"][0]["read"]["total_ios"], 0);
    let both = ["--rw=write", "--verify=crc32c", "--numjobs=2"];
    run(&daemon.socket, &both).bad(1, "another job would overwrite what is verified");
}

#[test]
fn flushes_come_behind_so_many_writes_and_count_by_themselves() {
    let daemon = Daemon::ram();
    let load = ["--rw=randrw", "--size=4m", "--iodepth=8", "--json"];
    let done = |args: &[&str]| {
        let job = run(&daemon.socket, &[&load, args].concat()).good().json()["jobs"][0].clone();
        let [reads, writes] = ["read", "write"].map(|side| number(&job[side]["total_ios"]) as u64);
        (reads, writes, job["sync"]["total_ios"].as_u64().unwrap(), job["sync"]["lat_ns"].clone())
    };
    for more in [&["--fsync=16"][..], &["--fdatasync=16", "--indirect", "--packed"]] {
        let (reads, writes, flushes, latency) = done(more);
        assert_eq!((reads + writes, flushes), (1024, writes / 16), "{more:?}: not in the sums");
        assert!(writes > 256 && latency["N"] == flushes, "{more:?}: {writes} {latency}");
        assert!(number(&latency["percentile"]["50.000000"]) > 0.0, "{more:?}");
    }
    let (_, writes, flushes, _) = done(&["--fsync=16", "--verify=crc32c"]);
    assert_eq!(flushes, writes / 16);
    assert_eq!(done(&["--fsync=0"]).2, 0);
    let out = run(&daemon.socket, &["--rw=write", "--size=1m", "--fsync=32"]).good().out;
    assert!(out.contains("fsync: 8\n    sync ("), "{out}");
}

/// As the device has it: without FLUSH it would have to make each write durable by itself.
#[test]
fn a_session_has_flushes_unless_writes_are_to_be_durable_by_themselves() {
    let device = Faulty::serve(Fault::None, 0);
    let load = ["--rw=write", "--bs=64k", "--iodepth=4"];
    for (more, flush, flushes) in
        [(&[][..], true, 0), (&["--sync=dsync"], false, 0), (&["--sync=none", "--fsync=4"], true, 4)]
    {
        run(&device.socket, &[&load, more].concat()).good();
        let asked = device.asked();
        assert_eq!((asked.0 & F_FLUSH != 0, asked.1), (flush, flushes), "{more:?}");
    }
    let file = device.dir.path().join("both.fio");
    std::fs::write(&file, "[global]\nrw=read\n[a]\nsync=dsync\n[b]\nfsync=1\n").unwrap();
    vbench(&["run", "--socket-path", &device.socket, file.to_str().unwrap()])
        .bad(1, "jobs at the same time have sync and fsync");
    let floor = Started::new(&["floor", "--socket-path", device.dir.path().join("f").to_str().unwrap()]);
    let socket = device.dir.path().join("f");
    peer::until_listening(&socket);
    run(socket.to_str().unwrap(), &["--rw=write", "--fsync=1"])
        .bad(1, "does not offer VIRTIO_BLK_F_FLUSH (--fsync)");
    drop(floor);
}

#[test]
fn wrong_data_is_named_with_both_checksums() {
    let args = ["--rw=write", "--verify=crc32c", "--iodepth=4", "--json"];
    for (fault, why) in [(Fault::Corrupt, "the header says 0x"), (Fault::Lose, "there is no header")] {
        let faulty = Faulty::serve(fault, 40960);
        let outcome = run(&faulty.socket, &args).bad(1, "wrong data at offset 40960: crc32c expected 0x");
        assert!(outcome.err.contains(", found 0x") && outcome.err.contains(why), "{}", outcome.err);
        let json = outcome.json();
        let job = &json["jobs"][0];
        assert_eq!((&json["partial"], &job["error"]), (&true.into(), &84.into()));
        assert_eq!(job["write"]["io_bytes"], DISK);
    }
}

#[test]
fn an_earlier_write_in_place_of_the_last_is_found() {
    // The first pass over the disk is there, the second is lost at one place.
    let daemon = Daemon::ram();
    let text = "[global]\nverify=crc32c\nrw=write\nsize=1m\n[first]\n[second]\nstonewall\nrandseed=1\n[read]\nstonewall\nrw=randread\n";
    let file = daemon.file("again.fio", text);
    let json = vbench(&["run", &file, "--json=-", "--socket-path", &daemon.socket]).good().json();
    assert_eq!(json["jobs"][2]["read"]["total_ios"], 256);
    let faulty = Faulty::serve(Fault::Lose, 8192);
    let text = text.replace("[first]", "[first]\ndo_verify=0");
    let file = daemon.file("again.fio", &text);
    vbench(&["run", &file, "--json=-", "--socket-path", &faulty.socket])
        .bad(1, "second: wrong data at offset 8192");
}

#[test]
fn error_statuses_end_the_run() {
    let args = ["--rw=read", "--iodepth=4", "--json"];
    let faulty = Faulty::serve(Fault::Refuse, 81920);
    let outcome = run(&faulty.socket, &args);
    let outcome =
        outcome.bad(1, "a read of 4096 bytes at offset 81920 failed with status 1 (VIRTIO_BLK_S_IOERR)");
    let json = outcome.json();
    assert_eq!((&json["partial"], &json["jobs"][0]["error"]), (&true.into(), &5.into()));
    assert!(number(&json["jobs"][0]["read"]["total_ios"]) >= 20.0);
    let faulty = Faulty::serve(Fault::NoStatus, 81920);
    run(&faulty.socket, &args).bad(1, "status 255 (none was written)");
}

#[test]
fn a_back_end_that_stops_answering_is_given_up() {
    for completion in ["poll", "interrupt"] {
        let faulty = Faulty::serve(Fault::Silent, 81920);
        let args = ["--rw=read", "--iodepth=1", "--json", "--completion", completion];
        let outcome =
            run(&faulty.socket, &args).bad(1, "does not go on: 1 requests without an answer for 5 s");
        let json = outcome.json();
        assert_eq!((&json["partial"], &json["jobs"][0]["error"]), (&true.into(), &110.into()));
        assert_eq!(json["jobs"][0]["read"]["total_ios"], 20);
        // Its session cannot end with a request unanswered.
        std::mem::forget(faulty);
    }
}

#[test]
fn a_back_end_that_dies_is_noticed_at_once() {
    for completion in ["poll", "interrupt"] {
        let mut daemon = Daemon::ram();
        let args = ["--rw=randread", "--time-based", "--runtime=200", "--json", "--completion", completion];
        let running = Started::new(&[&["run", "--socket-path", &daemon.socket], &args[..]].concat());
        std::thread::sleep(Duration::from_secs(1));
        daemon.kill();
        let begun = Instant::now();
        let json = running.end().bad(1, "the back end has closed the connection").json();
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert_eq!((&json["partial"], &json["jobs"][0]["error"]), (&true.into(), &104.into()));
        assert!(number(&json["jobs"][0]["read"]["total_ios"]) > 0.0);
    }
}

/// Data is checked, so the ring is one that the back end reads as this driver wrote it.
#[test]
fn packed_rings_and_rings_in_order_carry_what_split_ones_do() {
    let daemon = Daemon::ram();
    let recorded = ["--inflight", "--inflight --packed --in-order"];
    let rings = ["--packed", "--in-order", "--packed --in-order", "--packed --no-event-idx --indirect"];
    for ring in rings.into_iter().chain(recorded) {
        for completion in ["poll", "interrupt"] {
            let load = "--rw=randrw --bs=4k --size=16m --verify=crc32c --json --iodepth=8 --completion";
            let args = [load, completion, ring].join(" ");
            let args: Vec<_> = args.split(' ').collect();
            let json = run(&daemon.socket, &args).good().json();
            assert!(number(&json["jobs"][0]["read"]["total_ios"]) > 0.0, "{ring} {completion}");
        }
    }
}

#[test]
fn what_cannot_begin_says_why() {
    let daemon = Daemon::start(&["--backend=ram:1M", "--num-queues=2", "--packed=off"]);
    let none = run("/nonexistent/socket", &["--json"]).bad(1, "cannot connect to /nonexistent/socket");
    assert_eq!((&none.json()["partial"], &none.json()["jobs"][0]["error"]), (&true.into(), &2.into()));
    run(&daemon.socket, &["--packed"]).bad(1, "does not offer RING_PACKED; run without --packed");
    run(&daemon.socket, &["--numjobs=3"]).bad(1, "has 2 queues, fewer than the 3 jobs");
    run(&daemon.socket, &["--iodepth=2048"]).bad(1, "refused a ring of 8192 descriptors; lower --iodepth");
    run(&daemon.socket, &["--offset=512k", "--size=1m"]).bad(1, "reach past the disk's 1048576 bytes");
    run(&daemon.socket, &["--cpu=1000"]).bad(1, "cannot run on the CPU");
    let read_only = Daemon::start(&["--backend=ram:1M", "--read-only"]);
    run(&read_only.socket, &["--rw=write"]).bad(1, "is a read-only disk");
    // Somebody who listens and never answers.
    let silent = daemon.path("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    run(silent.to_str().unwrap(), &[]).bad(1, "does not answer; does it serve another front end?");
}

#[test]
fn usage_errors_are_one_line_and_exit_code_2() {
    let daemon = Daemon::ram();
    vbench(&["run"]).bad(2, "no socket");
    vbench(&["run", "--socket-path=s", "--one-thread", "--completion=interrupt"]).bad(2, "one_thread polls");
    for (args, what) in [
        (&["--rw=trim"][..], "'trim' is none of"),
        (&["--bs=1000"], "no multiple of 512"),
        (&["--bssplit=4k/10"], "add up to 10"),
        (&["--time-based"], "time_based needs a runtime"),
        (&["--rate-iops=1", "--arrival-rate=1"], "exclude each other"),
        (&["--sync=dsync", "--fsync=1"], "sync and fsync exclude each other"),
        (&["--sync=osync"], "'osync' is none of none, sync, dsync"),
        (&["--iodpeth=1"], "--iodpeth"),
        (&["/nonexistent.fio"], "cannot read /nonexistent.fio"),
    ] {
        run(&daemon.socket, args).bad(2, what);
    }
    let ini = daemon.file("bad.fio", "[global]\nrw=read\n\n[one]\nbs=4k\niodpeth=4\n");
    vbench(&["run", &ini]).bad(2, "bad.fio:6: unknown option 'iodpeth'");
    let toml = daemon.file("bad.toml", "[global]\nrw = 'read'\n\n[[job]]\niodpeth = 4\n");
    vbench(&["run", &toml]).bad(2, "bad.toml:5: unknown option 'iodpeth'");
    let before = std::fs::read(&ini).unwrap();
    vbench(&["run", "--json", &ini]).bad(2, "would overwrite");
    assert_eq!(std::fs::read(&ini).unwrap(), before);
}

#[test]
fn job_files_of_both_kinds_say_the_same() {
    let daemon = Daemon::ram();
    let ini = format!(
        "; comment\n[global]\nioengine=libaio\nsocket_path={}\nbs=8k\nsize=1m\niodepth=2\n\n\
         [first]\nrw=write\n\n[beside]\nrw=read\nsize=2m\nnumjobs=2\n\n[later]\nstonewall\nrw=randread\nbs=16k # own\n",
        daemon.socket
    );
    let toml = format!(
        "[global]\nioengine = 'libaio'\nsocket_path = '{}'\nbs = '8k'\nsize = '1m'\niodepth = 2\n\n\
         [[job]]\nname = 'first'\nrw = 'write'\n\n[[job]]\nname = 'beside'\nrw = 'read'\nsize = '2m'\nnumjobs = 2\n\n\
         [[job]]\nname = 'later'\nstonewall = true\nrw = 'randread'\nbs = '16k'\n",
        daemon.socket
    );
    for (name, text) in [("jobs.fio", ini), ("jobs.toml", toml)] {
        let file = daemon.file(name, &text);
        let json = vbench(&["run", &file, "--json"]).good().json();
        let jobs = json["jobs"].as_array().unwrap();
        let said: Vec<_> = jobs
            .iter()
            .map(|j| {
                let ios = number(&j["read"]["total_ios"]) + number(&j["write"]["total_ios"]);
                (j["jobname"].as_str().unwrap(), number(&j["groupid"]) as u64, ios as u64)
            })
            .collect();
        assert_eq!(
            said,
            [("first", 0, 128), ("beside", 0, 256), ("beside", 0, 256), ("later", 1, 64)],
            "{name}"
        );
        // The command line holds where a section has nothing of its own.
        let json = vbench(&["run", "--bs=4k", &file, "--json"]).good().json();
        assert_eq!(json["jobs"][0]["write"]["total_ios"], 256, "{name}");
        assert_eq!(json["jobs"][3]["read"]["total_ios"], 64, "{name}");
    }
}

/// Paths of all keys, down to numbers.
fn keys(prefix: &str, value: &Value, into: &mut Vec<String>) {
    if let Some(object) = value.as_object() {
        for (key, value) in object {
            let path = format!("{prefix}/{key}");
            keys(&path, value, into);
            into.push(path);
        }
    }
}

#[test]
fn json_has_every_key_that_fios_has() {
    let daemon = Daemon::ram();
    // fio itself, or what fio 3.33 printed where it is not installed.
    let args = ["--name=j", "--ioengine=null", "--rw=randrw", "--size=1m", "--output-format=json"];
    let theirs: Value = match Command::new("fio").args(args).output() {
        Ok(output) => serde_json::from_slice(&output.stdout).unwrap(),
        Err(_) => serde_json::from_str(include_str!("peer/fio-3.33.json")).unwrap(),
    };
    let file = daemon.path("out.json");
    let json = format!("--json={}", file.display());
    let outcome = run(&daemon.socket, &["--rw=randrw", "--size=1m", "--name=j", &json]).good();
    assert!(
        outcome.out.contains("read: IOPS=") && outcome.out.contains("clat percentiles"),
        "{}",
        outcome.out
    );
    let ours: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let (mut all, mut compared) = (Vec::new(), 0);
    keys("", &theirs["jobs"][0], &mut all);
    for path in all.iter().filter(|p| !p.starts_with("/job options/")) {
        let (theirs, ours) = (&theirs["jobs"][0].pointer(path).unwrap(), ours["jobs"][0].pointer(path));
        let ours = ours.unwrap_or_else(|| panic!("fio has {path}, vbench does not"));
        assert_eq!((theirs.is_number(), theirs.is_string()), (ours.is_number(), ours.is_string()), "{path}");
        assert!(!theirs.is_u64() || ours.is_u64() || ours.is_i64(), "{path}: fio has a whole number");
        compared += 1;
    }
    assert!(compared > 150, "{compared}");
    for key in theirs.as_object().unwrap().keys() {
        assert!(ours.get(key).is_some(), "fio has {key}");
    }
    assert!(ours.get("partial").is_none());
}

#[test]
fn the_generator_measures_itself() {
    let outcome = vbench(&["ceiling", "--rw=randrw", "--iodepth=8", "--runtime=200ms"]).good();
    assert_eq!(outcome.out.matches(" ns per request ").count(), 2, "{}", outcome.out);
    for form in [&["--packed"][..], &["--in-order"], &["--packed", "--in-order", "--indirect"]] {
        let outcome = vbench(&[&["ceiling", "--iodepth=8", "--runtime=100ms"], form].concat()).good();
        assert_eq!(outcome.out.matches(" ns per request ").count(), 2, "{form:?}: {}", outcome.out);
    }
    vbench(&["ceiling", "--verify=crc32c"]).bad(1, "ceiling");
}

#[test]
fn help_has_every_option() {
    let help = vbench(&["run", "--help"]).good().out;
    for option in
        ["--rw ", "--bssplit", "--arrival-rate", "--verify", "--hugepages", "--cpus-allowed", "--json"]
    {
        assert!(help.contains(option), "{option}");
    }
}
