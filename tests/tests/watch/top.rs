//! `vhostctl top` in a pseudo-terminal, with a daemon under load: keys are pressed and the screen is read as a terminal
//! would show it.
#![allow(unsafe_code)] // makes the pseudo-terminal, which no crate here does

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use kickless_tests::process::built;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::load::{Load, NetLoad, value};
use crate::rig::{LIMIT, Rig};

/// How a program says that what it has drawn is whole, as terminals do that can show it all at once.
const WHOLE: &[u8] = b"\x1b[?2026l";

struct Terminal {
    child: Child,
    master: File,
    screen: Arc<Mutex<Screen>>,
}

struct Screen {
    parser: vt100::Parser,
    /// What it showed when it was whole last.
    lines: Vec<String>,
    /// What came behind that.
    rest: Vec<u8>,
}

impl Screen {
    fn read(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        while let Some(at) = self.rest.windows(WHOLE.len()).position(|part| part == WHOLE) {
            let rest = self.rest.split_off(at + WHOLE.len());
            self.parser.process(&std::mem::replace(&mut self.rest, rest));
            let screen = self.parser.screen();
            let (_, cols) = screen.size();
            self.lines = screen.rows(0, cols).map(|row| row.trim_end().to_owned()).collect();
        }
    }

    /// Whether what it shows now, whole or not, is beside what it showed before the program began.
    fn is_alternate(&mut self) -> bool {
        self.parser.process(&std::mem::take(&mut self.rest));
        self.parser.screen().alternate_screen()
    }
}

/// Both ends of a new pseudo-terminal: that of the one who looks at it, and that of the program.
fn open(rows: u16, cols: u16) -> Result<(File, File)> {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    let mut size = size(rows, cols);
    // SAFETY: the two descriptors and the size are there to be written and read, the rest may be null.
    let done = unsafe { libc::openpty(&raw mut master, &raw mut slave, none, none.cast(), &raw mut size) };
    nix::Error::result(done)?;
    // SAFETY: both were made just now, for nobody else.
    Ok(unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) })
}

fn size(rows: u16, cols: u16) -> libc::winsize {
    libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    fn start(rig: &Rig, rows: u16, cols: u16) -> Result<Terminal> {
        let (master, slave) = open(rows, cols)?;
        // A session of its own, whose terminal this is: it hears of another size.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", "setpriv", "--pdeathsig", "KILL", "--"])
            .arg(built("vhostctl").context("vhostctl is not built: cargo build -p vhostctl")?)
            .args(["--api", &rig.path("api"), "top", "--interval", "0.2"])
            .env("TERM", "xterm-256color")
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave))
            .spawn()
            .context("setsid (package util-linux)")?;
        let screen = Screen { parser: vt100::Parser::new(rows, cols, 0), lines: vec![], rest: vec![] };
        let screen = Arc::new(Mutex::new(screen));
        let (mut reads, shown) = (master.try_clone()?, Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Ends with an error when the last one on the other side is gone.
            while let Ok(n @ 1..) = reads.read(&mut bytes) {
                shown.lock().unwrap().read(&bytes[..n]);
            }
        });
        Ok(Terminal { child, master, screen })
    }

    fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    fn lines(&self) -> Vec<String> {
        self.screen.lock().unwrap().lines.clone()
    }

    /// Waits until the screen is so.
    fn shows(&self, what: &str, is: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
        let seen = wait::until(what, LIMIT, || {
            let lines = self.lines();
            Ok(is(&lines).then_some(lines))
        });
        seen.with_context(|| format!("on the screen:\n{}", self.lines().join("\n")))
    }

    fn resize(&mut self, rows: u16, cols: u16) -> Result<()> {
        self.screen.lock().unwrap().parser.screen_mut().set_size(rows, cols);
        let size = size(rows, cols);
        // SAFETY: the descriptor is that of a terminal, and the structure is read.
        let done = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        nix::Error::result(done)?;
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The group, which it leads: `setsid` waits for what it has started.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The number behind a `k` or `M`.
fn number(text: &str) -> f64 {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "k" => 1e3,
        "M" => 1e6,
        _ => 1.0,
    };
    digits.parse::<f64>().unwrap_or(-1.0) * unit
}

/// The cells of the line of a disk.
fn line_of<'a>(lines: &'a [String], disk: &str) -> Option<Vec<&'a str>> {
    let cells = |line: &'a String| line.split_whitespace().collect::<Vec<_>>();
    lines.iter().map(cells).find(|cells| cells.get(1) == Some(&disk))
}

