//! How the view looks.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line as TextLine, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use super::columns::{Column, NAME, columns, is_net, percent, short, time};
use super::{Line, Top};
use crate::rates::{DropsNow, Now, ReactorNow};

/// What reactors and exports have at least of a small screen.
const EXPORTS: u16 = 6;
/// Before the bar of a reactor: its number, CPU, queues, and three shares.
const SHARES: usize = 45;

const BUSY: Color = Color::Green;
const IDLE: Color = Color::Yellow;
const ASLEEP: Color = Color::Blue;

const KEYS: [(&str, &str); 10] = [
    ("\u{2190} \u{2192}", "sort by another column"),
    ("r", "in the other order"),
    ("\u{2191} \u{2193} PgUp PgDn Home End", "another export"),
    ("Enter", "its queues, and why packets were dropped, or not"),
    ("u", "all queues, or none"),
    ("/", "those whose name has something in it; Esc: all"),
    ("p", "stand still, or go on"),
    ("+ -", "look less often, more often"),
    ("h", "this help"),
    ("q", "end"),
];

impl Top {
    pub fn draw(&mut self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let reactors = self.now.as_ref().map_or(0, |now| now.reactors.len() as u16);
        let room = area.height.saturating_sub(4 + EXPORTS).max(1);
        let [head, reactors, exports, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(1 + reactors.clamp(1, room)),
            Constraint::Min(2),
            Constraint::Length(1),
        ])
        .areas(area);
        match &self.now {
            Some(now) => {
                self.draw_head(frame, head, now);
                draw_reactors(frame, reactors, &now.reactors);
            }
            None if self.trouble.is_none() => {
                frame.render_widget(Paragraph::new(" reading the daemon's counters"), head);
            }
            None => {}
        }
        self.draw_exports(frame, exports);
        self.draw_foot(frame, foot);
        if self.help {
            draw_help(frame);
        }
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect, now: &Now) {
        let name = format!(" {} {} ", now.program, now.version);
        let attached = now.exports.iter().filter(|e| e.attached).count();
        let about =
            format!(" pid {}  {}  {} exports, {attached} attached", now.pid, now.poll, now.exports.len());
        let every =
            if self.frozen { " stands still ".into() } else { format!(" every {} s ", self.interval) };
        let gap = usize::from(area.width).saturating_sub(name.len() + about.len() + every.len());
        let every = if self.frozen { every.black().on_yellow() } else { every.into() };
        let first = TextLine::from(vec![name.bold().reversed(), about.into(), " ".repeat(gap).into(), every]);
        let all = &now.all;
        let p = all.percentiles.map_or(["-".into(), "-".into(), "-".into()], |p| p.map(time));
        let mut second = vec![Span::from(" ")];
        let mut say = |what: &'static str, value: String, style: Style| {
            second.extend([what.dim(), " ".into(), Span::styled(value, style), "  ".into()]);
        };
        let bold = Style::new().bold();
        if is_net(&now.program) {
            say("packets", format!("{}/s", short(all.iops)), bold);
            say("rx", format!("{}bit/s", short(8.0 * all.read)), bold);
            say("tx", format!("{}bit/s", short(8.0 * all.written)), bold);
            say("drops", format!("{}/s", short(all.dropped)), bold);
            say("in all", short(all.errors.0 as f64), errors(all.errors));
        } else {
            say("iops", short(all.iops), bold);
            say("read", format!("{}B/s", short(all.read)), bold);
            say("write", format!("{}B/s", short(all.written)), bold);
            say("p50/99/99.9", p.join(" "), bold);
            say("errors", short(all.errors.0 as f64), errors(all.errors));
        }
        frame.render_widget(Paragraph::new(vec![first, TextLine::from(second)]), area);
    }

    fn draw_exports(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let is_net = is_net(self.program());
        let columns = fitting(area.width, columns(self.program()));
        let name = NAME + area.width.saturating_sub(columns.iter().map(|c| c.width()).sum());
        let head = columns.iter().map(|&column| {
            let mark = match (column == self.sort, self.ascending) {
                (true, true) => "\u{25b2}",
                (true, false) => "\u{25bc}",
                _ => "",
            };
            let title = format!("{}{mark}", column.title(is_net));
            let style = if column == self.sort { Style::new().bold().cyan() } else { Style::new().bold() };
            Span::styled(aligned(column, &title, name), style)
        });
        let mut text = vec![TextLine::from(head.collect::<Vec<_>>()).underlined()];
        let room = usize::from(area.height.saturating_sub(1));
        self.page = room;
        let lines = self.lines();
        let at = lines
            .iter()
            .position(|line| matches!(line, Line::Export(e) if Some(&e.name) == self.cursor.as_ref()));
        // What the cursor is on is seen, with its queues if they fit.
        let mut offset = self.offset.min(lines.len().saturating_sub(room));
        if let Some(at) = at {
            let queues = lines[at + 1..].iter().take_while(|line| !matches!(line, Line::Export(_))).count();
            offset = offset.max((at + 1 + queues).saturating_sub(room)).min(at);
        }
        for (i, line) in lines.iter().enumerate().skip(offset).take(room) {
            let (unfolded, paused, attached) = match line {
                Line::Export(e) => (self.unfolded.contains(&e.name), e.paused, e.attached),
                Line::Queue(q) => (false, false, q.reactor.is_some()),
                Line::Drops(drops) => {
                    text.push(draw_drops(drops));
                    continue;
                }
            };
            let cells = columns.iter().map(|&column| {
                let mut cell = column.cell(line, unfolded, is_net);
                if column == Column::Name && paused {
                    cell.push_str(" paused");
                }
                Span::styled(aligned(column, &cell, name), style_of(column, line, attached))
            });
            let row = TextLine::from(cells.collect::<Vec<_>>());
            text.push(if Some(i) == at { row.style(Style::new().bg(Color::DarkGray)) } else { row });
        }
        if lines.is_empty() && self.now.is_some() {
            let none =
                if self.filter.is_empty() { "  nothing is served" } else { "  nothing of such a name" };
            text.push(none.into());
        }
        frame.render_widget(Paragraph::new(text), area);
        self.offset = offset;
    }

    fn draw_foot(&self, frame: &mut Frame<'_>, area: Rect) {
        let line = if let Some(trouble) = &self.trouble {
            TextLine::from(format!(" {trouble} ")).white().on_red()
        } else if self.typing || !self.filter.is_empty() {
            let end = if self.typing { "\u{2588}  Enter: done  Esc: all" } else { "  /: change" };
            TextLine::from(vec![" name has ".dim(), self.filter.as_str().bold(), end.into()])
        } else {
            let all = self.lines().len();
            let shown = (self.offset + self.page).min(all);
            let keys = " \u{2190}\u{2192} sort  r reverse  \u{2191}\u{2193} move  Enter queues  / find  h help  q quit";
            let place =
                if self.page < all { format!("{}-{shown}/{all} ", self.offset + 1) } else { String::new() };
            let gap = usize::from(area.width).saturating_sub(keys.chars().count() + place.len());
            TextLine::from(format!("{keys}{}{place}", " ".repeat(gap))).dim()
        };
        frame.render_widget(Paragraph::new(line), area);
    }
}

