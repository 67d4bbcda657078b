//! What is done with packets for a guest that has said so through its control queue: which of them it gets, in which of its
//! queues, and with which hash (virtio 1.3, 5.1.6.4.3 and 5.1.6.5).

use std::sync::Arc;

use crate::header::HashReport;
use crate::mac::MacAddr;
use crate::packet::{Packet, Tag};
use crate::rss::{Hasher, Rss};
use crate::switch::vlan::VlanSet;

/// Addresses that are kept of each table; with more, all pass.
pub const MAX_ADDRESSES: usize = 64;

/// What a command of class `VIRTIO_NET_CTRL_RX` switches (5.1.6.5.1), by its number.
mod mode {
    pub const PROMISC: u8 = 0;
    pub const ALLMULTI: u8 = 1;
    pub const ALLUNI: u8 = 2;
    pub const NOMULTI: u8 = 3;
    pub const NOUNI: u8 = 4;
    pub const NOBCAST: u8 = 5;
}

/// Which packets a guest gets.
#[derive(Clone, Debug)]
pub struct Filter {
    /// The card's address.
    own: Option<MacAddr>,
    /// What is on, a bit for each [`mode`].
    modes: u8,
    /// To these addresses; `None`: to any.
    pub unicast: Option<Vec<u64>>,
    /// To these groups; `None`: to any.
    pub multicast: Option<Vec<u64>>,
    /// Tagged ones in these VLANs.
    pub vlans: VlanSet,
}

impl Filter {
    /// Everything passes, until something else is said; of tagged packets then those in these VLANs.
    pub fn open(vlans: VlanSet) -> Filter {
        let (unicast, multicast) = (Some(Vec::new()), Some(Vec::new()));
        Filter { own: None, modes: 1 << mode::PROMISC, unicast, multicast, vlans }
    }

    /// The same of a card with this address.
    #[must_use]
    pub fn of(self, own: Option<MacAddr>) -> Filter {
        Filter { own, ..self }
    }

    /// Has a mode (0 to 5) be on or off.
    pub fn set(&mut self, mode: u8, on: bool) {
        let bit = 1 << (mode & 7);
        self.modes = self.modes & !bit | if on { bit } else { 0 };
    }

    /// What is on, a bit for each mode.
    pub fn modes(&self) -> u8 {
        self.modes
    }

    /// The same with these modes.
    #[must_use]
    pub fn with_modes(self, modes: u8) -> Filter {
        Filter { modes, ..self }
    }

    fn is(&self, mode: u8) -> bool {
        self.modes & 1 << mode != 0
    }

    /// Whether nothing is kept away.
    pub fn is_promiscuous(&self) -> bool {
        self.is(mode::PROMISC)
    }

    /// Whether the guest gets a frame that begins so.
    pub fn takes(&self, head: &[u8]) -> bool {
        if self.is_promiscuous() {
            return true;
        }
        let Ok(packet) = Packet::parse(head, head.len()) else { return false };
        let vid = packet.tag().map_or(0, Tag::vlan);
        let mac = MacAddr(packet.destination());
        let is_listed =
            |table: &Option<Vec<u64>>| table.as_ref().is_none_or(|table| table.contains(&mac.to_u64()));
        if vid != 0 && !self.vlans.contains(vid) {
            return false;
        }
        match mac {
            MacAddr::BROADCAST => !self.is(mode::NOBCAST),
            mac if mac.is_group() => {
                !self.is(mode::NOMULTI) && (self.is(mode::ALLMULTI) || is_listed(&self.multicast))
            }
            // A card without an address of its own cannot tell.
            mac => {
                let is_own = self.own.is_none_or(|own| own == mac);
                !self.is(mode::NOUNI) && (self.is(mode::ALLUNI) || is_own || is_listed(&self.unicast))
            }
        }
    }
}

/// What is done with packets for a guest.
#[derive(Clone, Debug)]
pub struct Steering {
    /// Which of them it gets; `None`: all.
    pub filter: Option<Filter>,
    /// The first so many of its queues are used.
    pub pairs: usize,
    /// Which of them by hash, if it is so.
    pub rss: Option<Arc<Rss>>,
    /// What is hashed without that.
    pub hasher: Option<Arc<Hasher>>,
    /// What it takes undone of what it has negotiated: `GUEST_*`.
    pub offloads: u64,
}

impl Default for Steering {
    /// All packets, in any queue, as they are.
    fn default() -> Steering {
        Steering { filter: None, pairs: usize::MAX, rss: None, hasher: None, offloads: u64::MAX }
    }
}

impl Steering {
    /// Whether each packet has to be looked at.
    pub fn looks_at_packets(&self) -> bool {
        self.hashes() || self.filter.as_ref().is_some_and(|filter| !filter.is_promiscuous())
    }

    /// Whether it is a packet's hash that counts, too, and not its Ethernet header alone.
    pub fn hashes(&self) -> bool {
        self.rss.is_some() || self.hasher.is_some()
    }

    /// Whether the guest gets a packet that begins so.
    pub fn takes(&self, head: &[u8]) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.takes(head))
    }

    /// The pair of queues for a packet of `len` bytes that begins so, if that is by its hash, and the hash to report.
    pub fn place(&self, head: &[u8], len: usize) -> (Option<usize>, HashReport) {
        let Ok(packet) = Packet::parse(head, len) else { return (None, HashReport::default()) };
        let layers = packet.layers();
        match (&self.rss, &self.hasher) {
            (Some(rss), _) => {
                let (pair, report) = rss.place(&packet, &layers);
                (Some(pair.into()), report)
            }
            (None, Some(hasher)) => (None, hasher.report(&packet, &layers)),
            (None, None) => (None, HashReport::default()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    /// The first bytes of a frame to this address.
    pub fn frame(to: [u8; 6], vid: Option<u16>) -> Vec<u8> {
        let mut frame = [to, [2, 0, 0, 0, 0, 9]].concat();
        frame.extend(vid.into_iter().flat_map(|vid| [0x81, 0, (vid >> 8) as u8, vid as u8]));
        frame.extend([0x88, 0xb5]);
        frame.resize(60, 0);
        frame
    }
}
