//! A trace in memory, and where it comes from: a capture of `vhost-blk --record`, or an iolog of fio.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use vhost_blk::record::format::{FormatError, HEADER_LEN, Header, Kind, RECORD_LEN, Record};

use super::iolog;

/// A part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where.
    pub offset: u64,
    /// How much.
    pub len: u64,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// When, in nanoseconds since the trace began.
    pub at: u64,
    /// What.
    pub kind: Kind,
    /// On which queue.
    pub queue: u8,
    /// Where on the disk; the first range of several.
    pub range: Range,
    /// Further ranges.
    pub more: Vec<Range>,
    /// How it ended; 0 is well.
    pub status: u8,
    /// How long it took in nanoseconds, where that is known.
    pub latency: Option<u32>,
}

impl Item {
    /// All ranges.
    pub fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        std::iter::once(self.range).chain(self.more.iter().copied())
    }

    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges().map(|r| r.len).sum()
    }
}

/// What a trace was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A capture.
    Capture(Header),
    /// An iolog of this version.
    Iolog(u8),
}

/// A trace, its requests in the order of their times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Where it comes from.
    pub source: Source,
    /// The requests.
    pub items: Vec<Item>,
    /// Requests that the capture has not got, because its ring was full.
    pub lost: u64,
    /// What else there is to say about it.
    pub notes: Vec<String>,
}

impl Trace {
    /// Reads a trace; which kind it is shows at its beginning.
    pub fn read(path: &Path) -> Result<Trace> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Trace::parse(&bytes).with_context(|| path.display().to_string())
    }

    /// As [`read`](Self::read), of the whole content.
    pub fn parse(bytes: &[u8]) -> Result<Trace> {
        match Header::from_bytes(bytes) {
            Ok(header) => capture(header, &bytes[HEADER_LEN..]),
            Err(FormatError::Magic) if bytes.starts_with(iolog::MAGIC) => {
                let text = str::from_utf8(bytes).map_err(|e| {
                    let line = bytes[..e.valid_up_to()].split(|&b| b == b'\n').count();
                    anyhow!("line {line}: no text")
                })?;
                iolog::parse(text)
            }
            Err(FormatError::Magic) => Err(anyhow!(
                "neither a capture of vhost-blk --record nor an fio iolog of version 2 or 3, by its first bytes"
            )),
            Err(e) => Err(anyhow!("offset 0: {e}")),
        }
    }

    /// Queues that it uses, one at least.
    pub fn queues(&self) -> u16 {
        self.items.iter().map(|i| u16::from(i.queue) + 1).max().unwrap_or(1)
    }
}

fn capture(header: Header, body: &[u8]) -> Result<Trace> {
    let (records, rest) = body.as_chunks::<RECORD_LEN>();
    let mut trace = Trace { source: Source::Capture(header), items: Vec::new(), lost: 0, notes: Vec::new() };
    // Where each queue's last request is, for the ranges that belong to it.
    let mut last = vec![None; 256];
    let mut ended = false;
    for (i, bytes) in records.iter().enumerate() {
        let offset = HEADER_LEN + i * RECORD_LEN;
        let r = Record::from_bytes(bytes).with_context(|| format!("offset {offset}"))?;
        let range = Range { offset: r.sector.saturating_mul(512), len: r.len.into() };
        match r.kind {
            Kind::End => ended = true,
            Kind::Lost => trace.lost += r.sector,
            Kind::Range => {
                let of = last[usize::from(r.queue)].and_then(|at: usize| trace.items.get_mut(at));
                let of = of.ok_or_else(|| anyhow!("offset {offset}: a range that belongs to no request"))?;
                of.more.push(range);
            }
            kind => {
                last[usize::from(r.queue)] = Some(trace.items.len());
                trace.items.push(Item {
                    at: r.time,
                    kind,
                    queue: r.queue,
                    range,
                    more: Vec::new(),
                    status: r.status,
                    latency: Some(r.latency),
                });
            }
        }
    }
    if !rest.is_empty() {
        let at = HEADER_LEN + records.len() * RECORD_LEN;
        trace
            .notes
            .push(format!("truncated: {} bytes at offset {at} are no whole record, left out", rest.len()));
    } else if !ended {
        trace.notes.push("the capture was not ended properly; the last requests may be missing".into());
    }
    // By completion in the file.
    trace.items.sort_by_key(|i| i.at);
    Ok(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind, time: u64, queue: u8, sector: u64) -> [u8; RECORD_LEN] {
        Record { time, queue, kind, status: 0, sector, len: 512, latency: 1 }.to_bytes()
    }

    fn file(records: &[[u8; RECORD_LEN]]) -> Vec<u8> {
        let header = Header { queues: 2, disk_size: 1 << 20, block_size: 512, start: 0 };
        [header.to_bytes().as_slice(), records.concat().as_slice()].concat()
    }

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", Trace::parse(bytes).unwrap_err())
    }

    #[test]
    fn requests_come_in_the_order_of_their_times_with_their_ranges() {
        let bytes = file(&[
            record(Kind::Discard, 9, 1, 8),
            record(Kind::Read, 5, 0, 1),
            record(Kind::Range, 9, 1, 16),
            record(Kind::Lost, 0, 0, 7),
            record(Kind::End, 0, 0, 0),
        ]);
        let trace = Trace::parse(&bytes).unwrap();
        assert_eq!((trace.lost, trace.notes.len(), trace.queues()), (7, 0, 2));
        let [read, discard] = trace.items.as_slice() else { panic!("{:?}", trace.items) };
        assert_eq!((read.at, read.range.offset), (5, 512));
        let offsets: Vec<_> = discard.ranges().map(|r| r.offset).collect();
        assert_eq!((discard.kind, offsets, discard.bytes()), (Kind::Discard, vec![4096, 8192], 1024));
    }

    #[test]
    fn a_capture_that_was_cut_off_is_read_up_to_its_last_whole_record() {
        let mut bytes = file(&[record(Kind::Read, 5, 0, 1), record(Kind::Read, 6, 0, 1)]);
        let trace = Trace::parse(&bytes).unwrap();
        assert!(trace.notes[0].contains("not ended properly"));
        bytes.pop();
        let trace = Trace::parse(&bytes).unwrap();
        assert_eq!(trace.items.len(), 1);
        assert_eq!(trace.notes, ["truncated: 23 bytes at offset 88 are no whole record, left out"]);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_the_place() {
        assert!(error(b"").starts_with("neither a capture"));
        assert!(error(b"garbage").starts_with("neither a capture"));
        assert_eq!(error(&file(&[])[..20]), "offset 0: truncated: 20 bytes are less than the header's 64");
        let mut other = file(&[]);
        other[8] = 9;
        assert_eq!(error(&other), "offset 0: capture of version 9; this program reads version 1");
        let mut broken = file(&[record(Kind::Read, 0, 0, 0), record(Kind::Read, 0, 0, 0)]);
        broken[64 + 24 + 15] = 12;
        assert_eq!(error(&broken), "offset 88: broken record: kind 12 is unknown");
        let lone = file(&[record(Kind::Range, 0, 0, 0)]);
        assert_eq!(error(&lone), "offset 64: a range that belongs to no request");
        assert_eq!(error(b"fio version 2 iolog\nd add\n\xff\n"), "line 3: no text");
    }
}
