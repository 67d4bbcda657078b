use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::Color;

use super::*;
use crate::rates::ReactorNow;

fn rates(iops: f64, p99: u64) -> Rates {
    let percentiles = (iops > 0.0).then_some([p99 / 10, p99, 2 * p99]);
    Rates {
        iops,
        read: iops * 4096.0,
        written: 0.0,
        percentiles,
        requests: iops as u64 * 60,
        ..Rates::default()
    }
}

fn export(name: &str, iops: f64, p99: u64) -> ExportNow {
    let queue = |queue| QueueNow { queue, reactor: Some(usize::from(queue)), rates: rates(iops / 2.0, p99) };
    let queues = vec![queue(0), queue(1)];
    ExportNow {
        name: name.into(),
        attached: iops > 0.0,
        rates: rates(iops, p99),
        queues,
        ..ExportNow::default()
    }
}

fn top() -> Top {
    let mut exports = vec![
        export("web", 120_000.0, 85_000),
        export("mail", 0.0, 0),
        export("database", 52_300.0, 1_250_000),
    ];
    exports[2].rates.errors = (3, 1);
    exports[2].rates.limited = 0.37;
    let reactor = |reactor, busy: f64, idle: f64| {
        let (cpu, asleep) = ((reactor > 0).then_some(reactor), 1.0 - busy - idle);
        ReactorNow { reactor, cpu, queues: 3, busy, idle, asleep }
    };
    let now = Now {
        program: "vhost-blk".into(),
        version: "0.1.0".into(),
        pid: 4711,
        poll: "adaptive".into(),
        reactors: vec![reactor(0, 0.5, 0.25), reactor(1, 0.0, 0.0)],
        all: rates(172_300.0, 90_000),
        exports,
    };
    Top { now: Some(now), ..Top::new(1.0) }
}

fn screen(top: &mut Top, width: u16, height: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| top.draw(frame)).unwrap();
    terminal
}

/// Lines of the screen, without spaces at their ends.
fn lines(terminal: &Terminal<TestBackend>) -> Vec<String> {
    let buffer = terminal.backend().buffer();
    let (width, height) = (buffer.area.width, buffer.area.height);
    let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| row(y).trim_end().to_owned()).collect()
}

fn press(top: &mut Top, keys: &[KeyCode]) {
    for key in keys {
        assert!(!top.key(KeyEvent::from(*key)), "{key:?} ends it");
    }
}

fn order(top: &Top) -> Vec<&str> {
    top.sorted().iter().map(|e| e.name.as_str()).collect()
}

#[test]
fn eighty_columns_have_all_that_matters() {
    let mut top = top();
    press(&mut top, &[KeyCode::Down, KeyCode::Enter]);
    let terminal = screen(&mut top, 80, 24);
    let seen = lines(&terminal);
    let expected = [
        " vhost-blk 0.1.0  pid 4711  adaptive  3 exports, 2 attached           every 1 s",
        " iops 172k  read 706MB/s  write 0B/s  p50/99/99.9 9.00us 90.0us 180us  errors 0",
        " REACTOR    CPU  QUEUES   BUSY   IDLE  ASLEEP",
        " 0          any       3    50%    25%     25% ████████████████▒▒▒▒▒▒▒▒········",
        " 1            1       3      -      -    100% ································",
        "NAME            IOPS▼   READ/s  WRITE/s     P50     P99   P99.9   ERRORS   LIMIT",
        "▾ web            120k     492M        0  8.50us  85.0us   170us        0       -",
        "  └ 0 on r0     60.0k     246M        0  8.50us  85.0us   170us        0       -",
        "  └ 1 on r1     60.0k     246M        0  8.50us  85.0us   170us        0       -",
        "▸ database      52.3k     214M        0   125us  1.25ms  2.50ms        3     37%",
        "▸ mail              0        0        0       -       -       -        0       -",
    ];
    assert_eq!(&seen[..expected.len()], expected);
    assert!(seen[23].contains("q quit"), "{}", seen[23]);
    let buffer = terminal.backend().buffer();
    assert_eq!(
        (buffer[(46, 3)].fg, buffer[(62, 3)].fg, buffer[(70, 3)].fg),
        (Color::Green, Color::Yellow, Color::Blue)
    );
    // Errors that came now are red, the cursor is where it was moved to.
    assert_eq!(buffer[(71, 9)].fg, Color::Red);
    assert_eq!((buffer[(0, 6)].bg, buffer[(0, 7)].bg), (Color::DarkGray, Color::Reset));
}

