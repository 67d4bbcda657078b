//! The status page in a browser, with a daemon under load: what it shows is what the daemon counts.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use kickless_tests::process::built;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use serde_json::{Value, json};

use crate::browser::Browser;
use crate::load::{Load, NetLoad};
use crate::rig::{LIMIT, Rig};

/// `vhostctl page`, on a port of the kernel's choice.
struct Relay {
    child: Child,
    url: String,
}

impl Relay {
    fn start(rig: &Rig) -> Result<Relay> {
        let program = built("vhostctl").context("vhostctl is not built: cargo build -p vhostctl")?;
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["--api", &rig.path("api"), "page", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut url = String::new();
        let out = child.stdout.take().context("its output")?;
        BufReader::new(out).read_line(&mut url)?;
        Ok(Relay { child, url: url.trim_end().to_owned() })
    }

    /// The whole answer to a request, which need not be a good one.
    fn ask(&self, method: &str, path: &str, host: &str) -> Result<String> {
        let address = self.url.trim_start_matches("http://").trim_end_matches('/');
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is passed on is what can do no harm.
pub fn is_only_looked_at(_: &Scene) -> Result<Option<String>> {
    let load = Load::start(&["a"])?;
    let relay = Relay::start(&load.rig)?;
    for (method, path, host, status, said) in [
        ("GET", "/", "localhost", 200, "<!doctype html>"),
        ("GET", "/metrics", "127.0.0.1:1", 200, "vhost_blk_requests_total{disk=\"a\""),
        ("GET", "/v1/stats", "localhost", 200, "\"exports\""),
        ("GET", "/v1/disks", "localhost", 404, "only /, /v1/stats and /metrics"),
        ("DELETE", "/v1/disks/a?force=true", "localhost", 404, "only /"),
        ("GET", "//v1/disks", "localhost", 404, "only /"),
        ("POST", "/v1/stats", "localhost", 405, ""),
        ("GET", "/", "evil.example", 403, "not by this name"),
        ("GET", "/metrics", "evil.example:80", 403, "not by this name"),
    ] {
        let answer = relay.ask(method, path, host)?;
        ensure!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{method} {path} at {host}: {answer}");
        ensure!(answer.contains(said), "{method} {path} at {host}: {answer}");
    }
    let answer = relay.ask("GET", "/", "localhost")?;
    let policy = answer.lines().find(|line| line.starts_with("content-security-policy: "));
    let policy = policy.context("no policy")?;
    ensure!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    // The daemon itself has it too, on its socket, and the disk is still there.
    let page = load.rig.call("GET", "/", None);
    ensure!(page.status == 200 && page.content_type.starts_with("text/html"), "{page:?}");
    ensure!(load.rig.disk("a")["attached"] == true, "the disk is gone");
    load.end()?;
    Ok(None)
}

/// How many pixels of a chart are of a colour of the page's.
fn pixels(browser: &mut Browser, chart: &str, color: &str) -> Result<u64> {
    let count = format!(
        "(() => {{ const c = document.getElementById('chart-{chart}'), d = document.createElement('canvas').getContext('2d');
            d.fillStyle = color('{color}'); d.fillRect(0, 0, 1, 1);
            const [r, g, b] = d.getImageData(0, 0, 1, 1).data;
            const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let n = 0;
            for (let i = 0; i < all.length; i += 4)
                n += all[i + 3] > 200 && Math.abs(all[i] - r) + Math.abs(all[i + 1] - g) + Math.abs(all[i + 2] - b) < 12;
            return n; }})()"
    );
    browser.value(&count)?.as_u64().context("a count of pixels")
}

/// A browser that shows the page, with charts of some readings.
fn charts(scene: &Scene, relay: &Relay) -> Result<Browser> {
    let mut browser = Browser::start(scene)?;
    browser.open(&relay.url)?;
    wait::until(
        "charts",
        LIMIT,
        || Ok((browser.value("history.length")?.as_u64() >= Some(5)).then_some(())),
    )?;
    Ok(browser)
}