pub fn is_used(_: &Scene) -> Result<Option<String>> {
    let mut load = Load::start(&["web", "mail"])?;
    load.rig.add("archive", "backend=null:1G");
    let mut terminal = Terminal::start(&load.rig, 24, 80)?;
    let loaded = |lines: &[String], disk: &str| {
        line_of(lines, disk).is_some_and(|cells| number(cells[2]) > 0.0 && cells[6].ends_with('s'))
    };
    let seen =
        terminal.shows("two disks under load", |lines| loaded(lines, "web") && loaded(lines, "mail"))?;
    ensure!(
        seen.len() == 24 && seen[0].contains("vhost-blk") && seen[0].contains("3 exports, 2 attached"),
        "{seen:?}"
    );
    ensure!(
        seen[3].contains("any")
            && seen[3].contains('%')
            && seen[3].contains(['\u{2588}', '\u{2592}', '\u{b7}']),
        "{}",
        seen[3]
    );
    let idle = line_of(&seen, "archive").context("the idle disk")?;
    ensure!(idle[2..] == ["0", "0", "0", "-", "-", "-", "0", "-"], "{idle:?}");

    // By name: twice to the left of IOPS is none, once is.
    terminal.press("\x1b[D")?;
    let is_at = |lines: &[String], row: usize, disk: &str| lines[row].split_whitespace().nth(1) == Some(disk);
    terminal.shows("disks by name", |lines| {
        is_at(lines, 5, "archive") && is_at(lines, 6, "mail") && is_at(lines, 7, "web")
    })?;
    terminal.press("r")?;
    terminal
        .shows("disks by name, backwards", |lines| is_at(lines, 5, "web") && is_at(lines, 7, "archive"))?;
    // The queues of the first one.
    terminal.press("\x1b[B\r")?;
    terminal.shows("queues", |lines| lines[6].contains("0 on r0") && lines[7].contains("1 on r0"))?;
    terminal.press("h")?;
    terminal.shows("help", |lines| lines.iter().any(|line| line.contains("sort by another column")))?;
    terminal.press("h")?;
    // What is bigger shows more.
    terminal.resize(30, 120)?;
    let seen = terminal
        .shows("a wider screen", |lines| lines[4].contains("REQUESTS") && lines[4].contains("IRQS/s"))?;
    ensure!(seen.len() == 30, "{seen:?}");
    // Agrees with what the daemon counts: what was shown last was so or less, and is soon more.
    let total = load.requests("web") as f64;
    terminal.shows("as many requests as were counted", |lines| {
        line_of(lines, "web").is_some_and(|cells| number(cells[10]) >= total * 0.99)
    })?;

    load.stop()?;
    terminal.shows("disks that rest", |lines| line_of(lines, "web").is_some_and(|cells| cells[2] == "0"))?;
    let seen = terminal.lines();
    let shown = number(line_of(&seen, "web").context("web")?[10]);
    let total = load.requests("web") as f64;
    ensure!((shown - total).abs() <= total * 0.01, "{shown} shown, {total} counted");
    load.rig.end();
    terminal.shows("that the daemon is gone", |lines| lines[29].contains("cannot reach a daemon"))?;
    terminal.press("q")?;
    let child = &mut terminal.child;
    let status = wait::until("its end", LIMIT, || Ok(child.try_wait()?))?;
    ensure!(status.success(), "{status}");
    // Its last words may be read after its end.
    wait::until("the terminal as it was", LIMIT, || {
        Ok((!terminal.screen.lock().unwrap().is_alternate()).then_some(()))
    })?;
    Ok(None)
}