/// Why packets went nowhere: a reason has a longer name than a column has room for.
fn draw_drops(drops: &DropsNow) -> TextLine<'static> {
    let said = format!("  \u{2514} {}: {}, {}/s", drops.reason, short(drops.all as f64), short(drops.rate));
    TextLine::from(said).style(if drops.rate > 0.0 { Style::new().red() } else { Style::new().dim() })
}

/// As many of these columns as there is room for, in their order.
fn fitting(width: u16, all: &[Column]) -> Vec<Column> {
    let mut used = 0;
    let fits = |column: &Column| {
        used += column.width();
        used <= width
    };
    all.iter().copied().take_while(fits).collect()
}

/// In its column: names to the left, numbers to the right; what is too long loses its end.
fn aligned(column: Column, text: &str, name: u16) -> String {
    let width = usize::from(if column == Column::Name { name } else { column.width() });
    if column != Column::Name {
        return format!("{text:>width$}");
    }
    if text.chars().count() < width {
        return format!("{text:<width$}");
    }
    let kept: String = text.chars().take(width.saturating_sub(2)).collect();
    format!("{kept}\u{2026} ")
}

fn errors((all, now): (u64, u64)) -> Style {
    match (all, now) {
        (0, _) => Style::new().dim(),
        (_, 0) => Style::new().red(),
        _ => Style::new().red().bold().reversed(),
    }
}

