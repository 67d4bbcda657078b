//! `/metrics`: its names are those of the documentation and nothing else, a dashboard asks for none that is not there, and
//! an independent reader makes the same of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use kickless_tests::process::run;
use kickless_tests::scene::Scene;
use serde_json::{Value, json};

use crate::load::{Load, NetLoad};

/// Names of a daemon's metrics with the labels they have, as they are written in a query: `vhost_blk_requests_total`.
type Names = BTreeMap<String, BTreeSet<String>>;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Names and labels of all samples; those of a histogram are one.
fn names_of(text: &str) -> Names {
    let mut names = Names::new();
    let mut histogram = String::new();
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            kind.strip_suffix(" histogram").unwrap_or_default().clone_into(&mut histogram);
        }
        if line.starts_with('#') {
            continue;
        }
        let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap_or(line.len()));
        let is_histogram = !histogram.is_empty() && name.starts_with(&histogram);
        let labels = names.entry(if is_histogram { histogram.clone() } else { name.to_owned() }).or_default();
        labels.extend(labels_in(rest));
    }
    names
}

/// What stands before `=` in braces.
fn labels_in(text: &str) -> impl Iterator<Item = String> {
    let inside = text.split_once('{').map_or("", |(_, rest)| rest.split_once('}').map_or("", |(in_, _)| in_));
    inside
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(label, _)| label.trim_end_matches(['~', '!']).trim().into())
}

/// Names and labels as the table of a section of the documentation has them.
fn documented(section: &str, prefix: &str) -> Result<Names> {
    let text = std::fs::read_to_string(repository().join("docs/control.md"))?;
    let (_, section) = text.split_once(&format!("\n## {section}\n")).context("no section on metrics")?;
    let section = section.split("\n## ").next().unwrap_or_default();
    let ticked = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let rows = section.lines().filter(|line| line.starts_with(&format!("| `{prefix}")));
    let cells = rows.map(|row| row.split('|').map(str::to_owned).collect::<Vec<_>>());
    Ok(cells.map(|c| (ticked(&c[1]).concat(), ticked(&c[2]).into_iter().collect())).collect())
}

/// Every expression of a dashboard, and every query of a variable.
fn expressions(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if key == "expr" || key == "query" => into.push(text.clone()),
                    other => expressions(other, into),
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|value| expressions(value, into)),
        _ => {}
    }
}

/// Names with labels in an expression.
fn asked_for(expression: &str) -> Vec<(String, Vec<String>)> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    expression
        .match_indices("vhost_")
        .map(|(at, _)| {
            let rest = &expression[at..];
            let (name, rest) = rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len()));
            let braces = if rest.starts_with('{') { rest } else { "" };
            (name.to_owned(), labels_in(braces).collect())
        })
        .collect()
}

pub fn are_documented(_: &Scene) -> Result<Option<String>> {
    let load = Load::start(&["a", "b"])?;
    let text = String::from_utf8(load.rig.call("GET", "/metrics", None).body)?;
    let hidden = ["vhost_blk_signals_suppressed_total"];
    hold_against(&text, &documented("Metrics", "vhost_blk_")?, "kickless.json", &hidden)?;
    load.end()?;
    Ok(None)
}

pub fn of_ports_are_documented(_: &Scene) -> Result<Option<String>> {
    let load = NetLoad::start()?;
    load.limit("b", json!({ "rx-pps": 10 }));
    load.metric("vhost_net_counter_total{port=\"b\",counter=\"switch_tx_rate_limit_drops\"}", 1.0)?;
    let text = load.metrics()?;
    hold_against(&text, &documented("Metrics of vhost-net", "vhost_net_")?, "kickless-ports.json", &[])?;
    load.end()
}

