//! A front end that keeps guest memory and the record of requests in flight over the death of its back end, as QEMU
//! does, with a driver in the guest that keeps loading the disk and notices nothing but a pause.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::random::Random;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use poll_engine::device::features;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::model::{BLOCK, Model};

/// How long a request may take, and a back end to answer.
const LIMIT: Duration = Duration::from_secs(60);
/// Descriptors of a ring; QEMU's record is for rings as large as the device allows, so ours is for larger ones.
const RING: u16 = 64;
const RECORDED: u16 = 128;
/// Requests in flight on a queue, at most.
const DEPTH: usize = 12;
/// Blocks of a request, at most.
const MAX_BLOCKS: usize = 8;
pub const QUEUES: usize = 2;
/// Few blocks, so that each is written again soon after: that is when a write of a killed back end would be seen.
pub const BLOCKS: usize = 384;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// What a request is about.
#[derive(Debug)]
enum Kind {
    Read(Range<usize>, Vec<u64>),
    Write(Range<usize>),
    Flush,
}

/// Memory for one request.
#[derive(Debug)]
struct Slot {
    /// Header, then status.
    header: u64,
    data: u64,
    request: Option<Kind>,
}

struct Lane {
    config: RingConfig,
    driver: DriverRing,
    kick: EventFd,
    call: EventFd,
    slots: Vec<Slot>,
    /// The slot of the chain that begins with a descriptor.
    by_head: Vec<Option<usize>>,
}

/// The front end and its guest.
pub struct Front {
    ram: Ram,
    map: Arc<MemoryMap>,
    lanes: Vec<Lane>,
    record: Option<(VhostUserInflight, File)>,
    /// Whether it asks for a record at all.
    pub tracks: bool,
    session: Option<Frontend>,
    /// `RING_PACKED`, or nothing.
    packed: u64,
    /// When the first answer of this back end came.
    pub answered: Option<Instant>,
    pub model: Model,
    random: Random,
}

/// How a stretch of load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it was meant to.
    Done,
    /// The back end is gone.
    Gone,
}

impl Front {
    pub fn new(seed: u64, packed: bool) -> Front {
        let packed = if packed { features::RING_PACKED } else { 0 };
        let mut ram = Ram::new(0x10_0000, 4 << 20, false).unwrap();
        let map = Arc::clone(ram.map());
        let lanes = (0..QUEUES).map(|_| {
            let config =
                DriverRing::lay_out(&mut ram, RING, features::INDIRECT_DESC | features::EVENT_IDX | packed)
                    .unwrap();
            let slot = |ram: &mut Ram| Slot {
                header: ram.alloc(64, 64).unwrap(),
                data: ram.alloc((MAX_BLOCKS * BLOCK) as u64, 4096).unwrap(),
                request: None,
            };
            Lane {
                driver: DriverRing::new(&config, &map).unwrap(),
                config,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
                slots: (0..DEPTH).map(|_| slot(&mut ram)).collect(),
                by_head: vec![None; RING.into()],
            }
        });
        let lanes = lanes.collect();
        Front {
            ram,
            map,
            lanes,
            record: None,
            tracks: true,
            session: None,
            packed,
            answered: None,
            model: Model::new(BLOCKS),
            random: Random(seed),
        }
    }

