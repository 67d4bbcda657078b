//! Schemathesis calls each daemon by the description that it gives of itself: with what that allows, with what it does not,
//! and in orders that its links suggest. Each answer is one that is described, and the daemon lives.
#![allow(clippy::unwrap_used)]
#![allow(clippy::needless_pass_by_value)] // bodies are written where they are passed

#[path = "../control/rig.rs"]
#[allow(dead_code)] // calls that change things
mod rig;

use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Result, ensure};
use kickless_tests::image::Image;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use rig::Rig;

/// What is looked at in each answer. That all that the description allows is accepted is not: that files are there, and that
/// sizes go together, is nothing that a schema says.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,negative_data_rejection,unsupported_method,use_after_free,\
                      ensure_resource_availability,allow_header_conformance";

fn main() -> ExitCode {
    let tests = vec![
        Test::new("disks", disks, missing),
        Test::new("ports", ports, missing),
        Test::new("an_answer_that_is_not_described_is_found", undescribed, missing),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_SCHEMATHESIS")
}

fn program() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("schemathesis/bin/schemathesis")
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn missing() -> Option<String> {
    (!program().exists())
        .then(|| "schemathesis is not there, and comes from PyPI: scripts/schemathesis.sh".into())
}

/// Most cases of a call, and orders of calls, that are made up.
fn examples() -> String {
    std::env::var("KICKLESS_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| "5".into())
}

/// Passes on what comes to an address of this machine, which is returned: schemathesis does not connect to Unix sockets.
fn relay(to: PathBuf) -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    thread::spawn(move || {
        for near in listener.incoming() {
            // Whoever called sees that nobody is there.
            let (Ok(near), Ok(far)) = (near, UnixStream::connect(&to)) else { continue };
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || pass(near2, far2, |far| far.shutdown(Shutdown::Write)));
            thread::spawn(move || pass(far, near, |near| near.shutdown(Shutdown::Write)));
        }
    });
    Ok(url)
}

fn pass<A: io::Read, B: io::Write>(mut from: A, mut to: B, end: impl FnOnce(&B) -> io::Result<()>) {
    // One that breaks off is over.
    let _ = io::copy(&mut from, &mut to);
    let _ = end(&to);
}

/// What schemathesis says, and whether it found nothing.
fn ask(rig: &Rig, url: &str, document: &str, names: &str) -> (bool, String) {
    let command = &mut Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program()).args(["--no-color", "run", document]);
    command.args(["--url", url, "--checks", CHECKS, "--max-examples", &examples()]);
    command.args(["--generation-database", "none", "--suppress-health-check", "all"]);
    command.args(["--request-timeout", "60", "--continue-on-failure"]);
    command.env("SCHEMATHESIS_HOOKS", root().join("tests/tests/schemathesis/hooks.py"));
    command.env("KICKLESS_SCENE", rig.path("")).env("KICKLESS_NAMES", names);
    let out = command.current_dir(rig.path("")).output().unwrap();
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    println!("{said}");
    (out.status.success(), said)
}

fn ask_all(mut rig: Rig, list: &str, names: &str) -> Result<Option<String>> {
    let url = relay(rig.scene.path("api"))?;
    let (well, said) = ask(&rig, &url, &format!("{url}/v1/openapi.json"), names);
    ensure!(well, "{said}");
    // It has called all there is, and not in vain.
    let selected = said.lines().find_map(|line| line.trim().strip_prefix("Tested: ")).unwrap_or("none");
    ensure!(said.contains(&format!("Selected: {selected}/{selected}")), "{said}");
    rig.does(200, "GET", list, None);
    rig.end();
    Ok(None)
}

fn disks(_: &Scene) -> Result<Option<String>> {
    let rig = Rig::start("", &[]);
    let image = Image::create(&rig.scene, "kept.img", 1 << 20)?;
    rig.add("kept", &format!("direct=off,blk-file={}", image.path().display()));
    rig.add("other", "backend=ram:1M");
    ask_all(rig, "/v1/disks", "kept other")
}

fn ports(_: &Scene) -> Result<Option<String>> {
    let switches = "[[switch]]\n[[switch]]\nname = 'kept'\n[[switch]]\nname = 'other'\n";
    let rig = Rig::start_net(&format!("poll = 'event'\n{switches}"), &[]);
    rig.add_port("kept", "");
    rig.add_port("other", "switch=kept");
    ask_all(rig, "/v1/ports", "kept other")
}

/// A description that leaves something out: the same calls say so.
fn undescribed(_: &Scene) -> Result<Option<String>> {
    let mut rig = Rig::start("", &[]);
    rig.add("kept", "backend=ram:1M");
    let url = relay(rig.scene.path("api"))?;
    let mut document = rig.does(200, "GET", "/v1/openapi.json", None);
    document["components"]["schemas"]["Reactor"]["properties"]["queues"]["type"] = "string".into();
    let paths = document["paths"].as_object_mut().unwrap();
    paths.retain(|path, _| path == "/v1/reactors");
    std::fs::write(rig.path("wrong.json"), document.to_string())?;
    let (well, said) = ask(&rig, &url, &rig.path("wrong.json"), "kept");
    ensure!(!well && said.contains("Response violates schema"), "{said}");
    rig.end();
    Ok(None)
}
