//! Live captures of ports in pcapng, for Wireshark, tshark and tcpdump (draft-ietf-opsawg-pcapng).
//!
//! ```text
//! queue ─► probe: filter, at most snaplen bytes ─► words (one ring for each probe, drops when full) ─► writer thread ─► file
//! ```
//!
//! A queue of a tap has a probe; a hub has one on each reactor, for all of its ports.
//!
//! A frame is as it crosses the port: one that is still to be cut into segments is there in one piece, and one whose
//! checksum is partial has that. Flags and a comment of the record say so. Directions are the guest's: outbound is what it
//! transmits; at a switch's uplink outbound is what comes in from there.

pub mod filter;

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, PcapError};
use poll_engine::clock::Clock;
use poll_engine::confine::{self, Role};
use poll_engine::words::{Producer, WordRing, Words};
use tracing::warn;

use self::filter::Filter;
use crate::header::{F_DATA_VALID, F_NEEDS_CSUM, GSO_NONE, HEADER, VnetHdr};
use crate::packet::{LARGEST, PEEK, Packet};

/// Bytes of each frame that are kept if nothing is said: all of it.
pub const SNAPLEN: u32 = 262_144;
/// Words of a ring: a megabyte.
const CAPACITY: u64 = 1 << 17;
/// Words of a record before the frame's bytes.
const RECORD: u64 = 5;
/// How long the writer sleeps between two looks, while rings fill fast and while they do not.
const SHORT_PAUSE: Duration = Duration::from_millis(1);
const LONG_PAUSE: Duration = Duration::from_millis(20);

/// Which way a frame goes, from the guest's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Inbound,
    /// From the guest.
    Outbound,
}

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// It would overwrite something.
    #[error("cannot capture to {0}: it exists; remove it or name another file")]
    Exists(PathBuf),
    /// The system says no.
    #[error("cannot capture to {0}: {1}")]
    Io(PathBuf, io::Error),
}

/// What of which frames is kept.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// Bytes of each frame, at most.
    pub snaplen: u32,
    /// Which frames.
    pub filter: Filter,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        CaptureConfig { snaplen: SNAPLEN, filter: Filter::default() }
    }
}

/// The ring of one probe.
#[derive(Debug)]
struct Ring {
    words: WordRing,
}

/// What probes, writer and reports share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    config: CaptureConfig,
    /// Names of ports that have come since, of which the file does not know yet; and how many ports there are.
    fresh: Mutex<(Vec<String>, u32)>,
    /// Those that the writer empties. One whose probe is gone goes after that.
    rings: Mutex<Vec<Arc<Ring>>>,
    stop: AtomicBool,
    written: AtomicU64,
    /// Frames that rings had no room for, or that the file did not take.
    lost: AtomicU64,
    failed: AtomicBool,
}

impl Shared {
    fn rings(&self) -> MutexGuard<'_, Vec<Arc<Ring>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A capture that is being written. Dropped, it is ended properly.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    keep: AtomicBool,
}