pub fn is_seen(scene: &Scene) -> Result<Option<String>> {
    let mut load = Load::start(&["web", "mail"])?;
    load.rig.add("<b>archive", "backend=null:1G");
    let relay = Relay::start(&load.rig)?;
    let mut browser = charts(scene, &relay)?;
    // Charts have what they say they have.
    for (chart, colors) in [("iops", &["a"][..]), ("bandwidth", &["a", "b"]), ("latency", &["a", "b", "c"])] {
        for color in colors {
            let seen = pixels(&mut browser, chart, color)?;
            ensure!(seen > 5, "{seen} pixels of {color} in the chart of {chart}");
        }
    }
    // How busy a reactor is depends on the machine; that it is something does not.
    let mut states = 0;
    for state in ["busy", "idle", "asleep"] {
        states += pixels(&mut browser, "reactors", state)?;
    }
    ensure!(states > 100, "{states} pixels in the chart of reactors");
    // What it has read last, shown: as many requests as the daemon has counted before and after.
    let shown = |browser: &mut Browser| browser.value("now.exports.find((e) => e.name === 'web').requests");
    let before = load.requests("web");
    wait::until("another reading", LIMIT, || Ok(shown(&mut browser)?.as_u64().filter(|n| *n >= before)))?;
    let n = shown(&mut browser)?.as_u64().unwrap_or(0);
    let after = load.requests("web");
    ensure!(n >= before && n <= after, "{n} shown, from {before} to {after} counted");
    // Times where there were requests, and no errors; names are text.
    let text = "[...document.querySelectorAll('#exports tbody tr')].map((r) => [r.dataset.name, ...[...r.cells].map((c) => c.textContent)])";
    let rows = wait::until("a row with times", LIMIT, || {
        let rows: Vec<Vec<String>> = serde_json::from_value(browser.value(text)?)?;
        let has_times = |row: &Vec<String>| row[0] == "web" && row[6].ends_with('s') && row[9] == "0";
        Ok(rows.iter().any(has_times).then_some(rows))
    })?;
    ensure!(rows.len() == 3, "{rows:?}");
    let archive = rows.iter().find(|row| row[0].starts_with("<b>")).context("the idle disk")?;
    ensure!(archive[1] == "<b>archivenot attached", "{archive:?}");
    let states = browser.value("now.reactors.map((r) => r.busy + r.idle + r.asleep)")?;
    for state in states.as_array().context("reactors")? {
        ensure!((state.as_f64().unwrap_or(0.0) - 1.0).abs() < 1e-6, "{states}");
    }
    // Sorted by name, and found.
    browser.value("document.querySelector('#exports th').click()")?;
    let first = "document.querySelector('#exports tbody tr').dataset.name";
    ensure!(browser.value(first)? == "<b>archive", "not by name");
    browser.value("(() => { $('find').value = 'mai'; $('find').dispatchEvent(new Event('input')); })()")?;
    ensure!(browser.value(first)? == "mail", "not found");
    browser.value("(() => { $('find').value = ''; $('find').dispatchEvent(new Event('input')); })()")?;
    if let Ok(to) = std::env::var("KICKLESS_PICTURE") {
        std::fs::write(to, browser.picture()?)?;
    }

    // At rest, everything agrees to the last request, with /metrics.
    load.stop()?;
    let text = String::from_utf8(load.rig.call("GET", "/metrics", None).body)?;
    let counted = |what: &str, disk: &str| -> f64 {
        let begin = format!("vhost_blk_{what}{{disk=\"{disk}\"");
        text.lines()
            .filter(|l| l.starts_with(&begin))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    };
    for disk in ["web", "mail"] {
        let all = counted("requests_total", disk);
        ensure!(all > 0.0, "{text}");
        let of = format!("now.exports.find((e) => e.name === '{disk}')");
        wait::until("the last request", LIMIT, || {
            let e = browser.value(&of)?;
            Ok((e["requests"].as_f64() == Some(all) && e["iops"] == 0).then_some(()))
        })?;
        let bytes = browser.value(&format!(
            "before.exports.find((e) => e.name === '{disk}').queues.reduce((s, q) => s + q.read, 0)"
        ))?;
        assert_eq!(bytes.as_f64(), Some(counted("read_bytes_total", disk)));
    }
    let complaints = std::mem::take(&mut browser.complaints);
    ensure!(complaints.is_empty(), "{complaints:?}");
    // What the policy is there for: nothing that is put into the page runs, and nothing leaves it.
    let inline = "new Promise((done) => { window.ran = false; const s = document.createElement('script');
        s.textContent = 'window.ran = true'; document.body.append(s); setTimeout(() => done(window.ran), 100); })";
    ensure!(browser.value(inline)? == false, "a script from elsewhere ran");
    ensure!(
        browser.value("fetch('http://127.0.0.1:1/').then(() => 'went', (e) => e.name)")? == "TypeError",
        "it left"
    );
    let refused: Vec<&String> =
        browser.complaints.iter().filter(|c| c.contains("Content Security Policy")).collect();
    ensure!(refused.len() >= 2, "{refused:?}");
    // The daemon goes away: it says so, and nothing breaks.
    browser.complaints.clear();
    load.rig.end();
    wait::until("that the daemon is gone", LIMIT, || {
        let trouble = browser.value("$('trouble').hidden ? '' : $('trouble').textContent")?;
        Ok(trouble.as_str().is_some_and(|t| t.contains("Nothing new")).then_some(()))
    })?;
    let thrown: Vec<&String> =
        browser.complaints.iter().filter(|c| !c.contains("Failed to load resource")).collect();
    ensure!(thrown.is_empty(), "{thrown:?}");
    let _: Value = browser.call("Browser.close", serde_json::json!({})).unwrap_or_default();
    Ok(None)
}

