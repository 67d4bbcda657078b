//! From a trace to what is sent: requests that fit the disk, queue by queue; the others counted.

use vhost_blk::record::format::Kind;
use vhost_blk::request::{
    FLAG_UNMAP, ID_LEN, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
};

use super::trace::{Item, Trace};

/// What the disk takes (virtio 1.3, 5.2.4).
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of one data segment.
    pub segment: u32,
    /// Data segments of a request.
    pub segments: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Flushes are offered.
    pub flush: bool,
    /// Sectors of a range and ranges of a discard; 0 if it is not offered.
    pub discard: (u32, u32),
    /// The same of a write of zeroes.
    pub write_zeroes: (u32, u32),
}

/// What goes with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Nothing.
    None,
    /// This much to be read.
    In(u32),
    /// This much to be written.
    Out(u32),
    /// Ranges as the request has them.
    Ranges(Vec<u8>),
}

/// One request to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Nanoseconds after the first of the trace.
    pub at: u64,
    /// Its `VIRTIO_BLK_T_` number.
    pub kind: u32,
    /// Where.
    pub sector: u64,
    /// What with.
    pub data: Data,
}

/// Why requests are not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Skip {
    /// Beyond the end.
    Beyond,
    /// More than a request takes.
    TooLarge,
    /// Not in whole sectors.
    Unaligned,
    /// The disk does not offer it.
    NotOffered,
    /// The capture does not say what it was.
    Unknown,
}

/// [`Skip`] in words, in order.
const REASONS: [&str; 5] = [
    "beyond the end of the disk",
    "larger than the disk takes",
    "not in whole sectors",
    "not offered by the disk",
    "of unknown content",
];

/// How many are not sent, by [`Skip`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped([u64; REASONS.len()]);

impl Skipped {
    /// How many in all.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// How many with their reasons.
    pub fn reasons(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.0).filter(|&(_, n)| n > 0)
    }

    /// One line, if there were any.
    pub fn line(&self) -> Option<String> {
        let parts: Vec<_> = self.reasons().map(|(reason, n)| format!("{n} {reason}")).collect();
        (!parts.is_empty()).then(|| format!("skipped {} requests: {}", self.total(), parts.join(", ")))
    }
}

/// What is sent on each of `queues`. A trace of fewer queues than that is dealt out in turn.
pub fn plan(trace: &Trace, limits: &Limits, queues: u16) -> (Vec<Vec<Step>>, Skipped) {
    let mut plans = vec![Vec::new(); usize::from(queues)];
    let mut skipped = Skipped::default();
    let start = trace.items.first().map_or(0, |i| i.at);
    let as_recorded = trace.queues() >= queues;
    for (i, item) in trace.items.iter().enumerate() {
        match step(item, limits) {
            Ok((kind, sector, data)) => {
                let queue = if as_recorded { usize::from(item.queue) } else { i } % plans.len();
                plans[queue].push(Step { at: item.at - start, kind, sector, data });
            }
            Err(why) => skipped.0[why as usize] += 1,
        }
    }
    (plans, skipped)
}

fn step(item: &Item, limits: &Limits) -> Result<(u32, u64, Data), Skip> {
    let (kind, range_limits) = match item.kind {
        Kind::Read => (T_IN, (0, 0)),
        Kind::Write if limits.read_only => return Err(Skip::NotOffered),
        Kind::Write => (T_OUT, (0, 0)),
        Kind::Flush if limits.flush => return Ok((T_FLUSH, 0, Data::None)),
        Kind::Flush => return Err(Skip::NotOffered),
        Kind::GetId => return Ok((T_GET_ID, 0, Data::In(ID_LEN as u32))),
        Kind::Discard => (T_DISCARD, limits.discard),
        Kind::WriteZeroes | Kind::WriteZeroesUnmap => (T_WRITE_ZEROES, limits.write_zeroes),
        Kind::Range | Kind::Other | Kind::Lost | Kind::End => return Err(Skip::Unknown),
    };
    for range in item.ranges() {
        if range.len == 0 || (range.offset | range.len) % SECTOR != 0 {
            return Err(Skip::Unaligned);
        }
        if range.offset.checked_add(range.len).is_none_or(|end| end > limits.size) {
            return Err(Skip::Beyond);
        }
    }
    let range = item.range;
    if matches!(item.kind, Kind::Read | Kind::Write) {
        let most = u64::from(limits.segment) * u64::from(limits.segments);
        let len = u32::try_from(range.len).ok().filter(|&n| u64::from(n) <= most).ok_or(Skip::TooLarge)?;
        let data = if kind == T_IN { Data::In(len) } else { Data::Out(len) };
        return Ok((kind, range.offset / SECTOR, data));
    }
    let (sectors, count) = range_limits;
    if count == 0 {
        return Err(Skip::NotOffered);
    }
    let flags = if item.kind == Kind::WriteZeroesUnmap { FLAG_UNMAP } else { 0 };
    let mut bytes = Vec::new();
    for range in item.ranges() {
        let (mut at, end) = (range.offset / SECTOR, (range.offset + range.len) / SECTOR);
        while at < end {
            let n = (end - at).min(sectors.into());
            bytes.extend_from_slice(&at.to_le_bytes());
            bytes.extend_from_slice(&(n as u32).to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            if bytes.len() > count as usize * 16 {
                return Err(Skip::TooLarge);
            }
            at += n;
        }
    }
    Ok((kind, 0, Data::Ranges(bytes)))
}

#[cfg(test)]
mod tests {
    use super::super::iolog;
    use super::*;

    const LIMITS: Limits = Limits {
        size: 1 << 20,
        segment: 4096,
        segments: 4,
        read_only: false,
        flush: true,
        discard: (16, 2),
        write_zeroes: (16, 2),
    };

    fn trace(lines: &str) -> Trace {
        iolog::parse(&format!("fio version 3 iolog\n{lines}")).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_counted_by_reason() {
        let trace = trace(
            "5 d read 0 512\n6 d read 1048576 512\n7 d write 18446744073709551104 1024\n8 d read 1 512\n\
             9 d read 0 16896\n10 d trim 0 16384\n11 d trim 0 16896\n12 d sync\n",
        );
        let (plans, skipped) = plan(&trace, &LIMITS, 1);
        assert_eq!(
            skipped.line().unwrap(),
            "skipped 5 requests: 2 beyond the end of the disk, 2 larger than the disk takes, 1 not in whole sectors"
        );
        let times: Vec<_> = plans[0].iter().map(|s| (s.at, s.kind)).collect();
        assert_eq!(times, [(0, T_IN), (5000, T_DISCARD), (7000, T_FLUSH)]);
        let Data::Ranges(ranges) = &plans[0][1].data else { panic!("{:?}", plans[0][1]) };
        assert_eq!((ranges.len(), ranges[16], ranges[24]), (32, 16, 16));
        let frozen = Limits { read_only: true, flush: false, discard: (0, 0), ..LIMITS };
        let (plans, skipped) = plan(&trace, &frozen, 1);
        assert_eq!((plans[0].len(), skipped.0[Skip::NotOffered as usize]), (1, 4));
    }

    #[test]
    fn a_trace_of_fewer_queues_is_dealt_out() {
        let mut trace = trace("1 d read 0 512\n2 d read 512 512\n3 d read 1024 512\n");
        let (plans, _) = plan(&trace, &LIMITS, 2);
        assert_eq!((plans[0].len(), plans[1].len()), (2, 1));
        trace.items[2].queue = 3;
        let (plans, _) = plan(&trace, &LIMITS, 2);
        assert_eq!((plans[0].len(), plans[1][0].sector), (2, 2));
    }
}
