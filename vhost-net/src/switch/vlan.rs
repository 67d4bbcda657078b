//! VLANs (IEEE 802.1Q): which one a frame is in, and what is done to its tag where it leaves.

use std::fmt;
use std::str::FromStr;

use super::DropReason;
use crate::packet::{ETHERTYPE_VLAN, Packet};

const VID: u16 = 0xfff;
/// The highest number of a VLAN; 4095 is reserved.
const LAST: u16 = 0xffe;

/// A set of VLANs. 0 is that of frames without a tag on ports that know nothing of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// None.
    pub fn none() -> VlanSet {
        VlanSet(Box::new([0; 64]))
    }

    /// Every one.
    pub fn all() -> VlanSet {
        let mut all = Box::new([u64::MAX; 64]);
        all[63] &= !(1 << 63);
        VlanSet(all)
    }

    /// A bit for each.
    pub fn to_bytes(&self) -> [u8; 512] {
        std::array::from_fn(|i| self.0[i / 8].to_le_bytes()[i % 8])
    }

    /// The same back.
    pub fn from_bytes(bytes: &[u8; 512]) -> VlanSet {
        let words = bytes.as_chunks::<8>().0;
        VlanSet(Box::new(std::array::from_fn(|i| u64::from_le_bytes(words[i]))))
    }

    /// Whether `vid` (12 bits) is in it.
    #[inline]
    pub fn contains(&self, vid: u16) -> bool {
        self.0[usize::from(vid >> 6 & 63)] >> (vid & 63) & 1 != 0
    }

    /// Adds one.
    pub fn insert(&mut self, vid: u16) {
        self.0[usize::from(vid >> 6 & 63)] |= 1 << (vid & 63);
    }

    /// Takes one out.
    pub fn remove(&mut self, vid: u16) {
        self.0[usize::from(vid >> 6 & 63)] &= !(1 << (vid & 63));
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..=LAST).filter(|&vid| self.contains(vid))).finish()
    }
}

/// One VLAN as text: 1 to 4094.
pub fn parse_vid(s: &str) -> Result<u16, String> {
    let vid = s.trim().parse().ok().filter(|vid| (1..=LAST).contains(vid));
    vid.ok_or_else(|| format!("'{s}' is no VLAN (write a number from 1 to {LAST})"))
}

impl fmt::Display for VlanSet {
    /// As it is [parsed](Self::from_str).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut vid, mut between) = (0, "");
        while vid <= LAST {
            let run = (vid..=LAST).take_while(|&vid| self.contains(vid)).count() as u16;
            match run {
                0 => {}
                1 => write!(f, "{between}{vid}")?,
                _ => write!(f, "{between}{vid}-{}", vid + run - 1)?,
            }
            if run > 0 {
                between = ",";
            }
            vid += run + 1;
        }
        Ok(())
    }
}

impl serde::Serialize for VlanSet {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl FromStr for VlanSet {
    type Err = String;

    /// A list such as `10,20-29`.
    fn from_str(s: &str) -> Result<VlanSet, String> {
        let mut set = VlanSet::none();
        for part in s.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (parse_vid(first)?, parse_vid(last)?);
            if last < first {
                return Err(format!("'{part}' is no range of VLANs"));
            }
            (first..=last).for_each(|vid| set.insert(vid));
        }
        Ok(set)
    }
}

/// What a port is to VLANs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vlan {
    /// In one VLAN: its frames have no tag, or one that says a priority only.
    Access(u16),
    /// In several: frames of the native one have no tag, those of the others have one.
    Trunk {
        /// Without it, frames without a tag are not taken.
        native: Option<u16>,
        /// The others.
        allowed: VlanSet,
    },
}

impl Default for Vlan {
    /// Knows nothing of VLANs: all pass as they are, each a network of its own.
    fn default() -> Vlan {
        Vlan::Trunk { native: Some(0), allowed: VlanSet::all() }
    }
}

/// What is to be done to the tag of a frame on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagAction {
    /// Nothing.
    Keep,
    /// A tag with this control information goes in behind the addresses.
    Push(u16),
    /// The tag goes.
    Pop,
    /// The tag's control information becomes this.
    Set(u16),
}

/// The outer tag of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Priority, drop eligible, VLAN (802.1Q-2022, 9.6).
    pub tci: u16,
    /// Another one follows.
    pub is_stacked: bool,
}

impl Tag {
    /// A frame's, if it is a customer's: a service's is its own affair.
    #[inline]
    pub fn of(packet: &Packet<'_>) -> Option<Tag> {
        let tag = packet.tag().filter(|tag| tag.tpid == ETHERTYPE_VLAN)?;
        Some(Tag { tci: tag.tci, is_stacked: packet.tags() > 1 })
    }
}

impl Vlan {
    /// The VLAN that a frame with this tag is in, coming from the port.
    #[inline]
    pub fn admit(&self, tag: Option<Tag>) -> Result<u16, DropReason> {
        let vid = tag.map_or(0, |tag| tag.tci & VID);
        match self {
            Vlan::Access(own) if vid == 0 => Ok(*own),
            Vlan::Trunk { native, .. } if vid == 0 => native.ok_or(DropReason::VlanIngress),
            Vlan::Trunk { native, allowed } if allowed.contains(vid) || *native == Some(vid) => Ok(vid),
            Vlan::Access(_) | Vlan::Trunk { .. } => Err(DropReason::VlanIngress),
        }
    }

