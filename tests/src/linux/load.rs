//! A [`Load`] as a shell script with fio, and what has come of it.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use serde_json::Value;

use crate::agent::Output;
use crate::scenario::{Expect, Load, Op, Outcome, Wait};

/// `EILSEQ`: what fio calls data that is not what was written.
const MISMATCH: u64 = 84;
/// Requests of a job in one round of a verified load that goes by time.
const ROUND: u64 = 4096;

/// What runs the load, on disks with so many queues each.
pub fn script(load: &Load, disks: &[String], queues: &[usize], cpus: usize) -> Result<String> {
    ensure!(load.wait == Wait::Sleep, "Linux decides itself how it waits: {:?} is not for it", load.wait);
    ensure!(load.requests != 0 || load.time != Duration::ZERO, "a load without end");
    match (load.op, load.expect) {
        (Op::Echo | Op::Exchange, _) => bail!("Linux takes only disks here"),
        (Op::WriteZeroes | Op::Flush, Expect::Anything) => Ok(one_by_one(load, disks, queues)),
        (Op::Read | Op::Write | Op::Mix | Op::Discard, Expect::Anything)
        | (Op::Write | Op::Mix, Expect::Written)
        | (Op::Read, Expect::Zeroes) => Ok(fio(load, disks, queues, cpus)),
        (op, expect) => bail!("fio cannot do {op:?} and expect {expect:?}"),
    }
}

fn fio(load: &Load, disks: &[String], queues: &[usize], cpus: usize) -> String {
    let rw = match load.op {
        Op::Read => "read",
        Op::Write => "write",
        Op::Mix => "rw",
        _ => "trim",
    };
    let verified = load.expect == Expect::Written;
    let mut args = format!(
        "--ioengine=libaio --direct=1 --disable_slat=1 --output-format=json+ --output=/tmp/load.json \
         --rw={}{rw} --bs={} --iodepth={} --size={span} --offset_increment={span} --randseed={} \
         --cpus_allowed=0-{} --cpus_allowed_policy=split",
        if load.random { "rand" } else { "" },
        load.block_size,
        load.depth,
        load.seed,
        cpus - 1,
        span = load.span,
    );
    match load.expect {
        Expect::Anything => {}
        Expect::Written => args.push_str(" --verify=crc32c --verify_fatal=1"),
        Expect::Zeroes => args.push_str(" --verify=pattern --verify_pattern=0x00 --verify_fatal=1"),
    }
    if load.flush_every != 0 {
        let _ = write!(args, " --fsync={}", load.flush_every);
    }
    let bytes = |requests: u64| requests * u64::from(load.block_size);
    if load.requests == 0 && !verified {
        let _ = write!(args, " --time_based --runtime={}ms", load.time.as_millis());
    } else if load.requests == 0 {
        let _ = write!(args, " --io_size={}", bytes(ROUND).min(load.span));
    } else if verified && bytes(load.requests) > load.span {
        // A round writes each block once and verifies it, so that it is known what was written last.
        let _ = write!(args, " --loops={}", bytes(load.requests).div_ceil(load.span));
    } else {
        let _ = write!(args, " --io_size={}", bytes(load.requests));
    }
    for (disk, queues) in disks.iter().zip(queues) {
        let _ = write!(args, " --name={disk} --filename=/dev/{disk} --numjobs={queues}");
    }
    // fio may have something to remark before its report.
    let once =
        format!("fio {args} || failed=1; sed -n '/^{{$/,/^}}$/p' /tmp/load.json >>/tmp/load.reports\n");
    if load.requests == 0 && verified {
        let until = until(load.time);
        return format!("{until}while {once}[ -z \"$failed\" ] && {GOES_ON}; do :; done\n");
    }
    once
}

/// A file that ends a load, if that is one of several rounds.
pub const STOP: &str = "/tmp/load.stop";
/// A condition that holds until the time is over that [`until`] has set, or [`STOP`] is there.
const GOES_ON: &str =
    "[ $(sed 's/\\.\\([0-9]*\\) .*/\\1/' /proc/uptime) -lt $end ] && [ ! -e /tmp/load.stop ]";

fn until(time: Duration) -> String {
    // Hundredths of a second, as /proc/uptime has them.
    format!("end=$(($(sed 's/\\.\\([0-9]*\\) .*/\\1/' /proc/uptime) + {}))\n", time.as_millis() / 10)
}

