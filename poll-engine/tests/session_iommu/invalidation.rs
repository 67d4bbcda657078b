//! What is taken back is not touched any more from the acknowledgement on, and nothing else waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use poll_engine::engine::pacing::Pacing;

use crate::front::{DATA, FrontEnd, INVALIDATE, IoQueue, PAGE, RW, bytes, data, message};
use crate::support::{Back, longs, readable_within, until};

#[test]
fn an_invalidation_waits_for_what_points_there_and_for_nothing_else() {
    for pacing in [Pacing::Event, Pacing::Adaptive] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut one, mut two) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        let [_, into] = data(&mut front, DATA);
        let other = DATA + 64 * PAGE;
        let [_, other_into] = data(&mut front, other);
        one.start(&mut front);
        two.start(&mut front);
        one.round_trip(&mut front, DATA);
        two.round_trip(&mut front, other);
        back.echo.hold.store(true, Ordering::Release);
        let map = Arc::clone(front.ram.map());
        one.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
        two.submit(&[(other, 100)], &[(other + PAGE, 100)]);
        until("requests to be taken", || back.echo.held.load(Ordering::Acquire) == 2);

        // Nothing in flight points here, nor into the page that is mapped beside it in memory.
        assert!(front.invalidate(other + 2 * PAGE, PAGE));
        assert!(front.update(other + 2 * PAGE, 0x10_0000, PAGE, RW));
        assert!(front.invalidate(other + 2 * PAGE, PAGE));

        front.peer.send(22, true, &message(DATA + PAGE, PAGE, 0, 0, INVALIDATE), &[]);
        assert!(!readable_within(&front.peer.stream, 150), "acknowledged with a request in flight");
        back.echo.open_gate();
        assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
        assert!(one.driver.finished() > 0, "acknowledged before the driver could know");
        one.driver.collect().unwrap();
        until("the other request", || two.driver.finished() > 0);
        two.driver.collect().unwrap();
        assert_ne!(bytes(&map, other_into, 100), vec![0; 100]);

        // From the acknowledgement on the old page is somebody else's.
        map.slice(into, PAGE as u32).unwrap().fill(0xee);
        let new = front.page();
        front.map(DATA + PAGE, new, RW);
        (0..20).for_each(|_| one.round_trip(&mut front, DATA));
        assert_eq!(bytes(&map, into, PAGE as u32), vec![0xee; PAGE as usize], "the old page was touched");
        // The same by a translation in place of another, which is an invalidation as well.
        map.slice(new, PAGE as u32).unwrap().fill(0xdd);
        front.map(DATA + PAGE, into, RW);
        assert!(front.update(DATA + PAGE, into, PAGE, RW));
        (0..20).for_each(|_| one.round_trip(&mut front, DATA));
        assert_eq!(bytes(&map, new, PAGE as u32), vec![0xdd; PAGE as usize]);
    }
}

#[test]
fn a_slow_request_elsewhere_does_not_hold_an_invalidation_up() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    let other = DATA + 64 * PAGE;
    data(&mut front, other);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
    queue.round_trip(&mut front, other);
    back.echo.hold.store(true, Ordering::Release);
    queue.submit(&[(other, 100)], &[(other + PAGE, 100)]);
    until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
    back.echo.hold.store(false, Ordering::Release);
    for _ in 0..20 {
        // What was mapped while it was taken, is not what it points to.
        assert!(front.invalidate(DATA, 2 * PAGE));
        queue.round_trip(&mut front, DATA);
    }
    assert_eq!(back.echo.held.load(Ordering::Acquire), 1);
    back.echo.open_gate();
    until("the slow request", || queue.driver.finished() > 0);
}

/// Pages of I/O space that requests are for.
const PAGES: u64 = 8;

/// Pages come and go under load, and what was taken back is never touched.
#[test]
fn invalidations_under_load_leave_retired_pages_alone() {
    for pacing in [Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let mut queues = [IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1)];
        let mut spare: Vec<u64> = (0..16).map(|_| front.page()).collect();
        for i in 0..PAGES {
            let page = front.page();
            front.map(DATA + i * PAGE, page, RW);
        }
        for queue in &queues {
            queue.start(&mut front);
        }
        // Requests are held, and let go by somebody who knows nothing of all this.
        back.echo.hold.store(true, Ordering::Release);
        let stop = AtomicBool::new(false);
        let echo = &back.echo;
        std::thread::scope(|scope| {
            let _stopped = StopOnDrop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    echo.pulse();
                    std::thread::sleep(Duration::from_micros(300));
                }
            });
            let map = Arc::clone(front.ram.map());
            let mut random = 0x1234_5678_9abc_def1u64;
            let mut next = |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            let (mut done, mut pending, mut invalidated) = (0, [0; 2], 0);
            let deadline = Instant::now() + Duration::from_secs(60);
            while done < 1500 || invalidated < 150 {
                assert!(Instant::now() < deadline, "{done} requests, {invalidated} invalidations");
                front.answer();
                for (queue, pending) in queues.iter_mut().zip(&mut pending) {
                    while *pending < 6 {
                        let (out, into) = (DATA + next(PAGES) * PAGE, DATA + next(PAGES) * PAGE + 2048);
                        queue.submit(&[(out, 100)], &[(into, 100)]);
                        *pending += 1;
                    }
                    while let Some((_, len)) = queue.driver.collect() {
                        assert_eq!(len, 100);
                        *pending -= 1;
                        done += 1;
                    }
                }
                if next(4) == 0 {
                    invalidated += 1;
                    let first = next(PAGES);
                    let count = 1 + next(PAGES - first);
                    assert!(front.invalidate(DATA + first * PAGE, count * PAGE));
                    for i in first..first + count {
                        let old = front.table[&(DATA + i * PAGE)].0;
                        map.slice(old, PAGE as u32).unwrap().fill(0xc5);
                        let new = spare.swap_remove(next(spare.len() as u64) as usize);
                        // It has been nobody's until now.
                        let there = bytes(&map, new, PAGE as u32);
                        assert!(there.iter().all(|&b| b == 0xc5 || b == 0), "a retired page was written");
                        map.slice(new, PAGE as u32).unwrap().fill(0x11);
                        front.map(DATA + i * PAGE, new, RW);
                        spare.push(old);
                    }
                }
            }
            for &page in &spare {
                assert!(bytes(&map, page, PAGE as u32).iter().all(|&b| b == 0xc5 || b == 0));
            }
        });
        back.echo.open_gate();
        assert_eq!(back.stats[0].errors_total() + back.stats[1].errors_total(), 0);
        assert!(back.stats[0].iotlb_misses.get() > 20);
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