impl Capture {
    /// Makes the file, which must not exist, and starts the writer; `interfaces` are the names of the ports. The file goes
    /// away again unless [`keep`](Self::keep) is called: a start that fails leaves nothing in the way of the next.
    pub fn create(path: &Path, interfaces: &[&str], config: CaptureConfig) -> Result<Capture, CaptureError> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists => CaptureError::Exists(path.into()),
            _ => CaptureError::Io(path.into(), e),
        };
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
        let shared = Arc::new(Shared {
            path: path.into(),
            config,
            fresh: Mutex::new((Vec::new(), interfaces.len() as u32)),
            rings: Mutex::default(),
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        });
        let mut capture = Capture { shared: Arc::clone(&shared), writer: None, keep: AtomicBool::new(false) };
        let out = begin(file, interfaces, shared.config.snaplen).map_err(|e| failed(io_error(e)))?;
        let clock = Clock::new();
        let zero = clock.raw();
        let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let writer = Writer { shared, out, clock, zero, start, pending: Vec::new(), told_lost: Vec::new() };
        let thread = std::thread::Builder::new().name("pcap".into());
        let writer = confine::spawn(thread, Role::Writer, move || writer.run());
        capture.writer = Some(writer.map_err(failed)?);
        Ok(capture)
    }

    /// The file is to stay.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    /// What one thread notes frames by: those of the port number `interface`, or of [others](Probe::note_of).
    pub fn probe(&self, interface: u32) -> Probe {
        let ring = Arc::new(Ring { words: WordRing::new(CAPACITY) });
        self.shared.rings().push(Arc::clone(&ring));
        let room = (self.shared.config.snaplen as usize).clamp(PEEK, LARGEST);
        Probe {
            producer: Producer::new(&ring.words),
            ring,
            interface,
            shared: Arc::clone(&self.shared),
            clock: Clock::new(),
            buffer: vec![0; room].into(),
        }
    }

    /// A port has come: its number, by which frames of it are noted from now on.
    pub fn add(&self, name: &str) -> u32 {
        let (fresh, count) = &mut *self.shared.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.push(name.to_owned());
        *count += 1;
        *count - 1
    }

    /// Its file, frames that are in it, and frames that are not, because there was no room or the file took no more.
    pub fn counts(&self) -> (PathBuf, u64, u64) {
        let shared = &self.shared;
        let unread: u64 = shared.rings().iter().map(|ring| ring.words.lost.get()).sum();
        let lost = unread + shared.lost.load(Ordering::Relaxed);
        (shared.path.clone(), shared.written.load(Ordering::Relaxed), lost)
    }

    /// A line for the report.
    pub fn line(&self) -> String {
        let (path, written, lost) = self.counts();
        format!(
            "pcap {}: {written} written, {lost} lost{}",
            path.display(),
            if self.shared.failed.load(Ordering::Relaxed) { ", the file takes no more" } else { "" },
        )
    }
}

impl Drop for Capture {
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

/// The reactor's side of a capture. No allocation, lock or system call.
#[derive(Debug)]
pub struct Probe {
    ring: Arc<Ring>,
    interface: u32,
    producer: Producer,
    shared: Arc<Shared>,
    clock: Clock,
    buffer: Box<[u8]>,
}

impl Probe {
    /// Notes a frame of `len` bytes with its header; `read` copies bytes of it, from an offset on, and says how many.
    pub fn note(
        &mut self,
        direction: Direction,
        header: &VnetHdr,
        len: usize,
        read: impl Fn(usize, &mut [u8]) -> usize,
    ) {
        self.note_of(self.interface, direction, header, len, read);
    }

    /// The same, of the port with this number.
    pub fn note_of(
        &mut self,
        interface: u32,
        direction: Direction,
        header: &VnetHdr,
        len: usize,
        read: impl Fn(usize, &mut [u8]) -> usize,
    ) {
        let config = &self.shared.config;
        let kept = len.min(config.snaplen as usize).min(self.buffer.len());
        let mut head = 0;
        if !config.filter.is_all() {
            head = read(0, &mut self.buffer[..len.min(PEEK)]);
            match Packet::parse(&self.buffer[..head], len) {
                Ok(packet) if config.filter.matches(&packet) => {}
                _ => return,
            }
        }
        if kept > head {
            head += read(head, &mut self.buffer[head..kept]);
        }
        let data = &self.buffer[..kept.min(head)];
        let words = &self.ring.words;
        let size = RECORD + (data.len() as u64).div_ceil(8);
        if !self.producer.reserve(words, size) {
            return;
        }
        let outbound = u64::from(direction == Direction::Outbound);
        let mut fields = [0; 16];
        fields[..HEADER].copy_from_slice(&header.to_bytes());
        let (one, two) = fields.split_at(8);
        self.producer.put(words, data.len() as u64 | outbound << 32 | u64::from(interface) << 33);
        self.producer.put(words, len as u64);
        self.producer.put(words, self.clock.raw());
        self.producer.put(words, word(one));
        self.producer.put(words, word(two));
        data.chunks(8).for_each(|chunk| self.producer.put(words, word(chunk)));
        self.producer.show(words);
    }
}

/// Up to eight bytes as a word.
#[inline]
fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or_else(
        || {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(whole)
        },
        |whole| u64::from_le_bytes(*whole),
    )
}

/// A frame out of a ring.
struct Record {
    time: u64,
    interface: u32,
    outbound: bool,
    header: VnetHdr,
    len: u32,
    data: Vec<u8>,
    /// How many before it were lost.
    lost: u64,
}

