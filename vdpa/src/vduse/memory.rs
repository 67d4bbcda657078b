//! Memory of a VDUSE device: the kernel's translations, mapped here, and looked up by queues as those of a vIOMMU.
//!
//! A translation is of some I/O virtual addresses to a part of a file: pages to bounce through and rings for
//! `virtio_vdpa`, guest memory for `vhost_vdpa`. The kernel tells only of some changes, and of no new translations: what a
//! queue misses is asked for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use poll_engine::memory::iotlb::{Iotlb, Mapping, Revoked};
use poll_engine::memory::map::MAX_REGIONS;
use poll_engine::memory::shortfall::{locked, memlock_limit};
use poll_engine::memory::{Access, MemoryMap, Miss, Misses, Ram, Region, RegionSpec};
use tracing::{info, warn};

use super::node::Node;
use super::uapi::IotlbEntry;

/// Where bounced pages are to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bounce {
    /// In the kernel's memory.
    #[default]
    Kernel,
    /// In ours: normal pages, or huge ones.
    Own {
        /// hugetlbfs.
        huge: bool,
    },
}

/// One translation, mapped.
#[derive(Debug)]
struct Known {
    entry: IotlbEntry,
    /// What tells files apart.
    file: (u64, u64),
    region: Arc<Region>,
}

/// All that is known of a device's memory.
#[derive(Debug)]
pub struct Memory {
    node: Arc<Node>,
    known: Vec<Known>,
    regions: MemoryMap,
    iotlb: Iotlb,
    misses: Arc<Misses>,
    view: Arc<MemoryMap>,
    bounce: Bounce,
    umem: Option<Ram>,
}

impl Memory {
    /// Nothing of it is known.
    pub fn new(node: Arc<Node>, misses: Arc<Misses>, bounce: Bounce) -> Memory {
        let view = Arc::new(Iotlb::default().snapshot(&MemoryMap::default(), &misses));
        let regions = MemoryMap::default();
        Memory { node, known: vec![], regions, iotlb: Iotlb::default(), misses, view, bounce, umem: None }
    }

    /// What queues translate by.
    pub fn view(&self) -> &Arc<MemoryMap> {
        &self.view
    }

    /// What queues miss.
    pub fn misses(&self) -> &Misses {
        &self.misses
    }

    /// Whether there is no room for a further translation.
    pub fn is_full(&self) -> bool {
        self.known.len() >= MAX_REGIONS
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.known.clear();
        self.iotlb.clear();
        self.renew();
    }

    /// Looks up anew what the kernel has between `first` and `last`. Returns what was there before and is not any more, or
    /// is elsewhere.
    pub fn refresh(&mut self, first: u64, last: u64) -> Revoked {
        let (mut found, mut at) = (vec![], first);
        // Some may be left for when they are missed.
        while found.len() < MAX_REGIONS {
            let Some((entry, fd)) = self.ask(at, last) else { break };
            let end = entry.last;
            found.push((entry, fd));
            match end.checked_add(1) {
                Some(next) if next <= last => at = next,
                _ => break,
            }
        }
        let is_in = |e: &IotlbEntry| e.start <= last && e.last >= first;
        let mut revoked = Revoked::default();
        let mut gone = vec![];
        self.known.retain(|k| {
            let same = |(entry, fd): &(IotlbEntry, File)| *entry == k.entry && identity(fd) == Some(k.file);
            let stays = !is_in(&k.entry) || found.iter().any(same);
            if !stays {
                gone.push(k.entry);
            }
            stays
        });
        for entry in gone {
            revoked.merge(self.iotlb.invalidate(entry.start, entry.last));
        }
        for (entry, file) in found {
            revoked.merge(self.learn(entry, file));
        }
        self.renew();
        revoked
    }

    /// Asks the kernel for what a queue misses. Returns what that has taken away from others, or `None` if the kernel has
    /// no translation that permits it.
    pub fn resolve(&mut self, miss: Miss) -> Option<Revoked> {
        let (entry, file) = self.ask(miss.iova, miss.iova)?;
        let revoked = self.learn(entry, file);
        self.renew();
        self.view.allows(miss.iova, miss.access).then_some(revoked)
    }

    fn ask(&self, first: u64, last: u64) -> Option<(IotlbEntry, File)> {
        match self.node.translation(first, last) {
            Ok(Some((entry, fd)))
                if entry.start <= entry.last && entry.start <= last && entry.last >= first =>
            {
                Some((entry, File::from(fd)))
            }
            Ok(Some((entry, _))) => {
                warn!("the kernel translates {first:#x} by {:#x} to {:#x}", entry.start, entry.last);
                None
            }
            Ok(None) => None,
            Err(e) => {
                warn!("cannot ask for the translation of I/O address {first:#x}: {e}");
                None
            }
        }
    }

