//! Ports that are joined to nobody: what they send is counted and gone, and what they get is made up.

use vhost_net::features::MRG_RXBUF;
use vhost_net::hub::Plan;
use vhost_net::mib::{self, Flow};
use vhost_net::stats::Drop;
use vhost_net::switch::PortId;

use crate::guest::{Back, Guest, mac};
use crate::peer::until;

fn start(plan: Plan) -> Back {
    Back::start_as(plan, &["", ""], 1, 1, None, None)
}

#[test]
fn what_is_discarded_is_counted_and_given_back() {
    let back = start(Plan::Discard);
    let mut guests = [back.guest(0, 1), back.guest(1, 1)];
    let mut bytes = 0;
    for n in 0..300usize {
        let mut frame = [mac(1).0, mac(0).0].concat();
        frame.resize(14 + n * 31 % 6000, n as u8);
        bytes += frame.len() as u64;
        guests[0].send(0, &frame);
    }
    // What is no packet is not among them.
    guests[0].send_raw(0, &[0; 11]);
    guests[0].send_raw(0, &[0; 12 + 13]);
    until("all to come back", || guests[0].all_sent());
    let stats = &back.hub.ports()[0].pairs[0];
    assert_eq!((stats.tx_packets.get(), stats.tx_bytes.get()), (300, bytes));
    assert_eq!(stats.tx_drops(Drop::Malformed), 2);
    for guest in &mut guests {
        guest.receive();
        assert!(guest.got.is_empty());
    }
}

/// By the names of RFC 2863, where packets go one by one and in runs, to one, to groups and to all.
#[test]
fn interfaces_count_what_is_to_one_to_groups_and_to_all() {
    for plan in [Plan::Switch, Plan::Wire] {
        let ports: &[&str] = if plan == Plan::Switch { &["", "", ""] } else { &["", ""] };
        let back = Back::start_as(plan, ports, 1, 1, None, None);
        let mut guests: Vec<_> = (0..ports.len()).map(|at| back.guest(at, 1)).collect();
        let mut hello = [[0xff; 6], mac(1).0].concat();
        hello.resize(60, 0);
        guests[1].send(0, &hello);
        guests[0].await_frames(1);
        let group = [1, 0, 0x5e, 1, 2, 3];
        let to = |n: usize| {
            if n < 50 {
                mac(1).0
            } else if n < 90 {
                group
            } else {
                [0xff; 6]
            }
        };
        let mut bytes = 0;
        for n in 0..120usize {
            let mut frame = [to(n), mac(0).0].concat();
            frame.extend([0x88, 0xb5]);
            frame.resize(60 + n, n as u8);
            bytes += frame.len() as u64;
            guests[0].send(0, &frame);
            // They have fewer buffers than there are packets.
            if n % 8 == 0 {
                until("all to be sent", || guests[0].all_sent());
                guests.iter_mut().for_each(Guest::receive);
            }
        }
        // No packet at all, and one whose header lies.
        guests[0].send_raw(0, &[0; 12 + 13]);
        guests[0].send_raw(0, &[&[1, 77][..], &[0; 10 + 60]].concat());
        until("all to be sent", || guests[0].all_sent());
        guests[1].await_frames(120);
        let flows = |at: usize| {
            let switched =
                back.hub.switch.as_ref().map(|s| s.counters(PortId(at as u16))).unwrap_or_default();
            mib::flows(&back.hub.ports()[at].pairs, &switched)
        };
        let sent = Flow { packets: [50, 40, 30], octets: bytes, discards: 0, errors: 2 };
        let got = Flow { packets: [0, 0, 1], octets: 60, discards: 0, errors: 0 };
        assert_eq!(flows(0), [got, sent]);
        assert_eq!(flows(1), [Flow { errors: 0, ..sent }, got]);
        if plan == Plan::Switch {
            assert_eq!(flows(2)[0].packets, [0, 40, 31]);
            // A port that is closed discards.
            back.hub.set_link(0, false);
            guests[0].send(0, &hello);
            until("it to be sent", || guests[0].all_sent());
            assert_eq!(flows(0)[1].discards, 1);
        }
    }
}

#[test]
fn what_is_made_up_comes_whole_and_in_order() {
    // In one buffer each, and in several.
    for (len, features) in [(60, 0), (61, MRG_RXBUF), (1514, 0), (2036, MRG_RXBUF), (9000, MRG_RXBUF)] {
        let back = start(Plan::Generate(len));
        let mut guest = back.guest_with(0, 1, features);
        let mut number = 0u64;
        while number < 1000 {
            until("packets", || {
                guest.receive_some(32);
                !guest.got.is_empty()
            });
            guest.headers.clear();
            for frame in std::mem::take(&mut guest.got) {
                assert_eq!(frame.len(), usize::from(len), "packet {number}");
                assert_eq!(frame[..14], [&[0xff; 6][..], &[2, 0, 0, 0, 0, 0], &[0x88, 0xb5]].concat());
                assert_eq!(frame[14..22], number.to_be_bytes());
                number += 1;
            }
        }
        // Others get theirs, and what a guest sends goes nowhere.
        guest.send(0, &[mac(1).0, mac(0).0, [0; 6], [0; 6]].concat());
        let mut other = back.guest_with(1, 1, features);
        until("packets", || {
            other.receive_some(32);
            !other.got.is_empty()
        });
        assert_eq!(other.got[0][14..22], [0; 8]);
        let stats = &back.hub.ports()[0].pairs[0];
        until("it to be sent", || stats.tx_packets.get() == 1);
        assert!(stats.rx_packets.get() >= number);
        assert_eq!(stats.rx_bytes.get(), stats.rx_packets.get() * u64::from(len));
    }
}