/// Of ports the same page shows packets, bits and drops.
pub fn shows_ports(scene: &Scene) -> Result<Option<String>> {
    let mut load = NetLoad::start()?;
    load.limit("b", json!({ "rx-pps": 10 }));
    load.limit("a", json!({ "tx-pps": 500 }));
    let relay = Relay::start(&load.rig)?;
    let mut browser = charts(scene, &relay)?;
    for (chart, colors) in [("iops", &["a"][..]), ("bandwidth", &["a", "b"]), ("latency", &["a"])] {
        for color in colors {
            let seen = pixels(&mut browser, chart, color)?;
            ensure!(seen > 5, "{seen} pixels of {color} in the chart of {chart}");
        }
    }
    let titles =
        browser.value("[...document.querySelectorAll('#exports th')].map((th) => th.textContent).join()")?;
    let expected =
        "Name,Queues,Packets/s \u{25be},Received/s,Sent/s,Received,Sent,Drops/s,Drops,Why,Limit,Packets";
    assert_eq!(titles, expected);
    assert_eq!(
        browser.value("$('title-iops').textContent + $('title-latency').textContent")?,
        "PacketsDrops"
    );
    let text = "[...document.querySelectorAll('#exports tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))";
    wait::until("what ports do, and why they drop", LIMIT, || {
        let rows: Vec<Vec<String>> = serde_json::from_value(browser.value(text)?)?;
        let of = |name: &str| rows.iter().find(|row| row[0].starts_with(name));
        let moves =
            |row: &Vec<String>| row[2] != "0" && row[5].ends_with("bit/s") && row[6].ends_with("bit/s");
        let drops = |row: &Vec<String>| row[7] != "0" && row[9].contains("switch_tx_rate_limit_drops ");
        let is_so = of("b").is_some_and(|row| moves(row) && drops(row))
            && of("a").is_some_and(|row| moves(row) && row[10].ends_with('%'))
            && of("idle").is_some_and(|row| row[9] == "\u{2013}");
        Ok(is_so.then_some(()))
    })?;
    // At rest everything agrees.
    load.stop()?;
    for port in ["a", "b"] {
        let now = load.rig.port(port);
        let sum = |what: &str| ["rx", "tx"].iter().filter_map(|way| now[way][what].as_u64()).sum::<u64>();
        let (packets, drops) = (sum("packets"), sum("discards") + sum("errors"));
        let of = format!("now.exports.find((e) => e.name === '{port}')");
        wait::until("the last packet", LIMIT, || {
            let e = browser.value(&of)?;
            Ok((e["requests"] == packets && e["errors"] == drops && e["iops"] == 0).then_some(()))
        })?;
    }
    ensure!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    let _: Value = browser.call("Browser.close", json!({})).unwrap_or_default();
    load.end()
}
