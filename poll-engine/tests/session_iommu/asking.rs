//! What is missing is asked for, once, and waited for by its queue alone.

use std::sync::Arc;
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;
use poll_engine::session::wire::protocol;
use poll_engine::stats::ErrorKind;

use crate::front::{
    ACCESS_FAIL, Asked, DATA, FrontEnd, IoQueue, MISS, PAGE, PROTOCOL, RO, RW, UPDATE, WO, bytes, data,
    ring_iova,
};
use crate::support::{Back, readable_within, until};

#[test]
fn addresses_are_asked_for_once_and_rings_too() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let mut queue = IoQueue::new(&mut front, 0);
        data(&mut front, DATA);
        queue.start(&mut front);
        let ring = front.expect_asked(3);
        let wanted = [(0, RO), (1, RO), (2, RW)];
        for (asked, (part, perm)) in ring.iter().zip(wanted) {
            let miss = Asked { iova: ring_iova(0, part), perm, kind: MISS, need_reply: true };
            assert_eq!(*asked, miss);
        }
        front.peer.expect_alive();
        for part in 0..3 {
            let (page, perm) = front.table[&ring_iova(0, part)];
            assert!(front.update(ring_iova(0, part), page, PAGE, perm));
            front.reply(0);
        }
        // Both buffers are asked for at once.
        queue.submit(&[(DATA + 8, 100)], &[(DATA + PAGE, 100)]);
        let asked = front.expect_asked(2);
        assert_eq!((asked[0].iova, asked[0].perm), (DATA + 8, RO));
        assert_eq!((asked[1].iova, asked[1].perm), (DATA + PAGE, WO));
        for iova in [DATA, DATA + PAGE] {
            let (page, perm) = front.table[&iova];
            assert!(front.update(iova, page, PAGE, perm));
            front.reply(0);
        }
        until("the request", || queue.driver.finished() > 0);
        queue.driver.collect().unwrap();
        for _ in 0..50 {
            queue.round_trip(&mut front, DATA);
        }
        assert_eq!(front.asked.len(), 5, "{:x?}", front.asked);
        assert_eq!(back.stats[0].errors_total(), 0);
        assert_eq!(queue.stop(&mut front), 51);
    }
}

#[test]
fn a_front_end_without_acknowledgements_is_answered_all_the_same() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::with(&back, PROTOCOL & !protocol::REPLY_ACK);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    (0..10).for_each(|_| queue.round_trip(&mut front, DATA));
    assert!(front.asked.iter().all(|a| !a.need_reply));
    assert!(front.invalidate(DATA, PAGE));
    queue.round_trip(&mut front, DATA);
    // Whether there is a translation cannot be told: it is asked again now and then, and waited for.
    queue.submit(&[(DATA + 64 * PAGE, 100)], &[(DATA + PAGE, 100)]);
    let first = front.expect_asked(1);
    front.expect_silence(Duration::from_millis(400));
    assert_eq!(front.expect_asked(1), first);
    let page = front.page();
    assert!(front.update(DATA + 64 * PAGE, page, PAGE, RO));
    until("the request", || queue.driver.finished() > 0);
}

#[test]
fn a_queue_that_waits_holds_up_no_other_and_asks_once() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut slow, mut fast) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        slow.start(&mut front);
        fast.start(&mut front);
        slow.round_trip(&mut front, DATA);
        fast.round_trip(&mut front, DATA);
        let lost = DATA + 64 * PAGE;
        slow.submit(&[(lost, 100)], &[(DATA + PAGE, 100)]);
        front.expect_asked(1);
        let polls = back.stats[0].polls.get();
        let silent = front.asked.len();
        for i in 0..500u32 {
            fast.round_trip(&mut front, DATA);
            if i % 100 == 0 {
                // A translation of something else is no reason to ask again.
                assert!(front.update(DATA + (100 + u64::from(i)) * PAGE, 0x10_0000, PAGE, RW));
            }
        }
        assert_eq!(front.asked.len(), silent, "{:x?}", front.asked);
        assert_eq!(back.stats[0].polls.get(), polls, "{pacing:?}: a queue that waits is looked at");
        assert_eq!(slow.driver.finished(), 0);
        // It can be stopped as it is; the chain was not consumed, and is taken the next time.
        assert_eq!(slow.stop(&mut front), 1);
        slow.start_at(&mut front, 1);
        let page = front.page();
        front.map(lost, page, RO);
        front.reply(0);
        let driver = &mut slow.driver;
        front.until("the request", || driver.finished() > 0);
        fast.round_trip(&mut front, DATA);
        assert_eq!(back.stats[0].errors_total() + back.stats[1].errors_total(), 0);
    }
}