/// What fio does not know how to do: a process for each queue, with one request in flight.
fn one_by_one(load: &Load, disks: &[String], queues: &[usize]) -> String {
    let block = u64::from(load.block_size);
    let blocks = (load.span / block).min(if load.requests == 0 { ROUND } else { load.requests }).max(1);
    let mut script = format!("read -r from rest </proc/uptime; echo from $from\n{}", until(load.time));
    for (disk, &queues) in disks.iter().zip(queues) {
        for queue in 0..queues as u64 {
            let (each, command) = if load.op == Op::Flush {
                (1, format!("sync -d /dev/{disk}"))
            } else {
                // Without -f it wants the disk to itself.
                let (at, len) = (queue * load.span, blocks * block);
                (blocks, format!("blkdiscard -f -z -p {block} -o {at} -l {len} /dev/{disk}"))
            };
            let goes_on = match load.requests {
                0 => GOES_ON.to_owned(),
                requests => format!("[ $n -lt {requests} ]"),
            };
            let _ = writeln!(
                script,
                "( n=0; while {goes_on}; do {command} || {{ echo error; break; }}; n=$((n + {each})); done; echo did $n ) &"
            );
        }
    }
    script.push_str("wait; read -r to rest </proc/uptime; echo to $to\n");
    script
}

/// What has come of it: what the script has said, and fio's reports one after the other.
pub fn outcome(load: &Load, output: &Output, reports: &str) -> Result<Outcome> {
    let mut outcome = Outcome {
        requests: 0,
        reads: 0,
        writes: 0,
        errors: 0,
        mismatches: 0,
        missing: 0,
        repeated: 0,
        resets: 0,
        kicks: 0,
        interrupts: 0,
        elapsed: Duration::ZERO,
        longest: Duration::ZERO,
        latency: Histogram::new(3)?,
    };
    if matches!(load.op, Op::WriteZeroes | Op::Flush) {
        read_words(&mut outcome, &output.stdout)?;
        return Ok(outcome);
    }
    let mut rounds = 0;
    for report in serde_json::Deserializer::from_str(reports).into_iter::<Value>() {
        let report = report.context("fio's report")?;
        add_report(&mut outcome, &report)?;
        rounds += 1;
    }
    ensure!(rounds > 0, "fio reports nothing");
    ensure!(output.code == 0 || outcome.errors + outcome.mismatches > 0, "exit code {}", output.code);
    Ok(outcome)
}

fn read_words(outcome: &mut Outcome, said: &str) -> Result<()> {
    let (mut from, mut to) = (0.0, 0.0);
    for line in said.lines() {
        match line.split_once(' ') {
            Some(("from", time)) => from = time.parse()?,
            Some(("to", time)) => to = time.parse()?,
            Some(("did", requests)) => outcome.requests += requests.parse::<u64>()?,
            _ if line == "error" => outcome.errors += 1,
            _ => {}
        }
    }
    outcome.elapsed = Duration::from_secs_f64(f64::max(to - from, 0.0));
    Ok(())
}

fn add_report(outcome: &mut Outcome, report: &Value) -> Result<()> {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let mut elapsed = 0;
    for job in report["jobs"].as_array().context("fio reports no jobs")? {
        match number(&job["error"]) {
            0 => {}
            MISMATCH => outcome.mismatches += 1,
            _ => outcome.errors += 1,
        }
        elapsed = elapsed.max(number(&job["job_runtime"]));
        let (reads, writes) = (number(&job["read"]["total_ios"]), number(&job["write"]["total_ios"]));
        outcome.reads += reads;
        outcome.writes += writes;
        outcome.requests += reads + writes + number(&job["trim"]["total_ios"]);
        for way in ["read", "write", "trim"] {
            let latency = &job[way]["clat_ns"];
            outcome.longest = outcome.longest.max(Duration::from_nanos(number(&latency["max"])));
            for (nanoseconds, count) in latency["bins"].as_object().into_iter().flatten() {
                outcome.latency.record_n(nanoseconds.parse()?, number(count))?;
            }
        }
    }
    // Jobs side by side, rounds one after the other.
    outcome.elapsed += Duration::from_millis(elapsed);
    Ok(())
}
