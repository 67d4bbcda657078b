//! What a trace is made of, in words.

use std::collections::BTreeMap;
use std::fmt::Write;

use vhost_blk::record::format::Kind;

use super::trace::{Source, Trace};

/// Sizes that are listed; the rest is summed up.
const SIZES: usize = 8;

/// The summary, a few lines.
pub fn summary(trace: &Trace) -> String {
    let mut out = String::new();
    // Writing to a String does not fail, here and below.
    let _ = match trace.source {
        Source::Capture(h) => writeln!(
            out,
            "capture of a disk of {} bytes in blocks of {}, {} queues, begun {}",
            h.disk_size,
            h.block_size,
            h.queues,
            utc(h.start)
        ),
        Source::Iolog(version) => writeln!(out, "fio iolog of version {version}"),
    };
    for note in &trace.notes {
        let _ = writeln!(out, "note: {note}");
    }
    if trace.lost > 0 {
        let _ = writeln!(out, "note: {} requests were lost when recording", trace.lost);
    }
    times(&mut out, trace);
    let mut kinds = BTreeMap::<Kind, (u64, u64)>::new();
    let mut sizes = BTreeMap::<u64, u64>::new();
    let mut queues = BTreeMap::<u8, u64>::new();
    for item in &trace.items {
        let (requests, bytes) = kinds.entry(item.kind).or_default();
        *requests += 1;
        *bytes += item.bytes();
        if matches!(item.kind, Kind::Read | Kind::Write) {
            *sizes.entry(item.range.len).or_default() += 1;
        }
        *queues.entry(item.queue).or_default() += 1;
    }
    for (kind, (requests, bytes)) in kinds {
        let _ = writeln!(out, "{:<18} {requests:>12} {bytes:>16} bytes", name(kind));
    }
    let failed = trace.items.iter().filter(|i| i.status != 0).count();
    if failed > 0 {
        let _ = writeln!(out, "{:<18} {failed:>12}", "failed");
    }
    let mut sizes: Vec<_> = sizes.into_iter().collect();
    sizes.sort_by_key(|&(size, n)| (std::cmp::Reverse(n), size));
    let rest: u64 = sizes.iter().skip(SIZES).map(|&(_, n)| n).sum();
    let mut parts: Vec<_> = sizes.iter().take(SIZES).map(|(size, n)| format!("{size}: {n}")).collect();
    if rest > 0 {
        parts.push(format!("others: {rest}"));
    }
    if !parts.is_empty() {
        let _ = writeln!(out, "sizes of reads and writes in bytes: {}", parts.join(", "));
    }
    if queues.len() > 1 {
        let parts: Vec<_> = queues.iter().map(|(queue, n)| format!("{queue}: {n}")).collect();
        let _ = writeln!(out, "queues: {}", parts.join(", "));
    }
    depths(&mut out, trace);
    out
}

fn times(out: &mut String, trace: &Trace) {
    let (Some(first), Some(last)) = (trace.items.first(), trace.items.last()) else {
        let _ = writeln!(out, "no requests");
        return;
    };
    let seconds = (last.at - first.at) as f64 / 1e9;
    let mut each_second = BTreeMap::<u64, u64>::new();
    for item in &trace.items {
        *each_second.entry((item.at - first.at) / 1_000_000_000).or_default() += 1;
    }
    let n = trace.items.len();
    let _ = write!(out, "{n} requests in {seconds:.3} s");
    if seconds > 0.0 {
        let _ = write!(out, ", {:.0} a second", n as f64 / seconds);
    }
    let _ = writeln!(out, ", {} in the busiest second", each_second.values().max().unwrap_or(&0));
}

/// Depths and latencies, where the trace knows how long requests took.
fn depths(out: &mut String, trace: &Trace) {
    let timed: Vec<_> =
        trace.items.iter().filter_map(|i| Some((i.at, i.queue, u64::from(i.latency?)))).collect();
    if timed.is_empty() {
        return;
    }
    let mut latencies: Vec<u64> = timed.iter().map(|t| t.2).collect();
    latencies.sort_unstable();
    let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100] as f64 / 1000.0;
    let _ = writeln!(out, "latency us p50={:.2} p99={:.2} max={:.2}", at(50), at(99), at(100));
    let mut events: Vec<_> =
        timed.iter().flat_map(|&(at, queue, took)| [(at, true, queue), (at + took, false, queue)]).collect();
    // What ends goes before what begins at the same time.
    events.sort_unstable();
    let (mut now, mut most, mut area, mut before) = (0i64, 0, 0.0, events[0].0);
    let mut of_queue = [(0i64, 0i64); 256];
    for (at, begins, queue) in events {
        area += now as f64 * (at - before) as f64;
        before = at;
        let step = if begins { 1 } else { -1 };
        now += step;
        most = most.max(now);
        let (now, most) = &mut of_queue[usize::from(queue)];
        *now += step;
        *most = (*most).max(*now);
    }
    let span = before.saturating_sub(timed[0].0).max(1);
    let _ = write!(out, "in flight: {:.2} on average, {most} at most", area / span as f64);
    let parts: Vec<_> =
        of_queue.iter().enumerate().filter(|(_, q)| q.1 > 0).map(|(i, q)| format!("{i}: {}", q.1)).collect();
    if parts.len() > 1 {
        let _ = write!(out, " (by queue {})", parts.join(", "));
    }
    out.push('\n');
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Flush => "flush",
        Kind::GetId => "get id",
        Kind::Discard => "discard",
        Kind::WriteZeroes => "write zeroes",
        Kind::WriteZeroesUnmap => "write zeroes unmap",
        Kind::Range | Kind::Other | Kind::Lost | Kind::End => "other",
    }
}

/// Nanoseconds since 1970 as a date.
fn utc(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (days, time) = (seconds / 86400, seconds % 86400);
    // Years that begin in March put the leap day last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::super::trace::{Item, Range};
    use super::*;
    use vhost_blk::record::format::Header;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000_000_000), date);
        }
    }

    #[test]
    fn a_summary_counts_kinds_sizes_and_what_was_in_flight() {
        let item = |at: u64, kind: Kind, len: u64, took: u32| Item {
            at,
            kind,
            queue: 0,
            range: Range { offset: 0, len },
            more: Vec::new(),
            status: 0,
            latency: Some(took),
        };
        let items = vec![
            item(0, Kind::Read, 512, 1_000_000_000),
            item(500_000_000, Kind::Write, 4096, 500_000_000),
            item(1_000_000_000, Kind::Read, 512, 1_000_000_000),
        ];
        let header = Header { queues: 1, disk_size: 1024, block_size: 512, start: 0 };
        let trace = Trace { source: Source::Capture(header), items, lost: 3, notes: Vec::new() };
        let text = summary(&trace);
        for part in [
            "capture of a disk of 1024 bytes in blocks of 512, 1 queues, begun 1970-01-01",
            "note: 3 requests were lost",
            "3 requests in 1.000 s, 3 a second, 2 in the busiest second",
            "sizes of reads and writes in bytes: 512: 2, 4096: 1",
            "in flight: 1.25 on average, 2 at most",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let row = |name: &str| {
            text.lines().find(|l| l.starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(
            (row("read"), row("write")),
            (vec!["read", "2", "1024", "bytes"], vec!["write", "1", "4096", "bytes"])
        );
    }

    #[test]
    fn an_empty_trace_has_a_summary_too() {
        let trace = Trace { source: Source::Iolog(2), items: Vec::new(), lost: 0, notes: Vec::new() };
        assert_eq!(summary(&trace), "fio iolog of version 2\nno requests\n");
    }
}
