//! `vbench ceiling`: what the generator itself costs, against a ring that nobody but this process serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use poll_engine::device::features;
use poll_engine::engine::placement::{pin_to, usable_cpus};
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;
use poll_engine::ring::layout::{
    DESC_F_INDIRECT, DESC_F_NEXT, Desc, SplitLayout, USED_F_NO_NOTIFY, indirect_pair,
};

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
    if spec.verify || spec.interrupt || spec.packed || spec.in_order || spec.numjobs > 1 {
        bail!("ceiling answers requests without doing them: no verify, interrupts, packed rings or numjobs");
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
    let config = DriverRing::lay_out(
        &mut ram,
        spec.ring_size(),
        if spec.indirect { features::INDIRECT_DESC } else { 0 },
    )
    .context(full)?;
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
    layout: SplitLayout,
    map: Arc<MemoryMap>,
    next: u16,
}

impl Peer {
    fn new(config: &RingConfig, ram: &Ram) -> Result<Peer> {
        let layout = SplitLayout::new(config, ram.map())?;
        layout.set_used_flags(USED_F_NO_NOTIFY);
        Ok(Peer { layout, map: Arc::clone(ram.map()), next: 0 })
    }

    #[inline]
    fn serve(&mut self) {
        let published = self.layout.avail_idx();
        if published == self.next {
            return;
        }
        while self.next != published {
            let head = self.layout.avail_ring(self.next);
            if let Some(status) = self.status(head).and_then(|at| self.map.slice(at, 1)) {
                status.write_byte(0);
            }
            self.layout.set_used_ring(self.next, head, 1);
            self.next = self.next.wrapping_add(1);
        }
        self.layout.set_used_idx(self.next);
    }

    /// Where the status belongs: the last of a chain.
    fn status(&self, head: u16) -> Option<u64> {
        let mut desc = self.layout.desc(head);
        if desc.flags & DESC_F_INDIRECT != 0 {
            let table = self.map.slice(desc.addr, desc.len)?;
            return Some(Desc::from_pair(indirect_pair(&table, 2)?).addr);
        }
        // Our own chains: they end.
        while desc.flags & DESC_F_NEXT != 0 {
            desc = self.layout.desc(desc.next);
        }
        Some(desc.addr)
    }
}
