//! fio replays the iologs that we write, and we read its. Where fio is not installed the test ends as ignored, with the
//! reason.
#![allow(clippy::unwrap_used)]

mod scene;

use std::process::{Command, Stdio};

use libtest_mimic::{Arguments, Completion, Trial};
use scene::{IOLOG, Scene, run, succeed, vbench};

fn main() -> std::process::ExitCode {
    let trials = vec![Trial::ignorable_test("fio_reads_the_iolog_that_is_written", || Ok(iologs()))];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn iologs() -> Completion {
    if Command::new("fio").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Completion::ignored_with("fio is not installed (apt-get install fio)");
    }
    let scene = Scene::new();
    let (output, _) = scene.played("fio", IOLOG, &["--backend=ram:64M"]);
    succeed(&output);
    let (from, to) = (scene.name("fio.capture"), scene.name("to.iolog"));
    succeed(&vbench(&["trace", "--to-iolog", &to, &from]));
    let mut fio = Command::new("fio");
    fio.args(["--name=replay", "--ioengine=null", "--filename=kickless", "--output-format=json"]);
    let said = succeed(&run(fio.current_dir(scene.dir.path()).arg(format!("--read_iolog={to}"))));
    let said: serde_json::Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let job = &said["jobs"][0];
    let count = |kind: &str| job[kind]["total_ios"].as_u64().unwrap();
    assert_eq!(job["error"], 0);
    assert_eq!((count("read"), count("write")), (2, 2), "{job}");
    assert_eq!(job["write"]["io_bytes"].as_u64(), Some(512 + (2 << 20)));

    // And what fio writes, we read.
    let mut fio = Command::new("fio");
    fio.args(["--name=w", "--ioengine=null", "--filename=d", "--size=1m", "--bs=4k", "--rw=randrw"]);
    let theirs = scene.name("theirs");
    succeed(&run(fio.current_dir(scene.dir.path()).arg(format!("--write_iolog={theirs}"))));
    let summary = succeed(&vbench(&["trace", &theirs]));
    assert!(summary.contains("\n256 requests in "), "{summary}");
    Completion::Completed
}
