//! The floor of a packet's cost: one port that sends everything back with the MAC addresses swapped, or two that are
//! connected, one copy from ring to ring, one thread, no checks. It trusts its guests. It exists to be measured beside,
//! in the same run and with the same driver, and for nothing else.
#![allow(unsafe_code, clippy::cast_ptr_alignment)] // it trusts its driver: that is the point

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::eventfd::EventFd;
use poll_engine::device::features;
use poll_engine::engine::placement::pin_to;
use poll_engine::memory::slice::prefetch;
use poll_engine::memory::{MemoryMap, Region};
use poll_engine::ring::RingConfig;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT};
use poll_engine::session::action::Action;
use poll_engine::session::listen::{Accepted, Listener};
use poll_engine::session::socket::{Connection, Incoming};
use poll_engine::session::state::{Offer, Session};

use super::frame::VNET;
use super::session::net_features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use crate::floor::{Desc, Translation, guest, translation};

/// Most packets passed on before the used indices are published.
const BATCH: usize = 32;
/// Turns of the loop between looks at whether a session waits.
const TURNS: usize = 256;

/// A card to serve.
#[derive(Clone, Debug, clap::Args)]
pub struct FloorNet {
    /// Socket to listen on; twice for two ports that are connected
    #[arg(long, value_name = "PATH", required = true, num_args = 1)]
    socket_path: Vec<PathBuf>,
    /// CPU to run on
    #[arg(long, value_name = "CPU")]
    cpu: Option<usize>,
}

/// A running ring, in host addresses.
struct Ring {
    desc: *const Desc,
    avail: *const u16,
    used: *mut u8,
    mask: u16,
    /// Where it is in the available ring, and in the used one.
    last: u16,
    out: u16,
}

#[derive(Default)]
struct Port {
    /// Keeps the memory mapped.
    map: Arc<MemoryMap>,
    by_guest: Translation,
    /// receiveq and transmitq.
    rings: [Option<Ring>; 2],
    calls: [Option<EventFd>; 2],
}

// SAFETY: all addresses are of memory that its map keeps mapped; one thread at a time has the lock around it.
unsafe impl Send for Port {}

/// The ports, and whether a session waits for them.
struct Ports {
    all: Mutex<Vec<Port>>,
    wanted: AtomicBool,
}

impl Ports {
    fn lock(&self) -> MutexGuard<'_, Vec<Port>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a session: the loop lets go.
    fn change<T>(&self, what: impl FnOnce(&mut Vec<Port>) -> T) -> T {
        self.wanted.store(true, Ordering::SeqCst);
        let mut all = self.lock();
        self.wanted.store(false, Ordering::SeqCst);
        what(&mut all)
    }
}

