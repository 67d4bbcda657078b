//! What a driver has asked for, as bytes: for another process that goes on with the guest, be it the one that takes over
//! (a live upgrade), the next one after a `SIGKILL`, or one on another host.
//!
//! ```text
//!   "knet" | version | 0: nothing was asked for
//!   "knet" | version | 1 | features | pairs used | offloads | announcing | modes | mac | unicast | multicast | VLANs |
//!                          data of the RSS command | of that for hashes
//! ```
//!
//! Numbers are little-endian, a list has its length before it. The longest is well below what a record has room for.

use poll_engine::device::StateRefused;

use crate::control::{Control, OFFLOADS};
use crate::mac::MacAddr;
use crate::steering::MAX_ADDRESSES;
use crate::switch::vlan::VlanSet;

const MAGIC: [u8; 4] = *b"knet";
const VERSION: u8 = 1;
/// The length of a table of addresses of which all pass.
const ALL: u8 = 0xff;

/// What was asked for, if anything was.
pub fn save(control: Option<&Control>) -> Vec<u8> {
    let mut bytes = [&MAGIC[..], &[VERSION, control.is_some().into()]].concat();
    let Some(control) = control else { return bytes };
    let filter = &control.filter;
    bytes.extend(control.features().to_le_bytes());
    bytes.extend(control.used.to_le_bytes());
    bytes.extend(control.offloads.to_le_bytes());
    bytes.extend([control.announcing.into(), filter.modes(), control.mac.is_some().into()]);
    bytes.extend(control.mac.unwrap_or_default());
    for table in [&filter.unicast, &filter.multicast] {
        bytes.push(table.as_ref().map_or(ALL, |table| table.len() as u8));
        bytes.extend(table.iter().flatten().flat_map(|&mac| MacAddr::from_u64(mac).0));
    }
    bytes.extend(filter.vlans.to_bytes());
    let (rss, hasher) = (control.rss.as_ref().map(|s| &s.data), control.hasher.as_ref().map(|s| &s.data));
    for data in [rss, hasher].map(|data| data.map_or(&[][..], Vec::as_slice)) {
        bytes.extend((data.len() as u16).to_le_bytes());
        bytes.extend(data);
    }
    bytes
}

/// The same back, of a card with so many pairs of queues. Any bytes may come.
pub fn load(bytes: &[u8], pairs: u16) -> Result<Option<Control>, StateRefused> {
    let refused = |what: String| StateRefused(what);
    let damaged = || refused("it is cut short or damaged".into());
    let Some((version, rest)) = bytes.strip_prefix(&MAGIC).and_then(<[u8]>::split_first) else {
        return Err(refused(format!("its {} bytes are no network card's", bytes.len())));
    };
    if *version != VERSION {
        return Err(refused(format!(
            "it has version {version} and this program knows {VERSION}: use the same release at both ends"
        )));
    }
    match rest {
        [0] => Ok(None),
        [1, rest @ ..] => Ok(Some(control(&mut Reader(rest), pairs).ok_or_else(damaged)?)),
        _ => Err(damaged()),
    }
}