    /// What becomes of the tag of a frame in VLAN `vid` that leaves through the port.
    #[inline]
    pub fn emit(&self, vid: u16, tag: Option<Tag>) -> Result<TagAction, DropReason> {
        let (is_native, is_trunk) = match self {
            Vlan::Access(own) if *own == vid => (true, false),
            Vlan::Trunk { native, .. } if *native == Some(vid) => (true, true),
            Vlan::Trunk { allowed, .. } if allowed.contains(vid) => (false, true),
            _ => return Err(DropReason::VlanEgress),
        };
        Ok(match tag {
            // Where nobody knows of VLANs, a priority is the business of those who have said it.
            Some(_) if is_native && vid == 0 => TagAction::Keep,
            // What is below would be taken for the frame's own VLAN.
            Some(tag) if is_native && is_trunk && tag.is_stacked => return Err(DropReason::VlanStacked),
            Some(_) if is_native => TagAction::Pop,
            None if is_native => TagAction::Keep,
            Some(tag) if tag.tci & VID == vid => TagAction::Keep,
            Some(tag) => TagAction::Set(tag.tci & !VID | vid),
            None => TagAction::Push(vid),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::unnecessary_wraps)] // as it is asked for
    fn tag(tci: u16) -> Option<Tag> {
        Some(Tag { tci, is_stacked: false })
    }

    fn trunk(native: Option<u16>, allowed: &str) -> Vlan {
        Vlan::Trunk { native, allowed: allowed.parse().unwrap() }
    }

    #[test]
    fn sets_are_read_as_lists_of_ranges() {
        let set: VlanSet = "10, 20-22,4094".parse().unwrap();
        assert_eq!(format!("{set:?}"), "{10, 20, 21, 22, 4094}");
        for bad in ["", "0", "4095", "2-1", "1,,2", "x", "-1", "1-2-3"] {
            assert!(bad.parse::<VlanSet>().is_err(), "{bad}");
        }
        assert!((0..4095).all(|vid| VlanSet::all().contains(vid)) && !VlanSet::all().contains(4095));
    }

    /// Every port, every tag: what comes in is in a VLAN that the port is in; what goes out to a second port is told to
    /// be in the same VLAN by that port, if it comes back as it left.
    #[test]
    fn a_frame_stays_in_its_vlan_from_port_to_port() {
        let ports = [
            Vlan::default(),
            Vlan::Access(5),
            Vlan::Access(6),
            trunk(None, "5-7"),
            trunk(Some(5), "6"),
            trunk(Some(6), "5,6"),
            trunk(Some(7), "1-4094"),
        ];
        let vids = [0, 1, 5, 6, 7, 8, 4094, 4095];
        let tags: Vec<_> = vids.iter().flat_map(|&vid| [tag(vid), tag(0xb000 | vid)]).chain([None]).collect();
        let pairs = ports.iter().flat_map(|from| std::iter::repeat(from).zip(&ports));
        let (mut passed, mut refused) = (0, 0);
        for ((from, to), &before) in pairs.flat_map(|pair| std::iter::repeat(pair).zip(&tags)) {
            let Ok(vid) = from.admit(before) else {
                refused += 1;
                continue;
            };
            assert_ne!(vid, 4095);
            let Ok(action) = to.emit(vid, before) else {
                assert!(vid == 0 || to.admit(tag(vid)).is_err(), "{to:?} is in {vid}");
                refused += 1;
                continue;
            };
            let after = match action {
                TagAction::Keep => before,
                TagAction::Pop => None,
                TagAction::Push(tci) => {
                    assert_eq!(before, None);
                    tag(tci)
                }
                TagAction::Set(tci) => {
                    assert_eq!(tci & !VID, before.unwrap().tci & !VID, "the priority stays");
                    tag(tci)
                }
            };
            assert_eq!(to.admit(after), Ok(vid), "{before:?} from {from:?} is {after:?} at {to:?}");
            passed += 1;
        }
        assert!(passed > 100 && refused > 100, "{passed} {refused}");
    }

    #[test]
    fn an_access_port_cannot_say_another_vlan() {
        assert_eq!(Vlan::Access(5).admit(None), Ok(5));
        assert_eq!(Vlan::Access(5).admit(tag(0xe000)), Ok(5));
        for vid in 1..=4095 {
            assert_eq!(Vlan::Access(5).admit(tag(vid)), Err(DropReason::VlanIngress), "{vid}");
        }
    }

    #[test]
    fn no_tag_below_the_native_one_comes_to_the_top_on_a_trunk() {
        let stacked = Some(Tag { tci: 5, is_stacked: true });
        assert_eq!(trunk(Some(5), "6").emit(5, stacked), Err(DropReason::VlanStacked));
        assert_eq!(Vlan::Access(5).emit(5, stacked), Ok(TagAction::Pop));
        assert_eq!(trunk(None, "5").emit(5, stacked), Ok(TagAction::Keep));
    }
}
