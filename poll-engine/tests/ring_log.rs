//! What a ring tells the dirty log, against what has changed in memory: rings of several pages, on their own.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // takes bits of a log

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use poll_engine::device::features;
use poll_engine::memory::Ram;
use poll_engine::memory::log::{DirtyLog, LOG_PAGE, QueueLog};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::ring::{Ring, RingConfig, RingFormat};
use proptest::prelude::*;

/// Five pages of used ring, or eight of descriptors and one of event suppression.
const SIZE: u16 = 2048;
const START: u64 = 0x40_0000;

struct Pair {
    ram: Ram,
    bits: Ram,
    config: RingConfig,
    ring: Ring,
    driver: DriverRing,
    data: u64,
    descs: u64,
    used: u64,
}

impl Pair {
    fn new(features: u64) -> Pair {
        let mut ram = Ram::new(START, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, SIZE, features).unwrap();
        let data = ram.alloc(4096, 4096).unwrap();
        let spec = ram.spec();
        let guest = |user: u64| user - spec.user_addr + spec.guest_addr;
        let (descs, used) = (guest(config.desc_addr), guest(config.used_addr));
        let bits = Ram::new(0, 4096, false).unwrap();
        let log = DirtyLog::map(bits.fd().try_clone_to_owned().unwrap(), 0, 4096).unwrap();
        let mut ring = Ring::activate(&config, ram.map()).unwrap();
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        ring.set_log(Some(&QueueLog { log: Arc::new(log), data: true, used: Some(used), call: None }));
        Pair { ram, bits, config, ring, driver, data, descs, used }
    }

    fn take(&self) -> BTreeSet<u64> {
        let bytes = self.bits.map().slice(0, 4096).unwrap();
        let mut pages = BTreeSet::new();
        for i in 0..4096 {
            // SAFETY: a byte inside the slice; the log only uses atomics on it.
            let bits = unsafe { AtomicU8::from_ptr(bytes.host_addr().add(i)) }.swap(0, Ordering::AcqRel);
            pages.extend((0..8).filter(|b| bits & 1 << b != 0).map(|b| 8 * i as u64 + b));
        }
        pages
    }

    /// What a device writes of a ring, page by page.
    fn written(&self) -> Vec<(u64, Vec<u8>)> {
        let (descs, _, device) = self.config.format.bytes(SIZE);
        let pages = |at: u64, len: u64| at / LOG_PAGE..=(at + len - 1) / LOG_PAGE;
        let page = |n: u64| {
            let mut bytes = vec![0; LOG_PAGE as usize];
            self.ram.map().slice(n * LOG_PAGE, LOG_PAGE as u32).unwrap().read(&mut bytes);
            (n, bytes)
        };
        let used = pages(self.used, device);
        match self.config.format {
            RingFormat::Split => used.map(page).collect(),
            RingFormat::Packed => pages(self.descs, descs).chain(used).map(page).collect(),
        }
    }

    /// The first and the last byte of what tells of the request that was served as number `served`.
    fn entry(&self, served: u64) -> [u64; 2] {
        let slot = served % u64::from(SIZE);
        match self.config.format {
            RingFormat::Split => [self.used + 4 + 8 * slot, self.used + 4 + 8 * slot + 7],
            RingFormat::Packed => [self.descs + 16 * slot, self.descs + 16 * slot + 15],
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// So many requests from beginning to end, shown at once.
    Serve(u16),
    Enable,
    Disable,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![(1..SIZE).prop_map(Step::Serve), Just(Step::Enable), Just(Step::Disable)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_log_knows_what_changed(packed: bool, event_idx: bool, steps in prop::collection::vec(step(), 1..30)) {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let mut pair = Pair::new(bit(packed, features::RING_PACKED) | bit(event_idx, features::EVENT_IDX));
        let whole: BTreeSet<u64> = pair.written().into_iter().map(|(n, _)| n).collect();
        prop_assert_eq!(whole.len(), if packed { 9 } else { 5 });
        // What starting the ring has written was told when the log came.
        let ends = BTreeSet::from([pair.used / LOG_PAGE, *whole.last().unwrap()]);
        prop_assert_eq!(pair.take(), ends.clone());
        let (mut chain, mut served) = (Chain::default(), 0u64);
        for step in steps {
            let before = pair.written();
            let mut allowed = ends.clone();
            match step {
                Step::Serve(n) => {
                    for _ in 0..n {
                        let buffer = Buffer { addr: pair.data, len: 16, writable: true };
                        pair.driver.add(&[buffer]).unwrap();
                        allowed.extend(pair.entry(served).map(|at| at / LOG_PAGE));
                        served += 1;
                    }
                    pair.driver.publish();
                    for _ in 0..n {
                        prop_assert!(pair.ring.available().unwrap() > 0);
                        let token = pair.ring.take(pair.ram.map(), &mut chain).unwrap();
                        pair.ring.complete(token, u32::from(n));
                    }
                    prop_assert!(pair.ring.publish());
                    while pair.driver.collect().is_some() {}
                }
                Step::Enable => {
                    pair.ring.enable_notification();
                }
                Step::Disable => pair.ring.disable_notification(),
            }
            let marked = pair.take();
            for ((n, old), (_, new)) in before.iter().zip(pair.written()) {
                prop_assert!(*old == new || marked.contains(n), "page {n} went unnoticed");
            }
            prop_assert!(marked.is_subset(&allowed), "{marked:?} where {allowed:?} may be");
        }
        pair.ring.set_log(None);
        pair.ring.enable_notification();
        pair.ring.disable_notification();
        prop_assert_eq!(pair.take(), BTreeSet::new());
    }
}

#[test]
fn only_what_is_asked_for_is_logged() {
    for format in [0, features::RING_PACKED] {
        let mut pair = Pair::new(format | features::EVENT_IDX);
        pair.take();
        let log = DirtyLog::map(pair.bits.fd().as_fd().try_clone_to_owned().unwrap(), 0, 4096).unwrap();
        pair.ring.set_log(Some(&QueueLog { log: Arc::new(log), data: true, used: None, call: None }));
        pair.ring.enable_notification();
        assert_eq!(pair.take(), BTreeSet::new(), "no VHOST_VRING_F_LOG");
    }
}