/// Serves one front end after another at each socket for ever.
pub fn serve(what: &FloorNet) -> Result<()> {
    let n = what.socket_path.len();
    ensure!(n <= 2, "floor-net has one port or two");
    let ports = Arc::new(Ports {
        all: Mutex::new((0..n).map(|_| Port::default()).collect()),
        wanted: AtomicBool::new(false),
    });
    for (index, path) in what.socket_path.iter().enumerate() {
        let (path, ports) = (path.clone(), Arc::clone(&ports));
        std::thread::spawn(move || {
            if let Err(e) = sessions(&path, index, &ports) {
                eprintln!("vbench: {}: {e:#}", path.display());
                std::process::exit(1);
            }
        });
    }
    if let Some(cpu) = what.cpu {
        pin_to(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
    }
    loop {
        let mut all = ports.lock();
        let running = all.iter().all(|p| p.rings.iter().all(Option::is_some));
        if running {
            turns(&mut all, &ports.wanted);
        }
        drop(all);
        if !running || ports.wanted.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Passes packets on until a session waits.
fn turns(ports: &mut [Port], wanted: &AtomicBool) {
    while !wanted.load(Ordering::Relaxed) {
        for _ in 0..TURNS {
            let n = match ports {
                [only] => {
                    let [Some(rx), Some(tx)] = &mut only.rings else { return };
                    // SAFETY: the driver's promise.
                    unsafe { pass::<true>(tx, &only.by_guest, rx, &only.by_guest, &only.calls) }
                }
                [a, b] => {
                    let ([Some(rx_a), Some(tx_a)], [Some(rx_b), Some(tx_b)]) = (&mut a.rings, &mut b.rings)
                    else {
                        return;
                    };
                    // SAFETY: the drivers' promises.
                    unsafe {
                        let to_b = [b.calls[0].as_ref(), a.calls[1].as_ref()];
                        let to_a = [a.calls[0].as_ref(), b.calls[1].as_ref()];
                        let n = pass_to::<false>(tx_a, &a.by_guest, rx_b, &b.by_guest, to_b);
                        n + pass_to::<false>(tx_b, &b.by_guest, rx_a, &a.by_guest, to_a)
                    }
                }
                _ => return,
            };
            if n == 0 {
                std::hint::spin_loop();
            }
        }
    }
}

#[inline]
unsafe fn pass<const SWAP: bool>(
    tx: &mut Ring,
    from: &[(u64, u64, *mut u8)],
    rx: &mut Ring,
    to: &[(u64, u64, *mut u8)],
    calls: &[Option<EventFd>; 2],
) -> usize {
    // SAFETY: the caller's promise.
    unsafe { pass_to::<SWAP>(tx, from, rx, to, [calls[0].as_ref(), calls[1].as_ref()]) }
}

impl Ring {
    fn new(config: &RingConfig, by_user: &[(u64, u64, *mut u8)]) -> Ring {
        let used = guest(by_user, config.used_addr);
        let ring = Ring {
            desc: guest(by_user, config.desc_addr).cast(),
            avail: guest(by_user, config.avail_addr).cast(),
            used,
            mask: config.size as u16 - 1,
            last: config.base as u16,
            out: 0,
        };
        // SAFETY: none to speak of. The driver is ours, its addresses are good, and a bad one ends this process only.
        unsafe {
            let out = used.cast::<u16>().add(1).read_volatile();
            // VIRTQ_USED_F_NO_NOTIFY.
            used.cast::<u16>().write_volatile(1);
            Ring { out, ..ring }
        }
    }

    /// Chains that are there.
    unsafe fn ready(&self) -> u16 {
        // SAFETY: as for `new`.
        unsafe { (*self.avail.add(1).cast::<AtomicU16>()).load(Ordering::Acquire).wrapping_sub(self.last) }
    }

    /// The chain that is `i` further on: its head, and where its first buffer is told.
    unsafe fn chain(&self, i: u16, map: &[(u64, u64, *mut u8)]) -> (u16, *const Desc, *const Desc) {
        // SAFETY: as for `new`.
        unsafe {
            let at = 2 + usize::from(self.last.wrapping_add(i) & self.mask);
            let head = self.avail.add(at).read_volatile() & self.mask;
            let desc = self.desc.add(usize::from(head));
            if (*desc).flags & DESC_F_INDIRECT == 0 {
                (head, self.desc, desc)
            } else {
                let table = guest(map, (*desc).addr).cast_const().cast::<Desc>();
                (head, table, table)
            }
        }
    }

    unsafe fn complete(&self, i: u16, head: u16, len: u32) {
        // SAFETY: as for `new`.
        unsafe {
            let slot = self.used.add(4 + 8 * usize::from(self.out.wrapping_add(i) & self.mask)).cast::<u32>();
            slot.write_volatile(head.into());
            slot.add(1).write_volatile(len);
        }
    }

    unsafe fn publish(&mut self, n: u16, call: Option<&EventFd>) {
        self.last = self.last.wrapping_add(n);
        self.out = self.out.wrapping_add(n);
        // SAFETY: as for `new`.
        unsafe {
            (*self.used.add(2).cast::<AtomicU16>()).store(self.out, Ordering::Release);
            fence(Ordering::SeqCst);
            // VIRTQ_AVAIL_F_NO_INTERRUPT.
            if self.avail.read_volatile() & 1 == 0
                && let Some(call) = call
            {
                // A counter that is full has been told.
                let _ = call.write(1);
            }
        }
    }
}

/// Copies packets from one ring to the other for as long as both have chains; how many. A packet that is larger than a
/// chain goes on in the next, as mergeable buffers do.
///
/// # Safety
///
/// Both rings hold good chains, and together room for their packets.
unsafe fn pass_to<const SWAP: bool>(
    tx: &mut Ring,
    from: &[(u64, u64, *mut u8)],
    rx: &mut Ring,
    to: &[(u64, u64, *mut u8)],
    [rx_call, tx_call]: [Option<&EventFd>; 2],
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let (packets, room) = (tx.ready().min(BATCH as u16), rx.ready());
        if packets == 0 || room == 0 {
            return 0;
        }
        let mut sources = [(0, std::ptr::null(), std::ptr::null()); BATCH];
        for i in 0..packets {
            sources[usize::from(i)] = tx.chain(i, from);
            prefetch(sources[usize::from(i)].2.cast());
            if i < room {
                prefetch(rx.chain(i, to).2.cast());
            }
        }
        for i in 0..packets {
            prefetch(guest(from, (*sources[usize::from(i)].2).addr));
            if i < room {
                prefetch(guest(to, (*rx.chain(i, to).2).addr));
            }
        }
        let (mut done, mut filled) = (0, 0);
        while done < packets {
            let (head, table, first) = sources[usize::from(done)];
            let Some(chains) = copy::<SWAP>((table, first), from, rx, filled, room, to) else { break };
            tx.complete(done, head, 0);
            filled += chains;
            done += 1;
        }
        if done > 0 {
            rx.publish(filled, rx_call);
            tx.publish(done, tx_call);
        }
        done.into()
    }
}

/// Copies one packet into the chains of `rx` from `filled` on; how many it took, or nothing if there are too few.
unsafe fn copy<const SWAP: bool>(
    (table, first): (*const Desc, *const Desc),
    from: &[(u64, u64, *mut u8)],
    rx: &Ring,
    filled: u16,
    room: u16,
    to: &[(u64, u64, *mut u8)],
) -> Option<u16> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut source = first;
        let (mut data, mut left) = (guest(from, (*source).addr), (*source).len as usize);
        let (mut chains, mut start) = (0, std::ptr::null_mut::<u8>());
        loop {
            if filled + chains == room {
                return None;
            }
            let (head, rx_table, mut desc) = rx.chain(filled + chains, to);
            let (mut at, mut space) = (guest(to, (*desc).addr), (*desc).len as usize);
            if start.is_null() {
                start = at;
            }
            let mut written = 0;
            loop {
                let n = left.min(space);
                at.copy_from_nonoverlapping(data, n);
                (data, at) = (data.add(n), at.add(n));
                (left, space, written) = (left - n, space - n, written + n as u32);
                if left == 0 {
                    if (*source).flags & DESC_F_NEXT == 0 {
                        break;
                    }
                    source = table.add(usize::from((*source).next));
                    (data, left) = (guest(from, (*source).addr), (*source).len as usize);
                }
                if space == 0 {
                    if (*desc).flags & DESC_F_NEXT == 0 {
                        break;
                    }
                    desc = rx_table.add(usize::from((*desc).next));
                    (at, space) = (guest(to, (*desc).addr), (*desc).len as usize);
                }
            }
            rx.complete(filled + chains, head, written);
            chains += 1;
            if left == 0 {
                break;
            }
        }
        start.add(10).cast::<u16>().write_unaligned(chains);
        if SWAP {
            // Where the header has a descriptor of its own, the frame is elsewhere.
            let (_, rx_table, desc) = rx.chain(filled, to);
            let split = (*desc).len as usize == VNET && (*desc).flags & DESC_F_NEXT != 0;
            let frame = if split {
                guest(to, (*rx_table.add(usize::from((*desc).next))).addr)
            } else {
                start.add(VNET)
            };
            let macs = frame.cast::<[u8; 12]>();
            let mut swapped = macs.read_unaligned();
            swapped.rotate_left(6);
            macs.write_unaligned(swapped);
        }
        Some(chains)
    }
}