/// Ports have packets, bits in both ways, and drops with their reasons.
pub fn shows_ports(_: &Scene) -> Result<Option<String>> {
    let mut load = NetLoad::start()?;
    let mut terminal = Terminal::start(&load.rig, 24, 80)?;
    let moves = |lines: &[String], port: &str| {
        let cells = line_of(lines, port);
        cells.is_some_and(|cells| cells.get(2..=6).is_some_and(|c| c.iter().all(|cell| number(cell) > 0.0)))
    };
    // Lines may be seen before they are drawn to the end.
    let rests = |lines: &[String]| {
        line_of(lines, "idle").is_some_and(|cells| cells[2..] == ["0", "0", "0", "0", "0", "0", "0", "-"])
    };
    let seen = terminal.shows("two ports under load, and one at rest", |lines| {
        moves(lines, "a") && moves(lines, "b") && rests(lines)
    })?;
    ensure!(seen[0].contains("vhost-net") && seen[0].contains("3 exports, 2 attached"), "{}", seen[0]);
    ensure!(
        seen[1].contains("packets") && seen[1].contains("bit/s") && seen[1].contains("drops"),
        "{}",
        seen[1]
    );
    let titles: Vec<_> = seen[4].split_whitespace().collect();
    let expected = ["NAME", "PPS\u{25bc}", "RX/s", "TX/s", "RXbit/s", "TXbit/s", "DROP/s", "DROPS", "LIMIT"];
    assert_eq!(titles, expected);

    // Too much for a receiver is dropped, and it is said why; too much of a sender's waits.
    load.limit("b", json!({ "rx-pps": 10 }));
    load.limit("a", json!({ "tx-pps": 500 }));
    terminal.shows("drops of b, and waits of a", |lines| {
        let dropped = |cells: Vec<&str>| number(cells[7]) > 0.0 && number(cells[8]) > 0.0;
        line_of(lines, "b").is_some_and(dropped)
            && line_of(lines, "a").is_some_and(|cells| cells[9].ends_with('%'))
    })?;
    terminal.press("u")?;
    terminal.shows("queues and reasons", |lines| {
        let says = |what: &str| lines.iter().any(|line| line.contains(what));
        says("0 on r0") && says("1 on r0") && says("switch_tx_rate_limit_drops: ")
    })?;
    // By what was sent, twice to the right of PPS: `b` sends more than `a` may.
    terminal.press("u\x1b[C\x1b[C")?;
    terminal.shows("ports by what they send", |lines| {
        let is_at = |row: usize, port: &str| lines[row].split_whitespace().nth(1) == Some(port);
        lines[4].contains("TX/s\u{25bc}") && is_at(5, "b") && is_at(6, "a") && is_at(7, "idle")
    })?;

    // At rest it agrees with what the daemon has counted.
    load.stop()?;
    terminal.resize(30, 120)?;
    for port in ["a", "b"] {
        let now = load.rig.port(port);
        let sum =
            |what: &str| ["rx", "tx"].iter().filter_map(|way| now[way][what].as_u64()).sum::<u64>() as f64;
        let (packets, drops) = (sum("packets"), sum("discards") + sum("errors"));
        terminal.shows("as many packets and drops as were counted", |lines| {
            line_of(lines, port).is_some_and(|cells| {
                let near = |cell: &str, n: f64| (number(cell) - n).abs() <= n * 0.01;
                // A narrow one of before has fewer.
                let all = cells.get(10);
                cells[2] == "0" && all.is_some_and(|all| near(all, packets)) && near(cells[8], drops)
            })
        })?;
    }
    terminal.press("q")?;
    let status = wait::until("its end", LIMIT, || Ok(terminal.child.try_wait()?))?;
    ensure!(status.success(), "{status}");
    load.end()
}

/// A limit that is hit is in the metrics and on the screen, and one that is taken away is not.
pub fn shows_limits(_: &Scene) -> Result<Option<String>> {
    let load = Load::start(&["slow", "free"])?;
    let terminal = Terminal::start(&load.rig, 24, 80)?;
    let metrics = || String::from_utf8(load.rig.call("GET", "/metrics", None).body).unwrap();
    let sum = |what: &str, disk: &str| -> f64 {
        let text = metrics();
        (0..2)
            .filter_map(|queue| {
                value(&text, &format!("vhost_blk_{what}{{disk=\"{disk}\",queue=\"{queue}\"}}"))
            })
            .sum()
    };
    let limited = |lines: &[String], disk: &str| line_of(lines, disk).map(|cells| cells[9].to_owned());
    terminal.shows("two disks without limits", |lines| {
        ["slow", "free"].iter().all(|disk| limited(lines, disk).as_deref() == Some("-"))
    })?;
    ensure!(sum("limited_total", "slow") == 0.0, "{}", metrics());

    load.rig.does(200, "PUT", "/v1/disks/slow/limits", Some(json!({ "iops-total": 50 })));
    terminal.shows("that a limit is hit", |lines| {
        limited(lines, "slow").is_some_and(|cell| cell.ends_with('%'))
            && limited(lines, "free").as_deref() == Some("-")
    })?;
    wait::until("waits in the metrics", LIMIT, || {
        Ok((sum("limited_total", "slow") > 0.0 && sum("limited_seconds_total", "slow") > 0.0).then_some(()))
    })?;
    ensure!(sum("limited_total", "free") == 0.0, "{}", metrics());

    load.rig.does(200, "PUT", "/v1/disks/slow/limits", Some(json!({})));
    terminal.shows("that there is none any more", |lines| limited(lines, "slow").as_deref() == Some("-"))?;
    load.end()?;
    Ok(None)
}
