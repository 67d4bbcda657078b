//! Recording and replaying with the real programs: what was asked for is in the capture, and what is in a capture is
//! asked for again.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use vhost_blk::record::format::{HEADER_LEN, Kind, RECORD_LEN, Record};

mod scene;
use scene::{
    IOLOG, LIMIT, Requests, Scene, VBENCH, capture, completed, recorded, requests, run, succeed, text, until,
    vbench,
};

fn as_in_iolog() -> Vec<(Kind, u64, u32, u8)> {
    let mut all = vec![
        (Kind::Read, 0, 4096, 0),
        (Kind::Write, 16, 512, 0),
        (Kind::Flush, 0, 0, 0),
        (Kind::Read, 1, 1536, 0),
        (Kind::Write, 128, 2 << 20, 0),
        (Kind::Discard, 8, 4096, 0),
        (Kind::Flush, 0, 0, 0),
        (Kind::Discard, 0, 4 << 20, 0),
    ];
    // In memory, a range has at most 4 MiB.
    all.extend((1..4).map(|i| (Kind::Range, i * 8192, 4 << 20, 0)));
    all
}

#[test]
fn a_capture_holds_exactly_the_requests_that_were_made() {
    let scene = Scene::new();
    let (output, all) = scene.played("ram", IOLOG, &["--backend=ram:64M"]);
    let said = succeed(&output);
    assert!(said.starts_with("8 requests at full speed"), "{said}");
    assert_eq!(all, Requests::from([(0, as_in_iolog())]));
    let (header, _) = capture(&scene.path("ram.capture"));
    assert_eq!((header.queues, header.disk_size, header.block_size), (1, 64 << 20, 512));
}

#[test]
fn a_file_is_recorded_as_memory_is() {
    let scene = Scene::new();
    // Not on tmpfs, where there is a choice: this is the back end whose requests end later.
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(64 << 20).unwrap();
    let image = format!("--blk-file={}", image.path().display());
    let (output, all) = scene.played("file", IOLOG, &[&image, "--block-size=4096"]);
    // With 4 KiB blocks under O_DIRECT, requests of sectors may fail; they are recorded as what they were.
    drop(output);
    let all = &all[&0];
    let asked = |kind: Kind| all.iter().filter(|r| r.0 == kind).map(|r| (r.1, r.2)).collect::<Vec<_>>();
    assert_eq!(asked(Kind::Read), [(0, 4096), (1, 1536)]);
    assert_eq!(asked(Kind::Write), [(16, 512), (128, 2 << 20)]);
    assert_eq!(asked(Kind::Flush).len(), 2);
    assert_eq!(asked(Kind::Discard), [(8, 4096), (0, 16 << 20)]);
}

#[test]
fn a_load_is_recorded_whole_and_replays_to_the_same_capture() {
    let scene = Scene::new();
    let args = ["--backend=ram:64M", "--num-queues=2"];
    let daemon = scene.recording("first", &args);
    // Little enough at once, and slow enough in debug builds, that no ring is full.
    let load = ["--rw=randrw", "--numjobs=2", "--iodepth=4", "--runtime=0.2", "--ramp-time=0"];
    succeed(&vbench(&[&["run", "--socket-path", daemon.socket()], load.as_slice()].concat()));
    // One that is in order: every request is the next one, whatever else the load generator does.
    let load = ["--rw=write", "--bs=8k", "--iodepth=2", "--runtime=0.1", "--ramp-time=0"];
    succeed(&vbench(&[&["run", "--socket-path", daemon.socket()], load.as_slice()].concat()));
    let made = completed(&daemon.report());
    let first = scene.path("first.capture");
    until("all of it in the file", || {
        let bytes = fs::metadata(&first).unwrap().len();
        bytes == HEADER_LEN as u64 + made * RECORD_LEN as u64
    });
    daemon.end(Signal::SIGTERM);

    let all = requests(&first);
    assert_eq!(all.values().map(Vec::len).sum::<usize>() as u64, made);
    assert!(all.values().flatten().all(|r| r.3 == 0 && matches!(r.0, Kind::Read | Kind::Write)));
    let random: Vec<_> = all.values().flatten().filter(|r| r.2 == 4096).collect();
    let share = random.iter().filter(|r| r.0 == Kind::Read).count() as f64 / random.len() as f64;
    assert!((0.4..0.6).contains(&share), "{share} of the random requests are reads");
    let in_order: Vec<_> = all[&0].iter().filter(|r| r.2 == 8192).collect();
    assert!(in_order.len() > 10);
    let sectors = (64 << 20) / 512;
    for pair in in_order.windows(2) {
        assert_eq!((pair[1].0, pair[1].1), (Kind::Write, (pair[0].1 + 16) % sectors));
    }

    let second = scene.recording("second", &args);
    let json = scene.name("json");
    let trace = first.to_str().unwrap();
    // One at a time keeps the order that requests of one round have in the first capture.
    let how = ["--speed=max", "--iodepth=1", "--json", &json, trace];
    succeed(&vbench(&[&["replay", "--socket-path", second.socket()], how.as_slice()].concat()));
    let report = second.report();
    assert_eq!(completed(&report), made);
    second.end(Signal::SIGTERM);
    assert!(requests(&scene.path("second.capture")) == all, "the captures differ");
    let said: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!((said["requests"].as_u64(), said["errors"].as_u64()), (Some(made), Some(0)));

    let summary = succeed(&vbench(&["trace", trace]));
    assert!(summary.contains(&format!("{made} requests in ")), "{summary}");
    assert!(!summary.contains("note:"), "{summary}");
}

