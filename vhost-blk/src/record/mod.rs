//! Captures: every request of a disk with its time, in a file.
//!
//! ```text
//! queue ─► tap ─► ring (one for each queue, drops when full) ─► writer thread ─► file
//! ```
//!
//! [`mod@format`] is the file's, [`ring`] takes notes from a reactor to the writer, [`tap`] is what the queue calls.

pub mod format;
pub mod ring;
pub mod tap;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use poll_engine::clock::Clock;
use poll_engine::confine::{self, Role};
use tracing::warn;

use self::format::{Header, Kind, MAX_56, RECORD_LEN, Record};
use self::ring::{CAPACITY, Note, NoteRing};
use self::tap::Tap;

/// How long the writer sleeps between two looks, while rings fill fast and while they do not. A record is in the
/// file's cache after at most the longer one.
const SHORT_PAUSE: Duration = Duration::from_millis(1);
const LONG_PAUSE: Duration = Duration::from_millis(20);
/// Bytes that are written at once.
const CHUNK: usize = 1 << 16;

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It would overwrite something.
    #[error("cannot record to {0}: it exists; remove it or name another file")]
    Exists(PathBuf),
    /// The system says no.
    #[error("cannot record to {0}: {1}")]
    Io(PathBuf, io::Error),
}

/// What reactors, writer and reports share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    rings: Vec<Arc<NoteRing>>,
    stop: AtomicBool,
    /// Requests in the file.
    written: AtomicU64,
    /// Requests that the file did not take.
    unwritten: AtomicU64,
    failed: AtomicBool,
}

/// A capture that is being written. Dropped, it is ended properly; nothing must be noted any more by then.
#[derive(Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    keep: AtomicBool,
}

impl Recorder {
    /// Makes the file, which must not exist, and starts the writer. The file goes away again unless
    /// [`keep`](Self::keep) is called: a start that fails leaves nothing in the way of the next.
    pub fn create(
        path: &Path,
        queues: u16,
        disk_size: u64,
        block_size: u32,
    ) -> Result<Recorder, RecordError> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists => RecordError::Exists(path.into()),
            _ => RecordError::Io(path.into(), e),
        };
        let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
        let shared = Arc::new(Shared {
            path: path.into(),
            rings: std::iter::repeat_with(Arc::default).take(queues.into()).collect(),
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            unwritten: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        });
        let mut recorder =
            Recorder { shared: Arc::clone(&shared), writer: None, keep: AtomicBool::new(false) };
        let clock = Clock::new();
        let zero = clock.raw();
        let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        file.write_all(&Header { queues, disk_size, block_size, start }.to_bytes()).map_err(failed)?;
        let good = format::HEADER_LEN as u64;
        let told_lost = vec![0; queues.into()];
        let writer = Writer { shared, file, good, clock, zero, told_lost, out: Vec::with_capacity(CHUNK) };
        let thread = std::thread::Builder::new().name("record".into());
        recorder.writer = Some(confine::spawn(thread, Role::Writer, move || writer.run()).map_err(failed)?);
        Ok(recorder)
    }

    /// The file is to stay.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    /// What queue `index` notes its requests to; one at a time.
    pub fn tap(&self, index: u16) -> Option<Tap> {
        self.shared.rings.get(usize::from(index)).map(|ring| Tap::new(Arc::clone(ring)))
    }

    /// A line for the report.
    pub fn line(&self) -> String {
        let shared = &self.shared;
        let lost = shared.rings.iter().map(|r| r.lost()).sum::<u64>();
        format!(
            "record {}: {} written, {} lost{}",
            shared.path.display(),
            shared.written.load(Ordering::Relaxed),
            lost + shared.unwritten.load(Ordering::Relaxed),
            if shared.failed.load(Ordering::Relaxed) { ", the file takes no more" } else { "" },
        )
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(writer) = self.writer.take() {
            writer.thread().unpark();
            // A panic would have ended the process.
            let _ = writer.join();
        }
        if !self.keep.load(Ordering::Relaxed) {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(&self.shared.path);
        }
    }
}

/// The writer thread's.
struct Writer {
    shared: Arc<Shared>,
    file: File,
    /// Bytes of the file that are whole records.
    good: u64,
    clock: Clock,
    /// The clock's reading at time 0.
    zero: u64,
    /// Lost notes of each queue that the file tells of.
    told_lost: Vec<u64>,
    out: Vec<u8>,
}

impl Writer {
    fn run(mut self) {
        let mut pause = LONG_PAUSE;
        loop {
            let stopping = self.shared.stop.load(Ordering::Acquire);
            let most = self.pass();
            if stopping {
                let time = self.now();
                let end =
                    Record { time, queue: 0, kind: Kind::End, status: 0, sector: 0, len: 0, latency: 0 };
                self.put(end);
                self.flush();
                return;
            }
            pause = if most > CAPACITY / 8 { SHORT_PAUSE } else { (pause * 2).min(LONG_PAUSE) };
            std::thread::park_timeout(pause);
        }
    }

