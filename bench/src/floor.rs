//! The floor of a request's cost: a null back end that trusts the guest and checks nothing, one split queue, one
//! thread. It exists to be measured beside, in the same run and with the same driver, and for nothing else. With
//! `--copy` it also moves the data between the guest and memory of its own, as the floor of a RAM disk.
#![allow(unsafe_code, clippy::cast_ptr_alignment)] // it trusts its driver: that is the point

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::sys::eventfd::EventFd;
use poll_engine::device::features;
use poll_engine::engine::placement::pin_to;
use poll_engine::memory::slice::{prefetch, prefetch_write};
use poll_engine::memory::{MemoryMap, Ram, Region};
use poll_engine::ring::RingConfig;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use poll_engine::session::action::Action;
use poll_engine::session::listen::{Accepted, Listener};
use poll_engine::session::socket::{Connection, Incoming};
use poll_engine::session::state::{Offer, Session};

/// Most requests answered before the used index is published: as many as the engine takes in a round. The driver goes
/// on with the first of them while the next are answered, which is worth more than any check costs; a floor that
/// batches otherwise is none.
const BATCH: u16 = poll_engine::engine::queue::BUDGET;
const SECTORS: u64 = (1 << 30) / 512;

/// A descriptor as it is in memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// Start, size and host address of each region.
pub type Translation = Vec<(u64, u64, *mut u8)>;

struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u16>,
}

/// Serves one front end after another for ever.
pub fn serve(path: &Path, cpu: Option<usize>, copy: bool) -> Result<()> {
    // The same kind of memory as a `ram` back end's: shared, and there from the first touch.
    let disk = copy.then(|| Ram::new(0, SECTORS * 512, false).map(Arc::new)).transpose()?;
    let bell = EventFd::new()?;
    let mut listener = Listener::bind(path)?;
    while let Accepted::FrontEnd(stream) = listener.accept(bell.as_fd())? {
        let mut connection = Connection::new(stream)?;
        let offer = Offer {
            features: features::VERSION_1 | features::INDIRECT_DESC,
            num_queues: 1,
            max_ring_size: 1024,
            has_state: false,
            postcopy: false,
            is_network: false,
        };
        let mut session = Session::new(offer);
        let mut map = Arc::new(MemoryMap::default());
        let mut running: Option<Running> = None;
        let halt = |running: &mut Option<Running>| {
            running.take().map_or(0, |r| {
                r.stop.store(true, Ordering::Relaxed);
                r.thread.join().unwrap_or(0)
            })
        };
        while let Ok(Incoming::Message(header, Ok(request), fds)) = connection.receive(bell.as_fd()) {
            let (actions, answer) = session.handle(request, fds).context("an unusual front end")?;
            for action in actions {
                match action {
                    Action::SetMemory(regions) => {
                        let regions =
                            regions.into_iter().map(|(spec, fd)| Region::map(spec, fd).map(Arc::new));
                        map = Arc::new(MemoryMap::new(regions.collect::<Result<_, _>>()?)?);
                    }
                    Action::Start(_, config) => {
                        let (map, stop) = (Arc::clone(&map), Arc::new(AtomicBool::new(false)));
                        let seen = Arc::clone(&stop);
                        let disk = disk.clone();
                        let thread = std::thread::spawn(move || {
                            if let Some(cpu) = cpu {
                                // Unpinned, it measures less well; that is seen in the result.
                                let _ = pin_to(cpu);
                            }
                            match disk.as_deref() {
                                Some(disk) => {
                                    let regions = disk.map().regions();
                                    let data =
                                        regions.first().map_or(std::ptr::null_mut(), |r| r.host_addr());
                                    run::<true>(&map, &config, data, &seen)
                                }
                                None => run::<false>(&map, &config, std::ptr::null_mut(), &seen),
                            }
                        });
                        running = Some(Running { stop, thread });
                    }
                    Action::Stop(index) => session.stopped(index, halt(&mut running).into()),
                    _ => {}
                }
            }
            let config = |at: u32, into: &mut [u8]| {
                let all = SECTORS.to_le_bytes();
                for (i, byte) in into.iter_mut().enumerate() {
                    *byte = all.get(at as usize + i).copied().unwrap_or(0);
                }
            };
            if let Some(reply) = session.reply(answer, header.need_reply, true, config) {
                connection.send(&reply.encode(header.request), None)?;
            }
        }
        halt(&mut running);
    }
    Ok(())
}