    /// A session with the back end at `socket`, set up anew from what was kept. An error means that it is gone.
    pub fn connect(&mut self, socket: &Path) -> Result<()> {
        self.session = None;
        self.answered = None;
        // Where nobody listens, `Frontend::connect` sleeps for 0.1 s.
        let mut front = Frontend::from_stream(UnixStream::connect(socket)?, QUEUES as u64);
        front.set_owner()?;
        let offered = front.get_features()?;
        let mut wanted = features::VERSION_1 | features::INDIRECT_DESC | features::EVENT_IDX | self.packed;
        wanted |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        // FLUSH.
        wanted |= 1 << 9;
        ensure!(offered & wanted == wanted, "features {offered:#x}");
        let protocol = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let theirs = front.get_protocol_features()?;
        ensure!(theirs.contains(protocol), "protocol features {theirs:?}");
        front.set_protocol_features(protocol)?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(wanted)?;
        let spec = self.ram.spec();
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: spec.guest_addr,
            memory_size: spec.size,
            userspace_addr: spec.user_addr,
            mmap_offset: 0,
            mmap_handle: self.ram.fd().as_raw_fd(),
        }])?;
        if self.tracks {
            if self.record.is_none() {
                let wanted = VhostUserInflight {
                    num_queues: QUEUES as u16,
                    queue_size: RECORDED,
                    ..Default::default()
                };
                self.record = Some(front.get_inflight_fd(&wanted)?);
            }
            let (spec, fd) = self.record.as_ref().context("a record")?;
            front.set_inflight_fd(spec, fd.as_raw_fd())?;
        }
        for (index, lane) in self.lanes.iter().enumerate() {
            lane.start(&mut front, index)?;
        }
        self.session = Some(front);
        Ok(())
    }

    /// Requests that are not answered.
    pub fn in_flight(&self) -> usize {
        self.lanes.iter().flat_map(|l| &l.slots).filter(|s| s.request.is_some()).count()
    }

    /// Makes as many requests available as there is room for.
    pub fn submit(&mut self) {
        for lane in &mut self.lanes {
            for slot in 0..DEPTH {
                if lane.slots[slot].request.is_none() {
                    let len = 1 + self.random.below(MAX_BLOCKS);
                    let first = self.random.below(BLOCKS - len);
                    let range = first..first + len;
                    let kind = match self.random.below(64) {
                        0 => Some(Kind::Flush),
                        1..32 => Some(Kind::Read(range.clone(), self.model.begin_read(range))),
                        _ => self.model.begin_write(range.clone()).map(|bytes| {
                            put(&self.map, lane.slots[slot].data, &bytes);
                            Kind::Write(range)
                        }),
                    };
                    if let Some(kind) = kind {
                        lane.add(&self.map, slot, kind);
                    }
                }
            }
            lane.publish();
        }
    }

    /// Collects answers and checks them; how many.
    pub fn collect(&mut self) -> Result<usize> {
        let mut count = 0;
        for (queue, lane) in self.lanes.iter_mut().enumerate() {
            while let Some((head, len)) = lane.driver.collect() {
                count += 1;
                let slot = lane.by_head.get_mut(usize::from(head)).and_then(Option::take);
                let slot = slot
                    .with_context(|| format!("queue {queue}: {head} was not in flight: completed twice"))?;
                let request = lane.slots[slot].request.take().context("a slot without a request")?;
                let at = lane.slots[slot].header + 32;
                let status = get(&self.map, at, 1)[0];
                ensure!(status == 0, "queue {queue}: {request:?} failed with status {status}");
                match request {
                    Kind::Flush => ensure!(len == 1, "used length {len} of a flush"),
                    Kind::Write(range) => {
                        ensure!(len == 1, "used length {len} of a write");
                        self.model.end_write(range);
                    }
                    Kind::Read(range, oldest) => {
                        let bytes = BLOCK * range.len();
                        ensure!(len as usize == bytes + 1, "used length {len} of a read of {bytes}");
                        let bytes = get(&self.map, lane.slots[slot].data, bytes);
                        self.model.end_read(range, &oldest, &bytes)?;
                    }
                }
            }
        }
        if count > 0 && self.answered.is_none() {
            self.answered = Some(Instant::now());
        }
        Ok(count)
    }

    /// Waits for an interrupt of any queue with something in flight. Whether the back end lives.
    fn wait(&mut self) -> Result<End> {
        let mut finished = false;
        for lane in &mut self.lanes {
            finished |= lane.driver.set_interrupts(true);
        }
        if finished {
            return Ok(End::Done);
        }
        let session = self.session.as_ref().context("no session")?;
        let mut fds: Vec<_> =
            self.lanes.iter().map(|l| PollFd::new(borrow(&l.call), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(borrow(session), PollFlags::POLLIN | PollFlags::POLLHUP));
        let deadline = Instant::now() + LIMIT;
        let ready = loop {
            match poll(&mut fds, PollTimeout::try_from(LIMIT)?) {
                Err(nix::Error::EINTR) => {}
                n => break n?,
            }
        };
        let hung_up = fds[QUEUES].any() == Some(true);
        for lane in &self.lanes {
            let _ = lane.call.read();
        }
        if ready == 0 {
            let hidden: usize = self.lanes.iter_mut().map(|l| usize::from(l.driver.finished())).sum();
            ensure!(hidden == 0, "{hidden} requests are answered, and no interrupt came");
            bail!(
                "{} requests are lost: no answer within {:?}",
                self.in_flight(),
                deadline - Instant::now() + LIMIT
            );
        }
        Ok(if hung_up { End::Gone } else { End::Done })
    }

    /// Keeps loading the disk until `enough` says so (then all that is in flight is waited for), or the back end is gone.
    pub fn load(&mut self, mut enough: impl FnMut() -> bool) -> Result<End> {
        loop {
            let stop = enough();
            if !stop {
                self.submit();
            }
            if self.collect()? == 0 {
                if stop && self.in_flight() == 0 {
                    return Ok(End::Done);
                }
                if self.wait()? == End::Gone {
                    // What it had answered before is as good as any.
                    self.collect()?;
                    return Ok(End::Gone);
                }
            }
        }
    }

    /// Reads the whole disk, with nothing else in flight.
    pub fn check(&mut self) -> Result<End> {
        let mut next = 0;
        while next < BLOCKS {
            let lane = &mut self.lanes[next / MAX_BLOCKS % QUEUES];
            let Some(slot) = lane.slots.iter().position(|s| s.request.is_none()) else {
                if self.collect()? == 0 && self.wait()? == End::Gone {
                    return Ok(End::Gone);
                }
                continue;
            };
            let range = next..(next + MAX_BLOCKS).min(BLOCKS);
            next = range.end;
            let oldest = self.model.begin_read(range.clone());
            lane.add(&self.map, slot, Kind::Read(range, oldest));
            lane.publish();
        }
        self.load(|| true)
    }

    /// Compares what the image holds with what was written, with nothing in flight.
    pub fn check_image(&mut self, image: &[u8]) -> Result<()> {
        ensure!(self.in_flight() == 0, "requests are in flight");
        self.check_left(image)
    }

    /// The same of an image that a dead daemon has left: what is in flight may be there, or not, or in part, since the
    /// kernel may be at it still.
    pub fn check_left(&mut self, image: &[u8]) -> Result<()> {
        let may_tear = std::mem::replace(&mut self.model.may_tear, true);
        let oldest = self.model.begin_read(0..BLOCKS);
        let checked = self.model.end_read(0..BLOCKS, &oldest, image);
        self.model.may_tear = may_tear;
        checked
    }
}

