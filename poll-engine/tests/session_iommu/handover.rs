//! A live upgrade of a device behind a vIOMMU: the new back end knows no translation, and asks again.

use std::io::Write;
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;

use crate::front::{FrontEnd, IoQueue, MISS, PAGE, RO, data};
use crate::support::{Back, longs, words};

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
        front.expect_silence(Duration::from_millis(20));
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

/// What the front end owes the last back end, some of it half told, answers no question of the next: that would take its
/// ring for refused, or the rest of an acknowledgement for none.
#[test]
fn acknowledgements_of_earlier_questions_answer_none_of_ours() {
    let refusal = [words(&[1, 5, 8]), longs(&[1])].concat();
    for cut in [0, 1, 12, refusal.len() - 1] {
        let back = Back::start(Pacing::Adaptive);
        let mut front = FrontEnd::new(&back);
        let mut queue = IoQueue::new(&mut front, 0);
        let iova = 0x7000_0000;
        data(&mut front, iova);
        queue.start(&mut front);
        queue.round_trip(&mut front, iova);
        // Both pages are asked for, and are mapped too late for that.
        let other = 0x7100_0000;
        queue.submit(&[(other, 100)], &[(other + PAGE, 100)]);
        front.expect_asked(2);
        front.channel.write_all(&refusal[..cut]).unwrap();
        // It is read as soon as the thread runs; if not, the next one reads all of it.
        std::thread::sleep(Duration::from_millis(5));
        let (next, _) = back.hand_over(Pacing::Adaptive);
        front.channel.write_all(&refusal[cut..]).unwrap();
        front.channel.write_all(&refusal).unwrap();
        data(&mut front, other);
        let driver = &mut queue.driver;
        front.until("the request", || driver.finished() > 0);
        assert_eq!(queue.driver.collect().map(|(_, len)| len), Some(100), "cut behind {cut}");
        // The channel is still good for questions and answers.
        front.invalidate(iova, 2 * PAGE);
        queue.round_trip(&mut front, iova);
        assert_eq!(next.stats[0].errors_total(), 0);
        assert_eq!(queue.stop(&mut front), 3);
    }
}