    /// Maps a translation unless it is known. One that it replaces is revoked.
    fn learn(&mut self, entry: IotlbEntry, file: File) -> Revoked {
        let mut revoked = Revoked::default();
        if self.known.iter().any(|k| k.entry == entry && identity(&file) == Some(k.file)) || self.is_full() {
            return revoked;
        }
        let overlaps = |k: &Known| k.entry.start <= entry.last && k.entry.last >= entry.start;
        for old in self.known.extract_if(.., |k| overlaps(k)) {
            revoked.merge(self.iotlb.invalidate(old.entry.start, old.entry.last));
        }
        match self.map(&entry, file) {
            Ok(known) => self.known.push(known),
            Err(why) => warn!("I/O addresses {:#x} to {:#x} cannot be used: {why}", entry.start, entry.last),
        }
        revoked
    }

    fn map(&mut self, entry: &IotlbEntry, file: File) -> Result<Known, String> {
        let access = Access::from_bits(entry.perm).ok_or(format!("permission {}", entry.perm))?;
        let size = (entry.last - entry.start).checked_add(1).ok_or("all addresses at once")?;
        let id = identity(&file).ok_or("its file cannot be looked at")?;
        let region = if let Some(region) = self.bounce_region(entry, size) {
            region
        } else {
            // An identity: what is a front end's address elsewhere is the I/O virtual one.
            let (guest_addr, user_addr, mmap_offset) = (entry.start, entry.start, entry.offset);
            let spec = RegionSpec { guest_addr, size, user_addr, mmap_offset };
            Arc::new(Region::map_for(access, spec, OwnedFd::from(file)).map_err(|e| e.to_string())?)
        };
        let all = self.known.iter().map(|k| &k.region).chain([&region]);
        self.regions = MemoryMap::new(all.cloned().collect()).map_err(|e| e.to_string())?;
        let mapping = Mapping { iova: entry.start, size, user_addr: region.spec().user_addr, access };
        self.iotlb.update(&mapping, &self.regions).map_err(|e| e.to_string())?;
        Ok(Known { entry: *entry, file: id, region })
    }

    /// Memory of ours for bouncing, if that is wanted and this is where pages bounce.
    fn bounce_region(&mut self, entry: &IotlbEntry, size: u64) -> Option<Arc<Region>> {
        let Bounce::Own { huge } = self.bounce else { return None };
        if entry.start != 0 {
            return None;
        }
        match self.node.umem_size(0) {
            Ok(Some(there)) if there == size => {}
            Ok(_) => return None,
            Err(e) => {
                warn!("{e}");
                self.bounce = Bounce::Kernel;
                return None;
            }
        }
        // It stays registered over a reset.
        if self.umem.as_ref().is_none_or(|ram| ram.spec().size != size) {
            let register = || {
                let ram = Ram::new(0, size, huge).map_err(|e| e.to_string())?;
                self.node.register_umem(&ram).map_err(|e| e.to_string())?;
                Ok::<_, String>(ram)
            };
            match register() {
                Ok(ram) => {
                    let pages = if huge { "huge pages" } else { "pages" };
                    info!("{} MiB of our own {pages} to bounce through", size >> 20);
                    self.umem = Some(ram);
                }
                Err(why) => {
                    let limit = memlock_limit();
                    let short =
                        limit.filter(|&limit| limit < size).map(|_| format!("; {}", locked(size, limit)));
                    let short = short.unwrap_or_default();
                    warn!("pages bounce through the kernel's memory, not ours: {why}{short}");
                    self.bounce = Bounce::Kernel;
                    return None;
                }
            }
        }
        self.umem.as_ref()?.map().regions().first().cloned()
    }

    fn renew(&mut self) {
        let all = self.known.iter().map(|k| Arc::clone(&k.region)).collect();
        // Whatever was mapped fits together.
        self.regions = MemoryMap::new(all).unwrap_or_default();
        self.iotlb.retain_in(&self.regions);
        self.view = Arc::new(self.iotlb.snapshot(&self.regions, &self.misses));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(ram) = &self.umem {
            // Its pages go back to the kernel with what is in them; closing the node would do the same.
            let _ = self.node.deregister_umem(ram);
        }
    }
}

/// What tells files apart. All domains of VDUSE devices are one file by this, but a device has one only.
fn identity(file: &File) -> Option<(u64, u64)> {
    let meta = file.metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}
