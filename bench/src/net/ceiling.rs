//! What the generator itself costs, against rings that nobody but this process serves.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use poll_engine::device::features::INDIRECT_DESC;
use poll_engine::engine::placement::{pin_to, usable_cpus};
use poll_engine::memory::MemoryMap;
use poll_engine::ring::layout::{
    DESC_F_INDIRECT, DESC_F_NEXT, Desc, SplitLayout, USED_F_NO_NOTIFY, indirect_pair,
};
use quanta::Clock;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Port, Rx, Tx, lay_out};
use super::report::pps;
use super::spec::{Direction, NetLoad, NetSpec};
use super::tally::Tally;
use super::worker::{Shared, Worker};
use crate::control::{Control, Order};
use crate::front_end::memory;

/// Measures both ways and prints them.
pub fn ceiling(load: &NetLoad) -> Result<()> {
    let mut load = load.clone();
    load.mrg_rxbuf = 0;
    let ports = load.direction.map_or(1, Direction::ports);
    let spec = NetSpec::new((0..ports).map(|p| PathBuf::from(p.to_string())).collect(), false, &load);
    let spec = spec.map_err(|e| anyhow!(e))?;
    if spec.base.interrupt || spec.base.packed || load.queue_pairs > 1 || spec.direction == Direction::Receive
    {
        bail!(
            "--ceiling hands packets over at once: no interrupts, no packed rings, no further queue pairs, not receive"
        );
    }
    let given = load.shared.0.0.iter().any(|(name, _)| *name == "runtime");
    let runtime = spec.base.runtime.filter(|_| given).unwrap_or(Duration::from_secs(1));
    let spec = Arc::new(spec.at(spec.base.arrival_rate.map(|r| r as f64), runtime));
    let seconds = runtime.as_secs_f64();
    println!("{}: size {}, {seconds:.1} s each", spec.direction.name(), load.size.text());
    for (name, own) in [("served by the generator's own thread", true), ("served by a second thread", false)]
    {
        let (tally, served) = measure(&spec, runtime, own)?;
        if let Some(failure) = &tally.failure {
            bail!("{}", failure.message);
        }
        let sum = tally.sum();
        let packets = if spec.direction == Direction::Transmit { sum.sent } else { sum.received_in_time };
        let each = |nanos: f64| nanos / packets.max(1) as f64;
        let cpu = (tally.cost.user + tally.cost.system) * 1e9;
        let rate = pps(tally.rate(packets));
        if own {
            let alone = cpu - served as f64;
            if alone <= 0.0 {
                println!("{name}: {rate}; others had the CPU for too long to tell what the generator costs");
                continue;
            }
            println!(
                "{name}: {rate}; {:.1} ns of CPU time per packet, of which the generator {:.1} ns: alone, {}",
                each(cpu),
                each(alone),
                pps(1e9 / each(alone))
            );
        } else {
            println!("{name}: {rate}; {:.1} ns of the generator's CPU time per packet", each(cpu));
        }
    }
    Ok(())
}