#[test]
fn wide_screens_have_more_and_narrow_ones_less() {
    let mut top = top();
    let wide = lines(&screen(&mut top, 120, 30));
    assert!(wide[5].ends_with("REQUESTS  KICKS/s   IRQS/s    PEAK"), "{}", wide[5]);
    let narrow = lines(&screen(&mut top, 50, 24));
    assert!(narrow[5].ends_with("P50") && !narrow[5].contains("P99"), "{}", narrow[5]);
    // Nothing is too small: it shows what it can.
    for (width, height) in [(1, 1), (5, 3), (20, 6), (80, 4), (400, 2)] {
        press(&mut top, &[KeyCode::Char('h')]);
        screen(&mut top, width, height);
        press(&mut top, &[KeyCode::Char('h')]);
        screen(&mut top, width, height);
    }
}

#[test]
fn a_screen_that_is_resized_is_drawn_anew() {
    let mut top = top();
    let mut terminal = screen(&mut top, 120, 30);
    terminal.backend_mut().resize(80, 24);
    terminal.draw(|frame| top.draw(frame)).unwrap();
    assert_eq!(lines(&terminal), lines(&screen(&mut top, 80, 24)));
}

#[test]
fn any_column_sorts_both_ways() {
    let mut top = top();
    assert_eq!(order(&top), ["web", "database", "mail"]);
    press(&mut top, &[KeyCode::Char('r')]);
    assert_eq!(order(&top), ["mail", "database", "web"]);
    press(&mut top, &[KeyCode::Char('r'), KeyCode::Left]);
    assert_eq!((top.sort, order(&top)), (Column::Name, vec!["database", "mail", "web"]));
    let expected = [
        (Column::Name, ["database", "mail", "web"]),
        (Column::Iops, ["web", "database", "mail"]),
        (Column::Read, ["web", "database", "mail"]),
        (Column::Written, ["database", "mail", "web"].map(|_| "")),
        (Column::P50, ["database", "web", "mail"]),
        (Column::P99, ["database", "web", "mail"]),
        (Column::P999, ["database", "web", "mail"]),
        (Column::Errors, ["database", "", ""]),
        (Column::Limited, ["database", "", ""]),
        (Column::Requests, ["web", "database", "mail"]),
    ];
    for (column, names) in expected {
        assert_eq!(top.sort, column);
        for (name, seen) in names.iter().zip(order(&top)).filter(|(name, _)| !name.is_empty()) {
            assert_eq!(*name, seen, "{column:?}");
        }
        press(&mut top, &[KeyCode::Right]);
    }
    press(&mut top, &[KeyCode::Right, KeyCode::Right, KeyCode::Right]);
    assert_eq!(top.sort, Column::Name, "round and round");
}

#[test]
fn ports_are_shown_and_found_with_their_switch() {
    let mut top = top();
    let now = top.now.as_mut().unwrap();
    now.program = "vhost-net".into();
    now.exports[0].switch = Some("blue".into());
    let seen = lines(&screen(&mut top, 120, 24));
    assert!(seen.iter().any(|line| line.contains("web on blue")), "{seen:?}");
    press(&mut top, &"/blu".chars().map(KeyCode::Char).collect::<Vec<_>>());
    assert_eq!(order(&top), ["web"]);
}

#[test]
fn long_lists_scroll_with_the_cursor_and_are_found_by_name() {
    let mut top = top();
    top.now.as_mut().unwrap().exports =
        (0..1000).map(|i| export(&format!("d{i:03}"), 1000.0 - f64::from(i), 1)).collect();
    let seen = lines(&screen(&mut top, 80, 24));
    assert!(seen[23].ends_with("1-17/1000"), "{}", seen[23]);
    press(&mut top, &[KeyCode::Down, KeyCode::PageDown, KeyCode::PageDown]);
    let seen = lines(&screen(&mut top, 80, 24));
    assert!(seen[22].starts_with("▸ d034") && seen[23].ends_with("19-35/1000"), "{seen:?}");
    press(&mut top, &[KeyCode::End, KeyCode::Enter]);
    let seen = lines(&screen(&mut top, 80, 24));
    assert!(seen[20].starts_with("▾ d999") && seen[22].starts_with("  └ 1"), "{seen:?}");
    press(&mut top, &[KeyCode::Home]);
    assert!(lines(&screen(&mut top, 80, 24))[6].starts_with("▸ d000"));
    press(
        &mut top,
        &[KeyCode::Char('/'), KeyCode::Char('q'), KeyCode::Backspace, KeyCode::Char('7'), KeyCode::Char('7')],
    );
    assert_eq!(order(&top).len(), 19);
    press(&mut top, &[KeyCode::Enter, KeyCode::Char('/'), KeyCode::Esc]);
    assert_eq!(order(&top).len(), 1000);
    // More reactors than there is room for.
    let now = top.now.as_mut().unwrap();
    now.reactors =
        (0..40).map(|reactor| ReactorNow { reactor, busy: 0.5, ..ReactorNow::default() }).collect();
    let seen = lines(&screen(&mut top, 80, 24));
    assert!(seen.contains(&" and 27 more, at most 50% busy".to_owned()), "{seen:?}");
    assert!(seen.iter().any(|line| line.starts_with("▸ d000")), "{seen:?}");
}

