//! The options of a job: one table for the command line and for job files.

use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, ValueEnum};

use crate::Pattern;
use crate::spec::Spec;
use crate::units::{Amount, Sizes, bytes, count, switch, sync, time};

/// Most requests in flight for a job: what the longest ring holds.
const MAX_DEPTH: u64 = 8192;

/// One option.
#[derive(Debug)]
pub struct Opt {
    /// fio's name for it (or ours, where fio has none).
    pub name: &'static str,
    also: &'static [&'static str],
    /// What stands for the value in --help; a switch if empty.
    value: &'static str,
    help: &'static str,
    set: fn(&mut Spec, &str) -> Result<(), String>,
}

/// Options of fio's that change nothing here: there is one way to do input and output.
const IGNORED: &[&str] = &[
    "allow_mounted_write",
    "buffered",
    "description",
    "direct",
    "disable_slat",
    "exitall_on_error",
    "filename",
    "group",
    "gtod_reduce",
    "hostname",
    "invalidate",
    "ioengine",
    "log_avg_msec",
    "percentile_list",
    "randrepeat",
    "refill_buffers",
    "startdelay",
    "thread",
    "verify_fatal",
];

const fn opt(
    name: &'static str,
    value: &'static str,
    help: &'static str,
    set: fn(&mut Spec, &str) -> Result<(), String>,
) -> Opt {
    Opt { name, also: &[], value, help, set }
}

impl Opt {
    const fn or(mut self, also: &'static [&'static str]) -> Opt {
        self.also = also;
        self
    }

    /// Sets it.
    pub fn apply(&self, spec: &mut Spec, value: &str) -> Result<(), String> {
        (self.set)(spec, value)
    }
}

