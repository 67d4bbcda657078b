//! Memory that a front end adds more than once: QEMU before 8.0 has a vhost device for each pair of queues of a network
//! card, and each of them adds, and takes back, the memory of the one guest.

use serde::{Deserialize, Serialize};

use crate::memory::map::{MemoryMap, RegionSpec};

/// Regions that were added again, and how often; no more of them than there are slots.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Repeats(Vec<(RegionSpec, u32)>);

impl Repeats {
    /// Whether a region that is to be added is in the map already, exactly so.
    pub(super) fn add(&mut self, spec: &RegionSpec, map: &MemoryMap) -> bool {
        if let Some((_, times)) = self.0.iter_mut().find(|(repeated, _)| repeated == spec) {
            *times = times.saturating_add(1);
            return true;
        }
        let there = map.regions().iter().any(|region| region.spec() == spec);
        if there {
            self.0.push((*spec, 1));
        }
        there
    }

    /// Whether a region that is taken back stays, since it was added more often.
    pub(super) fn remove(&mut self, spec: &RegionSpec) -> bool {
        let Some(at) = self.0.iter().position(|(repeated, _)| repeated == spec) else { return false };
        self.0[at].1 = self.0[at].1.saturating_sub(1);
        if self.0[at].1 == 0 {
            self.0.swap_remove(at);
        }
        true
    }

    /// All memory is another one.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