/// By guest-physical addresses, and by those of the front end.
pub fn translation(map: &MemoryMap) -> (Translation, Translation) {
    let regions = || map.regions().iter().map(|r| (r.spec(), r.host_addr()));
    let by_guest = regions().map(|(spec, host)| (spec.guest_addr, spec.size, host));
    let by_user = regions().map(|(spec, host)| (spec.user_addr, spec.size, host));
    (by_guest.collect(), by_user.collect())
}

/// Host address of a guest-physical one; guests are trusted to give good ones.
#[inline]
pub fn guest(map: &[(u64, u64, *mut u8)], addr: u64) -> *mut u8 {
    for (start, size, host) in map {
        let offset = addr.wrapping_sub(*start);
        if offset < *size {
            return host.wrapping_add(offset as usize);
        }
    }
    std::ptr::null_mut()
}

/// Moves the data of the request whose header is at `at`; gives the descriptor after the data, which is the status.
///
/// # Safety
///
/// The chain is a good one, and its sectors are on the disk.
#[inline]
unsafe fn copy_data(map: &[(u64, u64, *mut u8)], table: *const Desc, at: usize, disk: *mut u8) -> usize {
    // SAFETY: the caller's promise, and so the driver's.
    unsafe {
        let header = guest(map, (*table.add(at)).addr);
        let sector = header.add(8).cast::<u64>().read_unaligned();
        let mut disk = disk.add(sector as usize * 512);
        let mut at = usize::from((*table.add(at)).next & 1023);
        while (*table.add(at)).flags & DESC_F_NEXT != 0 {
            let Desc { addr, len, flags, next } = *table.add(at);
            let data = guest(map, addr);
            if flags & DESC_F_WRITE == 0 {
                disk.copy_from_nonoverlapping(data, len as usize);
            } else {
                data.copy_from_nonoverlapping(disk, len as usize);
            }
            disk = disk.add(len as usize);
            at = usize::from(next & 1023);
        }
        at
    }
}

/// `COPY` is a constant so that the loop without it stays what it is.
fn run<const COPY: bool>(map: &MemoryMap, config: &RingConfig, disk: *mut u8, stop: &AtomicBool) -> u16 {
    let (by_guest, by_user) = translation(map);
    let mask = config.size as u16 - 1;
    let desc = guest(&by_user, config.desc_addr).cast::<Desc>();
    let avail = guest(&by_user, config.avail_addr).cast::<u16>();
    let used = guest(&by_user, config.used_addr);
    let mut last = config.base as u16;
    // SAFETY: none to speak of. The driver is ours, its addresses are good, and a bad one ends this process only.
    unsafe {
        let avail_idx = &*avail.add(1).cast::<AtomicU16>();
        let used_idx = &*used.add(2).cast::<AtomicU16>();
        let mut out = used_idx.load(Ordering::Relaxed);
        used.cast::<u16>().write_volatile(1);
        while !stop.load(Ordering::Relaxed) {
            let ready = avail_idx.load(Ordering::Acquire).wrapping_sub(last).min(BATCH);
            if ready == 0 {
                std::hint::spin_loop();
                continue;
            }
            let head =
                |i: u16| avail.add(2 + usize::from(last.wrapping_add(i) & mask)).read_volatile() & mask;
            for i in 0..ready {
                prefetch(desc.add(usize::from(head(i))).cast());
            }
            for i in 0..ready {
                let h = head(i);
                let mut table = desc;
                let mut at = usize::from(h);
                if (*desc.add(at)).flags & DESC_F_INDIRECT != 0 {
                    table = guest(&by_guest, (*desc.add(at)).addr).cast();
                    at = 0;
                }
                prefetch_write(guest(&by_guest, (*table.add(at)).addr));
                if COPY {
                    at = copy_data(&by_guest, table, at, disk);
                }
                while (*table.add(at)).flags & DESC_F_NEXT != 0 {
                    at = usize::from((*table.add(at)).next & 1023);
                }
                *guest(&by_guest, (*table.add(at)).addr) = 0;
                let slot = used.add(4 + 8 * usize::from(out.wrapping_add(i) & mask)).cast::<u32>();
                slot.write_volatile(u32::from(h));
                slot.add(1).write_volatile(4097);
            }
            last = last.wrapping_add(ready);
            out = out.wrapping_add(ready);
            used_idx.store(out, Ordering::Release);
        }
    }
    last
}
