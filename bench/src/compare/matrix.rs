//! What is compared with what: back ends and workloads, from a TOML file or from the command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde::Deserialize;

use super::drive::{Drive, Kind};
use crate::Load;
use crate::net::spec::NetLoad;

/// A matrix file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// How often, how long and where.
    #[serde(default)]
    pub options: Options,
    /// What is measured.
    #[serde(default)]
    pub backend: Vec<Backend>,
    /// What it is driven with.
    #[serde(default)]
    pub workload: Vec<Workload>,
}

/// `[options]`: for all runs.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Times that every back end is run.
    pub rounds: Option<usize>,
    /// Seconds to measure.
    pub runtime: Option<f64>,
    /// Seconds to run before measuring.
    pub ramp_time: Option<f64>,
    /// CPU of the first job.
    pub generator_cpu: Option<usize>,
    /// CPUs of the back end, in the kernel's list format.
    pub backend_cpus: Option<String>,
    /// An image to make before and remove after; `{image}` in commands.
    pub image: Option<Image>,
}

/// An image of random content.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Where it is made.
    pub dir: PathBuf,
    /// MiB of it.
    pub mib: u64,
}

/// `[[backend]]`: one to start, or one that runs.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// What it is called in the results.
    pub name: String,
    /// Command to start it with.
    pub command: Option<String>,
    /// Socket of one that is running.
    pub socket: Option<PathBuf>,
    /// The second socket of one that is running and has two ports.
    pub socket2: Option<PathBuf>,
    /// Seconds from when its sockets are there until it is ready, where that is not at once.
    pub settle: Option<f64>,
    /// The ring that it is driven through, where that is not the workload's: split, packed, split,in-order or
    /// packed,in-order.
    pub ring: Option<RingKind>,
    /// Whether it records its requests in flight.
    #[serde(default)]
    pub inflight: bool,
    /// Environment of the command.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether ratios are to this one; without, the first is it.
    #[serde(default)]
    pub reference: bool,
}

/// A kind of ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum RingKind {
    /// Split.
    #[serde(rename = "split")]
    Split,
    /// Split, with `IN_ORDER`.
    #[serde(rename = "split,in-order")]
    SplitInOrder,
    /// Packed.
    #[serde(rename = "packed")]
    Packed,
    /// Packed, with `IN_ORDER`.
    #[serde(rename = "packed,in-order")]
    PackedInOrder,
}

impl RingKind {
    /// Whether it is packed, and whether it is in order.
    pub fn traits(self) -> (bool, bool) {
        let packed = matches!(self, RingKind::Packed | RingKind::PackedInOrder);
        (packed, matches!(self, RingKind::SplitInOrder | RingKind::PackedInOrder))
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(s: &str) -> Result<Backend, String> {
        match s.split_once('=') {
            Some((name, command)) if command.contains("{socket}") => {
                Ok(Backend { name: name.into(), command: Some(command.into()), ..Backend::default() })
            }
            _ => Err("write NAME=COMMAND, with {socket} where the socket's path belongs".into()),
        }
    }
}

/// One value or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a number from 1 to 65535, or an array of them")]
pub enum Sweep {
    /// One.
    One(u16),
    /// A sweep over several.
    Many(Vec<u16>),
}

impl Sweep {
    fn values(this: Option<&Sweep>) -> Vec<u16> {
        match this {
            None => vec![1],
            Some(Sweep::One(n)) => vec![*n],
            Some(Sweep::Many(all)) => all.clone(),
        }
    }
}

/// One rate or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a number of requests a second, or an array of them")]
pub enum Rates {
    /// One.
    One(u64),
    /// A sweep over several.
    Many(Vec<u64>),
}

/// One word or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string, or an array of them")]
pub enum Words {
    /// One.
    One(String),
    /// A sweep over several.
    Many(Vec<String>),
}

/// `[[workload]]`: the options of `vbench run`, of which iodepth, numjobs and arrival_rate may be swept; or, of kind net, those of
/// `vbench net`, of which iodepth, queue_pairs and size may be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// What it is called in the results.
    pub name: String,
    /// Whether it is requests to a disk or packets.
    #[serde(default)]
    pub kind: Kind,
    rw: Option<String>,
    rwmixread: Option<u8>,
    bs: Option<String>,
    iodepth: Option<Sweep>,
    numjobs: Option<Sweep>,
    arrival_rate: Option<Rates>,
    direction: Option<String>,
    size: Option<Words>,
    queue_pairs: Option<Sweep>,
    #[serde(default)]
    indirect: bool,
    #[serde(default)]
    no_event_idx: bool,
    /// Further options as they are written on the command line.
    #[serde(default)]
    args: Vec<String>,
}

