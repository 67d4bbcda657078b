//! The control queue (virtio 1.3, 5.1.6.5): what a driver asks for, as a state without I/O. Commands come in, and what is to
//! be done with packets for the guest goes out, as a [`Steering`].

use std::sync::Arc;

use crate::features::{
    CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_VQ, GUEST_ANNOUNCE,
    GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HASH_REPORT, MQ, RSS,
};
use crate::mac::MacAddr;
use crate::rss::{BadRss, Hasher, Rss};
use crate::steering::{Filter, MAX_ADDRESSES, Steering};
use crate::switch::vlan::VlanSet;

/// The queue, and all features that need it and whose commands are known here, besides MQ.
pub const FEATURES: u64 = CTRL_VQ
    | CTRL_RX
    | CTRL_RX_EXTRA
    | CTRL_VLAN
    | CTRL_MAC_ADDR
    | CTRL_GUEST_OFFLOADS
    | GUEST_ANNOUNCE
    | RSS
    | HASH_REPORT;
/// What a driver takes undone, which it can change (5.1.6.5.6.1).
pub(crate) const OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
/// Bytes of the longest command: tables of addresses. What is behind them is not read.
pub const LONGEST: usize = 16 << 10;

/// The number of the control queue of a card with so many pairs of queues, under these features (5.1.2).
pub fn queue_index(features: u64, pairs: u16) -> Option<u16> {
    let used = if features & (MQ | RSS) == 0 { 1 } else { pairs };
    (features & CTRL_VQ != 0).then_some(2 * used)
}

/// Why a command is not done: the driver hears `VIRTIO_NET_ERR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCommand {
    /// No class and command, or data of another length.
    #[error("a command of the control queue has the wrong length")]
    Length,
    /// Not known, or of a feature that was not negotiated.
    #[error("command {1} of class {0} was not negotiated")]
    Unknown(u8, u8),
    /// A value out of its range.
    #[error("a command of the control queue has a value that is out of range")]
    Value,
    /// Another address, of a port that is kept to its own.
    #[error("the port's guard keeps its guest to the card's address")]
    Guarded,
    /// RSS.
    #[error(transparent)]
    Rss(#[from] BadRss),
}

/// What was made of a command, and its data: that is what is told to another process.
#[derive(Clone, Debug)]
pub(crate) struct Said<T> {
    pub data: Vec<u8>,
    made: Arc<T>,
}

impl<T> Said<T> {
    fn new(data: &[u8], made: T) -> Said<T> {
        Said { data: data.to_vec(), made: Arc::new(made) }
    }
}

/// What a driver has asked for.
#[derive(Clone, Debug)]
pub struct Control {
    features: u64,
    pub(crate) pairs: u16,
    /// The card's address.
    pub mac: Option<[u8; 6]>,
    pub(crate) filter: Filter,
    pub(crate) used: u16,
    pub(crate) rss: Option<Said<Rss>>,
    pub(crate) hasher: Option<Said<Hasher>>,
    pub(crate) offloads: u64,
    /// The driver is asked to announce the guest (`VIRTIO_NET_S_ANNOUNCE`), and has not said yet that it has.
    pub announcing: bool,
}

impl Control {
    /// After a reset, with these features negotiated, of a card with so many pairs of queues and this address.
    pub fn new(features: u64, pairs: u16, mac: Option<[u8; 6]>) -> Control {
        let vlans = if features & CTRL_VLAN == 0 { VlanSet::all() } else { VlanSet::none() };
        // Everything passes until the driver says what it wants.
        let filter = Filter::open(vlans);
        // "The device MUST NOT queue packets on receive queues greater than virtqueue_pairs" (5.1.6.5.5.2), which is 1 at
        // first; with RSS alone there is no such number.
        let used = if features & MQ == 0 { pairs } else { 1 };
        let (rss, hasher, offloads) = (None, None, u64::MAX);
        Control { features, pairs, mac, filter, used, rss, hasher, offloads, announcing: false }
    }

    /// What was negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// What is to be done with packets for the guest.
    pub fn steering(&self) -> Steering {
        Steering {
            filter: (self.features & CTRL_RX != 0).then(|| self.filter.clone().of(self.mac.map(MacAddr))),
            pairs: self.used.into(),
            rss: self.rss.as_ref().map(|rss| Arc::clone(&rss.made)),
            hasher: self.hasher.as_ref().map(|hasher| Arc::clone(&hasher.made)),
            offloads: self.offloads,
        }
    }

