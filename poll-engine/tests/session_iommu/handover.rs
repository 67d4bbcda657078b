//! A live upgrade of a device behind a vIOMMU: the new back end knows no translation, and asks again.

use poll_engine::engine::pacing::Pacing;

use crate::front::{FrontEnd, IoQueue, MISS, PAGE, RO, data};
use crate::support::Back;

/// Translations that were taken back while nobody listened must not be believed: so none is kept, rings included.
#[test]
fn a_new_back_end_asks_for_everything_again() {
    for pacing in [Pacing::Busy, Pacing::Event] {
        let mut back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let mut queue = IoQueue::new(&mut front, 0);
        let iova = 0x7000_0000;
        data(&mut front, iova);
        queue.start(&mut front);
        queue.round_trip(&mut front, iova);
        for round in 0..3 {
            let asked = front.asked.len();
            let (next, _) = back.hand_over(pacing);
            back = next;
            // Somewhere else from now on: what the last back end knew is wrong.
            data(&mut front, iova);
            queue.round_trip(&mut front, iova);
            let again = &front.asked[asked..];
            assert!(again.iter().all(|a| a.kind == MISS), "{again:?}");
            assert!(again.iter().any(|a| a.iova / PAGE == iova / PAGE), "round {round}: {again:?}");
            // What it has been told is taken back as from the one that asked.
            assert!(front.invalidate(iova, 2 * PAGE));
            queue.round_trip(&mut front, iova);
        }
        front.expect_silence(std::time::Duration::from_millis(20));
        queue.stop(&mut front);
    }
}

/// In the middle of a question: it has been asked by the one, and is answered to the other.
#[test]
fn a_miss_on_its_way_is_asked_again() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    let iova = 0x7000_0000;
    data(&mut front, iova);
    queue.start(&mut front);
    queue.round_trip(&mut front, iova);
    // A page that is asked for, and not answered yet.
    let other = 0x7100_0000;
    data(&mut front, other);
    let (page, _) = front.table[&other];
    queue.submit(&[(other, 100)], &[(other + PAGE, 100)]);
    let asked = front.expect_asked(1);
    assert_eq!((asked[0].iova / PAGE * PAGE, asked[0].kind), (other, MISS));
    let (_next, _) = back.hand_over(Pacing::Adaptive);
    // The answer to the last one's question, and the acknowledgement that was due to it, come all the same.
    assert!(front.update(other, page, PAGE, RO));
    front.reply(0);
    let driver = &mut queue.driver;
    front.until("the request", || driver.finished() > 0);
    assert_eq!(queue.driver.collect().map(|(_, len)| len), Some(100));
    queue.round_trip(&mut front, iova);
    assert_eq!(queue.stop(&mut front), 3);
}