/// What a daemon says is what is documented, and what a dashboard asks for is there; and all is but what is `hidden`.
fn hold_against(text: &str, documented: &Names, dashboard: &str, hidden: &[&str]) -> Result<()> {
    let real = names_of(text);
    assert_eq!(&real, documented, "left: /metrics, right: docs/control.md");

    let dashboard = std::fs::read_to_string(repository().join("packaging/grafana").join(dashboard))?;
    let mut all = Vec::new();
    expressions(&serde_json::from_str(&dashboard)?, &mut all);
    let asked: Vec<_> = all.iter().flat_map(|e| asked_for(e)).collect();
    ensure!(asked.len() > 20, "{asked:?}");
    for (name, labels) in &asked {
        // Of a histogram the buckets are asked for, and nothing else.
        let of = real.get(name.strip_suffix("_bucket").unwrap_or(name));
        let of = of.with_context(|| format!("the dashboard asks for {name}, which is not there"))?;
        for label in labels.iter().filter(|label| *label != "instance") {
            ensure!(of.contains(label), "the dashboard asks for {label} of {name}");
        }
    }
    // And nothing is left out of it but what is of no use there.
    let shown: BTreeSet<_> = asked.iter().map(|(name, _)| name.trim_end_matches("_bucket")).collect();
    let left_out: Vec<_> = real.keys().filter(|name| !shown.contains(name.as_str())).collect();
    assert_eq!(left_out, hidden);
    Ok(())
}

const PYTHON: &str = "/usr/bin/python3";

/// Prometheus's own reader of the format, as JSON: it is strict, and checks histograms.
const READER: &str = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as families
print(json.dumps([[f.name, f.type, f.unit, f.documentation, [[s.name, s.labels, s.value] for s in f.samples]]
                  for f in families(sys.stdin.read())]))
";

pub fn no_reader() -> Option<String> {
    let (code, _) = run(PYTHON, &["-c", "import prometheus_client.openmetrics.parser"]).ok()?;
    (code != 0).then(|| "no python3-prometheus-client".into())
}

pub fn are_read(_: &Scene) -> Result<Option<String>> {
    let mut load = Load::start(&["a"])?;
    // The most that a name may be.
    load.rig.add("b\\\"{=}", "backend=null:1M");
    let at = load.rig.scene.path("metrics");
    let read = |load: &Load| -> Result<Vec<Value>> {
        std::fs::write(&at, load.rig.call("GET", "/metrics", None).body)?;
        let out = Command::new(PYTHON)
            .args(["-c", READER])
            .stdin(Stdio::from(std::fs::File::open(&at)?))
            .output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Ok(serde_json::from_slice(&out.stdout)?)
    };
    let value = |families: &[Value], sample: &str, labels: &[(&str, &str)]| -> f64 {
        let all = families.iter().flat_map(|f| f[4].as_array().unwrap());
        let is = |s: &&Value| s[0] == sample && labels.iter().all(|(k, v)| s[1][k] == *v);
        all.filter(is).map(|s| s[2].as_f64().unwrap()).sum()
    };
    let before = read(&load)?;
    for family in &before {
        ensure!(family[3].as_str().is_some_and(|help| !help.is_empty()), "{family} is not explained");
    }
    assert_eq!(value(&before, "vhost_blk_capacity_bytes", &[("disk", "b\\\"{=}")]), (1 << 20) as f64);
    load.stop()?;
    let after = read(&load)?;
    let disk = load.rig.disk("a")["all"].clone();
    // All that was done is in the histogram, and the sum of the queues is what the API says.
    let requests = value(&after, "vhost_blk_requests_total", &[("disk", "a")]);
    assert_eq!(requests, disk["requests"].as_f64().unwrap());
    assert_eq!(value(&after, "vhost_blk_latency_seconds_count", &[("disk", "a")]), requests);
    assert_eq!(value(&after, "vhost_blk_read_bytes_total", &[("disk", "a")]), disk["read"].as_f64().unwrap());
    ensure!(value(&after, "vhost_blk_latency_seconds_sum", &[("disk", "a")]) > 0.0, "no time has passed");
    // The states of a reactor are all there is, none goes back, and load made it busy.
    for state in ["busy", "idle", "asleep"] {
        let of = |families| value(families, "vhost_blk_reactor_seconds_total", &[("state", state)]);
        ensure!(of(&after) >= of(&before), "{state} went back");
        ensure!(state == "idle" || of(&after) > 0.0, "never {state}");
    }
    load.rig.end();
    Ok(None)
}