/// One front end after another at one socket.
fn sessions(path: &Path, index: usize, ports: &Ports) -> Result<()> {
    let bell = EventFd::new()?;
    let mut listener = Listener::bind(path)?;
    while let Accepted::FrontEnd(stream) = listener.accept(bell.as_fd())? {
        let mut connection = Connection::new(stream)?;
        let net = MRG_RXBUF | CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO4;
        let offer = Offer {
            features: features::VERSION_1 | features::INDIRECT_DESC | net,
            num_queues: 2,
            max_ring_size: 32768,
            has_state: false,
            postcopy: false,
            is_network: false,
        };
        let mut session = Session::new(offer);
        while let Ok(Incoming::Message(header, Ok(request), fds)) = connection.receive(bell.as_fd()) {
            let (actions, answer) = session.handle(request, fds).context("an unusual front end")?;
            for action in actions {
                act(action, index, ports, &mut session)?;
            }
            let config = |_: u32, into: &mut [u8]| into.fill(0);
            if let Some(reply) = session.reply(answer, header.need_reply, true, config) {
                connection.send(&reply.encode(header.request), None)?;
            }
        }
        ports.change(|all| all[index] = Port::default());
    }
    Ok(())
}

fn act(action: Action, index: usize, ports: &Ports, session: &mut Session) -> Result<()> {
    let event = |fd: Option<OwnedFd>| {
        // SAFETY: the front end's eventfd; anything else fails when it is written.
        fd.map(|fd| unsafe { EventFd::from_owned_fd(fd) })
    };
    match action {
        Action::SetMemory(regions) => {
            let regions = regions.into_iter().map(|(spec, fd)| Region::map(spec, fd).map(Arc::new));
            let map = Arc::new(MemoryMap::new(regions.collect::<Result<_, _>>()?)?);
            ports.change(|all| {
                let (by_guest, _) = translation(&map);
                all[index] = Port { map, by_guest, ..Port::default() };
            });
        }
        Action::Start(queue, config) => ports.change(|all| {
            let port = &mut all[index];
            let (_, by_user) = translation(&port.map);
            port.rings[usize::from(queue & 1)] = Some(Ring::new(&config, &by_user));
        }),
        Action::Stop(queue) => {
            let ring = ports.change(|all| all[index].rings[usize::from(queue & 1)].take());
            session.stopped(queue, ring.map_or(0, |r| r.last).into());
        }
        Action::Call(queue, call) => {
            ports.change(|all| all[index].calls[usize::from(queue & 1)] = event(call));
        }
        _ => {}
    }
    Ok(())
}
