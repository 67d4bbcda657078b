//! A small matrix from end to end: what is printed, the JSON, the page, and what is left behind.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

const VBENCH: &str = env!("CARGO_BIN_EXE_vbench");
const LIMIT: Duration = Duration::from_secs(120);

const MATRIX: &str = r#"
[options]
rounds = 2
runtime = 0.4
ramp_time = 0.1

[[backend]]
name = "floor"
command = "{bin}/vbench floor --socket-path {socket}"

[[backend]]
name = "kickless"
command = "{bin}/vhost-blk --cpus {cpu} --log error --socket-path {socket} --backend null:1G --poll busy"
reference = true

[[backend]]
name = "peer"
command = "no-such-storage-daemon --listen {socket}"

[[workload]]
name = "null disk"
iodepth = [1, 16]
"#;

/// One at a time: back ends that poll would take the CPUs from each other.
static ALONE: Mutex<()> = Mutex::new(());

/// A directory with a matrix, in which `vbench` also makes its temporary files.
struct Scene {
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    fn new(matrix: &str) -> Scene {
        let daemon = Path::new(VBENCH).parent().unwrap().join("vhost-blk");
        assert!(
            daemon.exists(),
            "{} is not built: cargo build -p vhost-blk (with the same profile)",
            daemon.display()
        );
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tmp")).unwrap();
        fs::write(dir.path().join("matrix.toml"), matrix).unwrap();
        Scene { dir, _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(VBENCH);
        command.current_dir(self.dir.path()).env("TMPDIR", self.path("tmp"));
        command.args(["compare", "matrix.toml", "--json", "out.json", "--html", "out.html"]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        finish(self.start(args))
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("out.json")).unwrap()).unwrap()
    }

    /// Nothing in the directory for temporary files, and no process that has it in its command line.
    fn assert_clean(&self) {
        let tmp = self.path("tmp");
        let left: Vec<_> = fs::read_dir(&tmp).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            assert!(!line.contains(tmp.to_str().unwrap()), "still running: {line}");
        }
    }
}

fn finish(mut child: Child) -> Output {
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("vbench compare does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_matrix_gives_tables_json_and_a_page() {
    let scene = Scene::new(MATRIX);
    let output = scene.run(&[]);
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("peer is left out: no-such-storage-daemon is not installed"), "{text}");
    assert!(text.contains("ratios to kickless of the same round"), "{text}");
    assert!(text.contains("round trip between the CPUs") || text.contains("one CPU"), "{text}");

    let json = scene.json();
    assert_eq!(json["partial"], false);
    assert_eq!(json["left_out"][0][0], "peer");
    let samples = json["samples"].as_array().unwrap();
    // In turn: A B A B for each depth.
    let order: Vec<_> = samples
        .iter()
        .map(|s| (s["point"].as_u64().unwrap(), s["round"].as_u64().unwrap(), s["backend"].as_str().unwrap()))
        .collect();
    let mut expected = Vec::new();
    for point in 0..2 {
        for round in 0..2 {
            expected.extend(["floor", "kickless"].map(|name| (point, round, name)));
        }
    }
    assert_eq!(order, expected);
    // On a crowded machine a run of 0.2 s may pass without a request; it is marked as noisy then.
    let (good, empty): (Vec<_>, Vec<_>) = samples.iter().partition(|s| s["requests"].as_u64().unwrap() > 0);
    assert!(!good.is_empty(), "{samples:?}");
    for sample in empty {
        assert!(sample["quiet"]["noise"].to_string().contains("no request"), "{sample}");
    }
    // Both poll: requests cost CPU time. It is counted by the scheduler's tick, of which a back end that had next to
    // no time may have seen none; so many requests take several.
    for sample in good.iter().filter(|s| s["requests"].as_u64().unwrap() >= 100_000) {
        let cpu = sample["cpu_us"].as_f64().unwrap();
        assert!(cpu > 0.01 && cpu < 100.0, "{sample}");
    }
    assert!(good.iter().any(|s| s["cpu_us"].as_f64().unwrap() > 0.0), "{good:?}");
    for sample in good {
        assert!(sample["iops"].as_f64().unwrap() > 0.0, "{sample}");
        // What the scheduler has counted may be nothing yet for a back end that had next to no time.
        assert!(sample["cpu_us"].as_f64().unwrap() >= 0.0, "{sample}");
        assert!(sample["voluntary"].is_f64() && sample["involuntary"].is_f64(), "{sample}");
        let latency: Vec<f64> =
            sample["latency_us"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert!(latency[0] > 0.0 && latency.is_sorted(), "{latency:?}");
        let curve = sample["percentiles"].as_array().unwrap();
        assert!(!curve.is_empty() && curve.len() <= 61, "{curve:?}");
    }
    assert!(!json["machine"]["cpu"].as_str().unwrap().is_empty());
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let page = fs::read_to_string(scene.path("out.html")).unwrap();
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
    assert!(document.descendants().filter(|n| n.tag_name().name() == "svg").count() >= 8);
    if host.trim().len() > 4 {
        assert!(!page.contains(host.trim()) && !json.to_string().contains(host.trim()));
    }
    scene.assert_clean();
}

#[test]
fn a_back_end_that_fails_leaves_a_partial_result() {
    // One dies at once, one has too few queues, and one is good.
    let matrix = MATRIX
        .replace("{bin}/vbench floor", "sh -c 'echo no luck >&2; exit 7' x")
        .replace("iodepth = [1, 16]", "iodepth = 1\n[[workload]]\nname = \"two\"\nnumjobs = 2");
    let scene = Scene::new(&matrix);
    let output = scene.run(&["--rounds", "1"]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("floor failed in round 1") && text.contains("no luck"), "{text}");
    assert!(text.contains("fewer than the 2 jobs"), "{text}");
    let json = scene.json();
    assert_eq!(json["partial"], true);
    assert_eq!(json["samples"].as_array().unwrap().len(), 1);
    assert!(fs::read_to_string(scene.path("out.html")).unwrap().contains("Partial: runs are missing"));
    scene.assert_clean();
}

#[test]
fn an_interrupt_keeps_what_there_is_and_leaves_no_process() {
    let scene = Scene::new(MATRIX);
    let child = scene.start(&["--rounds", "1", "--runtime", "200"]);
    let begun = Instant::now();
    // Until a back end listens, and then a moment of the run.
    while fs::read_dir(scene.path("tmp")).unwrap().flatten().all(|d| !d.path().join("socket").exists()) {
        assert!(begun.elapsed() < LIMIT, "no back end is started");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("interrupted"), "{}", said(&output));
    assert!(begun.elapsed() < Duration::from_secs(60), "an interrupt waits for nothing");
    assert_eq!(scene.json()["partial"], true);
    scene.assert_clean();
}

#[test]
fn mistakes_are_named() {
    let scene = Scene::new(&MATRIX.replace("rounds = 2", "rounds = 2\nruonds = 3"));
    let output = scene.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("matrix.toml, line 4: unknown field `ruonds`"), "{}", said(&output));
    fs::write(scene.path("matrix.toml"), MATRIX).unwrap();
    let output = scene.run(&["--iodepth", "4"]);
    assert!(said(&output).contains("--iodepth belongs into the matrix file"), "{}", said(&output));
    let output = scene.run(&["--only", "nobody"]);
    assert!(said(&output).contains("no back end has that name"), "{}", said(&output));
}
