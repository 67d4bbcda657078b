//! A newer daemon asked for over the API, and started by `vhostctl upgrade`: it is in the old one's place with all that that
//! one has served, guests under load notice nothing but a pause, and whatever is wrong with it leaves the old one serving.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kickless_tests::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::front::{End, Front};
use crate::rig::{LIMIT, Rig};

/// Daemons that `vhostctl` has started, and that nobody waits for.
#[derive(Default)]
struct Strays(Vec<Pid>);

impl Drop for Strays {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
}

fn pid(rig: &Rig) -> u64 {
    rig.does(200, "GET", "/v1/daemon", None)["pid"].as_u64().unwrap()
}

/// What the log of the first daemon says: those that come after it write there, too.
fn said(rig: &Rig) -> String {
    rig.process.stderr()
}

/// Upgrades, which must go well: what was said about it.
fn upgrade(rig: &Rig, strays: &mut Strays, further: &[&str]) -> Value {
    let before = pid(rig);
    let out = rig.ctl(&[&["--json", "upgrade"], further].concat());
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{out:?}\n{}", said(rig));
    let done: Value = serde_json::from_str(&text).unwrap();
    let now = pid(rig);
    strays.0.push(Pid::from_raw(now as i32));
    assert_eq!((&done["was"], &done["pid"]), (&json!(before), &json!(now)), "{done}");
    assert_ne!(before, now);
    done
}

/// It must not go well, for this reason, and the same daemon goes on.
fn fails(rig: &Rig, further: &[&str], why: &str) {
    let before = pid(rig);
    let out = rig.ctl(&[&["upgrade"], further].concat());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && text.contains(why), "{out:?}\n{}", said(rig));
    assert_eq!(text.trim().lines().count(), 1, "{text}");
    assert_eq!(pid(rig), before);
}

/// The last of them ends, and takes its sockets along.
fn end(rig: &Rig) {
    let last = Pid::from_raw(pid(rig) as i32);
    kill(last, Signal::SIGTERM).unwrap();
    wait::until("the last daemon's end", LIMIT, || {
        Ok((!std::path::Path::new(&rig.path("api")).exists()).then_some(()))
    })
    .unwrap();
    assert!(!said(rig).contains("panicked"), "{}", said(rig));
}

struct Load {
    over: Arc<AtomicBool>,
    guests: Vec<JoinHandle<Front>>,
}

impl Load {
    /// Of these disks: reads of what was not written last are found out.
    fn start(rig: &Rig, disks: &[&str]) -> Load {
        let over = Arc::<AtomicBool>::default();
        let guest = |(seed, name): (u64, &&str)| {
            let (socket, over) = (rig.scene.path(&format!("{name}.sock")), Arc::clone(&over));
            std::thread::spawn(move || {
                let mut front = Front::new(seed, seed % 2 == 1);
                front.connect(&socket).unwrap();
                assert_eq!(front.load(|| over.load(Ordering::Acquire)).unwrap(), End::Done, "hung up on");
                assert_eq!(front.check().unwrap(), End::Done);
                front
            })
        };
        let guests = (0..).zip(disks).map(guest).collect();
        Load { over, guests }
    }

    /// Waits until the daemon of now has served some more of each.
    fn progress(&self, rig: &Rig, disks: &[&str]) {
        let requests = |name: &str| rig.disk(name)["all"]["requests"].as_u64().unwrap();
        for name in disks {
            let before = requests(name);
            wait::until("requests", LIMIT, || {
                assert!(
                    !self.guests.iter().any(JoinHandle::is_finished),
                    "a guest has failed\n{}",
                    said(rig)
                );
                Ok((requests(name) > before + 50).then_some(()))
            })
            .unwrap();
        }
    }

    fn finish(self) {
        self.over.store(true, Ordering::Release);
        for guest in self.guests {
            let front = guest.join().unwrap();
            assert!(front.model.reads > 0 && front.model.writes > 0);
        }
    }
}

#[test]
fn a_newer_daemon_is_started_and_takes_over_under_load() {
    // The directory of the API is one of those that it may use, whatever it is allowed.
    let mut rig = Rig::start("poll = 'event'\nallow = ['/usr']\n", &[]);
    let disks = ["split", "packed"];
    for name in disks {
        rig.add(name, "backend=ram:2M,num-queues=2");
    }
    let mut strays = Strays::default();
    let load = Load::start(&rig, &disks);
    load.progress(&rig, &disks);

    // What would drop a disk, make no sense, or not be there.
    fails(&rig, &[], "(--save)");
    assert!(said(&rig).contains("serves something on"), "{}", said(&rig));
    fails(&rig, &["--", "--poll=often"], "none of busy");
    fails(&rig, &["--program", "/nonexistent"], "/nonexistent: cannot be started");
    fails(&rig, &["--program", "/bin/false"], "/bin/false: does not take its options");
    load.progress(&rig, &disks);

    for round in 0..3 {
        let done = upgrade(&rig, &mut strays, if round == 0 { &["--save"] } else { &[] });
        assert_eq!(
            (&done["exports"], &done["attached"], &done["attached-before"]),
            (&json!(2), &json!(2), &json!(2))
        );
        if round == 0 {
            assert!(rig.process.wait_exit(LIMIT).unwrap().success());
        }
        load.progress(&rig, &disks);
    }
    // With other options than before.
    let (config, api) = (format!("--config={}", rig.path("blk.toml")), rig.path("api"));
    upgrade(&rig, &mut strays, &["--", &config]);
    load.progress(&rig, &disks);
    load.finish();
    assert!(!std::path::Path::new(&format!("{api}.takeover")).exists());
    end(&rig);
}

#[test]
fn ports_are_handed_over_when_somebody_asks_for_it() {
    let mut rig = Rig::start_net("switch = true\npoll = 'event'\n", &[]);
    rig.add_port("a", "");
    rig.add_port("b", "vlan=5");
    let mut strays = Strays::default();
    let how = rig.does(200, "POST", "/v1/takeover", None);
    assert_eq!(how["socket"], json!(format!("{}.takeover", rig.path("api"))));
    // From now on.
    let tap = json!({ "socket-path": rig.path("t.sock"), "tap": "kl-none" });
    assert!(rig.refuses(409, "POST", "/v1/ports", Some(tap)).contains("cannot be handed over"));
    for _ in 0..2 {
        let done = upgrade(&rig, &mut strays, &["--save"]);
        assert_eq!(done["exports"], 2);
    }
    assert!(rig.process.wait_exit(LIMIT).unwrap().success());
    assert_eq!(rig.does(200, "GET", "/v1/ports", None).as_array().unwrap().len(), 2);
    end(&rig);
}