impl Record {
    /// The next whole one.
    fn next(words: &mut Words<'_>) -> Option<Record> {
        let [what, len, time] = [words.next()?, words.next()?, words.next()?];
        let header = [words.next()?.to_le_bytes(), words.next()?.to_le_bytes()].concat();
        let kept = what as u32 as usize;
        let mut data: Vec<u8> = words.by_ref().take(kept.div_ceil(8)).flat_map(u64::to_le_bytes).collect();
        data.truncate(kept);
        let header = VnetHdr::from_bytes(header.first_chunk()?);
        let (interface, outbound) = ((what >> 33) as u32, what >> 32 & 1 != 0);
        Some(Record { time, interface, outbound, header, len: len as u32, data, lost: 0 })
    }

    /// `epb_flags`: direction in bits 0 and 1, then 9: checksum not ready, 10: checksum valid, 11: to be segmented.
    fn flags(&self) -> u32 {
        let VnetHdr { flags, gso_type, .. } = self.header;
        let bit = |is: bool, at: u32| u32::from(is) << at;
        (if self.outbound { 2 } else { 1 })
            | bit(flags & F_NEEDS_CSUM != 0, 9)
            | bit(flags & F_DATA_VALID != 0, 10)
            | bit(gso_type != GSO_NONE, 11)
    }

    /// What is left to be done, in words.
    fn comment(&self) -> Option<String> {
        let VnetHdr { flags, gso_type, gso_size, csum_start, csum_offset, .. } = self.header;
        let mut parts = Vec::new();
        if flags & F_NEEDS_CSUM != 0 {
            let at = u32::from(csum_start) + u32::from(csum_offset);
            parts.push(format!("partial checksum at {at}, from {csum_start} on"));
        }
        if gso_type != GSO_NONE {
            let kind = match gso_type & 0x7f {
                1 => "TCP over IPv4",
                4 => "TCP over IPv6",
                5 => "UDP",
                3 => "UDP, in fragments",
                _ => "unknown",
            };
            let ecn = if gso_type & 0x80 == 0 { "" } else { " with ECN" };
            parts.push(format!("to be cut into segments of {gso_size} bytes ({kind}{ecn})"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    fn block(&self, timestamp: Duration) -> EnhancedPacketBlock<'_> {
        let mut options = vec![EnhancedPacketOption::Flags(self.flags())];
        options.extend(self.comment().map(|text| EnhancedPacketOption::Comment(Cow::Owned(text))));
        if self.lost > 0 {
            options.push(EnhancedPacketOption::DropCount(self.lost));
        }
        EnhancedPacketBlock {
            interface_id: self.interface,
            timestamp,
            original_len: self.len,
            data: Cow::Borrowed(&self.data),
            options,
        }
    }
}

type Out = PcapNgWriter<BufWriter<File>>;

/// The section header, and a block for each interface.
fn begin(file: File, interfaces: &[&str], snaplen: u32) -> Result<Out, PcapError> {
    let program = format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
    let section = SectionHeaderBlock {
        options: vec![SectionHeaderOption::UserApplication(Cow::Owned(program))],
        ..SectionHeaderBlock::default()
    };
    let mut out = PcapNgWriter::with_section_header(BufWriter::new(file), section)?;
    interfaces.iter().try_for_each(|name| describe(&mut out, name, snaplen))?;
    out.get_mut().flush().map_err(PcapError::IoError)?;
    Ok(out)
}

fn describe(out: &mut Out, name: &str, snaplen: u32) -> Result<(), PcapError> {
    let options = vec![
        InterfaceDescriptionOption::IfName(Cow::Owned(name.to_owned())),
        // Nanoseconds.
        InterfaceDescriptionOption::IfTsResol(9),
    ];
    let block = InterfaceDescriptionBlock { linktype: DataLink::ETHERNET, snaplen, options };
    out.write_pcapng_block(block).map(drop)
}

fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(e) => e,
        other => io::Error::other(other),
    }
}

/// The writer thread's.
struct Writer {
    shared: Arc<Shared>,
    out: Out,
    clock: Clock,
    /// The clock's reading at `start`.
    zero: u64,
    start: Duration,
    pending: Vec<Record>,
    /// Lost frames of each ring that the file tells of, in the order of the rings.
    told_lost: Vec<u64>,
}

impl Writer {
    fn run(mut self) {
        let mut pause = LONG_PAUSE;
        loop {
            let stopping = self.shared.stop.load(Ordering::Acquire);
            let most = self.pass();
            if stopping {
                return;
            }
            pause = if most > CAPACITY / 8 { SHORT_PAUSE } else { (pause * 2).min(LONG_PAUSE) };
            std::thread::park_timeout(pause);
        }
    }

