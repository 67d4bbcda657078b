//! What goes wrong with the new daemon is no trouble of the guest's: the old one goes on.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use kickless_tests::image::{Image, MIB};
use kickless_tests::process::{self, Process};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::{Signal, kill};
use poll_engine::takeover::channel::Channel;
use poll_engine::takeover::give::Program;
use poll_engine::takeover::take::Taker;
use poll_engine::takeover::{Answer, FORMAT, Request};

use crate::blk::LIMIT;
use crate::chain::Chain;
use crate::load::Load;
use crate::{QUEUES, report, three_disks};

const PROGRAM: Program = Program { name: "vhost-blk", version: "test" };

fn soon() -> Instant {
    Instant::now() + LIMIT
}

/// A daemon under load; after `test` it must serve as before, and still be one that can be taken over from.
fn under_load(test: impl FnOnce(&mut Chain<'_>, &Load)) {
    under_load_while(|chain, load| {
        test(chain, load);
        true
    });
}

/// As [`under_load`], for a test that tells whether anybody is left to serve.
fn under_load_while(test: impl FnOnce(&mut Chain<'_>, &Load) -> bool) -> bool {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "a.img", 16 * MIB).unwrap();
    let read_only = Image::filled(&scene, "c.img", 4 * MIB, 0x5c).unwrap();
    let mut chain = Chain::start(&scene, &three_disks(&scene, &image, &read_only));
    let [a, b, c] = ["a", "b", "c"].map(|name| scene.path(name));
    let load = Load::start(&[(&a, None), (&b, None), (&c, Some(0x5c))], QUEUES, false);
    load.progress();
    load.next_epoch();
    if !test(&mut chain, &load) {
        load.abandon();
        return false;
    }
    load.progress();
    chain.expect_alive();
    chain.upgrade(&[]);
    load.progress();
    let tallies = load.finish();
    report("the hand-over that failed", &tallies, 1..2);
    chain.terminate();
    true
}

/// Waits until the daemon says that it goes on, and why.
fn goes_on(chain: &Chain<'_>, why: &str) {
    let said = || Ok(chain.current.stderr().contains(why).then_some(()));
    let outcome = wait::until("the daemon to go on", LIMIT, said);
    assert!(outcome.is_ok(), "it was to say '{why}':\n{}", chain.current.stderr());
    assert!(chain.current.stderr().contains("not handed over, going on"));
}

/// Ends with one line, which says this.
fn fails(mut process: Process, why: &str) {
    let status = process.wait_exit(LIMIT).unwrap();
    let said = process.stderr();
    assert!(!status.success() && said.contains(why), "{status}, and not '{why}':\n{said}");
    assert!(!said.contains("panicked"), "{said}");
}

pub fn bad_configuration() {
    under_load(|chain, load| {
        let without =
            |what: &str| chain.args.iter().filter(|a| !a.contains(what)).cloned().collect::<Vec<_>>();
        let with = |what: &str, new: &str| {
            chain
                .args
                .iter()
                .map(|a| if a.contains(what) { new.to_owned() } else { a.clone() })
                .collect::<Vec<_>>()
        };
        let disk = |what: &str| chain.args.iter().find(|a| a.contains(what)).unwrap().clone();
        for (args, why) in [
            (without("backend=ram"), "this one would not; add it to the options"),
            (with("backend=ram", &disk("backend=ram").replace("16M", "8M")), "keep the options"),
            (with("read-only", &disk("read-only").replace(",read-only", "")), "keep the options"),
            (with("a.img", &disk("a.img").replace("a.img", "gone.img")), "cannot open"),
            (
                with("read-only", &disk("read-only").replace("c.img", "a.img")),
                "is not the image that the running process serves",
            ),
            ([&chain.args[..], &["--cpus=1000".into()]].concat(), "CPU 1000 cannot be used"),
            // These are noticed when the sessions are there to be compared with.
            (with("--num-queues", "--num-queues=1"), "another device: --num-queues differs"),
            (
                [&chain.args[..], &["--block-size=4096".into()]].concat(),
                "another device: --block-size differs",
            ),
            ([&chain.args[..], &["--queue-size=32".into()]].concat(), "another device: --queue-size differs"),
        ] {
            fails(chain.successor_with(&args), why);
            goes_on(chain, why);
            load.progress();
        }
    });
}

pub fn dies_at_any_step() {
    under_load(|chain, load| {
        // Before a word.
        drop(UnixStream::connect(&chain.control).unwrap());
        goes_on(chain, "the other process has gone away");
        load.progress();
        // Before asking.
        drop(Taker::connect(&chain.control, PROGRAM).unwrap());
        load.progress();
        // After asking, and before anything has come.
        let channel = Channel::new(UnixStream::connect(&chain.control).unwrap()).unwrap();
        let hello = Request::Hello { program: "vhost-blk".into(), version: "test".into() };
        channel.send(&hello, &[], soon()).unwrap();
        channel.send(&Request::Ready, &[], soon()).unwrap();
        drop(channel);
        load.progress();
        // In the middle of receiving: with the first of three states.
        let channel = Channel::new(UnixStream::connect(&chain.control).unwrap()).unwrap();
        channel.send(&hello, &[], soon()).unwrap();
        channel.send(&Request::Ready, &[], soon()).unwrap();
        loop {
            if let (Answer::Server(_), _) = channel.receive(soon(), "speak").unwrap() {
                break;
            }
        }
        drop(channel);
        load.progress();
        // With everything in its hands, but for having taken the baton.
        let (taker, _) = Taker::connect(&chain.control, PROGRAM).unwrap();
        let (snapshots, baton) = taker.ask().unwrap();
        assert_eq!(snapshots.len(), 3);
        drop(taker);
        load.progress();
        assert!(!baton.take(), "the old one serves");
        // It says why.
        let (taker, _) = Taker::connect(&chain.control, PROGRAM).unwrap();
        let (_, baton) = taker.ask().unwrap();
        taker.give_up("no more tape");
        goes_on(chain, "the new process gives up: no more tape");
        assert!(!baton.take());
    });
}

pub fn killed_at_any_time() {
    let mut killed = 0;
    // Killed between taking over and being heard of, it takes everything with it, as at any time after: that is what
    // records of requests in flight are for, and this front end keeps none.
    while killed < 20 {
        let last = under_load_while(|chain, load| {
            // From before it has begun to about when it serves: a start takes some ten milliseconds.
            for round in 0..30 {
                let mut next = chain.successor(&[]);
                std::thread::sleep(Duration::from_micros(1200 * round));
                if next.stderr().contains("serving") || chain.current.stderr().contains("handed over:") {
                    chain.adopt(next);
                } else {
                    next.kill9().unwrap();
                    killed += 1;
                }
                let ended = "the new process died in taking over";
                let over =
                    || chain.current.poll_exit().unwrap().is_some() || chain.current.stderr().contains(ended);
                if !load.progress_unless(over) {
                    let said = chain.current.stderr();
                    assert!(said.contains("handed over:") || said.contains(ended), "{said}");
                    return false;
                }
            }
            true
        });
        println!(
            "{killed} new daemons were killed{}",
            if last { "" } else { ", the last one while it took over" }
        );
    }
}

pub fn stands_still() {
    under_load(|chain, load| {
        let (taker, _) = Taker::connect(&chain.control, PROGRAM).unwrap();
        let (_, baton) = taker.ask().unwrap();
        // As a stopped process would: neither gone nor going on.
        goes_on(chain, "the other process did not run in time");
        load.progress();
        assert!(!baton.take(), "it comes too late");
        // And a real one, stopped somewhere on its way.
        let mut next = chain.successor(&[]);
        std::thread::sleep(Duration::from_millis(8));
        kill(next.pid(), Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_secs(6));
        kill(next.pid(), Signal::SIGCONT).unwrap();
        let begun = Instant::now();
        loop {
            let old_left = chain.current.poll_exit().unwrap().is_some();
            if old_left {
                chain.adopt(next);
                break;
            }
            if next.poll_exit().unwrap().is_some() {
                break;
            }
            assert!(
                begun.elapsed() < LIMIT,
                "both are there:\n{}\n{}",
                chain.current.stderr(),
                next.stderr()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        load.progress();
    });
}

pub fn another_age() {
    under_load(|chain, _| {
        // A newer one, to the running one.
        let stream = UnixStream::connect(&chain.control).unwrap();
        let channel = Channel::with_format(stream, FORMAT + 1).unwrap();
        let hello = Request::Hello { program: "vhost-blk".into(), version: "9".into() };
        // It may have been refused by its first word.
        let _ = channel.send(&hello, &[], soon());
        let why = format!("hands over in format {}, this one in format {FORMAT}", FORMAT + 1);
        goes_on(chain, &why);
        // What it is told is in a format that it can say is not its own.
        let refused = channel.receive::<Answer>(soon(), "answer").unwrap_err().to_string();
        assert!(refused.contains(&format!("in format {FORMAT}")), "{refused}");
        // Another program.
        let other = Program { name: "vhost-net", version: "1" };
        let refused = Taker::connect(&chain.control, other).unwrap_err().to_string();
        assert!(refused.contains("is vhost-net, not vhost-blk"), "{refused}");
        // Something else altogether.
        let mut stream = UnixStream::connect(&chain.control).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        goes_on(chain, "does not speak the hand-over protocol");
    });
    // An older one that runs, to the real new one.
    let scene = Scene::new().unwrap();
    let path = scene.path("control");
    let listener = UnixListener::bind(&path).unwrap();
    let args = [
        format!("--socket-path={}", scene.path("s").display()),
        "--backend=null:1M".to_owned(),
        format!("--takeover={}", path.display()),
    ];
    let next = Process::spawn(&scene, "new", &crate::blk::program(), &args).unwrap();
    let channel = Channel::with_format(listener.accept().unwrap().0, FORMAT + 1).unwrap();
    let answer = Answer::Hello { program: "vhost-blk".into(), version: "9".into(), exports: 0 };
    channel.send(&answer, &[], soon()).unwrap();
    fails(next, "upgrade by a restart instead");
    // Nobody at all.
    drop(listener);
    let next = Process::spawn(&scene, "nobody", &crate::blk::program(), &args).unwrap();
    fails(next, "it must have been started with --control");
    assert!(!scene.path("s").exists());
}

pub fn another_user() {
    under_load(|chain, _| {
        let mode = std::fs::metadata(&chain.control).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // Even if the file system lets them in.
        std::fs::set_permissions(&chain.control, std::fs::Permissions::from_mode(0o666)).unwrap();
        let dir = chain.control.parent().unwrap();
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = dir.join("vhost-blk-copy");
        process::copy(&crate::blk::program(), &program).unwrap();
        let takeover = format!("--takeover={}", chain.control.display());
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(&program)
            .args(&chain.args)
            .arg(takeover)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success()
                && said.contains("refuses: the process at the other end runs as user 65534"),
            "{said}"
        );
        goes_on(chain, "runs as user 65534, this one as 0");
    });
}
