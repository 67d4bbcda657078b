//! A view of a daemon in a terminal: its reactors and what it serves, as they are now.

mod columns;
mod draw;

use std::collections::HashSet;
use std::io::IsTerminal;
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Result, ensure};
use control::client::Client;
use control::stats::Stats;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal::{BeginSynchronizedUpdate, EndSynchronizedUpdate};
use ratatui::crossterm::{execute, queue};

use crate::rates::{DropsNow, ExportNow, Now, QueueNow, Rates, between};
use columns::{Column, columns};

/// The shortest and the longest time between two readings.
const INTERVALS: std::ops::RangeInclusive<f64> = 0.1..=60.0;
/// How long keys are waited for before what was read is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What is shown, and how.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each by itself
pub struct Top {
    now: Option<Now>,
    before: Option<Stats>,
    /// Why there is nothing new.
    trouble: Option<String>,
    sort: Column,
    ascending: bool,
    /// Names of those whose queues are shown.
    unfolded: HashSet<String>,
    /// The name that the cursor is on, and the first line that is shown.
    cursor: Option<String>,
    offset: usize,
    frozen: bool,
    help: bool,
    /// What names have in them that are shown, and whether that is being typed.
    filter: String,
    typing: bool,
    /// Seconds between two readings.
    interval: f64,
    /// Lines of exports that there was room for.
    page: usize,
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
enum Line<'a> {
    Export(&'a ExportNow),
    Queue(&'a QueueNow),
    Drops(&'a DropsNow),
}

impl Line<'_> {
    fn rates(&self) -> &Rates {
        static NONE: LazyLock<Rates> = LazyLock::new(Rates::default);
        match self {
            Line::Drops(_) => &NONE,
            Line::Export(export) => &export.rates,
            Line::Queue(queue) => &queue.rates,
        }
    }
}

impl Top {
    pub fn new(interval: f64) -> Top {
        Top {
            now: None,
            before: None,
            trouble: None,
            sort: Column::Iops,
            ascending: false,
            unfolded: HashSet::new(),
            cursor: None,
            offset: 0,
            frozen: false,
            help: false,
            filter: String::new(),
            typing: false,
            interval: interval.clamp(*INTERVALS.start(), *INTERVALS.end()),
            page: 1,
        }
    }

    /// What the daemon has said now.
    fn read(&mut self, stats: Result<Stats>) {
        match stats {
            Ok(stats) => {
                self.trouble = None;
                let now = self.before.as_ref().and_then(|before| between(before, &stats));
                if !self.frozen && now.is_some() {
                    self.now = now;
                }
                self.before = Some(stats);
            }
            Err(e) => self.trouble = Some(format!("{e:#}")),
        }
    }

    /// Exports in the order that was asked for.
    fn sorted(&self) -> Vec<&ExportNow> {
        let all = self.now.iter().flat_map(|now| &now.exports);
        let mut all: Vec<_> = all.filter(|e| e.label().contains(&self.filter)).collect();
        // Equals stay in the order of their names, whichever way the others go.
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all.sort_by(|a, b| {
            let order = self.sort.compare(a, b);
            if self.ascending { order } else { order.reverse() }
        });
        all
    }

    /// What the daemon is called.
    fn program(&self) -> &str {
        self.now.as_ref().map_or("", |now| &now.program)
    }

    /// All lines, those of queues and of drops below their export.
    fn lines(&self) -> Vec<Line<'_>> {
        let mut lines = Vec::new();
        for export in self.sorted() {
            lines.push(Line::Export(export));
            if self.unfolded.contains(&export.name) {
                lines.extend(export.queues.iter().map(Line::Queue));
                lines.extend(export.drops.iter().map(Line::Drops));
            }
        }
        lines
    }

    /// Moves the cursor by so many exports.
    fn step(&mut self, by: isize) {
        let names: Vec<_> = self.sorted().iter().map(|e| e.name.clone()).collect();
        let at = self.cursor.as_ref().and_then(|name| names.iter().position(|n| n == name));
        let to = at.map_or(0, |at| at.saturating_add_signed(by).min(names.len().saturating_sub(1)));
        self.cursor = names.into_iter().nth(to);
    }

    /// What a key does; true when it is to end.
    fn key(&mut self, key: KeyEvent) -> bool {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return true;
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => {
                    self.typing = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(c) => self.filter.push(c),
                _ => {}
            }
            return false;
        }
        if std::mem::take(&mut self.help) {
            return false;
        }
        let page = isize::try_from(self.page).unwrap_or(1).max(1);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('h' | '?') => self.help = true,
            KeyCode::Left | KeyCode::Char('<') => self.sort = self.sort.next(-1, columns(self.program())),
            KeyCode::Right | KeyCode::Char('>') => self.sort = self.sort.next(1, columns(self.program())),
            KeyCode::Char('r') => self.ascending = !self.ascending,
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::PageUp => self.step(-page),
            KeyCode::PageDown => self.step(page),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            KeyCode::Enter | KeyCode::Char(' ') => {
                if let Some(name) = self.cursor.clone()
                    && !self.unfolded.remove(&name)
                {
                    self.unfolded.insert(name);
                }
            }
            KeyCode::Char('u') => {
                let all: HashSet<_> = self.sorted().iter().map(|e| e.name.clone()).collect();
                self.unfolded = if self.unfolded.is_superset(&all) { HashSet::new() } else { all };
            }
            KeyCode::Char('p') => self.frozen = !self.frozen,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('+') => self.interval = (self.interval * 2.0).min(*INTERVALS.end()),
            KeyCode::Char('-') => self.interval = (self.interval / 2.0).max(*INTERVALS.start()),
            _ => {}
        }
        false
    }
}