    /// Does what a command asks for, or nothing: class, command and data, as the driver has put them into a buffer.
    pub fn command(&mut self, bytes: &[u8]) -> Result<(), BadCommand> {
        let (&[class, command], data) = bytes.split_first_chunk::<2>().ok_or(BadCommand::Length)?;
        let needs = |bit: u64| {
            if self.features & bit == 0 { Err(BadCommand::Unknown(class, command)) } else { Ok(()) }
        };
        match (class, command) {
            (0, 0 | 1) | (1, 0) => needs(CTRL_RX)?,
            (0, 2..=5) => needs(CTRL_RX_EXTRA)?,
            (1, 1) => needs(CTRL_MAC_ADDR)?,
            (2, 0 | 1) => needs(CTRL_VLAN)?,
            (3, 0) => needs(GUEST_ANNOUNCE)?,
            (4, 0) => needs(MQ)?,
            (4, 1) => needs(RSS)?,
            (4, 2) => needs(HASH_REPORT)?,
            (5, 0) => needs(CTRL_GUEST_OFFLOADS)?,
            _ => return Err(BadCommand::Unknown(class, command)),
        }
        match (class, command) {
            (0, _) => self.filter.set(command, on(data)?),
            (1, 0) => {
                let (unicast, rest) = addresses(data)?;
                let (multicast, rest) = addresses(rest)?;
                if !rest.is_empty() {
                    return Err(BadCommand::Length);
                }
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            (1, _) => {
                let mac = MacAddr(data.try_into().map_err(|_| BadCommand::Length)?);
                if !mac.is_station() {
                    return Err(BadCommand::Value);
                }
                self.mac = Some(mac.0);
            }
            (2, _) => {
                let vid = word(data)?;
                if vid > 0xffe {
                    return Err(BadCommand::Value);
                }
                if command == 0 { self.filter.vlans.insert(vid) } else { self.filter.vlans.remove(vid) }
            }
            (3, _) => {
                if !data.is_empty() {
                    return Err(BadCommand::Length);
                }
                self.announcing = false;
            }
            (5, _) => {
                let wanted = u64::from_le_bytes(data.try_into().map_err(|_| BadCommand::Length)?);
                if wanted & !(self.features & OFFLOADS) != 0 {
                    return Err(BadCommand::Value);
                }
                self.offloads = wanted | !OFFLOADS;
            }
            (_, 0) => {
                let pairs = word(data)?;
                if !(1..=self.pairs).contains(&pairs) {
                    return Err(BadCommand::Value);
                }
                // "VQ_PAIRS_SET [...] disables RSS" (5.1.6.5.6).
                (self.used, self.rss) = (pairs, None);
            }
            (_, 1) => self.set_rss(data)?,
            _ => self.set_hasher(data)?,
        }
        Ok(())
    }

    pub(crate) fn set_rss(&mut self, data: &[u8]) -> Result<(), BadRss> {
        self.rss = Some(Said::new(data, Rss::from_rss_config(data, self.pairs)?));
        self.used = self.pairs;
        Ok(())
    }

    pub(crate) fn set_hasher(&mut self, data: &[u8]) -> Result<(), BadRss> {
        self.hasher = Some(Said::new(data, Hasher::from_hash_config(data)?));
        Ok(())
    }
}

fn on(data: &[u8]) -> Result<bool, BadCommand> {
    match data {
        [0] => Ok(false),
        [1] => Ok(true),
        [_] => Err(BadCommand::Value),
        _ => Err(BadCommand::Length),
    }
}

fn word(data: &[u8]) -> Result<u16, BadCommand> {
    Ok(u16::from_le_bytes(data.try_into().map_err(|_| BadCommand::Length)?))
}

/// `struct virtio_net_ctrl_mac`: the addresses, none where there are more than are kept, which means all; and what follows.
#[allow(clippy::type_complexity)] // a table and what is behind it
fn addresses(data: &[u8]) -> Result<(Option<Vec<u64>>, &[u8]), BadCommand> {
    let (count, rest) = data.split_first_chunk::<4>().ok_or(BadCommand::Length)?;
    let bytes = (u32::from_le_bytes(*count) as usize).checked_mul(6).ok_or(BadCommand::Length)?;
    let (table, rest) = rest.split_at_checked(bytes).ok_or(BadCommand::Length)?;
    let table = table.as_chunks::<6>().0;
    let kept =
        (table.len() <= MAX_ADDRESSES).then(|| table.iter().map(|mac| MacAddr(*mac).to_u64()).collect());
    Ok((kept, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::tests::frame;
    use proptest::prelude::*;

    const ALL: u64 = FEATURES | MQ | GUEST_CSUM | GUEST_TSO4;
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn control() -> Control {
        Control::new(ALL, 4, Some(OWN))
    }

    fn takes(control: &Control, to: [u8; 6], vid: Option<u16>) -> bool {
        control.steering().takes(&frame(to, vid))
    }

    fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
        let one = |macs: &[[u8; 6]]| [&(macs.len() as u32).to_le_bytes()[..], &macs.concat()].concat();
        [vec![1, 0], one(unicast), one(multicast)].concat()
    }

    #[test]
    fn filters_are_what_the_driver_says() {
        let (other, group, all) = ([2, 0, 0, 0, 0, 2], [1, 0, 0x5e, 0, 0, 1], [0xff; 6]);
        let mut control = control();
        assert!(takes(&control, other, None) && takes(&control, group, Some(7)), "everything at first");
        control.command(&[0, 0, 0]).unwrap();
        let seen = |c: &Control| [OWN, other, group, all].map(|to| takes(c, to, None));
        assert_eq!(seen(&control), [true, false, false, true]);
        control.command(&table(&[other], &[group])).unwrap();
        assert_eq!(seen(&control), [true, true, true, true]);
        control.command(&table(&[], &[])).unwrap();
        for (command, to) in [(1, [true, false, true, true]), (2, [true, true, false, true])] {
            control.command(&[0, command, 1]).unwrap();
            assert_eq!(seen(&control), to);
            control.command(&[0, command, 0]).unwrap();
        }
        control.command(&table(&[], &vec![group; 65])).unwrap();
        assert_eq!(seen(&control), [true, false, true, true], "more than are kept are all");
        for (command, to) in [
            (3, [true, false, false, true]),
            (4, [false, false, true, true]),
            (5, [true, false, true, false]),
        ] {
            control.command(&[0, command, 1]).unwrap();
            assert_eq!(seen(&control), to);
            control.command(&[0, command, 0]).unwrap();
        }
        assert!(!takes(&control, OWN, Some(7)));
        control.command(&[2, 0, 7, 0]).unwrap();
        assert!(takes(&control, OWN, Some(7)) && !takes(&control, OWN, Some(8)));
        control.command(&[2, 1, 7, 0]).unwrap();
        assert!(!takes(&control, OWN, Some(7)));
        control.command(&[&[1, 1][..], &other].concat()).unwrap();
        assert_eq!((control.mac, seen(&control)[..2].to_vec()), (Some(other), vec![false, true]));
    }

    #[test]
    fn what_is_wrong_changes_nothing() {
        let mut control = control();
        let before = format!("{control:?}");
        for bad in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 0, 1, 0],
            &[0, 6, 1],
            &[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5],
            &[1, 0, 0xff, 0xff, 0xff, 0xff],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[1, 1, 1, 0, 0, 0, 0, 1],
            &[1, 1, 2, 0, 0],
            &[2, 0, 0xff, 0x0f],
            &[2, 2, 1, 0],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 1, 0],
            &[4, 2, 0],
            &[4, 3],
            &[3, 0, 0],
            &[3, 1],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0],
            &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0],
            &[5, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 0, 0, 0],
        ] {
            assert!(control.command(bad).is_err(), "{bad:x?}");
        }
        assert_eq!(format!("{control:?}"), before);
        let mut without = Control::new(0, 4, None);
        for known in [
            &[0, 0, 1][..],
            &[0, 3, 1],
            &table(&[], &[]),
            &[1, 1, 2, 0, 0, 0, 0, 1],
            &[2, 0, 1, 0],
            &[4, 0, 1, 0],
        ] {
            assert!(matches!(without.command(known), Err(BadCommand::Unknown(..))), "{known:x?}");
        }
    }

    #[test]
    fn pairs_offloads_and_announcements_are_as_the_driver_says() {
        let mut control = control();
        assert_eq!(control.steering().pairs, 1);
        control.command(&[4, 0, 3, 0]).unwrap();
        assert_eq!(control.steering().pairs, 3);
        assert_eq!(Control::new(ALL & !MQ, 4, None).steering().pairs, 4);
        assert_eq!(control.steering().offloads & ALL & OFFLOADS, GUEST_CSUM | GUEST_TSO4);
        control.command(&[&[5, 0][..], &GUEST_CSUM.to_le_bytes()].concat()).unwrap();
        assert_eq!(control.steering().offloads & ALL & OFFLOADS, GUEST_CSUM);
        control.announcing = true;
        control.command(&[3, 0]).unwrap();
        assert!(!control.announcing);
    }

    #[test]
    fn the_queue_is_behind_the_others() {
        assert_eq!(queue_index(MQ, 4), None);
        assert_eq!(
            [CTRL_VQ, CTRL_VQ | MQ, CTRL_VQ | RSS].map(|f| queue_index(f, 4)),
            [Some(2), Some(8), Some(8)]
        );
    }

    proptest! {
        #[test]
        fn no_command_breaks_anything(
            commands in prop::collection::vec((0u8..8, 0u8..7, prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut control = control();
            for (class, command, data) in commands {
                let before = format!("{control:?}");
                if control.command(&[&[class, command][..], &data].concat()).is_err() {
                    prop_assert_eq!(format!("{:?}", control), before);
                }
                let steering = control.steering();
                prop_assert!((1..=4).contains(&steering.pairs));
                steering.takes(&bytes);
                prop_assert!(steering.place(&bytes, bytes.len()).0.is_none_or(|pair| pair < 4));
            }
        }
    }
}
