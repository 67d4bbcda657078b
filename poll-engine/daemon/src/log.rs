//! The log: what is let through, as text or as JSON, and no more of it than anybody wants to read.
//!
//! Guests and front ends can have lines written, and so as many as they like. So each place in the program may write
//! [`BURST`] lines about one disk, port or other thing in [`WINDOW`]; further ones are counted, and what was left out is said
//! before the next line that comes after that. Whoever asks for `debug` or `trace` gets all of those.

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, JsonFields, Writer, format};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, fmt};
use tracing_subscriber::registry::LookupSpan;

/// So many lines of one kind about one thing...
const BURST: u64 = 20;
/// ... in this time.
const WINDOW: Duration = Duration::from_secs(5);
/// Kinds and things that are told apart; all others are one.
const KEPT: usize = 512;

/// Whether lines are JSON.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Logs to standard error. `asked` is what `--log` says: a filter, and `json` or `text` among its parts.
pub fn init(asked: &str) -> Result<()> {
    let (filter, is_json) = parse(asked);
    let parsed = EnvFilter::try_new(&filter).with_context(|| format!("--log '{asked}' is no filter"))?;
    let log = fmt().with_env_filter(parsed).with_writer(std::io::stderr);
    IS_JSON.store(is_json, Ordering::Relaxed);
    if is_json {
        let lines = format().json().flatten_event(true).with_target(true);
        log.with_ansi(false).fmt_fields(JsonFields::new()).event_format(Limited::new(lines, true)).init();
    } else {
        let lines = format().with_target(false);
        log.with_ansi(std::io::stderr().is_terminal()).event_format(Limited::new(lines, false)).init();
    }
    Ok(())
}

/// Writes why program `name` ends, whatever is filtered: as the log's last line if that is JSON.
pub fn write_end(name: &str, why: &anyhow::Error) {
    if IS_JSON.load(Ordering::Relaxed) {
        eprintln!("{}", json_line("ERROR", &format!("{why:#}"), json!({ "target": name })));
    } else {
        eprintln!("{name}: {why:#}");
    }
}

/// A line of JSON as the log has them, with these fields added.
fn json_line(level: &str, message: &str, mut fields: Value) -> Value {
    let mut time = String::new();
    // Nothing fails that writes into a string.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    fields["timestamp"] = time.into();
    fields["level"] = level.into();
    fields["message"] = message.into();
    fields
}

/// The filter, and whether lines are to be JSON.
fn parse(asked: &str) -> (String, bool) {
    let is_form = |part: &&str| matches!(part.trim(), "json" | "text");
    let filter: Vec<_> = asked.split(',').filter(|part| !is_form(part)).collect();
    let filter = if filter.is_empty() { "info".into() } else { filter.join(",") };
    (filter, asked.split(',').rfind(is_form).is_some_and(|part| part.trim() == "json"))
}

/// Lines of one kind about one thing.
#[derive(Debug)]
struct Gate {
    since: Instant,
    written: u64,
    left_out: u64,
    /// What they are, for people.
    about: String,
}

#[derive(Debug, Default)]
struct Gates(HashMap<u64, Gate>);

impl Gates {
    /// Whether one more line may be written; and what is to be said of those that were not.
    fn pass(&mut self, key: u64, about: &str, now: Instant) -> (bool, Vec<(String, u64)>) {
        let mut told = Vec::new();
        if self.0.len() >= KEPT && !self.0.contains_key(&key) {
            told = self.sweep(now);
        }
        let key = if self.0.len() >= KEPT && !self.0.contains_key(&key) { 0 } else { key };
        let new = || Gate { since: now, written: 0, left_out: 0, about: about.to_owned() };
        let gate = self.0.entry(key).or_insert_with(new);
        if now.saturating_duration_since(gate.since) >= WINDOW {
            gate.since = now;
            gate.written = 0;
        }
        if gate.written >= BURST {
            gate.left_out += 1;
            return (false, told);
        }
        gate.written += 1;
        told.extend(self.sweep(now));
        (true, told)
    }