/// What was counted, and nanoseconds that serving took in the generator's own thread.
fn measure(spec: &Arc<NetSpec>, runtime: Duration, own: bool) -> Result<(Tally, u64)> {
    let features = if spec.base.indirect { INDIRECT_DESC } else { 0 };
    let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let full = "guest memory is used up; lower --ring-size or --size";
    let (mut ports, mut rings, mut rams) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..spec.direction.ports() {
        let mut ram = memory(spec.memory(), spec.base.hugepages)?;
        let mut two = Vec::new();
        for _ in 0..2 {
            let config = lay_out(spec, features, &mut ram).context(full)?;
            rings.push(Ring::new(SplitLayout::new(&config, ram.map())?, ram.map()));
            two.push((config, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        }
        let [rx, tx] = <[_; 2]>::try_from(two).map_err(|_| anyhow!("two rings"))?;
        let rx = Rx::new(spec, features, &mut ram, rx).context(full)?;
        let tx = Tx::new(spec, features, &mut ram, tx).context(full)?;
        ports.push(Port { map: Arc::clone(ram.map()), rx, tx });
        rams.push(ram);
    }
    let worker = Worker::new(spec, &Arc::new(Shared::new(spec)?), 0, ports, call);
    let mut peer = Peer { rings, direction: spec.direction, clock: Clock::new(), served: 0 };
    let (control, over) = (Control::new(Order::Ramp), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (control, over) = (&control, &over);
        let thread = if own {
            scope.spawn(move || {
                let mut before = None;
                let ended = worker.run_beside(
                    control,
                    || {},
                    || {
                        if control.order() == Order::Measure && before.is_none() {
                            before = Some(peer.served);
                        }
                        peer.serve(true);
                    },
                );
                (ended.tally, peer.served - before.unwrap_or(0))
            })
        } else {
            scope.spawn(move || {
                // Two that spin on one CPU would wait for each other's time slices.
                let other = |own| usable_cpus().ok()?.into_iter().find(|&cpu| cpu != own);
                if let Some(cpu) = spec.base.cpu.and_then(other) {
                    // Unpinned, it measures less well; that is seen in the result.
                    let _ = pin_to(cpu);
                }
                while !over.load(Ordering::Relaxed) {
                    peer.serve(false);
                    std::hint::spin_loop();
                }
            });
            scope.spawn(move || (worker.run_beside(control, || {}, || {}).tally, 0))
        };
        // Until caches and clocks are warm.
        std::thread::sleep(spec.base.ramp_time.max(Duration::from_millis(50)));
        control.give(Order::Measure);
        std::thread::sleep(runtime);
        control.give(Order::Stop);
        let result = thread.join();
        over.store(true, Ordering::Relaxed);
        result.map_err(|_| anyhow!("the generator panicked"))
    })
}

/// A ring as its device sees it.
struct Ring {
    layout: SplitLayout,
    map: Arc<MemoryMap>,
    next: u16,
}

impl Ring {
    fn new(layout: SplitLayout, map: &Arc<MemoryMap>) -> Ring {
        layout.set_used_flags(USED_F_NO_NOTIFY);
        Ring { layout, map: Arc::clone(map), next: 0 }
    }

    fn ready(&self) -> u16 {
        self.layout.avail_idx().wrapping_sub(self.next)
    }

    /// The buffers of the chain `head`: at most two, for they are our own.
    fn buffers(&self, head: u16) -> [Option<Desc>; 2] {
        let first = self.layout.desc(head);
        if first.flags & DESC_F_INDIRECT != 0 {
            let table = self.map.slice(first.addr, first.len);
            return [0, 1].map(|i| table.as_ref().and_then(|t| indirect_pair(t, i).map(Desc::from_pair)));
        }
        let second = (first.flags & DESC_F_NEXT != 0).then(|| self.layout.desc(first.next));
        [Some(first), second]
    }

    fn complete(&mut self, head: u16, len: u32) {
        self.layout.set_used_ring(self.next, head, len);
        self.next = self.next.wrapping_add(1);
    }
}

/// The device's side: hands everything over at once.
struct Peer {
    /// receiveq and transmitq of each port.
    rings: Vec<Ring>,
    direction: Direction,
    clock: Clock,
    served: u64,
}

impl Peer {
    #[inline]
    fn serve(&mut self, timed: bool) {
        let begun = self.clock.raw();
        let mut any = false;
        for port in 0..self.direction.ports() {
            any |= self.direction.sends(port) && self.hand_over(port * 2 + 1, self.direction.to(port) * 2);
        }
        if timed && any {
            self.served += self.clock.delta_as_nanos(begun, self.clock.raw());
        }
    }

    fn hand_over(&mut self, from: usize, to: usize) -> bool {
        let mut n = self.rings[from].ready();
        if self.direction != Direction::Transmit {
            n = n.min(self.rings[to].ready());
        }
        for _ in 0..n {
            let head = self.rings[from].layout.avail_ring(self.rings[from].next);
            if self.direction != Direction::Transmit {
                let place = self.rings[to].layout.avail_ring(self.rings[to].next);
                let len = copy(&self.rings[from], head, &self.rings[to], place);
                self.rings[to].complete(place, len);
            }
            self.rings[from].complete(head, 0);
        }
        if n > 0 {
            self.rings[from].layout.set_used_idx(self.rings[from].next);
            self.rings[to].layout.set_used_idx(self.rings[to].next);
        }
        n > 0
    }
}

/// Copies a packet; both chains have their parts at the same places.
fn copy(from: &Ring, head: u16, to: &Ring, place: u16) -> u32 {
    let mut len = 0;
    for (a, b) in from.buffers(head).into_iter().zip(to.buffers(place)) {
        let (Some(a), Some(b)) = (a, b) else { continue };
        if let (Some(source), Some(target)) = (from.map.slice(a.addr, a.len), to.map.slice(b.addr, b.len)) {
            len += source.copy_to(&target) as u32;
        }
    }
    len
}