fn style_of(column: Column, line: &Line<'_>, attached: bool) -> Style {
    let rates = line.rates();
    let style = match column {
        Column::Errors => return errors(rates.errors),
        Column::Limited if rates.limited > 0.0 => return Style::new().magenta().bold(),
        Column::Name if matches!(line, Line::Export(_)) && attached => Style::new().bold(),
        _ => Style::new(),
    };
    let quiet = !attached || matches!(line, Line::Queue(_)) || rates.iops <= 0.0 && column != Column::Name;
    if quiet { style.add_modifier(Modifier::DIM) } else { style }
}

fn draw_reactors(frame: &mut Frame<'_>, area: Rect, reactors: &[ReactorNow]) {
    let title =
        format!("{:<10}{:>5}{:>8}{:>7}{:>7}{:>8}", " REACTOR", "CPU", "QUEUES", "BUSY", "IDLE", "ASLEEP");
    let mut text = vec![TextLine::from(format!("{title:<w$}", w = area.width.into())).bold().underlined()];
    let room = usize::from(area.height.saturating_sub(1));
    // The last line says how many more there are.
    let shown = if reactors.len() > room { room.saturating_sub(1) } else { room };
    for r in reactors.iter().take(shown) {
        let cpu = r.cpu.map_or("any".into(), |cpu| cpu.to_string());
        let shares = [r.busy, r.idle, r.asleep].map(percent);
        let said = format!(
            " {:<9}{cpu:>5}{:>8}{:>7}{:>7}{:>8} ",
            r.reactor, r.queues, shares[0], shares[1], shares[2]
        );
        let width = usize::from(area.width).saturating_sub(SHARES + 3);
        let [busy, idle] = [r.busy, r.busy + r.idle].map(|to| (to * width as f64).round() as usize);
        let (busy, idle, asleep) = (busy, idle.max(busy) - busy, width.saturating_sub(idle.max(busy)));
        text.push(TextLine::from(vec![
            said.into(),
            Span::from("\u{2588}".repeat(busy)).fg(BUSY),
            Span::from("\u{2592}".repeat(idle)).fg(IDLE),
            Span::from("\u{00b7}".repeat(asleep)).fg(ASLEEP),
        ]));
    }
    if shown < reactors.len() {
        let rest = &reactors[shown..];
        let busiest = rest.iter().map(|r| r.busy).fold(0.0, f64::max);
        text.push(
            TextLine::from(format!(" and {} more, at most {} busy", rest.len(), percent(busiest))).dim(),
        );
    }
    frame.render_widget(Paragraph::new(text), area);
}

fn draw_help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let lines: Vec<_> = KEYS
        .iter()
        .map(|(key, what)| TextLine::from(vec![format!(" {key:<23}").bold().cyan(), (*what).into()]))
        .chain(["".into()])
        .chain([
            TextLine::from(vec![
                " \u{2588} busy ".fg(BUSY),
                "\u{2592} idle: looks in vain ".fg(IDLE),
                "\u{00b7} asleep".fg(ASLEEP),
            ]),
            " LIMIT: share of the time that a limit had requests wait".into(),
        ])
        .collect();
    let (width, height) = (area.width.min(76), area.height.min(lines.len() as u16 + 2));
    let at = Rect::new((area.width - width) / 2, (area.height - height) / 2, width, height);
    frame.render_widget(Clear, at);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" keys ")), at);
}
