//! Power cuts after the fact: what a file may hold when the power has gone at some moment of a [log](super::write_log).
//!
//! All that had ended before a sync of its file began is there once that sync has ended, and so is a write with
//! `RWF_DSYNC` that has ended. Anything else that had begun is there or not, whatever comes before or after it, and of
//! what is there some sectors may be missing. What was begun after something else had ended, and is there, is never under
//! that; things that were under way together may be in any order.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fastrand::Rng;
use nix::fcntl::{FallocateFlags, fallocate};

use super::write_log::{HEAD_LEN, Head, Kind, MAGIC};

/// Bytes that are written whole or not at all: a sector of the storage. What a volume enciphers together may be more, and is
/// torn all the same: as XTS ciphers every 16 bytes by their place, what is deciphered is then torn at the same bytes.
const SECTOR: u64 = 512;
/// Bytes that a file system gives up or zeroes at once.
const BLOCK: u64 = 4096;
/// No payload is longer; a request's data are not.
const MAX_PAYLOAD: u64 = 1 << 32;

/// What a power cut is made of: what a file held before.
pub trait Target {
    /// Writes; where that is behind the end, there are zeros in between.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Has a range read as zeros, as far as there is anything.
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Has so many bytes.
    fn resize(&mut self, len: u64) -> io::Result<()>;
}

impl Target for Vec<u8> {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (at, end) = (offset as usize, offset as usize + bytes.len());
        Vec::resize(self, self.len().max(end), 0);
        self[at..end].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.len().min((offset + len) as usize);
        if let Some(range) = self.get_mut(offset as usize..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn resize(&mut self, len: u64) -> io::Result<()> {
        Vec::resize(self, len as usize, 0);
        Ok(())
    }
}

impl Target for File {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&*self, how, offset as i64, len as i64)?)
    }

    fn resize(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

/// A file that may have been changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Its name.
    pub path: PathBuf,
    /// Bytes that it had before.
    pub len: u64,
}

/// What was done.
#[derive(Clone, Debug)]
enum What {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Resize(u64),
    Sync,
    /// Nothing: it was not begun, or is not possible there.
    Nothing,
}

/// Something that was done to a file. Times are bytes of the log up to there.
#[derive(Clone, Debug)]
struct Done {
    file: u32,
    what: What,
    begun: u64,
    ended: Option<u64>,
    /// With an error.
    failed: bool,
    /// Since when it is there whatever happens.
    durable: Option<u64>,
}

/// A log that was read.
#[derive(Clone, Debug)]
pub struct Writes {
    files: Vec<Touched>,
    /// In the order in which they were begun.
    done: Vec<Done>,
    len: u64,
}

/// What was lost in a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Changes that were under way or not durable.
    pub uncertain: usize,
    /// How many of them are not there.
    pub missing: usize,
    /// Of how many only a part is there.
    pub torn: usize,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("it is no log of writes: {what}"))
}