/// One workload with one of each that it sweeps.
#[derive(Clone, Debug)]
pub struct Point {
    /// The workload's name.
    pub workload: String,
    /// What to drive with.
    pub drive: Drive,
}

impl Point {
    /// Name and whatever was swept.
    pub fn title(&self) -> String {
        format!("{}: {}", self.workload, self.drive.title())
    }
}

/// Options are read by the same parser as those of the command line, so that the two cannot drift apart.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Options4Run {
    #[command(flatten)]
    load: Load,
}

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Options4Net {
    #[command(flatten)]
    load: NetLoad,
}

impl Workload {
    /// One with defaults only.
    pub fn named(name: &str) -> Workload {
        Workload { name: name.into(), ..Workload::default() }
    }

    fn points(&self, runtime: f64, ramp_time: f64) -> Result<Vec<Point>> {
        let times = [format!("--runtime={runtime}"), format!("--ramp-time={ramp_time}")];
        let lines = match self.kind {
            Kind::Block => self.block()?,
            Kind::Net => self.net()?,
        };
        let mut points = Vec::new();
        for line in lines {
            let args = times.iter().chain(&line).chain(&self.args);
            let drive = match self.kind {
                Kind::Block => Options4Run::try_parse_from(args).map(|o| Drive::Block(o.load)),
                Kind::Net => Options4Net::try_parse_from(args).map(|o| Drive::Net(Box::new(o.load))),
            };
            let drive = drive.map_err(|e| {
                let text = e.to_string();
                let line = text.lines().next().unwrap_or_default();
                anyhow::anyhow!("workload {}: {}", self.name, line.trim_start_matches("error: "))
            })?;
            drive.check().with_context(|| format!("workload {}", self.name))?;
            points.push(Point { workload: self.name.clone(), drive });
        }
        ensure!(!points.is_empty(), "workload {}: an empty array", self.name);
        Ok(points)
    }

    /// The command lines of a disk's workload.
    fn block(&self) -> Result<Vec<Vec<String>>> {
        let foreign = self.direction.is_some() || self.size.is_some() || self.queue_pairs.is_some();
        ensure!(!foreign, "workload {}: direction, size and queue_pairs are of kind = \"net\"", self.name);
        let rates = match &self.arrival_rate {
            None => vec![None],
            Some(Rates::One(rate)) => vec![Some(*rate)],
            Some(Rates::Many(all)) => all.iter().copied().map(Some).collect(),
        };
        let mut lines = Vec::new();
        for jobs in Sweep::values(self.numjobs.as_ref()) {
            for (depth, rate) in Sweep::values(self.iodepth.as_ref())
                .into_iter()
                .flat_map(|d| rates.iter().map(move |r| (d, r)))
            {
                ensure!(jobs > 0 && depth > 0, "workload {}: iodepth and numjobs start at 1", self.name);
                let mut line = vec![format!("--iodepth={depth}"), format!("--numjobs={jobs}")];
                line.extend(rate.map(|v| format!("--arrival-rate={v}")));
                line.extend(self.rw.as_ref().map(|v| format!("--rw={v}")));
                line.extend(self.rwmixread.map(|v| format!("--rwmixread={v}")));
                line.extend(self.bs.as_ref().map(|v| format!("--bs={v}")));
                line.extend(self.switches());
                lines.push(line);
            }
        }
        Ok(lines)
    }

