//! fio's iolog, versions 2 and 3, as fio's manual describes them ("Trace file format v2", "v3"), and version 2 written.

use std::fmt::Write;

use anyhow::{Result, anyhow, bail};
use vhost_blk::record::format::Kind;

use super::trace::{Item, Range, Source, Trace};

/// How all of them begin.
pub const MAGIC: &[u8] = b"fio version ";

/// fio ignores shorter waits.
const SHORTEST_WAIT_US: u64 = 100;

/// The name under which the disk goes into an iolog.
pub const NAME: &str = "kickless";

/// Parses an iolog. All files in it are taken for the one disk.
pub fn parse(text: &str) -> Result<Trace> {
    let mut lines = text.lines().zip(1..).map(|(line, number)| (line.trim_end(), number));
    let version = match lines.next().map(|(line, _)| line) {
        Some("fio version 2 iolog") => 2,
        Some("fio version 3 iolog") => 3,
        other => bail!("line 1: '{}' is no iolog of version 2 or 3", other.unwrap_or_default()),
    };
    let mut parser = Parser { version, waited: 0, files: Vec::new(), items: Vec::new() };
    for (line, number) in lines.filter(|(line, _)| !line.is_empty()) {
        parser.line(line).map_err(|e| anyhow!("line {number}: {e}: '{}'", line.escape_debug()))?;
    }
    let Parser { files, mut items, .. } = parser;
    let mut notes = Vec::new();
    if files.len() > 1 {
        notes.push(format!("{} files in the iolog, all taken for the one disk", files.len()));
    }
    items.sort_by_key(|i| i.at);
    Ok(Trace { source: Source::Iolog(version), items, lost: 0, notes })
}

struct Parser {
    version: u8,
    /// Nanoseconds of all `wait`s so far.
    waited: u64,
    files: Vec<String>,
    items: Vec<Item>,
}

impl Parser {
    fn line(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split_ascii_whitespace();
        let number = |word: Option<&str>, what: &str| {
            let word = word.ok_or_else(|| format!("{what} is missing"))?;
            word.parse::<u64>().map_err(|_| format!("{what} '{word}' is no number"))
        };
        let at = match self.version {
            2 => self.waited,
            _ => number(words.next(), "timestamp")?.saturating_mul(1000),
        };
        let file = words.next().ok_or("the file is missing")?;
        let action = words.next().ok_or("the action is missing")?;
        let kind = match action {
            "add" => {
                if !self.files.iter().any(|f| f == file) {
                    self.files.push(file.into());
                }
                None
            }
            "open" | "close" => None,
            "wait" if self.version == 2 => {
                self.waited = self.waited.saturating_add(number(words.next(), "time")?.saturating_mul(1000));
                // A length that means nothing; fio wants one.
                words.next();
                None
            }
            "read" => Some(Kind::Read),
            "write" => Some(Kind::Write),
            "sync" | "datasync" => Some(Kind::Flush),
            "trim" => Some(Kind::Discard),
            other => return Err(format!("unknown action '{other}' in version {}", self.version)),
        };
        if let Some(kind) = kind {
            let mut range = Range { offset: 0, len: 0 };
            if kind == Kind::Flush {
                // With or without numbers, which mean nothing.
                words.by_ref().take(2).for_each(drop);
            } else {
                range.offset = number(words.next(), "offset")?;
                range.len = number(words.next(), "length")?;
                if range.len == 0 {
                    return Err("length is 0".into());
                }
            }
            self.items.push(Item { at, kind, queue: 0, range, more: Vec::new(), status: 0, latency: None });
        }
        match words.next() {
            None => Ok(()),
            Some(word) => Err(format!("'{word}' is too much")),
        }
    }
}

