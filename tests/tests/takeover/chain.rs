//! A daemon, and the daemons that take over from it one after another.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use kickless_tests::process::Process;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;

use crate::blk::{LIMIT, program};

pub struct Chain<'a> {
    scene: &'a Scene,
    pub args: Vec<String>,
    pub control: PathBuf,
    /// The one that serves.
    pub current: Process,
}

impl<'a> Chain<'a> {
    /// The first of them.
    pub fn start(scene: &'a Scene, args: &[String]) -> Chain<'a> {
        let control = scene.path("control");
        let mut all = args.to_vec();
        all.push(format!("--control={}", control.display()));
        let mut current = Process::spawn(scene, "vhost-blk", &program(), &all).unwrap();
        // The control socket is the last of all to appear, but for what it is bound beside.
        wait::until("the daemon", LIMIT, || {
            assert!(current.poll_exit()?.is_none(), "{}", current.stderr());
            let there = std::fs::metadata(&control).is_ok_and(|m| m.file_type().is_socket());
            Ok((there && current.stderr().contains("serving")).then_some(()))
        })
        .unwrap();
        Chain { scene, args: all, control, current }
    }

    /// Starts one that takes over, with further arguments.
    pub fn successor(&self, further: &[&str]) -> Process {
        let args = [&self.args[..], &further.iter().map(|&a| a.to_owned()).collect::<Vec<_>>()].concat();
        self.successor_with(&args)
    }

    /// Starts one that takes over, with these arguments alone.
    pub fn successor_with(&self, args: &[String]) -> Process {
        let args = [args, &[format!("--takeover={}", self.control.display())]].concat();
        Process::spawn(self.scene, "vhost-blk", &program(), &args).unwrap()
    }

    /// Has `next` in the current one's place, which must leave in good order.
    pub fn adopt(&mut self, next: Process) {
        let mut old = std::mem::replace(&mut self.current, next);
        let ended = old.wait_exit(LIMIT);
        assert!(
            ended.as_ref().is_ok_and(std::process::ExitStatus::success),
            "{ended:?}: {}\n{}",
            old.stderr(),
            self.current.stderr()
        );
        let said = old.stderr();
        assert!(said.contains("handed over") && !said.contains("panicked"), "{said}");
        // Whoever comes next finds the new one, at once.
        let beside = self.control.with_extension("new");
        assert!(self.control.exists() && !beside.exists(), "the old one has left before there was a new one");
        self.expect_alive();
    }

    /// One hand-over from beginning to end.
    pub fn upgrade(&mut self, further: &[&str]) {
        let next = self.successor(further);
        self.adopt(next);
    }

    pub fn expect_alive(&mut self) {
        let status = self.current.poll_exit().unwrap();
        assert!(status.is_none(), "{status:?}: {}", self.current.stderr());
    }

    pub fn terminate(mut self) {
        self.expect_alive();
        self.current.signal(Signal::SIGTERM).unwrap();
        let status = self.current.wait_exit(LIMIT).unwrap();
        let said = self.current.stderr();
        assert!(status.success() && !said.contains("panicked"), "{status}\n{said}");
        assert!(!self.control.exists(), "the control socket is still there");
    }
}
