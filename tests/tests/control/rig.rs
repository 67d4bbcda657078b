//! A daemon with its API, and somebody who calls.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use control::client::{Answer, Client};
use kickless_tests::process::{Process, built};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};

/// How long anything may take that ends.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Rig {
    pub scene: Scene,
    pub process: Process,
    pub client: Client,
    program: &'static str,
    args: Vec<String>,
}

impl Rig {
    /// With a configuration file that has this in it, and these options; in both, `CONTROL` stands for a socket.
    pub fn start(file: &str, options: &[&str]) -> Rig {
        Rig::start_in(Scene::new().unwrap(), file, options)
    }

    /// The same, in this place.
    pub fn start_in(scene: Scene, file: &str, options: &[&str]) -> Rig {
        let path = scene.path("blk.toml");
        let file = file.replace("CONTROL", &scene.path("control").display().to_string());
        std::fs::write(&path, format!("{file}api = '{}'\n", scene.path("api").display())).unwrap();
        Rig::configured(scene, "vhost-blk", &path, options)
    }

    /// The other daemon, with this at the top of its file; `DIR` stands for where its sockets are.
    pub fn start_net(file: &str, options: &[&str]) -> Rig {
        let scene = Scene::new().unwrap();
        let path = scene.path("net.toml");
        let file = file.replace("DIR", &scene.path("").display().to_string());
        std::fs::write(&path, format!("api = '{}'\n{file}", scene.path("api").display())).unwrap();
        Rig::configured(scene, "vhost-net", &path, options)
    }

    fn configured(scene: Scene, program: &'static str, path: &Path, options: &[&str]) -> Rig {
        let control = scene.path("control").display().to_string();
        let mut args = vec![format!("--config={}", path.display())];
        args.extend(options.iter().map(|option| option.replace("CONTROL", &control)));
        Rig::begin(scene, program, args)
    }

    /// Without a file.
    pub fn with_options(options: &[&str]) -> Rig {
        let scene = Scene::new().unwrap();
        let mut args = vec![format!("--api={}", scene.path("api").display())];
        args.extend(options.iter().map(|&option| option.to_owned()));
        Rig::begin(scene, "vhost-blk", args)
    }

    fn begin(scene: Scene, program: &'static str, args: Vec<String>) -> Rig {
        let process = Process::spawn(&scene, program, &path_of(program), &args).unwrap();
        let client = Client::new(&scene.path("api"));
        let mut rig = Rig { scene, process, client, program, args };
        rig.wait_up();
        rig
    }

    fn wait_up(&mut self) {
        let (client, process) = (&self.client, &mut self.process);
        wait::until("the API", LIMIT, || {
            assert!(process.poll_exit()?.is_none(), "{}", process.stderr());
            Ok(client.call("GET", "/v1/daemon", None).ok())
        })
        .unwrap();
    }

    /// A daemon that wants to take over.
    pub fn spawn_heir(&self) -> Process {
        let mut args = self.args.clone();
        args.push(format!("--takeover={}", self.path("control")));
        Process::spawn(&self.scene, "heir", &path_of(self.program), &args).unwrap()
    }

    /// It has: the old one leaves.
    pub fn succeed(&mut self, heir: Process) {
        let mut old = std::mem::replace(&mut self.process, heir);
        let status = old.wait_exit(LIMIT).unwrap();
        assert!(status.success(), "{}\n{}", old.stderr(), self.process.stderr());
    }

    pub fn restart(&mut self) {
        self.stop();
        self.process = Process::spawn(&self.scene, self.program, &path_of(self.program), &self.args).unwrap();
        self.wait_up();
    }

    fn stop(&mut self) {
        self.process.signal(Signal::SIGTERM).unwrap();
        let status = self.process.wait_exit(LIMIT).unwrap();
        let said = self.process.stderr();
        assert!(status.success() && !said.contains("panicked"), "{status}\n{said}");
    }

    /// Ends the daemon, which must have lived until here.
    pub fn end(&mut self) {
        self.alive();
        self.stop();
    }

    pub fn alive(&mut self) {
        assert!(self.process.poll_exit().unwrap().is_none(), "{}", self.process.stderr());
    }

    pub fn path(&self, name: &str) -> String {
        self.scene.path(name).display().to_string()
    }

    pub fn call(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.client.call(method, path, body.as_ref()).unwrap()
    }

    /// Calls, which must go well.
    pub fn does(&self, status: u16, method: &str, path: &str, body: Option<Value>) -> Value {
        let answer = self.call(method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", String::from_utf8_lossy(&answer.body));
        answer.json().unwrap()
    }

    /// The body is wrong, and where and why is said.
    pub fn finds_fault(&self, path: &str, body: &Value, key: Option<&str>, said: &str) {
        let answer = self.call("POST", path, Some(body.clone()));
        let problem = answer.json().unwrap();
        assert_eq!(answer.status, 400, "{body}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains(said), "{problem}");
        assert!(key.is_none() || problem["key"] == json!(key), "{body}: {problem}");
    }

    /// Calls, which must not; what is said about it in one line.
    pub fn refuses(&self, status: u16, method: &str, path: &str, body: Option<Value>) -> String {
        let answer = self.call(method, path, body);
        let problem = answer.json().unwrap();
        assert_eq!(
            (answer.status, &problem["status"]),
            (status, &json!(status)),
            "{method} {path}: {problem}"
        );
        assert_eq!(answer.content_type, "application/problem+json");
        let said = problem["detail"].as_str().unwrap().to_owned();
        assert!(!said.is_empty() && !said.contains('\n'), "{said}");
        said
    }

    /// A disk of this name, on a socket of that name.
    pub fn add(&self, name: &str, keys: &str) -> Value {
        self.add_to("/v1/disks", name, keys)
    }

    /// A port.
    pub fn add_port(&self, name: &str, keys: &str) -> Value {
        self.add_to("/v1/ports", name, keys)
    }

    fn add_to(&self, list: &str, name: &str, keys: &str) -> Value {
        let mut spec = Map::new();
        spec.insert("name".into(), name.into());
        spec.insert("socket-path".into(), self.path(&format!("{name}.sock")).into());
        for pair in keys.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap();
            spec.insert(key.into(), value.into());
        }
        self.does(201, "POST", list, Some(Value::Object(spec)))
    }

    pub fn port(&self, name: &str) -> Value {
        self.does(200, "GET", &format!("/v1/ports/{name}"), None)
    }

    pub fn disk(&self, name: &str) -> Value {
        self.does(200, "GET", &format!("/v1/disks/{name}"), None)
    }

    pub fn ctl(&self, args: &[&str]) -> Output {
        let program = built("vhostctl").expect("vhostctl is not built: cargo build -p vhostctl");
        Command::new(program).env("VHOSTCTL_API", self.path("api")).args(args).output().unwrap()
    }

    /// Mappings of memory.
    pub fn mappings(&self) -> usize {
        std::fs::read_to_string(format!("/proc/{}/maps", self.process.pid())).unwrap().lines().count()
    }

    /// Open descriptors, and threads.
    pub fn counts(&self) -> (usize, usize) {
        let count = |what: &str| {
            std::fs::read_dir(Path::new("/proc").join(self.process.pid().to_string()).join(what))
                .unwrap()
                .count()
        };
        (count("fd"), count("task"))
    }
}

fn path_of(program: &str) -> std::path::PathBuf {
    built(program).unwrap_or_else(|| panic!("{program} is not built: cargo build -p {program}"))
}
