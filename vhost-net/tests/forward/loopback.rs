//! Ports that are joined to nobody: what they send is counted and gone, and what they get is made up.

use vhost_net::features::MRG_RXBUF;
use vhost_net::hub::Plan;
use vhost_net::stats::Drop;

use crate::guest::{Back, mac};
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
    let stats = &back.hub.ports[0].pairs[0];
    assert_eq!((stats.tx_packets.get(), stats.tx_bytes.get()), (300, bytes));
    assert_eq!(stats.tx_drops(Drop::Malformed), 2);
    for guest in &mut guests {
        guest.receive();
        assert!(guest.got.is_empty());
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
        let stats = &back.hub.ports[0].pairs[0];
        until("it to be sent", || stats.tx_packets.get() == 1);
        assert!(stats.rx_packets.get() >= number);
        assert_eq!(stats.rx_bytes.get(), stats.rx_packets.get() * u64::from(len));
    }
}
