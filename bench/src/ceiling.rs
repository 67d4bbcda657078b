//! `vbench ceiling`: what the generator itself costs, against a ring that nobody but this process serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use poll_engine::device::features;
use poll_engine::engine::placement::{pin_to, usable_cpus};
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::driver::DriverRing;
use poll_engine::ring::layout::{
    DESC_F_INDIRECT, DESC_F_NEXT, Desc, PackedLayout, SplitLayout, USED_F_NO_NOTIFY, indirect_pair,
};
use poll_engine::ring::{RingConfig, RingFormat};
use vring::packed::{Event, Position, Rest};

use crate::control::{Control, Order};
use crate::front_end::{events, memory, regions};
use crate::job::{Job, JobResult};
use crate::options::Given;
use crate::spec::Spec;
use crate::verify::Ledger;

/// Bytes of the disk that is not there.
const DISK: u64 = 1 << 40;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Ceiling {
    /// The load, as for `vbench run`; --runtime is 1 if it is not given
    #[command(flatten)]
    pub options: Given,
}

/// Measures both ways and prints them.
pub fn ceiling(what: &Ceiling) -> Result<()> {
    let mut spec = Spec::default();
    what.options.apply(&mut spec).map_err(|e| anyhow!(e))?;
    if spec.verify || spec.interrupt || spec.numjobs > 1 {
        bail!("ceiling answers requests without doing them: no verify, interrupts or numjobs");
    }
    let runtime = *spec.runtime.get_or_insert(Duration::from_secs(1));
    spec.time_based = true;
    let spec = Arc::new(spec);
    let rw = format!("{:?}", spec.rw).to_lowercase();
    println!("{rw} bs={} iodepth={}, {:.1} s each", spec.largest(), spec.iodepth, runtime.as_secs_f64());
    for (name, own) in [("served by the job's own thread", true), ("served by a second thread", false)] {
        let result = measure(&spec, runtime, own)?;
        if let Some(failure) = result.failure {
            bail!("{}", failure.message);
        }
        let (requests, seconds) = (result.requests.max(1) as f64, result.seconds.max(1e-9));
        // Of CPU time, because others may have had the CPU meanwhile.
        let cpu = (result.cost.user + result.cost.system) * 1e9 / requests;
        println!(
            "{name}: {:.1} ns per request ({cpu:.1} ns of the job's CPU time), {:.0} IOPS",
            seconds * 1e9 / requests,
            requests / seconds
        );
    }
    Ok(())
}

fn measure(spec: &Arc<Spec>, runtime: Duration, own: bool) -> Result<JobResult> {
    let mut ram = memory(spec.memory(), spec.hugepages)?;
    let full = "guest memory is used up; lower iodepth or bs";
    let wanted = [
        (spec.indirect, features::INDIRECT_DESC),
        (spec.packed, features::RING_PACKED),
        (spec.in_order, features::IN_ORDER),
    ];
    let features = wanted.iter().filter(|w| w.0).fold(0, |all, w| all | w.1);
    let config = DriverRing::lay_out(&mut ram, spec.ring_size(), features).context(full)?;
    let mut peer = Peer::new(&config, &ram)?;
    let (_, _, region) = regions(std::slice::from_ref(spec), DISK)?.remove(0);
    let job = Job::new(spec, 0, &mut ram, &config, (region, &Ledger::default()), events()?).context(full)?;
    let (control, over) = (Control::new(Order::Ramp), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (control, over) = (&control, &over);
        let thread = if own {
            scope.spawn(move || job.run_beside(control, || {}, || peer.serve()))
        } else {
            scope.spawn(move || {
                // Two that spin on one CPU would wait for each other's time slices.
                let other = |own| usable_cpus().ok()?.into_iter().find(|&cpu| cpu != own);
                if let Some(cpu) = spec.cpu.and_then(other) {
                    // Unpinned, it measures less well; that is seen in the result.
                    let _ = pin_to(cpu);
                }
                while !over.load(Ordering::Relaxed) {
                    peer.serve();
                    std::hint::spin_loop();
                }
            });
            scope.spawn(move || job.run_beside(control, || {}, || {}))
        };
        // Until caches and clocks are warm.
        std::thread::sleep(spec.ramp_time.max(Duration::from_millis(50)));
        control.give(Order::Measure);
        std::thread::sleep(runtime);
        control.give(Order::Stop);
        let result = thread.join();
        over.store(true, Ordering::Relaxed);
        result.map_err(|_| anyhow!("the job panicked"))
    })
}