    /// Writes what is in the rings; how much it was in the fullest.
    fn pass(&mut self) -> u64 {
        let rings = self.shared.rings().clone();
        self.told_lost.resize(rings.len(), 0);
        let mut most = 0;
        for (ring, told) in rings.iter().zip(&mut self.told_lost) {
            // Before draining: what is lost later belongs behind what is drained now.
            let lost = ring.words.lost.get();
            let first = self.pending.len();
            most = most.max(ring.words.drain(|words| {
                while let Some(record) = Record::next(words) {
                    self.pending.push(record);
                }
            }));
            if let Some(record) = self.pending.get_mut(first) {
                record.lost = lost - std::mem::replace(told, lost);
            }
        }
        // Rings of different queues tell of the same time.
        self.pending.sort_by_key(|record| record.time);
        self.write();
        drop(rings);
        self.forget();
        most
    }

    fn write(&mut self) {
        let Writer { shared, out, clock, zero, start, pending, .. } = self;
        let count = pending.len() as u64;
        if count == 0 {
            return;
        }
        // After draining: whatever was drained is of ports that are here by now, or were before.
        let fresh = std::mem::take(&mut shared.fresh.lock().unwrap_or_else(PoisonError::into_inner).0);
        let mut write = || -> Result<(), PcapError> {
            fresh.iter().try_for_each(|name| describe(out, name, shared.config.snaplen))?;
            for record in &*pending {
                // One noted before the capture had begun is of its beginning.
                let since = Duration::from_nanos(clock.delta_as_nanos(*zero, record.time.max(*zero)));
                out.write_pcapng_block(record.block(*start + since))?;
            }
            out.get_mut().flush().map_err(PcapError::IoError)
        };
        let is_written = !shared.failed.load(Ordering::Relaxed)
            && match write() {
                Ok(()) => true,
                Err(e) => {
                    warn!("capturing to {} has stopped: {}", shared.path.display(), io_error(e));
                    shared.failed.store(true, Ordering::Relaxed);
                    false
                }
            };
        let counter = if is_written { &shared.written } else { &shared.lost };
        counter.fetch_add(count, Ordering::Relaxed);
        pending.clear();
    }