impl Writes {
    /// Reads a log. The last entry may be cut short, as a process leaves it that is killed.
    pub fn read(path: &Path) -> io::Result<Writes> {
        let mut from = BufReader::new(File::open(path)?);
        let mut magic = [0; MAGIC.len()];
        from.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(damaged("it begins otherwise"));
        }
        let mut writes = Writes { files: Vec::new(), done: Vec::new(), len: MAGIC.len() as u64 };
        let mut head = [0; HEAD_LEN];
        while from.read_exact(&mut head).is_ok() {
            let head = Head::parse(&head).ok_or(damaged("an entry of an unknown kind"))?;
            let payload = match head.kind {
                Kind::File => head.result as u64,
                Kind::Write | Kind::DurableWrite => head.len,
                _ => 0,
            };
            if payload > MAX_PAYLOAD {
                return Err(damaged("an entry is too long"));
            }
            let mut bytes = Vec::new();
            from.by_ref().take(payload).read_to_end(&mut bytes)?;
            if (bytes.len() as u64) < payload {
                break;
            }
            writes.len += HEAD_LEN as u64 + payload;
            writes.take(head, bytes)?;
        }
        writes.settle();
        Ok(writes)
    }

    fn take(&mut self, head: Head, bytes: Vec<u8>) -> io::Result<()> {
        let Head { kind, file, id, offset, len, result } = head;
        let what = match kind {
            Kind::File => {
                let path = String::from_utf8_lossy(&bytes).into_owned().into();
                self.files.push(Touched { path, len });
                return Ok(());
            }
            Kind::End => {
                let at = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
                let done =
                    at.and_then(|at| self.done.get_mut(at)).ok_or(damaged("an end without a beginning"))?;
                done.ended = Some(self.len);
                if result < 0 {
                    // It may have been done all the same, and nothing makes that durable.
                    (done.failed, done.durable) = (true, None);
                    let errno = i32::try_from(-result).unwrap_or(libc::EIO);
                    if matches!(errno, libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP) {
                        done.what = What::Nothing;
                    }
                } else {
                    done.durable = done.durable.and(done.ended);
                    if let What::Write { bytes, .. } = &mut done.what {
                        bytes.truncate(result as usize);
                    }
                }
                return Ok(());
            }
            Kind::Write | Kind::DurableWrite => What::Write { offset, bytes },
            Kind::Zero => What::Zero { offset, len },
            Kind::Resize => What::Resize(len),
            Kind::Sync => What::Sync,
        };
        if id != self.done.len() as u64 + 1 || file as usize >= self.files.len() {
            return Err(damaged("an entry is missing"));
        }
        // Until its end is known: never.
        let durable = (kind == Kind::DurableWrite).then_some(u64::MAX);
        self.done.push(Done { file, what, begun: self.len, ended: None, failed: false, durable });
        Ok(())
    }

    /// Finds out what syncs have made durable.
    fn settle(&mut self) {
        let is_sync = |done: &&Done| matches!(done.what, What::Sync) && !done.failed;
        let syncs: Vec<_> =
            self.done.iter().filter(is_sync).filter_map(|s| Some((s.file, s.begun, s.ended?))).collect();
        for done in self.done.iter_mut().filter(|done| !done.failed) {
            let Some(ended) = done.ended else { continue };
            let of = syncs.iter().filter(|(file, begun, _)| *file == done.file && *begun > ended);
            let synced = of.map(|&(.., ended)| ended).min();
            done.durable = done.durable.into_iter().chain(synced).min();
        }
    }

    /// The files, by number.
    pub fn files(&self) -> &[Touched] {
        &self.files
    }

    /// The times there are: from 0 to this, bytes of the log.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Between which moments something began or ended, in order.
    pub fn moments(&self) -> Vec<u64> {
        let mut moments: Vec<_> = self.done.iter().flat_map(|d| [Some(d.begun), d.ended]).flatten().collect();
        moments.sort_unstable();
        moments
    }

    /// Where the last write went that began a sector with these bytes: file and offset.
    pub fn find(&self, bytes: &[u8]) -> Option<(usize, u64)> {
        self.done.iter().rev().find_map(|done| match &done.what {
            What::Write { offset, bytes: written } => {
                let at = written.chunks(SECTOR as usize).position(|sector| sector.starts_with(bytes))?;
                Some((done.file as usize, offset + at as u64 * SECTOR))
            }
            _ => None,
        })
    }

    /// All that became of a sector, a line each.
    pub fn history(&self, number: usize, at: u64) -> Vec<String> {
        let touches = |offset: u64, len: u64| offset < at + SECTOR && at < offset + len;
        let of = self.done.iter().filter(|done| done.file as usize == number);
        of.filter_map(|done| {
            let what = match &done.what {
                What::Write { offset, bytes } if touches(*offset, bytes.len() as u64) => {
                    let from = at.saturating_sub(*offset) as usize;
                    format!(
                        "write of {} bytes at {offset}, there {:?}",
                        bytes.len(),
                        bytes.get(from..from + 8)
                    )
                }
                What::Zero { offset, len } if touches(*offset, *len) => {
                    format!("zeros, {len} bytes at {offset}")
                }
                What::Resize(len) => format!("resized to {len}"),
                _ => return None,
            };
            Some(format!("{} to {:?}, durable at {:?}: {what}", done.begun, done.ended, done.durable))
        })
        .collect()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// Makes of what file number `number` held before what it holds after a power cut at `time`.
    pub fn cut(
        &self,
        number: usize,
        time: u64,
        random: &mut Rng,
        target: &mut impl Target,
    ) -> io::Result<Lost> {
        let begun = self.done.iter().filter(|done| done.file as usize == number && done.begun <= time);
        let mut order: Vec<_> = begun.collect();
        // A log's times are where entries end: what has ended by `b.begun` was over before `b` began.
        let together = |a: &Done, b: &Done| a.ended.is_none_or(|ended| ended > b.begun);
        for at in 1..order.len() {
            if together(order[at - 1], order[at]) && random.bool() {
                order.swap(at - 1, at);
            }
        }
        let mut lost = Lost::default();
        // Sometimes nearly all is there, sometimes nearly nothing.
        let stays = random.f64();
        for done in order {
            if done.durable.is_some_and(|durable| durable <= time) {
                done.what.apply(target, None)?;
                continue;
            }
            if matches!(done.what, What::Sync | What::Nothing) {
                continue;
            }
            lost.uncertain += 1;
            if random.f64() >= stays {
                lost.missing += 1;
            } else if random.u8(0..4) == 0 {
                lost.torn += 1;
                done.what.apply(target, Some(random))?;
            } else {
                done.what.apply(target, None)?;
            }
        }
        Ok(lost)
    }

    /// Makes of what file number `number` held before what it holds when all is done that was begun.
    pub fn all(&self, number: usize, target: &mut impl Target) -> io::Result<()> {
        let mut of = self.done.iter().filter(|done| done.file as usize == number);
        of.try_for_each(|done| done.what.apply(target, None))
    }
}