fn control(from: &mut Reader<'_>, pairs: u16) -> Option<Control> {
    let mut control = Control::new(u64::from_le_bytes(from.array()?), pairs, None);
    let used = u16::from_le_bytes(from.array()?);
    let offloads = u64::from_le_bytes(from.array()?);
    let [announcing, modes, has_mac] = from.array()?;
    let mac = from.array::<6>()?;
    if used > pairs || used == 0 || offloads | OFFLOADS != u64::MAX || announcing > 1 || has_mac > 1 {
        return None;
    }
    (control.used, control.offloads, control.announcing) = (used, offloads, announcing == 1);
    control.mac = (has_mac == 1).then_some(mac);
    control.filter.unicast = from.table()?;
    control.filter.multicast = from.table()?;
    control.filter.vlans = VlanSet::from_bytes(&from.array()?);
    control.filter = control.filter.with_modes(modes);
    let [rss, hasher] = [from.list()?, from.list()?];
    if !rss.is_empty() {
        control.set_rss(rss).ok()?;
    }
    if !hasher.is_empty() {
        control.set_hasher(hasher).ok()?;
    }
    from.0.is_empty().then_some(control)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn list(&mut self) -> Option<&'a [u8]> {
        let len = u16::from_le_bytes(self.array()?);
        self.bytes(len.into())
    }

    #[allow(clippy::option_option)] // none read; a table; one of which all pass
    fn table(&mut self) -> Option<Option<Vec<u64>>> {
        match self.array()? {
            [ALL] => Some(None),
            [len] if usize::from(len) <= MAX_ADDRESSES => {
                let macs = self.bytes(6 * usize::from(len))?.as_chunks::<6>().0;
                Some(Some(macs.iter().map(|&mac| MacAddr(mac).to_u64()).collect()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::FEATURES;
    use crate::features::{GUEST_CSUM, GUEST_TSO4, MQ};
    use crate::rss::{TABLE, hash_types};
    use poll_engine::ring::inflight::MAX_MEMENTO;
    use proptest::prelude::*;

    const ALL_FEATURES: u64 = FEATURES | MQ | GUEST_CSUM | GUEST_TSO4;

    fn control() -> Control {
        Control::new(ALL_FEATURES, 4, Some([2, 0, 0, 0, 0, 1]))
    }

    fn again(control: &Control) -> String {
        format!("{:?}", load(&save(Some(control)), 4).unwrap().unwrap())
    }

    fn table(unicast: usize, multicast: usize) -> Vec<u8> {
        let one = |len: usize, first: u8| {
            let macs = (0..len).flat_map(|n| [first, 0, 0, 0, 0, n as u8]);
            [&(len as u32).to_le_bytes()[..], &macs.collect::<Vec<_>>()].concat()
        };
        [vec![1, 0], one(unicast, 2), one(multicast, 1)].concat()
    }

    fn rss(entries: u16) -> Vec<u8> {
        let mut bytes = [&[4, 1][..], &hash_types::ALL.to_le_bytes(), &(entries - 1).to_le_bytes()].concat();
        bytes.extend([2, 0]);
        bytes.extend((0..entries).flat_map(|n| [n as u8 % 4, 0]));
        bytes.extend([4, 0, 40]);
        bytes.extend([0x5a; 40]);
        bytes
    }

    fn hashes() -> Vec<u8> {
        [&[4, 2][..], &hash_types::IPV4.to_le_bytes(), &[0; 8], &[40], &[0xa5; 40]].concat()
    }

    /// A driver's commands, most of them good.
    fn command() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            (0u8..6, 0u8..2).prop_map(|(mode, on)| vec![0, mode, on]),
            (0usize..70, 0usize..70).prop_map(|(unicast, multicast)| table(unicast, multicast)),
            (0u8..255).prop_map(|last| vec![1, 1, 2, 0, 0, 0, 0, last]),
            (0u8..2, 0u16..4095)
                .prop_map(|(command, vid)| [2, command, vid as u8, (vid >> 8) as u8].to_vec()),
            (1u8..5).prop_map(|pairs| vec![4, 0, pairs, 0]),
            (0u32..8).prop_map(|shift| rss(1 << shift)),
            Just(hashes()),
            (0u8..2).prop_map(|bits| [&[5, 0, bits << 1][..], &[0; 7]].concat()),
        ]
    }

    proptest! {
        #[test]
        fn what_was_asked_for_is_the_same_elsewhere(
            commands in prop::collection::vec(command(), 0..20), announcing: bool, has_mac: bool,
        ) {
            let mut control = control();
            for bytes in commands {
                prop_assert!(control.command(&bytes).is_ok(), "{bytes:?}");
            }
            control.announcing = announcing;
            control.mac = control.mac.filter(|_| has_mac);
            prop_assert_eq!(again(&control), format!("{control:?}"));
        }

        #[test]
        fn any_bytes_are_taken_or_refused(
            commands in prop::collection::vec(command(), 0..6), at: prop::sample::Index, with: u8,
            bytes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut control = control();
            for bytes in &commands {
                control.command(bytes).unwrap();
            }
            let mut state = save(Some(&control));
            prop_assert!(load(&state[..at.index(state.len())], 4).is_err(), "cut short");
            let place = at.index(state.len());
            state[place] = with;
            for state in [state, bytes] {
                if let Ok(Some(control)) = load(&state, 4) {
                    prop_assert!((1..=4).contains(&control.steering().pairs));
                    prop_assert_eq!(again(&control), format!("{control:?}"));
                }
            }
        }
    }

    #[test]
    fn the_longest_has_room_in_a_record() {
        let mut control = control();
        for bytes in [table(MAX_ADDRESSES, MAX_ADDRESSES), rss(TABLE as u16), hashes()] {
            control.command(&bytes).unwrap();
        }
        let state = save(Some(&control));
        assert!((1500..MAX_MEMENTO).contains(&state.len()), "{}", state.len());
        assert_eq!(again(&control), format!("{control:?}"));
        // Of another card.
        assert!(load(&state, 3).unwrap_err().to_string().contains("damaged"));
        assert!(load(&save(None), 3).unwrap().is_none());
        assert!(load(b"kblk\x01\x01", 4).unwrap_err().to_string().contains("no network card's"));
        assert!(load(b"knet\x02\x00", 4).unwrap_err().to_string().contains("version 2"));
        // The keys are what they were, of which texts say nothing.
        let again = load(&state, 4).unwrap().unwrap().steering();
        let packet = crate::steering::tests::frame([2, 0, 0, 0, 0, 2], None);
        let mut ip = packet.clone();
        ip[12..34]
            .copy_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(again.place(&ip, ip.len()), control.steering().place(&ip, ip.len()));
        assert_ne!(again.place(&ip, ip.len()).1, crate::header::HashReport::default());
    }
}