    /// What was left out in windows that are over, which are forgotten, or have begun anew.
    fn sweep(&mut self, now: Instant) -> Vec<(String, u64)> {
        let mut told = Vec::new();
        self.0.retain(|_, gate| {
            let is_over = now.saturating_duration_since(gate.since) >= WINDOW;
            if gate.left_out > 0 && (is_over || gate.written < BURST) {
                told.push((gate.about.clone(), std::mem::take(&mut gate.left_out)));
            }
            !is_over
        });
        told
    }
}

/// What writes lines, and leaves some out.
#[derive(Debug)]
struct Limited<F> {
    lines: F,
    is_json: bool,
    gates: Mutex<Gates>,
}

impl<F> Limited<F> {
    fn new(lines: F, is_json: bool) -> Limited<F> {
        Limited { lines, is_json, gates: Mutex::default() }
    }

    /// Says that lines were left out, as a line of its own.
    fn tell(&self, writer: &mut Writer<'_>, about: &str, left_out: u64) -> fmt::Result {
        let said = format!("{left_out} more lines like this one were left out: {about}");
        if !self.is_json {
            SystemTime.format_time(writer)?;
            return writeln!(writer, "  WARN {said}");
        }
        let fields = json!({ "left_out": left_out, "target": module_path!() });
        writeln!(writer, "{}", json_line("WARN", &said, fields))
    }
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if *event.metadata().level() <= Level::INFO {
            let mut message = Message::default();
            event.record(&mut message);
            let key = message.key(event.metadata());
            let (passes, told) = {
                let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
                gates.pass(key, &message.0, Instant::now())
            };
            for (about, left_out) in told {
                self.tell(&mut writer, &about, left_out)?;
            }
            if !passes {
                return Ok(());
            }
        }
        self.lines.format_event(ctx, writer, event)
    }
}

/// What an event says.
#[derive(Default)]
struct Message(String);

impl Message {
    /// Of what stands before the first colon, which is what it is about, and the place in the program that it comes from.
    fn key(&self, from: &Metadata<'_>) -> u64 {
        let mut hasher = DefaultHasher::new();
        from.callsite().hash(&mut hasher);
        self.0.split(": ").next().hash(&mut hasher);
        hasher.finish().max(1)
    }
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_one_of_the_parts_of_a_filter() {
        for (asked, filter, is_json) in [
            ("info", "info", false),
            ("json", "info", true),
            ("text", "info", false),
            ("json,warn,poll_engine=debug", "warn,poll_engine=debug", true),
            ("debug,json", "debug", true),
            ("json,text", "info", false),
        ] {
            assert_eq!(parse(asked), (filter.to_owned(), is_json), "{asked}");
        }
    }

    #[test]
    fn a_flood_is_cut_and_counted_and_others_are_heard() {
        let (mut gates, begin) = (Gates::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        let written = (0..1000).filter(|i| gates.pass(1, "a: x", at(*i)).0).count();
        assert_eq!(written as u64, BURST);
        // Another thing, or another kind of line.
        assert_eq!(gates.pass(2, "b: x", at(1000)), (true, vec![]));
        // When it is over the rest is told, once, by whoever comes next.
        let told = vec![("a: x".to_owned(), 1000 - BURST)];
        assert_eq!(gates.pass(2, "b: x", at(5000)), (true, told));
        assert_eq!(gates.pass(1, "a: x", at(5001)), (true, vec![]));
    }

    #[test]
    fn a_flood_that_goes_on_is_told_of_in_every_window() {
        let (mut gates, begin) = (Gates::default(), Instant::now());
        let (mut written, mut left_out) = (0, 0);
        for i in 0..20_001 {
            let (passes, told) = gates.pass(1, "a: x", begin + Duration::from_millis(i));
            written += u64::from(passes);
            left_out += told.iter().map(|(_, n)| n).sum::<u64>();
        }
        // Four windows and the first line of the fifth.
        assert_eq!((written, written + left_out), (4 * BURST + 1, 20_001));
    }

    #[test]
    fn floods_of_many_kinds_are_bounded_together() {
        let (mut gates, begin) = (Gates::default(), Instant::now());
        let written = (1..=100_000).filter(|key| gates.pass(*key, "a: x", begin).0).count();
        assert!(gates.0.len() <= KEPT + 1 && written <= KEPT + BURST as usize, "{written}");
    }
}