impl Lane {
    /// Tells the back end about the queue. It has died, so all that is known is where the used ring ends; of a packed ring
    /// QEMU tells what it knew last, which is where it began.
    fn start(&self, front: &mut Frontend, index: usize) -> Result<()> {
        front.set_vring_num(index, RING)?;
        let base = match self.driver.split() {
            Some(ring) => ring.used_idx(),
            None => 1 << 15,
        };
        front.set_vring_base(index, base)?;
        let addresses = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: self.config.desc_addr,
            used_ring_addr: self.config.used_addr,
            avail_ring_addr: self.config.avail_addr,
            log_addr: None,
        };
        front.set_vring_addr(index, &addresses)?;
        front.set_vring_call(index, &self.call)?;
        front.set_vring_kick(index, &self.kick)?;
        front.set_vring_enable(index, true)?;
        Ok(())
    }

    fn add(&mut self, map: &MemoryMap, slot: usize, kind: Kind) {
        let (code, range) = match &kind {
            Kind::Read(range, _) => (READ, range.clone()),
            Kind::Write(range) => (WRITE, range.clone()),
            Kind::Flush => (FLUSH, 0..0),
        };
        let Slot { header, data, .. } = self.slots[slot];
        let head = [code.to_le_bytes(), [0; 4]].concat();
        put(map, header, &[head, (range.start as u64).to_le_bytes().to_vec()].concat());
        put(map, header + 32, &[0xff]);
        let mut buffers = vec![Buffer { addr: header, len: 16, writable: false }];
        if !range.is_empty() {
            let len = (range.len() * BLOCK) as u32;
            buffers.push(Buffer { addr: data, len, writable: code == READ });
        }
        buffers.push(Buffer { addr: header + 32, len: 1, writable: true });
        let head = self.driver.add(&buffers).expect("room for as many as there are slots");
        self.slots[slot].request = Some(kind);
        self.by_head[usize::from(head)] = Some(slot);
    }

    fn publish(&mut self) {
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }
}

fn put(map: &MemoryMap, at: u64, bytes: &[u8]) {
    assert_eq!(map.slice(at, bytes.len() as u32).unwrap().write(bytes), bytes.len());
}

fn get(map: &MemoryMap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(map.slice(at, len as u32).unwrap().read(&mut bytes), len);
    bytes
}

#[allow(unsafe_code)]
fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it is open for as long as its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
