//! The threads of an image that do what waits: find clusters, allocate them, copy them on write, decompress them.
//!
//! One of them changes the image, a batch of errands at a time: what they change is written to the file once, and then
//! they are answered. The others read meanwhile, but not while something is changed.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use imago::{FormatAccess, Mapping};
use poll_engine::confine::{self, Role};
use tracing::{debug, warn};

use super::allocate::{Ahead, Batch};
use super::errand::{Answer, Errand, IN_PLACE, Inbox, WANTS_DATA, What};
use super::file::ImageFile;
use super::table::{CHUNK, Entry};
use super::{Shared, Way};
use crate::backend::bounce::Bounce;

/// Threads that read.
const READERS: usize = 2;
/// Most errands of a batch.
const MAX_BATCH: usize = 64;
/// Zeros that are written at a time where nothing else does.
const ZEROS: u64 = 64 << 10;

/// Most clusters that are looked up when one of them is asked for: those of an L2 table.
const MAX_LEARNT: u64 = 8192;

type Access = FormatAccess<ImageFile>;
type Job = (Errand, Arc<Inbox>);

/// The threads.
#[derive(Debug)]
pub struct Workers {
    reads: Option<Sender<Job>>,
    changes: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    image: Arc<Image>,
}

/// The image, as they have it.
#[derive(Debug)]
pub(super) struct Image {
    /// Taken to read while the image is read, and to write while it is changed.
    pub(super) access: RwLock<Option<Access>>,
    pub(super) shared: Arc<Shared>,
}

impl Workers {
    /// Starts them.
    pub fn start(access: Access, shared: Arc<Shared>) -> io::Result<Workers> {
        let image = Arc::new(Image { access: RwLock::new(Some(access)), shared });
        let (reads, to_read) = unbounded();
        let (changes, to_change) = unbounded();
        let mut workers = Workers {
            reads: Some(reads),
            changes: Some(changes),
            threads: Vec::new(),
            image: Arc::clone(&image),
        };
        for _ in 0..READERS {
            let (image, jobs) = (Arc::clone(&image), Receiver::clone(&to_read));
            workers.spawn("image-read", move || jobs.iter().for_each(|job| image.read(job)))?;
        }
        workers.spawn("image-write", move || image.change_all(&to_change))?;
        Ok(workers)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let builder = std::thread::Builder::new().name(name.into());
        self.threads.push(confine::spawn(builder, Role::Worker, run)?);
        Ok(())
    }

    /// The image, for a thread that is none of them.
    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    /// Has an errand run; the answer goes to `inbox`.
    pub fn send(&self, errand: Errand, inbox: &Arc<Inbox>) {
        let to = if matches!(errand.what, What::Read(_)) { &self.reads } else { &self.changes };
        let sent = to.as_ref().is_some_and(|to| to.send((errand, Arc::clone(inbox))).is_ok());
        assert!(sent, "workers outlive the queues of their image");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        (self.reads, self.changes) = (None, None);
        for thread in self.threads.drain(..) {
            // Its panics were caught and told.
            let _ = thread.join();
        }
        let access = self.image.access.write().unwrap_or_else(PoisonError::into_inner).take();
        if self.image.shared.broken.load(Ordering::Relaxed) {
            // It would write what it has left to write, in whatever state that is.
            std::mem::forget(access);
        }
    }
}

/// What is wrong with an image that nothing is to be done with any more.
fn broken() -> io::Error {
    io::Error::other("an earlier request has failed half-way; restart the daemon after qemu-img check")
}