    /// The command lines of a network's.
    fn net(&self) -> Result<Vec<Vec<String>>> {
        let foreign = self.rw.is_some()
            || self.rwmixread.is_some()
            || self.bs.is_some()
            || self.numjobs.is_some()
            || self.arrival_rate.is_some();
        ensure!(
            !foreign,
            "workload {}: rw, rwmixread, bs, numjobs and arrival_rate are of disks, not of kind = \"net\"",
            self.name
        );
        let sizes = match &self.size {
            None => vec!["64".into()],
            Some(Words::One(one)) => vec![one.clone()],
            Some(Words::Many(all)) => all.clone(),
        };
        let depths = match &self.iodepth {
            None => vec![None],
            some => Sweep::values(some.as_ref()).into_iter().map(Some).collect(),
        };
        let mut lines = Vec::new();
        for size in &sizes {
            for pairs in Sweep::values(self.queue_pairs.as_ref()) {
                for depth in &depths {
                    let mut line = vec![format!("--size={size}"), format!("--queue-pairs={pairs}")];
                    line.extend(depth.map(|n| format!("--iodepth={n}")));
                    line.extend(self.direction.as_ref().map(|v| format!("--direction={v}")));
                    line.extend(self.switches());
                    lines.push(line);
                }
            }
        }
        Ok(lines)
    }

    fn switches(&self) -> impl Iterator<Item = String> {
        let of = [(self.indirect, "--indirect"), (self.no_event_idx, "--no-event-idx")];
        // Of a network these have a value.
        let net = if self.kind == Kind::Net { "=1" } else { "" };
        of.into_iter().filter(|(on, _)| *on).map(move |(_, name)| format!("{name}{net}"))
    }
}