/// An iolog of version 2, and how many requests it could not take: those that failed, and those that fio has no action
/// for.
pub fn write(trace: &Trace) -> (String, u64) {
    let mut out = format!("fio version 2 iolog\n{NAME} add\n{NAME} open\n");
    let start = trace.items.first().map_or(0, |i| i.at);
    let (mut waited, mut left_out) = (0, 0);
    for item in &trace.items {
        let action = match item.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "sync",
            Kind::Discard => "trim",
            _ => "",
        };
        if action.is_empty() || item.status != 0 {
            left_out += 1;
            continue;
        }
        // Short waits add up until fio heeds them.
        let wait = ((item.at - start) / 1000).saturating_sub(waited);
        if wait >= SHORTEST_WAIT_US {
            // Writing to a String does not fail, here and below.
            let _ = writeln!(out, "{NAME} wait {wait} 0");
            waited += wait;
        }
        for range in item.ranges() {
            let _ = writeln!(out, "{NAME} {action} {} {}", range.offset, range.len);
        }
    }
    let _ = writeln!(out, "{NAME} close");
    (out, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Vec<(u64, Kind, u64, u64)> {
        let items = parse(text).unwrap().items;
        items.iter().map(|i| (i.at, i.kind, i.range.offset, i.range.len)).collect()
    }

    #[test]
    fn version_2_is_timed_by_its_waits() {
        let text = "fio version 2 iolog\n/a add\n/a open\n/a read 0 4096\n/a wait 150 0\n/a write 512 1024\n\
                    /a wait 1000 0\n/a sync 0 0\n/a datasync\n/a trim 8192 512\n/a close\n";
        let all = [
            (0, Kind::Read, 0, 4096),
            (150_000, Kind::Write, 512, 1024),
            (1_150_000, Kind::Flush, 0, 0),
            (1_150_000, Kind::Flush, 0, 0),
            (1_150_000, Kind::Discard, 8192, 512),
        ];
        assert_eq!(parsed(text), all);
    }

    #[test]
    fn version_3_is_timed_by_microseconds() {
        let text = "fio version 3 iolog\n17 d add\n104 d open\n110 d read 61440 4096\n125 d write 0 512\n131 d close\n";
        assert_eq!(parsed(text), [(110_000, Kind::Read, 61440, 4096), (125_000, Kind::Write, 0, 512)]);
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = |text: &str| format!("{:#}", parse(text).unwrap_err());
        assert_eq!(
            error("fio version 4 iolog\n"),
            "line 1: 'fio version 4 iolog' is no iolog of version 2 or 3"
        );
        for (line, what) in [
            ("d", "the action is missing"),
            ("d read", "offset is missing"),
            ("d read 0", "length is missing"),
            ("d read x 1", "offset 'x' is no number"),
            ("d read -1 1", "offset '-1' is no number"),
            ("d read 0 0", "length is 0"),
            ("d read 0 1 2", "'2' is too much"),
            ("d frob 0 1", "unknown action 'frob' in version 2"),
            ("d wait soon", "time 'soon' is no number"),
        ] {
            let text = format!("fio version 2 iolog\nd add\n\n{line}\n");
            assert_eq!(error(&text), format!("line 4: {what}: '{line}'"));
        }
        assert!(error("fio version 3 iolog\nd read 0 1\n").starts_with("line 2: timestamp 'd' is no number"));
        assert!(error("fio version 3 iolog\n1 d wait 5 0\n").contains("unknown action 'wait' in version 3"));
    }

    #[test]
    fn what_fio_cannot_repeat_is_left_out_and_counted() {
        let mut trace = parse("fio version 2 iolog\nd read 0 512\nd read 512 512\nd write 0 512\n").unwrap();
        trace.items[1].status = 1;
        trace.items[2].kind = Kind::WriteZeroes;
        let (text, left_out) = write(&trace);
        assert_eq!(left_out, 2);
        assert_eq!(
            text,
            "fio version 2 iolog\nkickless add\nkickless open\nkickless read 0 512\nkickless close\n"
        );
    }

    proptest! {
        /// What is written is read again; times to the shortest wait.
        #[test]
        fn what_is_written_is_read_again(
            items in prop::collection::vec((0u64..400_000, 0usize..4, 0u64..1 << 50, 1u64..1 << 32), 0..40),
        ) {
            let kinds = [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard];
            let mut at = 0;
            let items: Vec<_> = items.into_iter().map(|(step, kind, offset, len)| {
                at += step;
                let kind = kinds[kind];
                let range = if kind == Kind::Flush { Range { offset: 0, len: 0 } } else { Range { offset, len } };
                Item { at, kind, queue: 0, range, more: Vec::new(), status: 0, latency: None }
            }).collect();
            let trace = Trace { source: Source::Iolog(2), items, lost: 0, notes: Vec::new() };
            let (text, left_out) = write(&trace);
            prop_assert_eq!(left_out, 0);
            let again = parse(&text).unwrap();
            prop_assert_eq!(again.items.len(), trace.items.len());
            let start = trace.items.first().map_or(0, |i| i.at);
            for (a, b) in trace.items.iter().zip(&again.items) {
                prop_assert_eq!((a.kind, a.range), (b.kind, b.range));
                prop_assert!((a.at - start).abs_diff(b.at) <= SHORTEST_WAIT_US * 1000);
            }
        }

        /// Whatever the text, parsing ends in a trace or an error.
        #[test]
        fn no_text_is_too_much(text in "(fio version [23] iolog\n)?([0-9]{0,4} ?d (add|read|wait|sync|trim) ?[0-9]{0,20} ?[0-9]{0,20}\n){0,5}") {
            let _ = parse(&text);
        }
    }
}
