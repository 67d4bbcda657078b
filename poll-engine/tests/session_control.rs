//! What the rest of the process asks of a session and of the engine while guests run: to pause, to move, to stop only if
//! nobody is there, to have more reactors or fewer.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use poll_engine::engine::RetireError;
use poll_engine::engine::pacing::Pacing;
use poll_engine::session::server::AskError;
use support::{Back, Guest, until, words};

const ALL: [Pacing; 3] = [Pacing::Busy, Pacing::Adaptive, Pacing::Event];

#[test]
fn a_paused_queue_takes_nothing_and_answers_all_when_it_goes_on() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        back.server.set_paused(true).unwrap();
        assert!(back.server.is_paused());
        (0..3).for_each(|_| guest.submit());
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.finished(), 0, "taken while paused");
        // The session is served all the same, and a queue can stop and start.
        assert_eq!(guest.stop(&mut peer), 1);
        guest.describe(&mut peer, 1);
        guest.set_kick(&mut peer);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.finished(), 0, "taken while paused, after a start");
        back.server.set_paused(false).unwrap();
        (0..3).for_each(|_| guest.wait());
        guest.round_trip();
    }
}

#[test]
fn a_pause_lasts_over_front_ends() {
    let back = Back::start(Pacing::Adaptive);
    back.server.set_paused(true).unwrap();
    let mut peer = back.front();
    let mut guest = Guest::new(1);
    guest.start(&mut peer);
    guest.submit();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.driver.finished(), 0);
    back.server.set_paused(false).unwrap();
    guest.wait();
}

#[test]
fn a_pause_is_over_when_what_was_in_flight_is() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        back.echo.hold.store(true, Ordering::Release);
        (0..2).for_each(|_| guest.submit());
        until("requests to be taken", || back.echo.held.load(Ordering::Acquire) == 2);
        std::thread::scope(|scope| {
            let pausing = scope.spawn(|| back.server.set_paused(true));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!pausing.is_finished(), "paused with requests in flight");
            back.echo.open_gate();
            pausing.join().unwrap().unwrap();
        });
        (0..2).for_each(|_| guest.wait());
        back.server.set_paused(false).unwrap();
        guest.round_trip();
    }
}

#[test]
fn a_queue_moves_to_the_reactor_it_is_wanted_on_and_loses_nothing() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        assert_eq!((back.stats[0].reactor(), back.stats[1].reactor()), (Some(0), None));
        let other = back.engine.add_reactor(None).unwrap();
        for wanted in [other, 0, other, other] {
            *back.echo.wanted_on.lock().unwrap() = Some(wanted);
            guest.submit();
            back.server.restart_queues().unwrap();
            guest.wait();
            assert_eq!(back.stats[0].reactor(), Some(wanted));
            guest.round_trip();
        }
        // One that is not there is no reason not to run.
        *back.echo.wanted_on.lock().unwrap() = Some(77);
        back.server.restart_queues().unwrap();
        guest.round_trip();
        assert_eq!(guest.stop(&mut peer), 10);
        assert_eq!(back.stats[0].reactor(), None);
    }
}

#[test]
fn a_reactor_that_retires_keeps_its_queues_until_they_have_moved() {
    let back = Back::start(Pacing::Event);
    assert_eq!(back.engine.retire(0).err(), Some(RetireError::Last));
    assert_eq!(back.engine.retire(1).err(), Some(RetireError::Unknown(1)));
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    guest.round_trip();
    assert_eq!(back.engine.add_reactor(None).unwrap(), 1);
    let retiring = back.engine.retire(0).unwrap();
    assert_eq!((retiring.number(), retiring.queues()), (0, 1));
    guest.round_trip();
    // Given up, and begun again.
    back.engine.keep(retiring);
    assert_eq!(back.engine.list().iter().map(|r| r.number).collect::<Vec<_>>(), [0, 1]);
    let retiring = back.engine.retire(0).unwrap();
    back.server.restart_queues().unwrap();
    assert_eq!((back.stats[0].reactor(), retiring.queues()), (Some(1), 0));
    retiring.finish();
    guest.round_trip();
    assert_eq!(back.engine.add_reactor(None).unwrap(), 2, "numbers are never used again");
    assert_eq!(back.engine.list().iter().map(|r| r.queues).collect::<Vec<_>>(), [1, 0]);
    assert!(back.engine.add_reactor(Some(100_000)).is_err());
}

#[test]
fn the_way_of_waiting_changes_while_a_queue_runs() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    for pacing in [Pacing::Busy, Pacing::Event, Pacing::Adaptive, Pacing::Busy, Pacing::Event] {
        guest.submit();
        back.engine.set_pacing(pacing);
        assert_eq!(back.engine.pacing(), pacing);
        guest.wait();
        guest.round_trip();
        // A reactor that never sleeps looks at its rings all the time, and others do not.
        until("polls to go on, or to end", || {
            let polls = back.stats[0].polls.get();
            std::thread::sleep(Duration::from_millis(20));
            (back.stats[0].polls.get() > polls) == (pacing == Pacing::Busy)
        });
    }
}

#[test]
fn a_server_stops_unless_somebody_is_there() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    assert!(peer.ack(18, &words(&[0, 0]), &[]));
    assert!(back.server.is_attached() && !back.server.begin_stop_unattached());
    drop(peer);
    until("the front end to be gone", || !back.server.is_attached());
    assert!(back.server.begin_stop_unattached());
    until("the end", || back.server.has_ended());
    assert_eq!(back.server.set_paused(true), Err(AskError::Ended));
    assert!(!back.socket.exists());
    assert_eq!(Arc::strong_count(&back.engine), 1);
}