#[test]
fn a_capture_is_readable_after_the_daemon_was_killed_and_says_so() {
    let scene = Scene::new();
    let daemon = scene.recording("killed", &["--backend=null:64M"]);
    let load = ["--iodepth=4", "--runtime=0.2", "--ramp-time=0"];
    succeed(&vbench(&[&["run", "--socket-path", daemon.socket()], load.as_slice()].concat()));
    let made = completed(&daemon.report());
    let path = scene.path("killed.capture");
    until("all of it in the file", || {
        fs::metadata(&path).unwrap().len() >= HEADER_LEN as u64 + made * RECORD_LEN as u64
    });
    // A moment after they were written they count as written.
    until("the report of it", || recorded(&daemon.report()) == made);
    daemon.end(Signal::SIGKILL);
    let (_, records) = capture(&path);
    assert_eq!(records.len() as u64, made);
    let summary = succeed(&vbench(&["trace", path.to_str().unwrap()]));
    assert!(summary.contains("note: the capture was not ended properly"), "{summary}");
}

#[test]
fn requests_start_at_their_times() {
    let scene = Scene::new();
    let lines: Vec<_> = (0..11u32).map(|i| format!("{} d read {} 512\n", i * 50_000, i * 512)).collect();
    let trace = scene.path("timed.iolog");
    fs::write(&trace, format!("fio version 3 iolog\n{}", lines.concat())).unwrap();
    let daemon = scene.recording("timed", &["--backend=null:1M"]);
    let play = |speed: &str| {
        let args = ["replay", "--socket-path", daemon.socket(), "--speed", speed, trace.to_str().unwrap()];
        succeed(&vbench(&args))
    };
    let said = play("original");
    assert!(said.contains("lateness us "), "{said}");
    play("5");
    daemon.end(Signal::SIGTERM);
    let (_, records) = capture(&scene.path("timed.capture"));
    let span = |of: &[Record]| of[10].time - of[0].time;
    let [original, fast] = [span(&records[..11]), span(&records[11..22])].map(Duration::from_nanos);
    // Never too early; how late depends on the machine.
    assert!((Duration::from_millis(480)..LIMIT).contains(&original), "{original:?}");
    assert!((Duration::from_millis(80)..LIMIT).contains(&fast), "{fast:?}");
    assert!(fast < original);
}

#[test]
fn what_does_not_fit_is_skipped_with_one_line_and_what_fails_fails_the_replay() {
    let scene = Scene::new();
    let iolog = "fio version 2 iolog\nd read 0 512\nd read 1048576 512\nd read 1048064 1024\n";
    let (output, all) = scene.played("small", iolog, &["--backend=null:1M"]);
    succeed(&output);
    let said = text(&output.stderr);
    assert_eq!(said, "vbench: skipped 2 requests: 2 beyond the end of the disk\n");
    assert_eq!(all[&0].len(), 1);

    // The image shrinks under the daemon: what is beyond its end now, fails.
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    let daemon = scene.recording("shrunk", &[&file, "--direct=off"]);
    image.as_file().set_len(4096).unwrap();
    let trace = scene.path("shrunk.iolog");
    fs::write(&trace, "fio version 2 iolog\nd read 0 512\nd read 8192 512\n").unwrap();
    let output = vbench(&["replay", "--socket-path", daemon.socket(), trace.to_str().unwrap()]);
    daemon.end(Signal::SIGTERM);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(
        said.ends_with("1 of 2 requests failed; the first: request of type 0, sector 16: status 1\n"),
        "{said}"
    );
    let all = requests(&scene.path("shrunk.capture"));
    assert_eq!(all[&0].iter().map(|r| (r.1, r.3)).collect::<Vec<_>>(), [(0, 0), (16, 1)]);
}

#[test]
fn an_existing_file_is_not_overwritten_and_a_failed_start_leaves_none() {
    let scene = Scene::new();
    let program = Path::new(VBENCH).with_file_name("vhost-blk");
    assert!(program.exists(), "{} is not built; run cargo build first", program.display());
    let start = |record: &Path, socket: &Path| {
        let mut command = Command::new(&program);
        command.arg("--backend=null:1M").arg("--record").arg(record).arg("--socket-path").arg(socket);
        let output = run(&mut command);
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let there = scene.path("there");
    fs::write(&there, "precious").unwrap();
    let said = start(&there, &scene.path("s"));
    let line = format!(
        "vhost-blk: cannot record to {}: it exists; remove it or name another file\n",
        there.display()
    );
    assert_eq!(said.lines().last().unwrap().to_owned() + "\n", line);
    assert_eq!(fs::read_to_string(&there).unwrap(), "precious");
    let new = scene.path("new");
    start(&new, &scene.path("no/such/directory"));
    assert!(!new.exists());
}

#[test]
fn bad_traces_are_refused_with_the_place() {
    let scene = Scene::new();
    let file = scene.path("bad");
    for (content, what) in [
        ("garbage".as_bytes(), "neither a capture of vhost-blk --record nor an fio iolog"),
        (b"kickless\x01", "offset 0: truncated: 9 bytes are less than the header's 64"),
        (
            b"fio version 2 iolog\nd add\nd frob 1 2\n",
            "line 3: unknown action 'frob' in version 2: 'd frob 1 2'",
        ),
    ] {
        fs::write(&file, content).unwrap();
        let output = vbench(&["trace", file.to_str().unwrap()]);
        assert!(!output.status.success());
        let said = text(&output.stderr);
        assert!(said.lines().count() == 1 && said.contains(what), "{said}");
    }
}
