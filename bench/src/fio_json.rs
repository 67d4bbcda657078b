//! Results in the form of `fio --output-format=json`, so that what reads fio's reads these.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::job::JobResult;
use crate::measure::{Batches, Moments, Side};
use crate::options::Given;
use crate::run::{Entry, Report};

const PERCENTILES: [f64; 17] =
    [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

/// The whole document.
pub fn document(report: &Report, now: SystemTime) -> Value {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut all = json!({
        "fio version": concat!("vbench-", env!("CARGO_PKG_VERSION")),
        "timestamp": since.as_secs(),
        "timestamp_ms": since.as_millis() as u64,
        "time": date(since.as_secs()),
        "global options": options(&report.global),
        "jobs": grouped(&report.entries).iter().map(job).collect::<Vec<_>>(),
    });
    if let Some(failure) = &report.failure {
        all["partial"] = json!(true);
        all["partial_reason"] = json!(failure);
    }
    all
}

/// Jobs of sections with group_reporting added up.
pub fn grouped(entries: &[Entry]) -> Vec<Entry> {
    let mut out: Vec<Entry> = Vec::new();
    for entry in entries {
        let copy = Entry {
            spec: entry.spec.clone(),
            group: entry.group,
            options: entry.options.clone(),
            result: entry.result.clone(),
            elapsed: entry.elapsed,
        };
        match out
            .last_mut()
            .filter(|last| entry.spec.group_reporting && std::sync::Arc::ptr_eq(&last.spec, &entry.spec))
        {
            Some(last) => last.result.merge(&entry.result),
            None => out.push(copy),
        }
    }
    out
}

fn options(given: &Given) -> Value {
    given.0.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect::<Map<_, _>>().into()
}

fn job(entry: &Entry) -> Value {
    let result = &entry.result;
    let mut options = options(&entry.options);
    options["name"] = json!(entry.spec.name);
    let (percent_user, percent_system) = result.cpu_percent();
    let [ns, us, ms] = distribution(result);
    json!({
        "jobname": entry.spec.name,
        "groupid": entry.group,
        "error": result.failure.as_ref().map_or(0, |f| f.errno),
        "error_text": result.failure.as_ref().map_or("", |f| f.message.as_str()),
        "eta": 0,
        "elapsed": entry.elapsed.ceil() as u64,
        "job options": options,
        "read": side(&result.read),
        "write": side(&result.write),
        "trim": side(&Side::default()),
        "sync": { "total_ios": result.sync.ios, "lat_ns": latency(&result.sync) },
        "job_runtime": (result.seconds * 1000.0).round() as u64,
        "usr_cpu": percent_user,
        "sys_cpu": percent_system,
        "ctx": result.cost.switches,
        "majf": result.cost.major,
        "minf": result.cost.minor,
        "iodepth_level": classes(&result.depths, ["1", "2", "4", "8", "16", "32", ">=64"]),
        "iodepth_submit": classes(&result.sent, ["0", "4", "8", "16", "32", "64", ">=64"]),
        "iodepth_complete": classes(&result.collected, ["0", "4", "8", "16", "32", "64", ">=64"]),
        "latency_ns": ns,
        "latency_us": us,
        "latency_ms": ms,
        "latency_depth": entry.spec.iodepth,
        "latency_target": 0,
        "latency_percentile": 100.0,
        "latency_window": 0,
        "kicks": result.kicks,
    })
}

fn side(side: &Side) -> Value {
    let rate = |n: u64| if side.seconds > 0.0 { n as f64 / side.seconds } else { 0.0 };
    let clat = latency(side);
    let mut lat = clat.clone();
    if let Some(lat) = lat.as_object_mut() {
        lat.remove("percentile");
    }
    let kib = |bytes: f64| bytes / 1024.0;
    let bandwidth = &side.bandwidth;
    json!({
        "io_bytes": side.bytes,
        "io_kbytes": side.bytes / 1024,
        "bw_bytes": rate(side.bytes) as u64,
        "bw": rate(side.bytes) as u64 / 1024,
        "iops": rate(side.ios),
        "runtime": (side.seconds * 1000.0).round() as u64,
        "total_ios": side.ios,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": moments(&side.waits),
        "clat_ns": clat,
        "lat_ns": lat,
        "bw_min": kib(bandwidth.min) as u64,
        "bw_max": kib(bandwidth.max) as u64,
        "bw_agg": if bandwidth.n > 0 { 100.0 } else { 0.0 },
        "bw_mean": kib(bandwidth.mean()),
        "bw_dev": kib(bandwidth.deviation()),
        "bw_samples": bandwidth.n,
        "iops_min": side.iops.min as u64,
        "iops_max": side.iops.max as u64,
        "iops_mean": side.iops.mean(),
        "iops_stddev": side.iops.deviation(),
        "iops_samples": side.iops.n,
    })
}

fn latency(side: &Side) -> Value {
    let mut latency = json!({
        "min": if side.latency.is_empty() { 0 } else { side.latency.min() },
        "max": side.latency.max(),
        "mean": side.latency.mean(),
        "stddev": side.latency.stdev(),
        "N": side.latency.len(),
    });
    if !side.latency.is_empty() {
        let at = |p: f64| (format!("{p:.6}"), json!(side.latency.value_at_percentile(p)));
        latency["percentile"] = PERCENTILES.map(at).into_iter().collect::<Map<_, _>>().into();
    }
    latency
}

fn moments(m: &Moments) -> Value {
    json!({ "min": m.min as u64, "max": m.max as u64, "mean": m.mean(), "stddev": m.deviation(), "N": m.n })
}

fn classes(batches: &Batches, names: [&str; 7]) -> Value {
    names
        .into_iter()
        .zip(batches.percent())
        .map(|(n, p)| (n.to_owned(), json!(p)))
        .collect::<Map<_, _>>()
        .into()
}

/// Percentages of requests by latency: nanoseconds, microseconds, milliseconds.
fn distribution(result: &JobResult) -> [Value; 3] {
    const STEPS: [u64; 10] = [2, 4, 10, 20, 50, 100, 250, 500, 750, 1000];
    let all = result.latency.len().max(1) as f64;
    let mut edges: Vec<_> = [1, 1000, 1_000_000].iter().flat_map(|unit| STEPS.map(|s| s * unit)).collect();
    edges.push(2_000_000_000);
    let mut counts = vec![0u64; edges.len() + 1];
    for value in result.latency.iter_recorded() {
        counts[edges.partition_point(|&e| e <= value.value_iterated_to())] += value.count_at_value();
    }
    let mut counts = counts.into_iter().map(|n| json!(n as f64 * 100.0 / all));
    let mut take = |names: &[&str]| -> Value {
        names.iter().map(|&n| n.to_owned()).zip(counts.by_ref()).collect::<Map<_, _>>().into()
    };
    let steps = STEPS.map(|s| s.to_string());
    let mut names: Vec<&str> = steps.iter().map(String::as_str).collect();
    // An iterator zipped from the shorter side loses no element of the longer.
    let [ns, us] = [take(&names), take(&names)];
    names.extend(["2000", ">=2000"]);
    [ns, us, take(&names)]
}

/// A time as C's `asctime` writes it, in UTC.
fn date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Years from March on, so that the leap day is the last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (date, month) = (day - (153 * month + 2) / 5 + 1, (month + 2) % 12);
    let year = era * 400 + year + u64::from(month < 2);
    format!(
        "{} {} {date:2} {:02}:{:02}:{:02} {year}",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize],
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "Thu Jan  1 00:00:00 1970");
        assert_eq!(date(951_827_696), "Tue Feb 29 12:34:56 2000");
        assert_eq!(date(1_795_562_790), "Tue Nov 24 23:26:30 2026");
    }

    #[test]
    fn every_latency_is_in_one_class() {
        let mut result = JobResult::nothing(crate::requests::Region { start: 0, len: 0 }, None);
        for value in [1, 999, 1000, 5_000_000, 3_000_000_000] {
            result.latency.saturating_record(value);
        }
        let [ns, us, ms] = distribution(&result);
        assert_eq!((&ns["2"], &ns["1000"], &us["2"]), (&json!(20.0), &json!(20.0), &json!(20.0)));
        assert_eq!((&ms["10"], &ms[">=2000"], &us["1000"]), (&json!(20.0), &json!(20.0), &json!(0.0)));
    }
}
