//! A disk beside a plain copy of it in memory.
#![allow(dead_code)] // each test program uses its part

use std::path::Path;

use anyhow::{Result, ensure};
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;

use crate::blk::{DISCARD, FLUSH, Front, Lane, OK, READ, Served, Shape, WRITE, WRITE_ZEROES};

const SECTOR: usize = 512;
/// Requests of one round; `KICKLESS_IMAGE_REQUESTS` says otherwise.
fn requests() -> usize {
    std::env::var("KICKLESS_IMAGE_REQUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}

/// Bytes that say where they are, with gaps of zeros.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for stretch in bytes.chunks_mut(24 << 10) {
        if random.below(4) > 0 {
            // Half of it the same, so that it can be compressed.
            let half = stretch.len() / 2;
            stretch[..half].fill(random.number() as u8);
            stretch[half..].chunks_mut(8).for_each(|word| {
                let number = random.number().to_le_bytes();
                word.copy_from_slice(&number[..word.len()]);
            });
        }
    }
    bytes
}

/// What a disk holds.
pub struct Copy {
    pub bytes: Vec<u8>,
    /// Bytes of a block.
    pub block: usize,
    /// Whether ranges are discarded, too.
    pub discards: bool,
    random: Random,
}

impl Copy {
    pub fn new(bytes: Vec<u8>, seed: u64) -> Copy {
        Copy { bytes, block: SECTOR, discards: true, random: Random(seed) }
    }

    /// A range of sectors: often small, sometimes as large as a request may be; often where others begin or end.
    fn range(&mut self) -> std::ops::Range<usize> {
        let blocks = self.bytes.len() / self.block;
        let most = [1, 8, 64, 300, 2048][self.random.below(5)] * SECTOR / self.block;
        let len = 1 + self.random.below(most.clamp(1, blocks));
        let mut first = self.random.below(blocks - len + 1);
        if self.random.below(3) == 0 {
            first &= !127;
        }
        if self.random.below(40) == 0 {
            first = blocks - len;
        }
        first * self.block..(first + len) * self.block
    }
}

fn read(lane: &mut Lane, range: std::ops::Range<usize>) -> Result<Vec<u8>> {
    let (sector, len) = ((range.start / SECTOR) as u64, range.len());
    let at = lane.more;
    lane.put(at, &vec![0xa5; len]);
    let shape = Shape { into: &[len as u32], into_at: Some(at), ..Shape::default() };
    let answer = lane.request(READ, sector, &shape);
    ensure!(answer == (OK, len as u32 + 1), "read of {range:?}: {answer:?}");
    Ok(lane.get(at, len))
}

fn expect(lane: &mut Lane, range: std::ops::Range<usize>, bytes: &[u8]) -> Result<()> {
    let found = read(lane, range.clone())?;
    let differs = found.iter().zip(&bytes[range.clone()]).position(|(a, b)| a != b);
    ensure!(differs.is_none(), "{range:?} differs at byte {:?}", differs.map(|at| range.start + at));
    Ok(())
}

/// A range of sectors as a discard or write-zeroes has it (virtio 1.3, 5.2.6).
pub fn segment(first: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn clear(lane: &mut Lane, kind: u32, range: &std::ops::Range<usize>, flags: u32) -> Result<()> {
    let segment = segment((range.start / SECTOR) as u64, (range.len() / SECTOR) as u32, flags);
    lane.put(lane.area + 4096, &segment);
    let answer = lane.request(kind, 0, &Shape { out: &[16], ..Shape::default() });
    ensure!(answer == (OK, 1), "request {kind} of {range:?}: {answer:?}");
    Ok(())
}

/// One request, on the disk and on the copy.
pub fn step(lane: &mut Lane, copy: &mut Copy) -> Result<()> {
    let range = copy.range();
    match copy.random.below(16) {
        0 => {
            let answer = lane.request(FLUSH, 0, &Shape::default());
            ensure!(answer == (OK, 1), "flush: {answer:?}");
        }
        1..6 => expect(lane, range, &copy.bytes)?,
        6..8 => {
            let flags = copy.random.below(2) as u32;
            clear(lane, WRITE_ZEROES, &range, flags)?;
            copy.bytes[range.clone()].fill(0);
            expect(lane, range, &copy.bytes)?;
        }
        8 if copy.discards => {
            clear(lane, DISCARD, &range, 0)?;
            // What it holds now is what it has held, or nothing.
            let found = read(lane, range.clone())?;
            for (new, old) in found.chunks(SECTOR).zip(copy.bytes[range.clone()].chunks_mut(SECTOR)) {
                ensure!(new == old || new.iter().all(|&b| b == 0), "{range:?}: a discard has left something");
                old.copy_from_slice(new);
            }
        }
        _ => write(lane, copy, range)?,
    }
    Ok(())
}

/// Writes something new.
pub fn write(lane: &mut Lane, copy: &mut Copy, range: std::ops::Range<usize>) -> Result<()> {
    let seed = copy.random.number();
    let mut bytes = pattern(range.len(), seed);
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    lane.put(lane.more, &bytes);
    let (sector, len) = ((range.start / SECTOR) as u64, range.len() as u32);
    let shape = Shape { out: &[len], out_at: Some(lane.more), ..Shape::default() };
    let answer = lane.request(WRITE, sector, &shape);
    ensure!(answer == (OK, 1), "write of {range:?}: {answer:?}");
    copy.bytes[range].copy_from_slice(&bytes);
    Ok(())
}

pub fn serve(scene: &Scene, path: &Path, args: &[&str]) -> (Served, Front) {
    let image = format!("--blk-file={}", path.display());
    let served = Served::start(scene, &[&[&*image, "--num-queues=2"], args].concat());
    let front = Front::connect(&served.socket, 2);
    (served, front)
}

/// Serves a qcow2 image, and uses it as its copy.
pub fn exercise(scene: &Scene, path: &Path, copy: &mut Copy, args: &[&str]) -> Result<()> {
    exercise_as(scene, path, copy, &[args, &["--format=qcow2"]].concat())
}

/// As [`exercise`], of whatever format the arguments say.
pub fn exercise_as(scene: &Scene, path: &Path, copy: &mut Copy, args: &[&str]) -> Result<()> {
    let (served, mut front) = serve(scene, path, args);
    for i in 0..requests() {
        step(&mut front.queues[i % 2], copy)?;
    }
    check_all(&mut front, &copy.bytes)?;
    let errors = served.stats().lines().filter(|l| l.starts_with("errors")).count();
    ensure!(errors == 0, "{}", served.stats());
    drop(front);
    served.terminate();
    Ok(())
}

/// Reads all of it.
pub fn check_all(front: &mut Front, bytes: &[u8]) -> Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + (640 << 10)).min(bytes.len());
        expect(&mut front.queues[0], at..end, bytes)?;
        at = end;
    }
    Ok(())
}

/// Serves an image and reads all of it, twice.
pub fn read_all(scene: &Scene, path: &Path, bytes: &[u8], args: &[&str]) -> Result<()> {
    let (served, mut front) = serve(scene, path, args);
    for _ in 0..2 {
        check_all(&mut front, bytes)?;
    }
    drop(front);
    served.terminate();
    Ok(())
}