impl Matrix {
    /// Reads a file; `name` is what messages call it.
    pub fn parse(text: &str, name: &Path) -> Result<Matrix> {
        let matrix: Matrix = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start.min(text.len()));
            let line = text[..at].matches('\n').count() + 1;
            anyhow::anyhow!("{}, line {line}: {}", name.display(), e.message())
        })?;
        matrix.check().with_context(|| name.display().to_string())?;
        Ok(matrix)
    }

    /// What a parser of TOML cannot know.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.backend.is_empty(), "there is no [[backend]]");
        ensure!(!self.workload.is_empty(), "there is no [[workload]]");
        ensure!(self.options.rounds != Some(0), "rounds starts at 1");
        for (i, backend) in self.backend.iter().enumerate() {
            let name = &backend.name;
            match (&backend.command, &backend.socket) {
                (Some(command), None) => {
                    // In the directory, it has to be called `socket`.
                    let listens = command.contains("{socket}") || command.contains("{dir}");
                    ensure!(listens, "back end {name}: no {{socket}} in its command");
                    ensure!(shlex::split(command).is_some(), "back end {name}: a quote that is not closed");
                    let image = self.options.image.is_some() || !command.contains("{image}");
                    ensure!(image, "back end {name}: {{image}} needs an image in [options]");
                }
                (None, Some(_)) => {}
                _ => bail!("back end {name}: give either a command or the socket of one that is running"),
            }
            let settle = backend.settle.is_none_or(|s| Duration::try_from_secs_f64(s).is_ok());
            ensure!(settle, "back end {name}: settle is no number of seconds");
            ensure!(self.backend[..i].iter().all(|b| b.name != *name), "two back ends are called {name}");
        }
        let references = self.backend.iter().filter(|b| b.reference).count();
        ensure!(references <= 1, "{references} back ends are marked as the reference");
        for (i, workload) in self.workload.iter().enumerate() {
            let name = &workload.name;
            ensure!(self.workload[..i].iter().all(|w| w.name != *name), "two workloads are called {name}");
        }
        let points = self.points()?;
        let mixed = points.iter().any(|p| p.drive.kind() != self.kind());
        ensure!(!mixed, "workloads of disks and of networks do not go into one matrix");
        if points.iter().any(|p| p.drive.sockets() > 1) {
            for backend in &self.backend {
                let two = backend.command.as_ref().is_none_or(|c| c.contains("{socket2}"));
                let two = two && (backend.command.is_some() || backend.socket2.is_some());
                ensure!(two, "back end {}: no {{socket2}}, and a workload has two ports", backend.name);
            }
        }
        Ok(())
    }

    /// What its workloads are.
    pub fn kind(&self) -> Kind {
        self.workload.first().map_or(Kind::Block, |w| w.kind)
    }

    /// Leaves only the back ends of these names.
    pub fn keep(&mut self, only: &[String]) -> Result<()> {
        for name in only {
            ensure!(self.backend.iter().any(|b| b.name == *name), "--only {name}: no back end has that name");
        }
        if !only.is_empty() {
            self.backend.retain(|b| only.contains(&b.name));
        }
        Ok(())
    }

    /// Rounds of every point.
    pub fn rounds(&self) -> usize {
        self.options.rounds.unwrap_or(5)
    }

    /// Seconds measured in each run.
    pub fn runtime(&self) -> f64 {
        self.options.runtime.unwrap_or(2.0)
    }

    /// Seconds before that.
    pub fn ramp_time(&self) -> f64 {
        self.options.ramp_time.unwrap_or(0.3)
    }

    /// Every workload with everything it sweeps.
    pub fn points(&self) -> Result<Vec<Point>> {
        let times = [self.runtime(), self.ramp_time()];
        for seconds in times {
            ensure!(Duration::try_from_secs_f64(seconds).is_ok(), "{seconds} is no number of seconds");
        }
        let points = self.workload.iter().map(|w| w.points(times[0], times[1]));
        Ok(points.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[options]
rounds = 3
runtime = 0.5
backend_cpus = "0,2-3"

[[backend]]
name = "a"
command = "a --socket '{socket}'"
env = { RUST_LOG = "off" }

[[backend]]
name = "b"
socket = "/run/b"
reference = true

[[workload]]
name = "sweep"
rw = "randrw"
rwmixread = 70
bs = "8k"
iodepth = [1, 32]
numjobs = [1, 2]
indirect = true
"#;

    fn error(text: &str) -> String {
        format!("{:#}", Matrix::parse(text, Path::new("m.toml")).unwrap_err())
    }

    #[test]
    fn a_matrix_gives_every_combination_of_what_it_sweeps() {
        let matrix = Matrix::parse(GOOD, Path::new("m.toml")).unwrap();
        let points = matrix.points().unwrap();
        let swept: Vec<_> = points.iter().map(|p| (p.drive.queues(), p.drive.iodepth())).collect();
        assert_eq!(swept, [(1, 1), (1, 32), (2, 1), (2, 32)]);
        let Drive::Block(load) = &points[0].drive else { panic!("a disk's") };
        assert_eq!((load.bs, load.rwmixread, load.indirect, load.no_event_idx), (8192, 70, true, false));
        assert_eq!(load.runtime, Duration::from_millis(500));
        assert!(matrix.backend[1].reference);
        let text = GOOD.replace("numjobs = [1, 2]", "arrival_rate = [1000, 5_000_000]");
        let points = Matrix::parse(&text, Path::new("m.toml")).unwrap().points().unwrap();
        let swept: Vec<_> = points.iter().map(|p| (p.drive.iodepth(), p.drive.arrival_rate())).collect();
        let rates = [Some(1000), Some(5_000_000)];
        assert_eq!(swept, [(1, rates[0]), (1, rates[1]), (32, rates[0]), (32, rates[1])]);
        assert_eq!(matrix.backend[0].env["RUST_LOG"], "off");
    }

    const NET: &str = r#"
[[backend]]
name = "a"
command = "a {socket} {socket2}"

[[workload]]
name = "wire"
kind = "net"
direction = "both"
size = ["64", "imix"]
iodepth = [1, 128]
args = ["--burst=16"]
"#;

    #[test]
    fn networks_have_workloads_of_their_own() {
        let matrix = Matrix::parse(NET, Path::new("m.toml")).unwrap();
        assert_eq!(matrix.kind(), Kind::Net);
        let points = matrix.points().unwrap();
        let titles: Vec<_> = points.iter().map(Point::title).collect();
        assert_eq!(titles[3], "wire: both, imix bytes, depth 128");
        assert_eq!((titles.len(), points[0].drive.sockets(), points[0].drive.iodepth()), (4, 2, 1));
        let Drive::Net(load) = &points[0].drive else { panic!("a network's") };
        assert_eq!(load.burst, 16);
        let with = |from: &str, to: &str| error(&NET.replacen(from, to, 1));
        assert!(with("{socket2}", "").contains("back end a: no {socket2}"));
        assert!(with("\"both\"", "\"sideways\"").contains("workload wire: invalid value 'sideways'"));
        assert!(with("direction = \"both\"", "bs = \"4k\"").contains("are of disks"));
        assert!(with("kind = \"net\"", "").contains("are of kind = \"net\""));
        assert!(
            with("[[workload]]", "[[workload]]\nname = 'x'\n[[workload]]").contains("do not go into one")
        );
        assert!(with("--burst=16", "--ring-size=5").contains("no power of two"));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        for (after, line) in [("[options]", 3), ("name = \"b\"", 14), ("name = \"sweep\"", 19)] {
            let said = error(&GOOD.replacen(after, &format!("{after}\nfrobnicate = 1"), 1));
            assert!(said.contains(&format!("m.toml, line {line}:")), "{said}");
            assert!(said.contains("`frobnicate`"), "{said}");
        }
        let said = error(&format!("{GOOD}\n[[wrkload]]\nname = 'x'"));
        assert!(said.contains("line 26:") && said.contains("`wrkload`"), "{said}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let with = |from: &str, to: &str| error(&GOOD.replacen(from, to, 1));
        assert!(with("rounds = 3", "rounds = 0").contains("rounds starts at 1"));
        assert!(with("rounds = 3", "rounds = 'x'").contains("line 3"));
        assert!(with("iodepth = [1, 32]", "iodepth = 'x'").contains("line 22: expected a number"));
        assert!(with("iodepth = [1, 32]", "iodepth = []").contains("workload sweep: an empty array"));
        assert!(with("'{socket}'", "s").contains("back end a: no {socket}"));
        assert!(with("'{socket}'", "'{socket}").contains("back end a: a quote"));
        assert!(with("'{socket}'", "{socket} {image}").contains("back end a: {image} needs"));
        assert!(with("name = \"b\"", "name = \"a\"").contains("two back ends are called a"));
        assert!(with("socket = \"/run/b\"", "").contains("back end b: give either"));
        assert!(with("\"randrw\"", "\"sideways\"").contains("workload sweep: invalid value 'sideways'"));
        assert!(with("\"8k\"", "\"7\"").contains("multiple of 512"));
        assert!(error("[[backend]]\nname = 'a'\nsocket = 'b'").contains("no [[workload]]"));
    }

    #[test]
    fn the_matrices_that_come_along_are_good() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("matrices");
        let mut seen = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            Matrix::parse(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
            seen += 1;
        }
        assert!(seen >= 3);
    }

    #[test]
    fn back_ends_of_the_command_line_need_a_socket() {
        assert!("a=b {socket}".parse::<Backend>().is_ok());
        assert!("a=b".parse::<Backend>().is_err());
        assert!("{socket}".parse::<Backend>().is_err());
    }
}