    /// Lets rings go whose probes are gone and that are empty: nobody puts anything into them any more.
    fn forget(&mut self) {
        let mut rings = self.shared.rings();
        let mut at = 0;
        while at < rings.len() {
            // The probe's is the other one.
            if at < self.told_lost.len() && Arc::strong_count(&rings[at]) == 1 {
                let mut left = false;
                rings[at].words.drain(|words| {
                    while let Some(record) = Record::next(words) {
                        left = true;
                        self.pending.push(record);
                    }
                });
                if !left {
                    self.shared.lost.fetch_add(rings[at].words.lost.get(), Ordering::Relaxed);
                    rings.remove(at);
                    self.told_lost.remove(at);
                    continue;
                }
            }
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcapng::{Block, PcapNgReader};

    fn frame(seed: u8, len: usize) -> Vec<u8> {
        (0..len).map(|i| seed.wrapping_add(i as u8)).collect()
    }

    fn note(probe: &mut Probe, direction: Direction, header: &VnetHdr, frame: &[u8]) {
        probe.note(direction, header, frame.len(), |at, into| {
            let n = into.len().min(frame.len() - at);
            into[..n].copy_from_slice(&frame[at..at + n]);
            n
        });
    }

    /// Interface, flags, comment, lost before, length and bytes of each frame in a file.
    type Seen = (u32, u32, Option<String>, u64, u32, Vec<u8>);

    fn read(path: &Path) -> (Vec<String>, Vec<Seen>) {
        let mut reader = PcapNgReader::new(File::open(path).unwrap()).unwrap();
        let (mut names, mut seen, mut last) = (Vec::new(), Vec::new(), Duration::ZERO);
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::InterfaceDescription(interface) => {
                    let name = interface.options.iter().find_map(|o| match o {
                        InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
                        _ => None,
                    });
                    names.extend(name);
                }
                Block::EnhancedPacket(packet) => {
                    let (mut flags, mut comment, mut lost) = (0, None, 0);
                    for option in &packet.options {
                        match option {
                            EnhancedPacketOption::Flags(f) => flags = *f,
                            EnhancedPacketOption::Comment(text) => comment = Some(text.to_string()),
                            EnhancedPacketOption::DropCount(n) => lost = *n,
                            _ => {}
                        }
                    }
                    assert!(packet.timestamp >= last, "out of order");
                    last = packet.timestamp;
                    let bytes = packet.data.to_vec();
                    seen.push((packet.interface_id, flags, comment, lost, packet.original_len, bytes));
                }
                _ => {}
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(seen.is_empty() || now < last + Duration::from_secs(60), "{last:?} is not {now:?}");
        (names, seen)
    }

    #[test]
    fn frames_are_in_the_file_with_what_is_left_to_be_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let config = CaptureConfig { snaplen: 100, ..CaptureConfig::default() };
        let capture = Capture::create(&path, &["web", "db"], config).unwrap();
        capture.keep();
        let (mut web, mut db) = (capture.probe(0), capture.probe(1));
        let plain = VnetHdr::default();
        let tso = VnetHdr { flags: 1, gso_type: 1, gso_size: 1448, csum_start: 34, csum_offset: 16, ..plain };
        note(&mut web, Direction::Outbound, &tso, &frame(1, 60_000));
        note(&mut db, Direction::Inbound, &VnetHdr { flags: 2, ..plain }, &frame(2, 60));
        note(&mut web, Direction::Inbound, &plain, &frame(3, 101));
        drop(web);
        drop(db);
        while !capture.line().ends_with(": 3 written, 0 lost") {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Probes that are gone leave nothing behind.
        while !capture.shared.rings().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(capture);
        let (names, seen) = read(&path);
        assert_eq!(names, ["web", "db"]);
        let comment =
            "partial checksum at 50, from 34 on; to be cut into segments of 1448 bytes (TCP over IPv4)";
        assert_eq!(
            seen,
            [
                (0, 0xa02, Some(comment.into()), 0, 60_000, frame(1, 100)),
                (1, 0x401, None, 0, 60, frame(2, 60)),
                (0, 1, None, 0, 101, frame(3, 100)),
            ]
        );
    }

    #[test]
    fn the_filter_is_asked_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let filter = "ether host 07:08:09:0a:0b:0c".parse().unwrap();
        let capture = Capture::create(&path, &["p"], CaptureConfig { snaplen: 14, filter }).unwrap();
        capture.keep();
        let mut probe = capture.probe(0);
        for seed in 0..10 {
            note(&mut probe, Direction::Inbound, &VnetHdr::default(), &frame(seed, 300));
        }
        // No frame at all is none of these.
        note(&mut probe, Direction::Inbound, &VnetHdr::default(), &[]);
        drop(capture);
        let (_, seen) = read(&path);
        // As source, and as destination.
        let bytes: Vec<_> = seen.into_iter().map(|s| s.5).collect();
        assert_eq!(bytes, [frame(1, 14), frame(7, 14)]);
    }

    #[test]
    fn what_there_is_no_room_for_is_counted_where_it_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let capture = Capture::create(&path, &["p"], CaptureConfig::default()).unwrap();
        capture.keep();
        let mut probe = capture.probe(0);
        // More than a ring can hold, faster than any file.
        for n in 0..200 {
            note(&mut probe, Direction::Inbound, &VnetHdr::default(), &frame(n as u8, 65_000));
        }
        let lost = probe.ring.words.lost.get();
        assert!(lost > 0, "nothing was lost");
        while !capture.line().ends_with(&format!(" {} written, {lost} lost", 200 - lost)) {
            std::thread::sleep(Duration::from_millis(1));
        }
        note(&mut probe, Direction::Inbound, &VnetHdr::default(), &frame(9, 60));
        drop(capture);
        let (_, seen) = read(&path);
        assert_eq!(seen.len() as u64 + lost, 201);
        assert_eq!(seen.iter().map(|s| s.3).sum::<u64>(), lost);
    }

    #[test]
    fn nothing_is_overwritten_and_a_failed_start_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let capture = Capture::create(&path, &["p"], CaptureConfig::default()).unwrap();
        let error = Capture::create(&path, &["p"], CaptureConfig::default()).unwrap_err();
        assert!(error.to_string().ends_with("it exists; remove it or name another file"), "{error}");
        drop(capture);
        assert!(!path.exists());
    }
}