/// All of them, in the order of --help.
pub const OPTIONS: &[Opt] = &[
    opt("name", "NAME", "Name of the job in the output", |s, v| {
        v.clone_into(&mut s.name);
        Ok(())
    }),
    opt("socket_path", "PATH", "vhost-user-blk socket to connect to, or /dev/vhost-vdpa-N", |s, v| {
        s.socket_path = Some(PathBuf::from(v));
        Ok(())
    }),
    opt(
        "rw",
        "PATTERN",
        "Access pattern: read, write, rw, randread, randwrite or randrw [default: read]",
        |s, v| {
            s.rw = Pattern::from_str(if v == "readwrite" { "rw" } else { v }, false)
                .map_err(|_| format!("'{v}' is none of read, write, rw, randread, randwrite, randrw"))?;
            Ok(())
        },
    )
    .or(&["readwrite"]),
    opt("rwmixread", "PERCENT", "Percentage of reads in rw and randrw [default: 50]", |s, v| {
        s.rwmixread = count(v, 0, 100)? as u8;
        Ok(())
    }),
    opt("rwmixwrite", "PERCENT", "Percentage of writes in rw and randrw [default: 50]", |s, v| {
        s.rwmixread = 100 - count(v, 0, 100)? as u8;
        Ok(())
    }),
    opt(
        "bs",
        "SIZE[,SIZE]",
        "Bytes of a request, or of reads,writes (such as 4k or 4k,8k) [default: 4k]",
        |s, v| Sizes::set_blocks(&mut s.sizes, v),
    )
    .or(&["blocksize"]),
    opt(
        "bssplit",
        "SIZE/PERCENT:..",
        "Mix of request sizes, such as 4k/50:64k/50; after a comma that of writes",
        |s, v| Sizes::set_splits(&mut s.sizes, v),
    ),
    opt("iodepth", "N", "Requests in flight for each job [default: 1]", |s, v| {
        s.iodepth = count(v, 1, MAX_DEPTH)? as u16;
        Ok(())
    }),
    opt("numjobs", "N", "Jobs: one thread with one queue each [default: 1]", |s, v| {
        s.numjobs = count(v, 1, 256)? as u16;
        Ok(())
    }),
    opt(
        "size",
        "SIZE",
        "Bytes that each job does, and the length of its part of the disk; or N% [default: the disk]",
        |s, v| {
            s.size = Some(Amount::parse(v)?);
            Ok(())
        },
    ),
    opt("offset", "SIZE", "Where its part of the disk begins; or N% [default: 0]", |s, v| {
        s.offset = Amount::parse(v)?;
        Ok(())
    }),
    opt(
        "offset_increment",
        "SIZE",
        "How much further the part of each further job begins [default: 0]",
        |s, v| {
            s.offset_increment = Amount::parse(v)?;
            Ok(())
        },
    ),
    opt("number_ios", "N", "End each job after so many requests", |s, v| {
        s.number_ios = Some(count(v, 1, u64::MAX)?);
        Ok(())
    }),
    opt(
        "runtime",
        "TIME",
        "End after this time (seconds, or 300ms, 2m), if --size is not done before",
        |s, v| {
            s.runtime = Some(time(v)?);
            Ok(())
        },
    ),
    opt("time_based", "", "Start over when --size is done, until --runtime is over", |s, v| {
        s.time_based = switch(v)?;
        Ok(())
    }),
    opt("ramp_time", "TIME", "Time to run before measuring [default: 0]", |s, v| {
        s.ramp_time = time(v)?;
        Ok(())
    }),
    opt("rate_iops", "N", "Closed loop: at most N requests a second for each job", |s, v| {
        s.rate_iops = Some(count(v, 1, 1 << 30)?);
        Ok(())
    }),
    opt(
        "arrival_rate",
        "N",
        "Open loop: N requests a second arrive at each job; latency counts from the arrival",
        |s, v| {
            s.arrival_rate = Some(count(v, 1, 1 << 30)?);
            Ok(())
        },
    ),
    opt("arrival", "KIND", "Times between arrivals: fixed, or poisson [default: fixed]", |s, v| {
        s.poisson = one_of(v, ["fixed", "poisson"])?;
        Ok(())
    }),
    opt("fsync", "N", "Flush after every N writes; 0 for never [default: 0]", |s, v| {
        s.fsync = Some(count(v, 0, u64::MAX)?).filter(|&n| n > 0);
        Ok(())
    })
    .or(&["fdatasync"]),
    opt(
        "sync",
        "KIND",
        "none: writes are durable when flushed; dsync (or sync): each before it is answered [default: none]",
        |s, v| {
            s.sync = sync(v)?;
            Ok(())
        },
    ),
    opt("randseed", "N", "Seed of all random numbers [default: 0]", |s, v| {
        s.randseed = bytes(v)?;
        Ok(())
    }),
    opt("norandommap", "", "Random offsets may repeat before every block was used once", |s, v| {
        s.norandommap = switch(v)?;
        Ok(())
    }),
    opt(
        "verify",
        "METHOD",
        "crc32c: write checksums, and check all reads of what this run has written",
        |s, v| {
            s.verify = one_of(v, ["0", "crc32c"])?;
            Ok(())
        },
    ),
    opt(
        "do_verify",
        "",
        "With --verify, read everything back after writing; --do-verify=0 does not [default: 1]",
        |s, v| {
            s.do_verify = switch(v)?;
            Ok(())
        },
    ),
    opt(
        "completion",
        "HOW",
        "How to wait: poll the ring, or sleep until an interrupt [default: poll]",
        |s, v| {
            s.interrupt = one_of(v, ["poll", "interrupt"])?;
            Ok(())
        },
    ),
    opt(
        "one_thread",
        "",
        "One thread polls all jobs that say so in turn, on the CPU of the first: many guests without a CPU for each",
        |s, v| {
            s.one_thread = switch(v)?;
            Ok(())
        },
    ),
    opt("indirect", "", "Use indirect descriptors", |s, v| {
        s.indirect = switch(v)?;
        Ok(())
    }),
    opt("no_event_idx", "", "Do without the event index, which is used where it is offered", |s, v| {
        s.no_event_idx = switch(v)?;
        Ok(())
    }),
    opt("packed", "", "Use packed rings", |s, v| {
        s.packed = switch(v)?;
        Ok(())
    }),
    opt(
        "in_order",
        "",
        "Have requests answered in order, which back ends offer that cannot help it",
        |s, v| {
            s.in_order = switch(v)?;
            Ok(())
        },
    ),
    opt(
        "inflight",
        "",
        "Have the back end record its requests in flight, for the next one should it be killed",
        |s, v| {
            s.inflight = switch(v)?;
            Ok(())
        },
    ),
    opt("hugepages", "", "Guest memory in 2 MiB pages", |s, v| {
        s.hugepages = switch(v)?;
        Ok(())
    }),
    opt("cpu", "CPU", "CPU of the first job, the next for the next and so on", |s, v| {
        s.cpu = Some(count(v, 0, 1023)? as usize);
        Ok(())
    }),
    opt("cpus_allowed", "LIST", "CPUs that all jobs may run on, such as 0,2-3", |s, v| {
        s.cpus_allowed = Some(v.parse()?);
        Ok(())
    }),
    opt("stonewall", "", "In job files: begin when all sections before have ended", |s, v| {
        s.stonewall = switch(v)?;
        Ok(())
    })
    .or(&["wait_for_previous"]),
    opt("group_reporting", "", "Report the jobs of a section as one", |s, v| {
        s.group_reporting = switch(v)?;
        Ok(())
    }),
];