#[test]
fn what_goes_wrong_is_said_and_what_stands_still_stands() {
    let mut top = top();
    top.read(Err(anyhow::anyhow!("cannot reach a daemon at /x")));
    assert!(lines(&screen(&mut top, 80, 24))[23].contains("cannot reach a daemon at /x"));
    press(&mut top, &[KeyCode::Char('p')]);
    let stats = |now_ns| Stats { now_ns, pid: 1, ..Stats::default() };
    top.read(Ok(stats(1)));
    top.read(Ok(stats(2)));
    let seen = lines(&screen(&mut top, 80, 24));
    assert!(seen[0].ends_with("stands still") && seen[6].starts_with("▸ web"), "{seen:?}");
    press(&mut top, &[KeyCode::Char('p')]);
    top.read(Ok(stats(3)));
    assert!(lines(&screen(&mut top, 80, 24)).contains(&"  nothing is served".to_owned()));
    assert!(top.key(KeyEvent::from(KeyCode::Char('q'))));
    assert!(top.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
}

#[test]
fn numbers_are_short() {
    use super::columns::{percent, short, time};
    let texts = [0.0, 7.4, 999.4, 999.6, 1234.0, 12_345.0, 99_960.0, 123_456.0, 999_600.0, 5.0e9].map(short);
    assert_eq!(texts, ["0", "7", "999", "1.00k", "1.23k", "12.3k", "100k", "123k", "1.00M", "5.00G"]);
    assert_eq!(
        [0, 850, 85_000, 1_250_000, 3_000_000_000].map(time),
        ["0ns", "850ns", "85.0us", "1.25ms", "3.00s"]
    );
    assert_eq!([0.0, 0.001, 0.5, 0.996, 0.9996].map(percent), ["-", "<1%", "50%", "99%", "100%"]);
}

#[test]
fn ports_have_columns_of_their_own() {
    let mut top = top();
    let now = top.now.as_mut().unwrap();
    now.program = "vhost-net".into();
    now.exports.truncate(2);
    let web = &mut now.exports[0];
    web.rates = Rates {
        ways: [100_000.0, 20_000.0],
        written: 1e6,
        dropped: 5.0,
        errors: (12, 3),
        ..rates(120_000.0, 1)
    };
    web.drops = vec![DropsNow { reason: "rx_no_buffers_drops".into(), all: 12, rate: 5.0 }];
    now.all = web.rates.clone();
    press(&mut top, &[KeyCode::Down, KeyCode::Enter, KeyCode::Right, KeyCode::Right]);
    assert_eq!((top.sort, order(&top)), (Column::Sent, vec!["web", "mail"]));
    let terminal = screen(&mut top, 80, 24);
    let seen = lines(&terminal);
    let expected = [
        " packets 120k/s  rx 3.93Gbit/s  tx 8.00Mbit/s  drops 5/s  in all 12",
        "NAME              PPS    RX/s   TX/s▼  RXbit/s  TXbit/s  DROP/s    DROPS   LIMIT",
        "▾ web            120k    100k   20.0k    3.93G    8.00M       5       12       -",
        "  └ rx_no_buffers_drops: 12, 5/s",
        "▸ mail              0       0       0        0        0       0        0       -",
    ];
    assert_eq!([&seen[1], &seen[5], &seen[6], &seen[9], &seen[10]].map(String::as_str), expected);
    assert_eq!(terminal.backend().buffer()[(4, 9)].fg, Color::Red);
    // Round and round, by columns of its own alone.
    press(&mut top, &[KeyCode::Right; 12]);
    assert_eq!(top.sort, Column::Sent);
}