/// The device's side: answers everything at once and does nothing.
struct Peer {
    ring: PeerRing,
    map: Arc<MemoryMap>,
    in_order: bool,
}

/// The ring, and what it takes next.
enum PeerRing {
    Split(SplitLayout, u16),
    Packed(PackedLayout, Position),
}

impl Peer {
    fn new(config: &RingConfig, ram: &Ram) -> Result<Peer> {
        let ring = match config.format {
            RingFormat::Split => {
                let layout = SplitLayout::new(config, ram.map())?;
                layout.set_used_flags(USED_F_NO_NOTIFY);
                PeerRing::Split(layout, 0)
            }
            RingFormat::Packed => {
                let layout = PackedLayout::new(config, ram.map())?;
                layout.set_device_event(Event::Disable);
                PeerRing::Packed(layout, Position::START)
            }
        };
        Ok(Peer { ring, map: Arc::clone(ram.map()), in_order: config.in_order })
    }

    #[inline]
    fn serve(&mut self) {
        match &mut self.ring {
            PeerRing::Split(layout, next) => serve_split(layout, next, &self.map, self.in_order),
            PeerRing::Packed(layout, next) => serve_packed(layout, next, &self.map, self.in_order),
        }
    }
}

#[inline]
fn serve_split(layout: &SplitLayout, next: &mut u16, map: &MemoryMap, in_order: bool) {
    let published = layout.avail_idx();
    if published == *next {
        return;
    }
    let first = *next;
    while *next != published {
        let head = layout.avail_ring(*next);
        let mut desc = layout.desc(head);
        // Our own chains: they end.
        while desc.flags & DESC_F_NEXT != 0 {
            desc = layout.desc(desc.next);
        }
        answer(map, desc.addr, (desc.flags & DESC_F_INDIRECT != 0).then_some(desc.len));
        layout.set_used_ring(if in_order { first } else { *next }, head, 1);
        *next = next.wrapping_add(1);
    }
    layout.set_used_idx(published);
}

#[inline]
fn serve_packed(layout: &PackedLayout, next: &mut Position, map: &MemoryMap, in_order: bool) {
    let size = layout.size();
    let mut first = None;
    while next.is_available(layout.rest(next.index).flags()) {
        let at = *next;
        let mut desc = layout.desc(at.index);
        *next = at.advance(1, size);
        while desc.flags & DESC_F_NEXT != 0 {
            desc = layout.desc(next.index);
            *next = next.advance(1, size);
        }
        answer(map, desc.addr, (desc.flags & DESC_F_INDIRECT != 0).then_some(desc.len));
        match first {
            None => first = Some((at, desc.id)),
            Some((at, _)) if in_order => first = Some((at, desc.id)),
            Some(_) => layout.set_rest(at.index, Rest::used(at, desc.id, 1)),
        }
    }
    if let Some((at, id)) = first {
        layout.show(at.index, Rest::used(at, id, 1));
    }
}

/// Writes the status of a request whose last descriptor is this: a buffer at `addr`, or a table of `table` bytes there.
#[inline]
fn answer(map: &MemoryMap, addr: u64, table: Option<u32>) {
    let status = match table {
        None => Some(addr),
        // Both formats have the address first.
        Some(len) => {
            map.slice(addr, len).and_then(|table| Some(Desc::from_pair(indirect_pair(&table, 2)?).addr))
        }
    };
    if let Some(status) = status.and_then(|at| map.slice(at, 1)) {
        status.write_byte(0);
    }
}