impl What {
    /// Does it, or to some of its parts only.
    fn apply(&self, target: &mut impl Target, torn: Option<&mut Rng>) -> io::Result<()> {
        match (self, torn) {
            (What::Write { offset, bytes }, None) => target.write(*offset, bytes),
            (What::Write { offset, bytes }, Some(random)) => {
                let mut parts = parts(*offset, bytes.len() as u64, SECTOR).filter(|_| random.bool());
                parts.try_for_each(|(at, len)| {
                    let from = (at - offset) as usize;
                    target.write(at, &bytes[from..from + len as usize])
                })
            }
            (What::Zero { offset, len }, None) => target.zero(*offset, *len),
            (What::Zero { offset, len }, Some(random)) => {
                let mut parts = parts(*offset, *len, BLOCK).filter(|_| random.bool());
                parts.try_for_each(|(at, len)| target.zero(at, len))
            }
            (What::Resize(len), _) => target.resize(*len),
            (What::Sync | What::Nothing, _) => Ok(()),
        }
    }
}

/// The parts of a range that are each in one unit: where, and how long.
fn parts(offset: u64, len: u64, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let behind = move |at: u64| (at / unit + 1) * unit;
    let starts = std::iter::successors(Some(offset), move |&at| Some(behind(at)));
    starts.take_while(move |&at| at < end).map(move |at| (at, end.min(behind(at)) - at))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::fd::AsRawFd;

    use super::super::write_log::{Change, LogError, WriteLog};
    use super::*;

    fn write(sector: u64, bytes: &[u8]) -> Change<'_> {
        Change::Write { offset: sector * 512, bytes, durable: false }
    }

    /// The first bytes of sectors after many cuts at a time.
    fn found(writes: &Writes, time: u64) -> HashSet<Vec<u8>> {
        let cut = |seed| {
            let mut bytes = vec![0; 2048];
            writes.cut(0, time, &mut Rng::with_seed(seed), &mut bytes).unwrap();
            bytes.chunks(512).map(|sector| sector[0]).collect()
        };
        (0..1000).map(cut).collect()
    }

    #[test]
    fn what_is_flushed_stays_and_anything_may_become_of_the_rest() {
        let scene = tempfile::tempdir().unwrap();
        let (path, log_path) = (scene.path().join("disk"), scene.path().join("log"));
        std::fs::write(&path, [0; 2048]).unwrap();
        let file = File::open(&path).unwrap();
        let log = WriteLog::create(&log_path).unwrap();
        assert!(matches!(WriteLog::create(&log_path), Err(LogError::Exists(_))));
        let fd = file.as_raw_fd();
        assert_eq!(log.begin(fd, Change::Sync), 0, "it is not known yet");
        log.know(&file, &path).unwrap();
        log.know(&file, &path).unwrap();
        let time = || std::fs::metadata(&log_path).unwrap().len();
        let (a, b, c) = ([1; 1024], [2; 1024], [3; 512]);

        let first = log.begin(fd, write(0, &a));
        let under_way = time();
        log.end(first, 1024);
        let second = log.begin(fd, write(1, &b));
        // It has not ended when this begins.
        let sync = log.begin(fd, Change::Sync);
        log.end(second, 1024);
        let before_sync = time();
        log.end(sync, 0);
        let after_sync = time();
        let durable = log.begin(fd, Change::Write { offset: 1536, bytes: &c, durable: true });
        log.end(durable, 512);
        let after_durable = time();
        let zero = log.begin(fd, Change::Zero { offset: 0, len: 512 });
        log.end(zero, 0);
        let failed = log.begin(fd, Change::Sync);
        log.end(failed, -i64::from(libc::EIO));
        let impossible = log.begin(fd, Change::Zero { offset: 0, len: 2048 });
        log.end(impossible, -i64::from(libc::EOPNOTSUPP));
        drop(log);

        let writes = Writes::read(&log_path).unwrap();
        assert_eq!(writes.files(), [Touched { path, len: 2048 }]);
        assert_eq!(writes.len(), time());
        let states = |sets: &[[u8; 4]]| sets.iter().map(|s| s.to_vec()).collect::<HashSet<_>>();
        assert_eq!(found(&writes, 0), states(&[[0; 4]]));
        let any = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]];
        assert_eq!(found(&writes, under_way), states(&any));
        let both = found(&writes, before_sync);
        for state in [[0, 2, 2, 0], [1, 2, 2, 0], [1, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]] {
            assert!(both.iter().any(|one| one[..] == state[..]), "{state:?}");
        }
        let flushed = [[1, 1, 0, 0], [1, 2, 0, 0], [1, 1, 2, 0], [1, 2, 2, 0]];
        assert_eq!(found(&writes, after_sync), states(&flushed));
        assert_eq!(found(&writes, after_durable), states(&flushed.map(|[a, b, c, _]| [a, b, c, 3])));
        let both = flushed.into_iter().flat_map(|[a, b, c, _]| [[a, b, c, 3], [0, b, c, 3]]);
        assert_eq!(found(&writes, writes.len()), states(&both.collect::<Vec<_>>()), "a sync that failed");
        let mut all = vec![0; 2048];
        writes.all(0, &mut all).unwrap();
        assert_eq!(all.chunks(512).map(|s| s[0]).collect::<Vec<_>>(), [0, 2, 2, 3]);
    }

    #[test]
    fn what_was_under_way_together_is_in_any_order() {
        let scene = tempfile::tempdir().unwrap();
        let (path, log_path) = (scene.path().join("disk"), scene.path().join("log"));
        std::fs::write(&path, [0; 512]).unwrap();
        let file = File::open(&path).unwrap();
        let log = WriteLog::create(&log_path).unwrap();
        log.know(&file, &path).unwrap();
        let fd = file.as_raw_fd();
        let together = [log.begin(fd, write(0, &[1; 512])), log.begin(fd, write(0, &[2; 512]))];
        for id in together {
            log.end(id, 512);
        }
        let third = log.begin(fd, write(0, &[3; 512]));
        log.end(third, 512);
        let sync = log.begin(fd, Change::Sync);
        let time = std::fs::metadata(&log_path).unwrap().len();
        log.end(sync, 0);
        drop(log);
        let writes = Writes::read(&log_path).unwrap();
        let first = |time| found(&writes, time).into_iter().map(|sectors| sectors[0]).collect::<HashSet<_>>();
        assert_eq!(first(time), HashSet::from([0, 1, 2, 3]));
        assert_eq!(first(writes.len()), HashSet::from([3]));
    }

    #[test]
    fn what_is_no_log_is_refused() {
        let scene = tempfile::tempdir().unwrap();
        let path = scene.path().join("log");
        drop(WriteLog::create(&path).unwrap());
        assert!(!path.exists(), "a log of nothing");
        let entry =
            |kind: u32, id: u64| [&kind.to_le_bytes()[..], &[0; 4], &id.to_le_bytes(), &[0xff; 24]].concat();
        for bytes in [
            vec![],
            vec![b'x'; 100],
            [&MAGIC[..], &entry(9, 1)].concat(),
            [&MAGIC[..], &entry(7, 0)].concat(),
            [&MAGIC[..], &entry(7, 5)].concat(),
            [&MAGIC[..], &entry(2, 1)].concat(),
            [&MAGIC[..], &entry(6, 1)].concat(),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            assert!(Writes::read(&path).is_err(), "{bytes:?}");
        }
    }
}
