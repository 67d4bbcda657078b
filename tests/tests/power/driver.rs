//! A guest that writes, zeroes, discards and flushes on several queues at once, and what it may find after a power cut.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kickless_tests::random::Random;

use crate::blk::{DISCARD, FLUSH, Front, LIMIT, Lane, OK, Shape, WRITE, WRITE_ZEROES};

pub const SECTOR: usize = 512;
pub const QUEUES: usize = 4;
/// `VIRTIO_BLK_F_DISCARD`.
const F_DISCARD: u64 = 1 << 13;
/// Sectors of a request, at most.
const MOST: usize = 300;

/// A moment: how long the log is, and how many steps the guest has made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    pub time: u64,
    pub step: u64,
}

/// Something that became of a sector.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// 0: zeros.
    write: u64,
    begun: Moment,
    ended: Option<Moment>,
    /// A discard: what was there before may still be.
    may_stay: bool,
}

/// What a sector holds after this write of it.
fn content(sector: usize, write: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if write > 0 {
        let mut random = Random((sector as u64) << 32 | write);
        bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.number().to_le_bytes()));
    }
    bytes
}

/// What the guest knows of its disk.
pub struct Model {
    /// At the beginning.
    first: Vec<u8>,
    /// Where space was given up; zeros unless this says otherwise.
    given_up: Option<Vec<u8>>,
    /// Since.
    versions: Vec<Vec<Version>>,
    /// From when to when.
    flushes: Vec<(Moment, Moment)>,
    /// How many bytes the disk had before it grew, and from when to when that was.
    grown: Option<(usize, Moment, Moment)>,
    /// Whatever is answered is durable.
    write_through: bool,
}

impl Model {
    pub fn new(first: Vec<u8>, given_up: Option<Vec<u8>>, write_through: bool) -> Model {
        let versions = vec![Vec::new(); first.len() / SECTOR];
        Model { first, given_up, versions, flushes: Vec::new(), grown: None, write_through }
    }

    /// What a sector holds by this version of it.
    fn content(&self, sector: usize, version: &Version) -> Vec<u8> {
        match &self.given_up {
            Some(bytes) if version.may_stay => bytes[sector * SECTOR..][..SECTOR].to_vec(),
            _ => content(sector, version.write).to_vec(),
        }
    }

    /// Bytes of the disk.
    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// The disk has grown to this many bytes meanwhile; what came to it is zeros.
    fn grow(&mut self, bytes: usize, begun: Moment, ended: Moment) {
        self.grown = Some((self.first.len(), begun, ended));
        self.first.resize(bytes, 0);
        self.versions.resize(bytes / SECTOR, Vec::new());
    }

    /// Checks that there are as many bytes as there may be.
    fn check_size(&self, time: u64, bytes: usize) -> Result<()> {
        let all = self.first.len();
        let is_right = match self.grown {
            Some((before, begun, ended)) => {
                bytes == before && time < ended.time || bytes == all && begun.time < time
            }
            None => bytes >= all,
        };
        ensure!(is_right, "{bytes} bytes are left of {all}; it has grown: {:?}", self.grown);
        Ok(())
    }

    /// Checks what is there after a power cut, whose sectors that may hold one thing only are counted.
    pub fn check(&self, time: u64, found: &[u8], history: impl Fn(&[u8]) -> String) -> Result<usize> {
        self.check_size(time, found.len())?;
        let flushed =
            self.flushes.iter().filter(|(_, ended)| ended.time <= time).map(|(begun, _)| begun.step).max();
        let is_durable = |version: &Version| match (version.ended, self.write_through) {
            (Some(ended), true) => ended.time <= time,
            (Some(ended), false) => flushed.is_some_and(|step| ended.step < step),
            (None, _) => false,
        };
        let mut certain = 0;
        for (sector, (found, first)) in found.chunks(SECTOR).zip(self.first.chunks(SECTOR)).enumerate() {
            let versions = &self.versions[sector];
            let oldest = versions.iter().rposition(|v| is_durable(v) && !v.may_stay);
            let later = &versions[oldest.map_or(0, |at| at)..];
            let later = later.iter().filter(|v| v.begun.time < time || is_durable(v));
            let mut may_be: Vec<_> = later.map(|v| self.content(sector, v)).collect();
            if oldest.is_none() {
                may_be.push(first.to_vec());
            }
            certain += usize::from(may_be.len() == 1);
            ensure!(
                may_be.iter().any(|bytes| bytes == found),
                "sector {sector} holds none of the {} things that it may: {:?} (flushed: step {flushed:?}); its first \
                 bytes: {:?}; where it was: {}",
                may_be.len(),
                versions,
                &found[..16],
                history(&may_be[0][..16])
            );
        }
        Ok(certain)
    }
}

