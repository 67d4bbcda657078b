//! Rings that are not mapped, or not any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;

use crate::front::{
    ACCESS_FAIL, DATA, FrontEnd, INVALIDATE, IoQueue, PAGE, RO, bytes, data, message, ring_iova,
};
use crate::support::{Back, longs, readable_within, until};

#[test]
fn a_ring_that_is_not_mapped_can_be_stopped_refused_and_started() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    front.expect_asked(3);
    assert_eq!(queue.stop(&mut front), 0);
    (0..3).for_each(|_| front.reply(0));
    queue.start(&mut front);
    front.expect_asked(3);
    // The used ring may not be written: no start.
    let (page, _) = front.table[&ring_iova(0, 2)];
    front.reply(0);
    front.reply(0);
    assert!(front.update(ring_iova(0, 2), page, PAGE, RO));
    assert_eq!(front.expect_asked(1)[0].kind, ACCESS_FAIL);
    front.reply(0);
    front.peer.expect_alive();
    queue.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
    front.expect_silence(Duration::from_millis(50));
    assert_eq!(queue.driver.finished(), 0);
    assert_eq!(queue.stop(&mut front), 0);
    // And there is nothing at all.
    queue.start(&mut front);
    front.expect_asked(1);
    front.reply(1);
    front.peer.expect_alive();
    // A new kick descriptor is a new try.
    assert_eq!(queue.stop(&mut front), 0);
    queue.start(&mut front);
    let driver = &mut queue.driver;
    front.until("the request", || driver.finished() > 0);
}

#[test]
fn an_invalidated_ring_is_left_alone_and_may_come_back_elsewhere() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut queue, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        queue.start(&mut front);
        good.start(&mut front);
        good.round_trip(&mut front, DATA);
        let map = Arc::clone(front.ram.map());
        let mut taken = 0;
        for part in [2, 0, 1, 2] {
            queue.round_trip(&mut front, DATA);
            taken += 1;
            // In flight when it is invalidated: it is answered first.
            back.echo.hold.store(true, Ordering::Release);
            queue.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
            until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
            taken += 1;
            front.peer.send(22, true, &message(ring_iova(0, part), 16, 0, 0, INVALIDATE), &[]);
            assert!(!readable_within(&front.peer.stream, 100), "acknowledged with a request in flight");
            back.echo.open_gate();
            assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
            assert!(queue.driver.finished() > 0);
            queue.driver.collect().unwrap();
            let old: Vec<u64> = (0..3).map(|p| front.table[&ring_iova(0, p)].0).collect();
            let before: Vec<_> = old.iter().map(|&at| bytes(&map, at, PAGE as u32)).collect();
            std::thread::sleep(Duration::from_millis(20));
            for (i, &at) in old.iter().enumerate() {
                assert!(bytes(&map, at, PAGE as u32) == before[i], "part {i} was touched");
            }
            // The other parts as well: they are to move.
            assert!(front.invalidate(ring_iova(0, 0), 3 << 24));
            // Moved, with all that is in it, to pages of other addresses; and poisoned where it was.
            let moved: Vec<u64> = (0..3).map(|_| front.page()).collect();
            for i in 0..3 {
                map.slice(moved[i], PAGE as u32).unwrap().write(&before[i]);
                map.slice(old[i], PAGE as u32).unwrap().fill(0xaa);
                let perm = front.table[&ring_iova(0, i as u64)].1;
                front.map(ring_iova(0, i as u64), moved[i], perm);
            }
            let [desc_addr, avail_addr, used_addr] = [0, 1, 2].map(|i: usize| front.ram.user_addr(moved[i]));
            let own = RingConfig { desc_addr, avail_addr, used_addr, base: taken, ..queue.told };
            queue.driver = DriverRing::new(&own, &map).unwrap();
            good.round_trip(&mut front, DATA);
            queue.round_trip(&mut front, DATA);
            taken += 1;
            for &at in &old {
                assert!(bytes(&map, at, PAGE as u32).iter().all(|&b| b == 0xaa), "the old ring was touched");
            }
        }
        assert_eq!(back.stats[0].errors_total(), 0);
        // And stopped while it is not mapped.
        assert!(front.invalidate(0, 0));
        assert_eq!(queue.stop(&mut front), taken);
        good.round_trip(&mut front, DATA);
    }
}