/// Reads what the daemon says, again and again, until nobody listens; `pace` is told how often.
fn read(client: &Client, pace: &Receiver<f64>, tell: &Sender<Result<Stats>>, mut every: f64) {
    loop {
        let answer = client.call("GET", "/v1/stats", None);
        let stats = answer.and_then(|a| a.done()).and_then(|json| Ok(serde_json::from_value(json)?));
        if tell.send(stats).is_err() {
            return;
        }
        match pace.recv_timeout(Duration::from_secs_f64(every)) {
            Ok(other) => every = other,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Shows it until somebody has seen enough.
pub fn run(client: Client, interval: f64) -> Result<()> {
    ensure!(
        std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
        "top needs a terminal; `vhostctl --watch list` does without"
    );
    let mut top = Top::new(interval);
    let (pace, paces) = channel();
    let (tell, told) = channel();
    let every = top.interval;
    // Not waited for: a daemon may take its time to answer.
    std::thread::spawn(move || read(&client, &paces, &tell, every));
    let mut terminal = ratatui::init();
    let ended = watch(&mut terminal, &mut top, &pace, &told);
    ratatui::restore();
    ended
}

fn watch(
    terminal: &mut DefaultTerminal,
    top: &mut Top,
    pace: &Sender<f64>,
    told: &Receiver<Result<Stats>>,
) -> Result<()> {
    loop {
        // All at once, where the terminal can: nobody sees half a line.
        queue!(terminal.backend_mut(), BeginSynchronizedUpdate)?;
        terminal.draw(|frame| top.draw(frame))?;
        execute!(terminal.backend_mut(), EndSynchronizedUpdate)?;
        let mut changed = false;
        while !changed {
            let input = event::poll(TICK)?.then(event::read).transpose()?;
            match input {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    let every = top.interval;
                    if top.key(key) {
                        return Ok(());
                    }
                    if every.to_bits() != top.interval.to_bits() {
                        // The reader ends only with this.
                        let _ = pace.send(top.interval);
                    }
                    changed = true;
                }
                Some(Event::Resize(..)) => changed = true,
                _ => {}
            }
            if let Ok(stats) = told.try_recv() {
                top.read(stats);
                changed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