/// A request under way.
enum Doing {
    /// On these sectors.
    Change(Range<usize>),
    Flush(Moment),
}

/// Asks for growth.
pub type Grow<'a> = &'a dyn Fn() -> Result<()>;

/// The guest.
pub struct Guest<'a> {
    front: Front,
    doing: Vec<Option<Doing>>,
    model: &'a mut Model,
    random: Random,
    log: PathBuf,
    steps: u64,
    writes: u64,
    discards: bool,
    /// Sectors that are written together.
    block: usize,
}

impl Guest<'_> {
    pub fn new<'a>(socket: &Path, log: &Path, model: &'a mut Model, block: usize, seed: u64) -> Guest<'a> {
        let front = Front::flushing(socket, QUEUES);
        let discards = front.features & F_DISCARD != 0;
        let doing = (0..QUEUES).map(|_| None).collect();
        let (random, log) = (Random(seed), log.to_owned());
        Guest { front, doing, model, random, log, steps: 0, writes: 0, discards, block }
    }

    fn now(&mut self) -> Result<Moment> {
        self.steps += 1;
        Ok(Moment { time: std::fs::metadata(&self.log)?.len(), step: self.steps })
    }

    /// Has the disk be this large from here on, by `grow`, while requests are under way.
    fn grow(&mut self, bytes: usize, grow: impl FnOnce() -> Result<()>) -> Result<()> {
        let begun = self.now()?;
        grow()?;
        let ended = self.now()?;
        self.model.grow(bytes, begun, ended);
        Ok(())
    }

    /// Begins so many requests, and sees to their end. Half-way, the disk grows to so many bytes, if it can.
    pub fn work(mut self, requests: usize, grow: Option<(usize, Grow<'_>)>) -> Result<()> {
        let (mut left, mut grow) = (requests, grow);
        let mut deadline = Instant::now() + LIMIT;
        while left > 0 || self.doing.iter().any(Option::is_some) {
            for queue in 0..QUEUES {
                if self.doing[queue].is_some() {
                    let is_over = self.end(queue)?;
                    deadline = if is_over { Instant::now() + LIMIT } else { deadline };
                } else if left > 0 {
                    self.begin(queue)?;
                    left -= 1;
                }
            }
            if let Some((bytes, grow)) = grow.take_if(|_| left <= requests / 2) {
                self.grow(bytes, grow)?;
            }
            ensure!(Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// A range that nothing is done to; mostly where something was done before.
    fn range(&mut self) -> Option<Range<usize>> {
        let random = &mut self.random;
        let sectors = self.model.versions.len();
        let most = [1, 8, 40, MOST][random.below(4)].min(sectors);
        let len = (1 + random.below(most)).next_multiple_of(self.block);
        let within = if random.below(2) == 0 { sectors / 4 } else { sectors };
        let mut first = random.below(within.max(len) - len + 1);
        first -= first % if random.below(3) == 0 { 8 } else { self.block };
        let range = first..first + len;
        let meets = |doing: &Option<Doing>| match doing {
            Some(Doing::Change(other)) => other.start < range.end && range.start < other.end,
            _ => false,
        };
        (!self.doing.iter().any(meets)).then_some(range)
    }

    fn begin(&mut self, queue: usize) -> Result<()> {
        let what = self.random.below(16);
        if what < 3 {
            let begun = self.now()?;
            self.doing[queue] = Some(Doing::Flush(begun));
            self.front.queues[queue].begin(FLUSH, 0, &Shape::default());
            return Ok(());
        }
        let Some(range) = self.range() else { return Ok(()) };
        let begun = self.now()?;
        let lane = &mut self.front.queues[queue];
        let (write, may_stay) = match what {
            5 if self.discards => {
                clear(lane, DISCARD, &range, 0);
                (0, true)
            }
            3..=5 => {
                let flags = self.random.below(2) as u32;
                clear(lane, WRITE_ZEROES, &range, flags);
                (0, false)
            }
            _ => {
                self.writes += 1;
                let write = self.writes;
                let bytes: Vec<_> = range.clone().flat_map(|sector| content(sector, write)).collect();
                lane.put(lane.more, &bytes);
                let shape = Shape { out: &[bytes.len() as u32], out_at: Some(lane.more), ..Shape::default() };
                lane.begin(WRITE, range.start as u64, &shape);
                (write, false)
            }
        };
        for versions in &mut self.model.versions[range.clone()] {
            versions.push(Version { write, begun, ended: None, may_stay });
        }
        self.doing[queue] = Some(Doing::Change(range));
        Ok(())
    }

    /// Whether a request has ended.
    fn end(&mut self, queue: usize) -> Result<bool> {
        let Some(status) = self.front.queues[queue].over() else { return Ok(false) };
        ensure!(status == OK, "status {status}");
        let ended = self.now()?;
        match self.doing[queue].take().context("nothing was begun")? {
            Doing::Flush(begun) => self.model.flushes.push((begun, ended)),
            Doing::Change(range) => {
                for version in self.model.versions[range].iter_mut().filter_map(|all| all.last_mut()) {
                    version.ended = Some(ended);
                }
            }
        }
        Ok(true)
    }
}

fn clear(lane: &mut Lane, kind: u32, range: &Range<usize>, flags: u32) {
    let mut segment = (range.start as u64).to_le_bytes().to_vec();
    segment.extend((range.len() as u32).to_le_bytes());
    segment.extend(flags.to_le_bytes());
    lane.put(lane.area + 4096, &segment);
    lane.begin(kind, 0, &Shape { out: &[16], ..Shape::default() });
}

/// Whether the model finds what it is there for.
pub fn self_test() -> Result<()> {
    let moment = |n: u64| Moment { time: 10 * n, step: n };
    let version =
        |write, at, may_stay| Version { write, begun: moment(at), ended: Some(moment(at + 1)), may_stay };
    let mut model = Model::new(vec![7; SECTOR], None, false);
    model.versions[0] = vec![version(1, 1, false), version(2, 5, false), version(0, 9, true)];
    model.flushes = vec![(moment(3), moment(4)), (moment(7), moment(8))];
    let check = |model: &Model, time, bytes: &[u8]| model.check(time, bytes, |_| String::new()).is_ok();
    let old = vec![7; SECTOR];
    let [zeros, one, two] = [0, 1, 2].map(|write| content(0, write).to_vec());
    let mut torn = one.clone();
    torn[256..].copy_from_slice(&two[256..]);
    for (time, may_be) in [
        (5, vec![&old]),
        (35, vec![&old, &one]),
        (45, vec![&one]),
        (75, vec![&one, &two]),
        (85, vec![&two]),
        (200, vec![&two, &zeros]),
    ] {
        for bytes in [&old, &zeros, &one, &two, &torn] {
            let is_right = check(&model, time, bytes);
            ensure!(is_right == may_be.contains(&bytes), "at {time}: {:?}", &bytes[..4]);
        }
    }
    let noise = vec![9; SECTOR];
    model.given_up = Some(noise.clone());
    ensure!([&two, &noise].iter().all(|bytes| check(&model, 200, bytes)) && !check(&model, 200, &zeros));
    model.grow(2 * SECTOR, moment(20), moment(21));
    let grown = |tail: u8| [&two[..], &[tail; SECTOR]].concat();
    for (time, old, new) in [(195, true, false), (205, true, true), (215, false, true)] {
        ensure!(check(&model, time, &two) == old && check(&model, time, &grown(0)) == new, "at {time}");
    }
    ensure!(!check(&model, 215, &grown(7)), "what came to it is not zeros");
    model.write_through = true;
    ensure!(check(&model, 65, &two) && !check(&model, 65, &one));
    Ok(())
}
