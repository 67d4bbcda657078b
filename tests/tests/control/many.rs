//! A thousand disks in one process, twenty of them loaded. How long it took and how much memory is printed; what is asserted
//! about time is no more than that it ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kickless_tests::wait;
use serde_json::json;

use crate::front::{End, Front};
use crate::rig::{LIMIT, Rig};

/// As many as the machine lets one process have, by their descriptors.
const DISKS: usize = 1000;
const ACTIVE: usize = 20;
/// Resident memory that is enough, in KiB.
const ENOUGH: u64 = 256 << 10;

fn resident(rig: &Rig) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", rig.process.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_thousand_disks_of_which_twenty_are_loaded() {
    let mut rig = Rig::start("poll = 'adaptive'\n", &[]);
    rig.add("first", "backend=ram:1M");
    rig.does(204, "DELETE", "/v1/disks/first", None);
    let before = rig.counts();
    let begun = Instant::now();
    for i in 0..DISKS {
        // Those that are loaded hold what is written to them: as much as the guests' disks have.
        let backend = if i < ACTIVE { "ram:1M" } else { "null:1G" };
        rig.add(&format!("d{i}"), &format!("backend={backend},num-queues=4"));
    }
    let added = begun.elapsed();
    let idle = resident(&rig);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads: Vec<_> = (0..ACTIVE)
            .map(|i| {
                let (socket, over) = (rig.scene.path(&format!("d{i}.sock")), &over);
                scope.spawn(move || {
                    let mut front = Front::new(i as u64, i % 2 == 1);
                    front.model.may_tear = true;
                    front.connect(&socket).unwrap();
                    assert_eq!(front.load(|| over.load(Ordering::Acquire)).unwrap(), End::Done);
                    front.model.reads + front.model.writes
                })
            })
            .collect();
        std::thread::sleep(Duration::from_secs(2));
        over.store(true, Ordering::Release);
        let served: Vec<u64> = loads.into_iter().map(|load| load.join().unwrap()).collect();
        assert!(served.iter().all(|n| *n > 0), "{served:?}");
        println!("requests of {ACTIVE} guests: {}", served.iter().sum::<u64>());
    });
    let loaded = resident(&rig);
    let (descriptors, threads) = rig.counts();
    println!(
        "{DISKS} disks added in {added:.2?}; {idle} KiB resident, {loaded} KiB after load; {descriptors} descriptors, {threads} threads"
    );
    assert!(loaded < ENOUGH, "{loaded} KiB are resident");
    assert_eq!(rig.does(200, "GET", "/v1/disks", None).as_array().unwrap().len(), DISKS);
    let begun = Instant::now();
    for i in 0..DISKS {
        rig.does(204, "DELETE", &format!("/v1/disks/d{i}?force=true"), None);
    }
    println!("removed in {:.2?}, {} KiB resident", begun.elapsed(), resident(&rig));
    assert_eq!(rig.does(200, "GET", "/v1/disks", None), json!([]));
    // Threads and descriptors of the API's connections come and go.
    wait::until("what they had to be given back", LIMIT, || {
        let now = rig.counts();
        Ok((now.0 <= before.0 + 4 && now.1 <= before.1 + 2).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {before:?} at first, {:?} now", rig.counts()));
    rig.end();
}
