//! A page that needs nothing but itself: tables, curves as inline SVG, no scripts. It is also well-formed XML.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use anyhow::Result;

use super::charts;
use super::drive::Kind;
use super::measure::{PointInfo, Results, Sample};
use super::table::{self, Table};

const STYLE: &str = "
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fdfdfc; --soft: #60666e; --line: #d8dade; --mark: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6e7e9; --bg: #17191c; --soft: #a0a6ae; --line: #3a3e44; --mark: #ff8a7a; }
}
body { color: var(--fg); background: var(--bg); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); } .mark { color: var(--mark); font-weight: 600; }
small { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; line-height: 1.3; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.2rem; align-items: start; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0; font-size: .9rem; }
.legend span { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .4em; vertical-align: -.1em; }
ul.notes { font-size: .85rem; color: var(--soft); padding-left: 1.2rem; }
";

/// A figure of a run: its name, its unit, and itself.
type Figure = (&'static str, String, fn(&Sample) -> Option<f64>);

/// Rate and CPU time.
fn figures(kind: Kind) -> [Figure; 2] {
    [
        (kind.rate(), format!("{}s a second", kind.unit()), |s| Some(s.iops)),
        ("CPU time of the back end", format!("µs for each {}", kind.unit()), |s| s.cpu_us),
    ]
}

/// The whole page.
pub fn page(results: &Results) -> Result<String> {
    let mut out = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n";
    write!(out, "<title>Back ends beside each other</title>\n<style>{STYLE}</style>\n</head>\n<body>\n")?;
    head(&mut out, results)?;
    sweeps(&mut out, results)?;
    for point in 0..results.points.len() {
        let table = table::main(results, point);
        writeln!(out, "<section>\n<h2>{}</h2>", escape(&table.title))?;
        legend(&mut out, results)?;
        out += "<div class=\"charts\">\n";
        figure(&mut out, "Latency by percentile", charts::latency(results, point)?)?;
        out += "<div>\n";
        for (name, unit, of) in figures(results.kind) {
            figure(&mut out, name, charts::bars(results, point, &unit, of)?)?;
        }
        out += "</div>\n</div>\n";
        write_table(&mut out, &table)?;
        write_table(&mut out, &table::details(results, point))?;
        out += "</section>\n";
    }
    out += "</body>\n</html>\n";
    Ok(out)
}

fn head(out: &mut String, results: &Results) -> Result<()> {
    let machine = &results.machine;
    out.push_str("<h1>Back ends beside each other</h1>\n");
    if results.partial {
        out.push_str("<p class=\"mark\">Partial: runs are missing.</p>\n");
    }
    let noisy: usize = (0..results.points.len()).map(|p| results.noisy_rounds(p).len()).sum();
    if noisy > 0 {
        let all = results.rounds * results.points.len();
        writeln!(out, "<p class=\"mark\">Noisy: {noisy} of {all} rounds, as the notes say.</p>")?;
    }
    writeln!(
        out,
        "<p>{} rounds of {} s in turn, every back end started afresh. In tables the median stands above minimum and maximum; ratios are to <b>{}</b> of the \
         same round. Curves and bars show the median, bands and lines across the least and the greatest.</p>",
        results.rounds,
        results.runtime,
        escape(results.reference())
    )?;
    let kind = if machine.hypervisor { "virtual CPUs" } else { "CPUs" };
    let list: Vec<String> = results.backend_cpus.iter().map(ToString::to_string).collect();
    let noise =
        if results.before.noise.is_empty() { "quiet".into() } else { results.before.noise.join(", ") };
    writeln!(
        out,
        "<p class=\"soft\">{} {kind} of {}, {} MiB, Linux {}; generator on CPU {}, back ends on CPU {}. Load average at the \
         start {}; before: {}.</p>",
        machine.cpus,
        escape(&machine.cpu),
        machine.memory_mib,
        escape(&machine.kernel),
        results.generator_cpu,
        list.join(", "),
        escape(&machine.loadavg),
        escape(&noise)
    )?;
    out.push_str("<ul class=\"notes\">\n");
    for [name, why] in &results.left_out {
        writeln!(out, "<li>{} is left out: {}</li>", escape(name), escape(why))?;
    }
    for failure in results.failures.iter().filter(|f| f.point.is_none()) {
        writeln!(
            out,
            "<li class=\"mark\">{} did not run: {}</li>",
            escape(&failure.backend),
            escape(&failure.error)
        )?;
    }
    if let Some(why) = &results.no_counters {
        writeln!(out, "<li>Cycles, instructions and cache misses: not available: {}</li>", escape(why))?;
    }
    for backend in &results.backends {
        if let Some(command) = &backend.command {
            writeln!(out, "<li>{}: <code>{}</code></li>", escape(&backend.name), escape(command))?;
        }
    }
    out.push_str("</ul>\n");
    Ok(())
}

/// What can be swept: its name on an axis, its name where it is fixed, and its value.
type Axis = (&'static str, &'static str, fn(&PointInfo) -> u64);
const AXES: [Axis; 3] = [
    ("queue depth", "depth", |p| u64::from(p.iodepth)),
    ("queues", "queues", |p| u64::from(p.numjobs)),
    ("load, requests a second that arrive for each queue", "load", |p| p.arrival_rate.unwrap_or(0)),
];

/// Curves over whatever a workload sweeps.
fn sweeps(out: &mut String, results: &Results) -> Result<()> {
    let names: BTreeSet<&str> = results.points.iter().map(|p| p.workload.as_str()).collect();
    for name in names {
        let of_name = || results.points.iter().enumerate().filter(move |(_, p)| p.workload == name);
        let values = AXES.map(|(_, _, of)| of_name().map(|(_, p)| of(p)).collect::<BTreeSet<u64>>());
        if values.iter().all(|v| v.len() < 2) {
            continue;
        }
        writeln!(out, "<section>\n<h2>{}: what changes with depth, queues and load</h2>", escape(name))?;
        legend(out, results)?;
        out.push_str("<div class=\"charts\">\n");
        for (at, (axis, _, of)) in AXES.iter().enumerate().filter(|(at, _)| values[*at].len() > 1) {
            // One family of charts for each combination of the others.
            let mut families: BTreeMap<Vec<u64>, Vec<(u64, usize)>> = BTreeMap::new();
            for (i, point) in of_name() {
                let others = (0..AXES.len()).filter(|o| *o != at).map(|o| AXES[o].2(point)).collect();
                families.entry(others).or_default().push((of(point), i));
            }
            for (others, points) in families {
                let other = (0..AXES.len()).filter(|o| *o != at).zip(others);
                let mut fixed = String::new();
                for (o, value) in other.filter(|(o, _)| values[*o].len() > 1) {
                    write!(fixed, ", {} {value}", AXES[o].1)?;
                }
                for (name, unit, figure_of) in figures(results.kind) {
                    let title = format!("{name} against {axis}{fixed}");
                    figure(out, &title, charts::against(results, &points, axis, &unit, figure_of)?)?;
                }
            }
        }
        out.push_str("</div>\n</section>\n");
    }
    Ok(())
}

fn legend(out: &mut String, results: &Results) -> Result<()> {
    out.push_str("<ul class=\"legend\">");
    for (index, backend) in results.backends.iter().enumerate() {
        let (colour, reference) =
            (charts::css_colour(index), if backend.reference { " (reference)" } else { "" });
        let name = escape(&backend.name);
        write!(out, "<li><span style=\"background:{colour}\"></span>{name}{reference}</li>")?;
    }
    out.push_str("</ul>\n");
    Ok(())
}

fn figure(out: &mut String, title: &str, svg: Option<String>) -> Result<()> {
    if let Some(svg) = svg {
        writeln!(out, "<figure><figcaption>{}</figcaption>\n{svg}</figure>", escape(title))?;
    }
    Ok(())
}

fn write_table(out: &mut String, table: &Table) -> Result<()> {
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    for head in &table.heads {
        write!(out, "<th>{}</th>", escape(&head.replace(" us", " µs")))?;
    }
    out.push_str("</tr>\n");
    for row in &table.rows {
        let cells: Vec<String> = row.iter().map(|c| cell(c)).collect();
        writeln!(out, "<tr><td>{}</td></tr>", cells.join("</td><td>"))?;
    }
    out.push_str("</table></div>\n");
    if table.notes.is_empty() {
        return Ok(());
    }
    out.push_str("<ul class=\"notes\">\n");
    for note in &table.notes {
        writeln!(out, "<li>{}</li>", escape(note))?;
    }
    out.push_str("</ul>\n");
    Ok(())
}

/// The median above what lies around it, which takes less room than all three in a row.
fn cell(text: &str) -> String {
    match text.split(" / ").collect::<Vec<_>>()[..] {
        [min, median, max] => {
            format!("<b>{}</b><br/><small>{} to {}</small>", escape(median), escape(min), escape(max))
        }
        _ => escape(text),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            // No XML has them, and error messages may.
            c if c.is_control() && !c.is_whitespace() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::host::{Machine, Quiet};
    use crate::compare::measure::{BackendInfo, Failure, PointInfo};

    fn sample(point: usize, backend: &str, round: usize) -> Sample {
        let factor = (1 + point + round) as f64;
        Sample {
            point,
            backend: backend.into(),
            round,
            iops: 1e5 * factor,
            requests: 1000,
            gbits: None,
            loss_percent: None,
            latency_us: [1.0, 2.0, 3.0, 4.0, 5.0].map(|us| us * factor),
            percentiles: vec![[0.0, 0.5 * factor], [0.9, factor], [0.99, 3.0 * factor]],
            cpu_us: (backend != "c").then_some(0.2 * factor),
            voluntary: Some(0.0),
            involuntary: Some(0.0),
            counters: None,
            round_trip_ns: Some(if backend == "c" { 300.0 } else { 100.0 }),
            quiet: Quiet { noise: vec!["a <b> & \u{1b}c".into()], ..Quiet::default() },
        }
    }

    fn results() -> Results {
        let info = |depth, jobs| PointInfo {
            workload: "w<1>".into(),
            title: format!("w<1>: depth {depth}, {jobs} queues"),
            iodepth: depth,
            numjobs: jobs,
            arrival_rate: None,
        };
        let backend = |name: &str| BackendInfo { name: name.into(), command: None, reference: name == "a&b" };
        let names = ["a&b", "c"];
        let mut samples = Vec::new();
        for point in 0..4 {
            for round in 0..2 {
                samples.extend(names.map(|n| sample(point, n, round)));
            }
        }
        samples.pop();
        Results {
            partial: true,
            kind: Kind::Block,
            machine: Machine::this(2),
            generator_cpu: 1,
            backend_cpus: vec![0],
            rounds: 2,
            runtime: 1.0,
            backends: names.map(backend).into(),
            points: vec![info(1, 1), info(8, 1), info(1, 2), info(8, 2)],
            samples,
            failures: vec![Failure {
                point: Some(3),
                backend: "c".into(),
                round: Some(1),
                error: "died <at once>".into(),
            }],
            left_out: vec![["qsd".into(), "not installed".into()]],
            before: Quiet::default(),
            no_counters: Some("none".into()),
        }
    }

    #[test]
    fn the_page_is_well_formed_and_needs_nothing_else() {
        let page = page(&results()).unwrap();
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
        let count = |name: &str| document.descendants().filter(|n| n.tag_name().name() == name).count();
        // Two figures by depth for each number of queues and by queues for each depth, then three for each point.
        assert_eq!(count("svg"), 2 * 2 + 2 * 2 + 4 * 3);
        assert_eq!((count("table"), count("script"), count("link"), count("img")), (8, 0, 0, 0));
        for node in document.descendants() {
            for attribute in node.attributes() {
                assert!(!["src", "href"].contains(&attribute.name()), "{attribute:?}");
            }
        }
        for said in
            ["Partial", "died &lt;at once&gt;", "qsd is left out", "(1 of 2 rounds)", "distance changed"]
        {
            assert!(page.contains(said), "{said}");
        }
    }

    #[test]
    fn curves_have_a_band_and_a_line_for_each_back_end() {
        let svg = charts::latency(&results(), 0).unwrap().unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let count = |name: &str| document.descendants().filter(|n| n.tag_name().name() == name).count();
        assert_eq!(count("polygon"), 2);
        assert!(document.descendants().any(|n| n.text().is_some_and(|t| t.contains("90 %"))));
        let mut empty = results();
        empty.samples.clear();
        assert!(charts::latency(&empty, 0).unwrap().is_none());
        assert!(page(&empty).is_ok());
    }

    #[test]
    fn the_text_says_what_is_missing_and_what_was_noisy() {
        let text = table::text(&results());
        for said in
            ["ratios to a&b", "c (1 of 2 rounds)", "not available", "round 1 was noisy", "partial: c failed"]
        {
            assert!(text.contains(said), "{said}: {text}");
        }
    }
}
