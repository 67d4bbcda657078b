//! A sequence of messages against the codec and the state machine, without any I/O: what it wants done makes sense, whatever
//! was asked. A queue is started only when it is stopped and with a ring that can be, and the device is acquired before.
//!
//! Input: a byte of what is offered; then messages, each a number, flags, the length of its payload, and that.

use std::os::fd::OwnedFd;

use poll_engine::device::features::{ENGINE, IN_ORDER};
use poll_engine::ring::RingConfig;
use poll_engine::session::action::{Action, Refused};
use poll_engine::session::state::{Offer, Session};
use poll_engine::session::wire::{HEADER_LEN, Header, Request};

use super::Bytes;

const QUEUES: u16 = 3;
const MAX_RING: u16 = 256;

fn fd() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let offered = bytes.byte();
    let offer = Offer {
        features: ENGINE | IN_ORDER | 0xff,
        num_queues: QUEUES,
        max_ring_size: MAX_RING,
        has_state: offered & 1 != 0,
        postcopy: offered & 2 != 0,
        is_network: true,
    };
    let mut session = Session::new(offer);
    let mut running: [Option<RingConfig>; QUEUES as usize] = [None; QUEUES as usize];
    for _ in 0..256 {
        if bytes.0.is_empty() {
            break;
        }
        let (number, flags, len) = (bytes.byte(), bytes.byte(), bytes.byte());
        if number == 0xff {
            // A header that nobody has made.
            if let Ok(header) = <[u8; HEADER_LEN]>::try_from(bytes.take(HEADER_LEN)) {
                let _ = Header::decode(header);
            }
            continue;
        }
        let (need_reply, fds) = (flags & 1 != 0, usize::from(flags >> 1 & 7));
        let payload = bytes.take(len.into());
        let Ok(request) = Request::decode(number.into(), payload) else { continue };
        let Ok((actions, answer)) = session.handle(request, (0..fds).map(|_| fd()).collect()) else {
            match session.refuse(number.into(), need_reply) {
                Refused::Reply(reply) => _ = reply.encode(number.into()),
                Refused::Silence => {}
                Refused::End => return,
            }
            continue;
        };
        let mut acquired = running.iter().any(Option::is_some);
        let mut done = true;
        for action in actions {
            match action {
                Action::Acquire => {
                    assert!(!acquired, "acquired twice");
                    acquired = true;
                }
                Action::Start(index, config) => {
                    assert!(acquired, "started before the device is ours");
                    let queue = &mut running[usize::from(index)];
                    assert!(queue.is_none(), "queue {index} runs");
                    assert!(config.size > 0 && config.size <= MAX_RING.into(), "{config:?}");
                    config.checked_size().unwrap();
                    if flags & 0x80 != 0 {
                        session.start_failed(index);
                        done = false;
                    } else {
                        *queue = Some(config);
                    }
                }
                Action::Stop(index) => {
                    assert!(running[usize::from(index)].take().is_some(), "queue {index} does not run");
                    session.stopped(index, u32::from(len) << 8 | u32::from(flags));
                }
                Action::HandOver | Action::ResetDevice => assert!(running.iter().all(Option::is_none)),
                Action::Kick(index, _) | Action::Call(index, _) | Action::Err(index, _) => {
                    assert!(index < QUEUES);
                }
                Action::Log(changes) => assert!(changes.iter().all(|&(index, _)| index < QUEUES)),
                Action::SetInflight(spec, _) | Action::AllocateInflight(spec) => {
                    assert!((1..=QUEUES).contains(&spec.num_queues) && spec.queue_size > 0);
                }
                Action::WriteConfig(offset, bytes) => {
                    assert!(offset as usize + bytes.len() <= 256 + usize::from(u8::MAX) || offset > 256);
                }
                _ => {}
            }
        }
        if flags & 0x40 != 0 {
            let _ = session.needs_reset();
        }
        let read = |_, into: &mut [u8]| assert!(into.len() <= 256);
        if let Some(reply) = session.reply(answer, need_reply, done, read) {
            let _ = reply.encode(number.into());
        }
    }
}