/// Whether it is the second of two words.
fn one_of(v: &str, words: [&str; 2]) -> Result<bool, String> {
    words.iter().position(|w| *w == v).map(|i| i == 1).ok_or_else(|| {
        let words = words.join(" nor ");
        format!("'{v}' is neither {words}")
    })
}

/// What a name in a job file stands for.
#[derive(Debug)]
pub enum Named {
    /// An option.
    Known(&'static Opt),
    /// One of fio's that has no meaning here.
    Ignored,
    /// Nothing.
    Unknown,
}

/// Looks a name up.
pub fn named(name: &str) -> Named {
    if let Some(opt) = OPTIONS.iter().find(|o| o.name == name || o.also.contains(&name)) {
        return Named::Known(opt);
    }
    if IGNORED.contains(&name) { Named::Ignored } else { Named::Unknown }
}

/// Options with their values, in the order in which they apply.
#[derive(Clone, Debug, Default)]
pub struct Given(pub Vec<(&'static str, String)>);

impl Given {
    /// Applies all of them. Each value was checked when it was read.
    pub fn apply(&self, spec: &mut Spec) -> Result<(), String> {
        for (name, value) in &self.0 {
            if let Named::Known(opt) = named(name) {
                opt.apply(spec, value).map_err(|e| format!("{name}: {e}"))?;
            }
        }
        Ok(())
    }
}

/// Checks a value on the command line as its option does.
fn checked(opt: &'static Opt) -> ValueParser {
    ValueParser::new(move |s: &str| opt.apply(&mut Spec::default(), s).map(|()| s.to_owned()))
}

/// Adds options to a command.
pub fn augment(mut command: Command, options: impl Iterator<Item = &'static Opt>) -> Command {
    for opt in options {
        let mut arg = Arg::new(opt.name).long(opt.name.replace('_', "-")).help(opt.help);
        if opt.name.contains('_') {
            // As fio writes it.
            arg = arg.alias(opt.name);
        }
        arg = arg.aliases(opt.also);
        arg = match opt.value {
            "" => arg
                .value_parser(["0", "1"])
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("1")
                .hide_possible_values(true)
                .value_name("0|1"),
            value => arg.value_name(value).value_parser(checked(opt)),
        };
        command = command.arg(arg.action(ArgAction::Set));
    }
    command
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        augment(command, OPTIONS.iter())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Given, clap::Error> {
        let mut given: Vec<_> = OPTIONS
            .iter()
            .filter_map(|o| {
                // A command may have some of the options only.
                let value: &String = matches.try_get_one(o.name).ok()??;
                Some((matches.index_of(o.name), (o.name, value.clone())))
            })
            .collect();
        // As on the command line, because the later of two options that set the same thing holds.
        given.sort_by_key(|(at, _)| *at);
        Ok(Given(given.into_iter().map(|(_, option)| option).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Given::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn set(name: &str, value: &str) -> Result<Spec, String> {
        let mut spec = Spec::default();
        let Named::Known(opt) = named(name) else { return Err("unknown".into()) };
        opt.apply(&mut spec, value).map(|()| spec)
    }

    #[test]
    fn names_are_there_once() {
        let mut names: Vec<_> = OPTIONS.iter().flat_map(|o| [&[o.name], o.also].concat()).collect();
        names.extend(IGNORED);
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn values_are_checked() {
        assert_eq!(set("readwrite", "readwrite").unwrap().rw, Pattern::Rw);
        assert_eq!(set("rwmixwrite", "30").unwrap().rwmixread, 70);
        assert!(set("completion", "interrupt").unwrap().interrupt);
        assert!(set("verify", "crc32c").unwrap().verify);
        let bad =
            [("rw", "trim"), ("rwmixread", "101"), ("iodepth", "0"), ("numjobs", "x"), ("verify", "md5")];
        for (name, value) in bad.into_iter().chain([("cpus_allowed", "3-1"), ("size", "1"), ("packed", "2")])
        {
            assert!(set(name, value).is_err(), "{name}={value}");
        }
        assert!(matches!(named("ioengine"), Named::Ignored));
        assert!(matches!(named("iodpeth"), Named::Unknown));
    }
}