impl Image {
    /// Does something with the image, which may fail in any way.
    pub(super) fn guarded<T>(&self, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.shared.broken.load(Ordering::Relaxed) {
            return Err(broken());
        }
        catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
            self.shared.broken.store(true, Ordering::Relaxed);
            Err(broken())
        })
    }

    fn answer(&self, (errand, inbox): Job, outcome: &io::Result<()>) {
        let result = match outcome {
            Ok(()) if matches!(errand.what, What::MakeRoom) => {
                if self.is_in_place(errand.offset) {
                    IN_PLACE
                } else {
                    WANTS_DATA
                }
            }
            Ok(()) => errand.len as i32,
            Err(e) => {
                if !self.shared.told.swap(true, Ordering::Relaxed) {
                    let (path, Errand { what, offset, len, .. }) = (self.shared.files[0].path(), &errand);
                    let path = path.display();
                    warn!("{path}: {what:?} of {len} bytes at {offset}: {e} (further ones are only counted)");
                }
                -e.raw_os_error().unwrap_or(libc::EIO)
            }
        };
        inbox.put(Answer { tag: errand.tag, result, buffer: errand.what.into_buffer() });
    }

    /// Whether reactors may write to a byte themselves.
    fn is_in_place(&self, offset: u64) -> bool {
        let way = self.shared.way(crate::disk::Access::Write, offset >> self.shared.cluster_bits);
        matches!(way, Way::File(..))
    }

    fn read(&self, (mut errand, inbox): Job) {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        let Errand { offset, len, .. } = errand;
        let outcome = match (&*access, &mut errand.what) {
            (Some(access), What::Read(buffer)) => self.guarded(|| {
                self.learn(access, offset)?;
                access.read(&mut buffer.bytes_mut()[..len as usize], offset)
            }),
            _ => Err(broken()),
        };
        drop(access);
        self.answer((errand, inbox), &outcome);
    }

    fn change_all(&self, jobs: &Receiver<Job>) {
        let mut ahead = Ahead::default();
        while let Ok(first) = jobs.recv() {
            let mut batch = vec![first];
            batch.extend(jobs.try_iter().take(MAX_BATCH - 1));
            let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
            let outcomes = match &*access {
                Some(access) => self.change(access, &batch, &mut ahead),
                None => batch.iter().map(|_| Err(broken())).collect(),
            };
            drop(access);
            for (job, outcome) in batch.into_iter().zip(outcomes) {
                self.answer(job, &outcome);
            }
            if let Some(next) = ahead.take_next(self.shared.size()) {
                self.go_ahead(next, &mut ahead);
            }
        }
    }

    /// Makes room where nobody waits for it yet.
    fn go_ahead(&self, at: u64, ahead: &mut Ahead) {
        let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let Some(access) = &*access else { return };
        let mut batch = Batch::default();
        let made = self.guarded(|| {
            let (mapping, _) = access.get_mapping(at, 1)?;
            if !matches!(mapping, Mapping::Zero { .. }) {
                return Ok(());
            }
            self.make_room(access, at..at + 1, ahead, &mut batch)?;
            self.write_out(access, false, &batch)
        });
        // Whoever wants to write there will be told.
        made.unwrap_or_else(|e| debug!("{}: no room ahead: {e}", self.shared.files[0].path().display()));
        ahead.take_next(0);
    }

    /// Runs a batch of errands. All that they have changed is in the file when this returns.
    fn change(&self, access: &Access, jobs: &[Job], ahead: &mut Ahead) -> Vec<io::Result<()>> {
        // Before anything changes: what is entered in the table is in the file already.
        let mut outcomes: Vec<_> =
            jobs.iter().map(|(errand, _)| self.guarded(|| self.learn(access, errand.offset))).collect();
        let is_there =
            |errand: &Errand| matches!(errand.what, What::MakeRoom) && self.is_in_place(errand.offset);
        if jobs.iter().all(|(errand, _)| is_there(errand)) {
            return outcomes;
        }
        let mut durable = false;
        let mut batch = Batch::default();
        for ((errand, _), outcome) in jobs.iter().zip(&mut outcomes).filter(|(_, o)| o.is_ok()) {
            durable |= matches!(errand.what, What::Write { durable: true, .. });
            *outcome = self.guarded(|| self.one(access, errand, ahead, &mut batch));
        }
        let written = self.guarded(|| {
            self.write_out(access, durable, &batch)?;
            for (errand, _) in jobs.iter().filter(|(e, _)| !matches!(e.what, What::Discard)) {
                self.note(access, errand.offset, errand.offset + errand.len)?;
            }
            Ok(())
        });
        if let Err(e) = written {
            for outcome in outcomes.iter_mut().filter(|o| o.is_ok()) {
                *outcome = Err(e.raw_os_error().map_or_else(broken, io::Error::from_raw_os_error));
            }
        }
        outcomes
    }

    /// Has tables be in the file, and enters what was allocated.
    fn write_out(&self, access: &Access, durable: bool, batch: &Batch) -> io::Result<()> {
        access.flush()?;
        self.shared.changed.fetch_add(1, Ordering::AcqRel);
        if durable || batch.frees {
            let mark = self.shared.changed.load(Ordering::Acquire);
            self.shared.files.iter().try_for_each(ImageFile::make_durable)?;
            self.shared.synced.fetch_max(mark, Ordering::AcqRel);
        }
        batch.made.iter().try_for_each(|made| self.note(access, made.start, made.end))
    }

    fn one(&self, access: &Access, errand: &Errand, ahead: &mut Ahead, batch: &mut Batch) -> io::Result<()> {
        let (start, end) = (errand.offset, errand.offset + errand.len);
        match &errand.what {
            What::Read(_) => Ok(()),
            What::MakeRoom => self.make_room(access, start..end, ahead, batch),
            What::Write { buffer, .. } => {
                self.prepare(access, start, end, &mut batch.frees)?;
                access.write(&buffer.bytes()[..errand.len as usize], start)
            }
            What::Zero { unmap, .. } => self.zero(access, start, end, *unmap, &mut batch.frees),
            What::Discard => self.discard(access, start, end),
        }
    }

    /// What is going to be changed: fails where that would be done to tables.
    pub(super) fn prepare(&self, access: &Access, start: u64, end: u64, frees: &mut bool) -> io::Result<()> {
        stretches(access, start, end, |_, len, mapping| {
            match mapping {
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    self.is_data(storage, *offset, len)?;
                }
                // A cluster that is shared, or compressed, is left behind.
                Mapping::Raw { storage, .. } if storage.number() == self.shared.data => *frees = true,
                Mapping::Special { .. } => *frees = true,
                _ => {}
            }
            Ok(())
        })?;
        if *frees && let Some(mut order) = self.shared.files[0].order() {
            order.may_free();
        }
        Ok(())
    }

    pub(super) fn is_data(&self, file: &ImageFile, offset: u64, len: u64) -> io::Result<()> {
        let Some(order) = file.order() else { return Ok(()) };
        let cluster = 1u64 << self.shared.cluster_bits;
        let mut at = offset & !(cluster - 1);
        while at < offset + len {
            if order.is_metadata(at) {
                return Err(io::Error::other(
                    "the image is damaged, its data are where its tables are; see qemu-img check",
                ));
            }
            at += cluster;
        }
        Ok(())
    }

    fn zero(&self, access: &Access, start: u64, end: u64, unmap: bool, frees: &mut bool) -> io::Result<()> {
        self.prepare(access, start, end, frees)?;
        let (mut at, unsupported) = (start, io::ErrorKind::Unsupported);
        while at < end {
            let (mapping, len) = access.get_mapping(at, end - at)?;
            match mapping {
                _ if len == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Mapping::Zero { .. } => {}
                // It stays where it is.
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    match storage.zero(offset, len, unmap) {
                        Err(e) if e.kind() == unsupported => write_zeros(access, at, len)?,
                        done => done?,
                    }
                }
                _ => match access.write_zeroes(at, len) {
                    // Version 2 knows no clusters that read as zeros.
                    Err(e) if e.raw_os_error().is_none() => write_zeros(access, at, len)?,
                    done => done?,
                },
            }
            at += len;
        }
        Ok(())
    }

    /// Gives up the space of what is in place; that it is read from below again is nobody's wish.
    fn discard(&self, access: &Access, start: u64, end: u64) -> io::Result<()> {
        stretches(access, start, end, |_, len, mapping| match mapping {
            Mapping::Raw { storage, offset, writable: true, .. } => {
                self.is_data(storage, *offset, len)?;
                match storage.zero(*offset, len, true) {
                    // It is advice.
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
                    done => done,
                }
            }
            _ => Ok(()),
        })
    }

    /// Finds out where a cluster is, and all others of its L2 table, unless that is known.
    fn learn(&self, access: &Access, offset: u64) -> io::Result<()> {
        let bits = self.shared.cluster_bits;
        let cluster = offset >> bits;
        if self.shared.table.get(cluster) != Entry::Unknown {
            return Ok(());
        }
        let together = (1u64 << (bits - 3)).clamp(CHUNK, MAX_LEARNT);
        let first = cluster / together * together;
        self.note(access, first << bits, (first + together) << bits)
    }

    /// Enters where the clusters of a range are.
    pub(super) fn note(&self, access: &Access, start: u64, end: u64) -> io::Result<()> {
        let Shared { cluster_bits: bits, table, .. } = &*self.shared;
        let size = self.shared.size();
        let (mut at, end) = (start >> bits << bits, end.next_multiple_of(1 << bits).min(size));
        while at < end {
            let (mapping, len) = access.get_mapping(at, end - at)?;
            if len == 0 {
                return Ok(());
            }
            for cluster in at >> bits..=(at + len - 1) >> bits {
                let (from, to) = (cluster << bits, ((cluster + 1) << bits).min(size));
                let whole = at <= from && to <= at + len;
                let entry = if whole { self.entry(&mapping, from - at, to - from) } else { Entry::Slow };
                table.set(cluster, entry);
            }
            at += len;
        }
        Ok(())
    }

    /// Of a cluster whose `len` bytes begin `inside` a mapping.
    fn entry(&self, mapping: &Mapping<'_, ImageFile>, inside: u64, len: u64) -> Entry {
        match mapping {
            Mapping::Zero { .. } => Entry::Zeros,
            Mapping::Raw { storage, offset, writable, .. } => {
                let at = offset + inside;
                let aligned = at.is_multiple_of(storage.traits().offset_align.into());
                // Behind the end of a file are zeros that nobody can read.
                let there = at.checked_add(len).is_some_and(|end| end <= storage.len());
                // One that is shared may be given up while somebody reads it.
                let is_ours = storage.number() == self.shared.data || storage.number() == 0;
                let stays = *writable || !is_ours || self.shared.read_only;
                if aligned && there && stays && self.is_data(storage, at, len).is_ok() {
                    Entry::Data { file: storage.number(), offset: at, writable: *writable }
                } else {
                    Entry::Slow
                }
            }
            _ => Entry::Slow,
        }
    }
}

/// Calls `each` for each stretch of a range that is mapped in one way: where it begins, how long it is, and how.
pub(super) fn stretches(
    access: &Access,
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, u64, &Mapping<'_, ImageFile>) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mapping, len) = access.get_mapping(at, end - at)?;
        if len == 0 {
            return Ok(());
        }
        each(at, len, &mapping)?;
        at += len;
    }
    Ok(())
}

fn write_zeros(access: &Access, start: u64, len: u64) -> io::Result<()> {
    let zeros = Bounce::zeros(ZEROS as usize);
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZEROS);
        access.write(&zeros.bytes()[..n as usize], start + done)?;
        done += n;
    }
    Ok(())
}
