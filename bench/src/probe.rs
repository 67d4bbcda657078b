//! What the machine takes for the things that a request is made of, so that a latency can be told from what nobody can
//! avoid: a cache line that goes to another CPU and back, a copy, an entry into the kernel, a cipher.

use std::hint::{black_box, spin_loop};
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use io_uring::IoUring;
use nix::sys::eventfd::{EfdFlags, EventFd};
use poll_engine::engine::placement::{CpuList, pin_to, usable_cpus};
use poll_engine::uring::Uring;
use vhost_blk::backend::luks::xts::{Direction, KEY, Xts};

/// What to measure, and where.
#[derive(Clone, Debug, clap::Args)]
pub struct Probe {
    /// Two CPUs: the one that measures, and the other end of cache lines (default: the first two)
    #[arg(long, value_name = "CPUS")]
    cpus: Option<CpuList>,
    /// Rounds; of these the minimum, median and maximum are printed
    #[arg(long, value_name = "N", default_value_t = 31, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only the cipher
    #[arg(long)]
    cipher: bool,
}

/// Times one thing is done in a round.
const TRIPS: u64 = 20_000;
const COPIES: u64 = 20_000;
const CALLS: u64 = 5_000;
/// Bytes of the copy, and of the memory it goes through where it is not to find it in a cache.
const BLOCK: usize = 4096;
const FAR: usize = 256 << 20;
/// Bytes that are enciphered: a long request, and what no cache has.
const CIPHERED: [(&str, usize); 2] = [("128 KiB", 128 << 10), ("64 MiB", 64 << 20)];
/// Bytes that are enciphered in a round at least.
const CIPHERED_ROUND: usize = 16 << 20;

/// A cache line of its own, and the one beside it, which CPUs fetch along.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

/// Measures and prints.
pub fn probe(what: &Probe) -> Result<()> {
    let cpus = match &what.cpus {
        Some(list) => list.0.clone(),
        None => usable_cpus().context("which CPUs may be used")?,
    };
    let &[here, there, ..] = cpus.as_slice() else {
        bail!("needs two CPUs: give them as --cpus 0,1");
    };
    pin_to(here).with_context(|| format!("cannot run on CPU {here}"))?;
    let head = |unit: &str| println!("{unit:<52} {:>9} {:>9} {:>9}", "min", "median", "max");
    let print = |name: &str, mut rounds: Vec<f64>| {
        rounds.sort_by(f64::total_cmp);
        let (min, max) = (rounds[0], rounds[rounds.len() - 1]);
        println!("{name:<52} {min:>9.1} {:>9.1} {max:>9.1}", rounds[rounds.len() / 2]);
    };
    head("GB/s");
    for (name, rounds) in ciphers(what)? {
        print(&name, rounds);
    }
    if what.cipher {
        return Ok(());
    }

    head("ns");
    let lines: [Line; 2] = Default::default();
    print(
        &format!("cache line from CPU {here} to CPU {there} and back"),
        round_trips(what, there, &lines[0].0, &lines[0].0)?,
    );
    let lines: [Line; 2] = Default::default();
    print("two cache lines, one for each direction", round_trips(what, there, &lines[0].0, &lines[1].0)?);

    let (from, mut into) = (vec![1u8; FAR], vec![2u8; FAR]);
    print(
        "copy of 4 KiB, in the cache",
        each(what, COPIES, |_| into[..BLOCK].copy_from_slice(black_box(&from[..BLOCK]))),
    );
    // A step that is odd in blocks visits every block, and no prefetcher follows it.
    let blocks = (FAR / BLOCK) as u64;
    let mut at = 0;
    print(
        "copy of 4 KiB, from memory to memory",
        each(what, COPIES, |_| {
            at = (at + 40_503) % blocks;
            let range = at as usize * BLOCK..(at as usize + 1) * BLOCK;
            black_box(&mut into)[range.clone()].copy_from_slice(&black_box(&from)[range]);
        }),
    );

    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?;
    let mut failed = 0;
    print("write to an eventfd", each(what, CALLS, |_| failed += u64::from(event.write(1).is_err())));
    let ring = IoUring::new(8).context("no io_uring here")?;
    print(
        "io_uring_enter with nothing to do",
        each(what, CALLS, |_| failed += u64::from(ring.submit_and_wait(0).is_err())),
    );
    let mut uring = Uring::new(8).context("no io_uring here")?;
    let mut completions = Vec::new();
    let mut done = 0;
    print(
        "io_uring_enter with a write to an eventfd, reaped",
        each(what, CALLS, |_| {
            uring.signal(event.as_fd(), 0);
            uring.submit();
            uring.wait(None);
            uring.reap(&mut completions);
            done += completions.len() as u64;
            completions.clear();
        }),
    );
    if failed > 0 || done != CALLS * u64::from(what.rounds + 1) {
        bail!(
            "{failed} calls failed, and {done} completions came: the figures of the calls are worth nothing"
        );
    }
    Ok(())
}