#[test]
fn buffers_and_tables_go_on_in_scattered_pages() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    let map = Arc::clone(front.ram.map());
    // Neighbours in I/O space are in reverse order in memory.
    let pages: Vec<u64> = (0..8).map(|_| front.page()).collect();
    for (i, &page) in (0..).zip(pages.iter().rev()) {
        front.map(DATA + i * PAGE, page, if i < 4 { RO } else { WO });
    }
    let at = |i: u64| pages[7 - i as usize];
    for i in 0..4 {
        map.slice(at(i), PAGE as u32).unwrap().fill(0x10 + i as u8);
    }
    queue.start(&mut front);
    // Three pages and a half, from the middle of a page.
    let len = 3 * PAGE as u32 + 100;
    queue.submit(&[(DATA + 2048, len)], &[(DATA + 4 * PAGE, len)]);
    let driver = &mut queue.driver;
    front.until("the request", || driver.finished() > 0);
    assert_eq!(queue.driver.collect().map(|(_, len)| len), Some(len));
    let sent: Vec<u8> = (0..4).flat_map(|i| bytes(&map, at(i), PAGE as u32)).collect();
    let got: Vec<u8> = (4..8).flat_map(|i| bytes(&map, at(i), PAGE as u32)).collect();
    assert_eq!(got[..len as usize], sent[2048..][..len as usize]);
    // A table that is cut by the end of a page, in the middle of a descriptor's neighbour.
    let [table, more] = [front.page(), front.page()];
    let iova = DATA + 32 * PAGE;
    front.map(iova, more, RO);
    front.map(iova + PAGE, table, RO);
    let last = more + PAGE - 16;
    let desc = |addr: u64, len: u32, flags: u16, next: u16| {
        [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    map.slice(last, 16).unwrap().write(&desc(DATA, 100, 1, 1));
    map.slice(table, 16).unwrap().write(&desc(DATA + 4 * PAGE, 100, 2, 0));
    let layout = queue.driver.split().unwrap();
    let indirect = vring::layout::Desc { addr: iova + PAGE - 16, len: 32, flags: 4, next: 0 };
    layout.set_desc(0, indirect);
    queue.driver.make_available(0);
    queue.driver.publish();
    queue.kick.write(1).unwrap();
    let driver = &mut queue.driver;
    front.until("the indirect request", || driver.finished() > 0);
    assert_eq!(queue.driver.collect(), Some((0, 100)));
    assert_eq!(bytes(&map, at(4), 100), vec![0x10; 100]);
    assert_eq!(back.stats[0].errors_total(), 0);
}

#[test]
fn permissions_are_kept_to_and_a_refusal_breaks_its_queue_alone() {
    // What is mapped at the page that a request writes to (or reads from), whether an answer comes at all, and
    // what is said on the channel after it.
    for (perm, is_read, fails) in [(RO, false, true), (WO, true, true), (RO, true, false), (WO, false, false)]
    {
        let back = Back::start(Pacing::Event);
        let mut front = FrontEnd::new(&back);
        let (mut bad, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        bad.start(&mut front);
        good.start(&mut front);
        bad.round_trip(&mut front, DATA);
        good.round_trip(&mut front, DATA);
        let iova = DATA + 64 * PAGE;
        let page = front.page();
        let map = Arc::clone(front.ram.map());
        map.slice(page, PAGE as u32).unwrap().fill(0x77);
        assert!(front.update(iova, page, PAGE, perm));
        front.asked.clear();
        if is_read {
            bad.submit(&[(iova, 100)], &[(DATA + PAGE, 100)]);
        } else {
            bad.submit(&[(DATA, 100)], &[(iova, 100)]);
        }
        if !fails {
            until("the request", || bad.driver.finished() > 0);
            assert!(front.asked.is_empty());
            continue;
        }
        // It may have been widened since: that is asked before anything else.
        let wanted = if is_read { RO } else { WO };
        let asked = front.expect_asked(1)[0];
        assert_eq!((asked.iova, asked.perm, asked.kind), (iova, wanted, MISS));
        assert!(front.update(iova, page, PAGE, perm));
        let told = front.expect_asked(1)[0];
        assert_eq!(told, Asked { iova, perm: wanted, kind: ACCESS_FAIL, need_reply: false });
        assert!(readable_within(&bad.err, 5000), "the error descriptor stays silent");
        assert_eq!(back.stats[0].errors(ErrorKind::Memory), 1);
        front.reply(0);
        assert_eq!(bytes(&map, page, PAGE as u32), vec![0x77; PAGE as usize], "written all the same");
        (0..20).for_each(|_| good.round_trip(&mut front, DATA));
        assert_eq!(bad.stop(&mut front), 1, "the chain was not consumed");
        front.peer.expect_alive();
        // Wide enough, it is taken.
        assert!(front.update(iova, page, PAGE, RW));
        bad.start_at(&mut front, 1);
        let driver = &mut bad.driver;
        front.until("the request", || driver.finished() > 0);
    }
}

#[test]
fn a_negative_answer_breaks_the_queue_and_silence_does_not() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let (mut bad, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
    data(&mut front, DATA);
    bad.start(&mut front);
    good.start(&mut front);
    bad.round_trip(&mut front, DATA);
    good.round_trip(&mut front, DATA);
    bad.submit(&[(DATA, 100)], &[(0xdead_0000, 100)]);
    front.expect_asked(1);
    // Answered wrongly: with other pages, with none of ours, and with a success that brought nothing.
    assert!(front.update(0xdead_1000, 0x10_0000, PAGE, RW));
    let outside = front.ram.spec().user_addr + front.ram.spec().size - 100;
    assert!(!front.iotlb(0xdead_0000, PAGE, outside, RW, UPDATE));
    front.reply(0);
    front.expect_silence(Duration::from_millis(400));
    assert!(!readable_within(&bad.err, 0));
    // It asks again in its own time.
    assert_eq!(front.expect_asked(1)[0].iova, 0xdead_0000);
    good.round_trip(&mut front, DATA);
    front.reply(1);
    assert!(readable_within(&bad.err, 5000));
    assert_eq!(back.stats[0].errors(ErrorKind::Memory), 1);
    (0..10).for_each(|_| good.round_trip(&mut front, DATA));
    assert_eq!(back.stats[1].errors_total(), 0);
    // A front end that leaves a queue waiting can go, and another come.
    good.submit(&[(DATA, 100)], &[(0xbeef_0000, 100)]);
    front.expect_asked(1);
    drop(front);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
}