    /// Takes over what is in the rings; how much it was in the fullest.
    fn pass(&mut self) -> u64 {
        let shared = Arc::clone(&self.shared);
        let mut most = 0;
        for (queue, ring) in shared.rings.iter().enumerate() {
            // Before draining: what is lost later belongs behind what is drained now.
            let lost = ring.lost();
            most = most.max(ring.drain(|note| {
                let record = self.convert(queue as u8, note);
                self.put(record);
            }));
            let more = lost - std::mem::replace(&mut self.told_lost[queue], lost);
            if more > 0 {
                let (time, queue) = (self.now(), queue as u8);
                self.put(Record {
                    time,
                    queue,
                    kind: Kind::Lost,
                    status: 0,
                    sector: more,
                    len: 0,
                    latency: 0,
                });
            }
        }
        self.flush();
        most
    }

    fn now(&self) -> u64 {
        self.clock.delta_as_nanos(self.zero, self.clock.raw())
    }

    fn convert(&self, queue: u8, note: Note) -> Record {
        let what = (note.what >> 56) as u8;
        let latency = self.clock.delta_as_nanos(note.since, note.until);
        Record {
            time: self.clock.delta_as_nanos(self.zero, note.since),
            queue,
            // Packed by our own tap.
            kind: Kind::from_number(what & 15).unwrap_or(Kind::Other),
            status: what >> 4,
            sector: note.what & MAX_56,
            len: note.len,
            latency: u32::try_from(latency).unwrap_or(u32::MAX),
        }
    }

    fn put(&mut self, record: Record) {
        self.out.extend_from_slice(&record.to_bytes());
        if self.out.len() + RECORD_LEN > CHUNK {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.out.is_empty() {
            return;
        }
        let is_request =
            |r: &[u8]| !matches!(Kind::from_number(r[15] & 15), Some(Kind::Lost | Kind::Range | Kind::End));
        let requests = self.out.chunks_exact(RECORD_LEN).filter(|r| is_request(r)).count() as u64;
        let failed = self.shared.failed.load(Ordering::Relaxed);
        match if failed { Ok(false) } else { self.file.write_all(&self.out).map(|()| true) } {
            Ok(true) => {
                self.good += self.out.len() as u64;
                self.shared.written.fetch_add(requests, Ordering::Relaxed);
            }
            Ok(false) => {
                self.shared.unwritten.fetch_add(requests, Ordering::Relaxed);
            }
            Err(e) => {
                warn!("recording to {} has stopped: {e}", self.shared.path.display());
                self.shared.failed.store(true, Ordering::Relaxed);
                self.shared.unwritten.fetch_add(requests, Ordering::Relaxed);
                // Without the torn record at its end the file is sound; with it, it is still readable.
                let _ = self.file.set_len(self.good);
            }
        }
        self.out.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::format::HEADER_LEN;
    use super::ring::Producer;
    use super::*;

    fn note(recorder: &Recorder, queue: usize, notes: u64) {
        let ring = &recorder.shared.rings[queue];
        let mut producer = Producer::new(ring);
        let now = Clock::new().raw();
        for i in 0..notes {
            if producer.reserve(ring, 1) {
                producer.put(ring, now, i | u64::from(Kind::Write as u8) << 56, 512);
            }
        }
        producer.show(ring, now);
    }

    fn records(path: &Path) -> Vec<Record> {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(Header::from_bytes(&bytes).unwrap().queues, 2);
        let (whole, rest) = bytes[HEADER_LEN..].as_chunks::<RECORD_LEN>();
        assert!(rest.is_empty());
        whole.iter().map(|r| Record::from_bytes(r).unwrap()).collect()
    }

    #[test]
    fn what_was_noted_is_in_the_file_and_so_is_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let recorder = Recorder::create(&path, 2, 1 << 20, 512).unwrap();
        recorder.keep();
        note(&recorder, 1, 1000);
        drop(recorder);
        let all = records(&path);
        assert_eq!(all.len(), 1001);
        assert!(all[..1000].iter().zip(0..).all(|(r, i)| (r.queue, r.sector, r.len) == (1, i, 512)));
        assert_eq!(all[1000].kind, Kind::End);
        assert!(all[1000].time >= all[999].time);
    }

    #[test]
    fn what_was_lost_is_counted_in_file_and_report() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let recorder = Recorder::create(&path, 2, 1 << 20, 512).unwrap();
        recorder.keep();
        // More than can be drained meanwhile.
        note(&recorder, 0, CAPACITY * 3);
        let lost = recorder.shared.rings[0].lost();
        assert!(lost > 0, "nothing was lost");
        assert!(recorder.line().ends_with(&format!(" written, {lost} lost")), "{}", recorder.line());
        drop(recorder);
        let all = records(&path);
        let told: u64 = all.iter().filter(|r| r.kind == Kind::Lost).map(|r| r.sector).sum();
        assert_eq!(told, lost);
        assert_eq!(all.iter().filter(|r| r.kind == Kind::Write).count() as u64 + lost, CAPACITY * 3);
    }

    #[test]
    fn nothing_is_overwritten_and_a_failed_start_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let recorder = Recorder::create(&path, 2, 1 << 20, 512).unwrap();
        let error = Recorder::create(&path, 2, 1 << 20, 512).unwrap_err();
        assert!(error.to_string().ends_with("it exists; remove it or name another file"), "{error}");
        drop(recorder);
        assert!(!path.exists());
    }
}