/// GB/s of AES-256-XTS where the data are, as LUKS volumes have it: by the same library, called sector by sector.
fn ciphers(what: &Probe) -> Result<Vec<(String, Vec<f64>)>> {
    let key = std::array::from_fn::<u8, KEY, _>(|i| i as u8);
    let mut all = Vec::new();
    for (size, bytes) in CIPHERED {
        let mut data = vec![3; bytes];
        for sector in [512, 4096] {
            for (way, direction) in [("enciphered", Direction::Encipher), ("deciphered", Direction::Decipher)]
            {
                let mut xts = Xts::new(&key, direction).context("no cipher")?;
                let times = (CIPHERED_ROUND / bytes).max(1) as u64;
                let rounds = each(what, times, |_| {
                    for (number, sector) in black_box(&mut data).chunks_exact_mut(sector).enumerate() {
                        xts.in_place(number as u64, sector);
                    }
                });
                let name = format!("AES-256-XTS, {size} {way} in sectors of {sector}");
                all.push((name, rounds.iter().map(|ns| bytes as f64 / ns).collect()));
            }
        }
    }
    Ok(all)
}

/// Nanoseconds of each of `times` calls of `work`, for each round. One more round warms up.
fn each(what: &Probe, times: u64, mut work: impl FnMut(u64)) -> Vec<f64> {
    let mut round = || {
        let since = Instant::now();
        (0..times).for_each(&mut work);
        since.elapsed().as_nanos() as f64 / times as f64
    };
    round();
    (0..what.rounds).map(|_| round()).collect()
}

/// Nanoseconds from writing `out` until the other CPU, which waits for that, has written `back`.
fn round_trips(what: &Probe, there: usize, out: &AtomicU64, back: &AtomicU64) -> Result<Vec<f64>> {
    // Where both are the same line, the answer is told from the question by the lowest bit.
    let question = |trip: u64| 2 * trip + 1;
    let answer = |trip: u64| 2 * trip + 2;
    let total = TRIPS * u64::from(what.rounds + 1);
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let pinned = pin_to(there).with_context(|| format!("cannot run on CPU {there}"));
            ready.wait();
            for trip in 0..total {
                while out.load(Ordering::Acquire) != question(trip) {
                    spin_loop();
                }
                back.store(answer(trip), Ordering::Release);
            }
            pinned
        });
        ready.wait();
        let mut trip = 0;
        let rounds = each(what, TRIPS, |_| {
            out.store(question(trip), Ordering::Release);
            while back.load(Ordering::Acquire) != answer(trip) {
                spin_loop();
            }
            trip += 1;
        });
        match other.join() {
            Ok(pinned) => pinned.map(|()| rounds),
            Err(_) => bail!("the thread on CPU {there} has died"),
        }
    })
}
