//! Configuration files of both daemons, made at random out of the words that the daemons themselves say they know, and out
//! of the examples: each is read, or refused in one line that names the file, and never is there a panic. Some are given to
//! the programs as well.
//!
//! `KICKLESS_CONFIG_SECONDS` says how long (2), `KICKLESS_FUZZ_SEED` begins where a failure was.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use daemon::file::File;
use kickless_tests::process::built;
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;

/// A daemon: how it reads a file, which is an error's line if it refuses it.
struct Reader {
    program: &'static str,
    read: fn(&File) -> Result<(), String>,
    example: &'static str,
    /// Tables that there may be, the file itself first; and the keys of each.
    tables: Vec<(&'static str, Vec<String>)>,
}

fn line(e: &anyhow::Error) -> String {
    format!("{e:#}")
}

fn file(text: &str) -> File {
    File::new(Path::new("f"), text.to_owned())
}

impl Reader {
    fn new(
        program: &'static str,
        read: fn(&File) -> Result<(), String>,
        example: &'static str,
        tables: &[&'static str],
    ) -> Reader {
        let keys = |table: &&'static str| {
            // What it knows, it says.
            let said = read(&file(&format!("{table}\nnonsense = 1\n"))).unwrap_err();
            let known = said.split_once(", expected ").map_or("", |(_, known)| known);
            let keys: Vec<String> = known.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            assert!(keys.len() >= 2, "{table}: {said}");
            (*table, keys)
        };
        Reader { program, read, example, tables: tables.iter().map(keys).collect() }
    }

    /// A file with tables, keys and values of all kinds.
    fn generate(&self, random: &mut Random) -> String {
        let mut text = String::new();
        for at in 0..=random.below(4) {
            let (table, keys) = &self.tables[if at == 0 { 0 } else { random.below(self.tables.len()) }];
            text.push_str(table);
            text.push('\n');
            for _ in 0..random.below(7) {
                let key = &keys[random.below(keys.len())];
                text.extend([key.as_str(), " = ", &self.value(key, random), "\n"]);
            }
        }
        text
    }

    /// One that the example has for this key, more often than not.
    fn value(&self, key: &str, random: &mut Random) -> String {
        let known: Vec<_> =
            self.example.lines().filter_map(|l| l.strip_prefix(key)?.strip_prefix(" = ")).collect();
        if !known.is_empty() && random.below(3) > 0 {
            return known[random.below(known.len())].to_owned();
        }
        VALUES[random.below(VALUES.len())].replace("LONG", &"x".repeat(random.below(5000)))
    }

    fn change(&self, text: &str, random: &mut Random) -> String {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        for _ in 0..=random.below(3) {
            let at = random.below(lines.len().max(1));
            let other = random.below(lines.len().max(1));
            match random.below(7) {
                0 if !lines.is_empty() => drop(lines.remove(at)),
                1 if !lines.is_empty() => lines.insert(at, lines[other].clone()),
                2 if !lines.is_empty() => lines.swap(at, other),
                3 => lines.insert(at, self.generate(random)),
                4 if !lines.is_empty() => {
                    if let Some((key, _)) = lines[at].clone().split_once(" = ") {
                        lines[at] = format!("{key} = {}", self.value(key, random));
                    }
                }
                5 if !lines.is_empty() => {
                    let mut chars: Vec<char> = lines[at].chars().collect();
                    let from = random.below(chars.len() + 1);
                    let to = (from + random.below(6)).min(chars.len());
                    chars.splice(from..to, VALUES[random.below(VALUES.len())].chars().take(6));
                    lines[at] = chars.into_iter().collect();
                }
                _ => lines.push(self.generate(random)),
            }
        }
        lines.join("\n")
    }
}

/// Right and wrong ones of every kind.
const VALUES: &[&str] = &[
    "true",
    "false",
    "0",
    "1",
    "-1",
    "4",
    "512",
    "4096",
    "65535",
    "65536",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "0x10",
    "1_0",
    "1e400",
    "nan",
    "inf",
    "0.5",
    "''",
    "'a'",
    "\"b\"",
    "\"\\u0000\"",
    "\"\\n\"",
    "'/run/a'",
    "'/run/b'",
    "'LONG'",
    "'ram:1M'",
    "'null:512'",
    "'null:99999999999G'",
    "'ram:'",
    "'0'",
    "'0-1'",
    "'2-3,6'",
    "'1-0'",
    "'99999999999999999999'",
    "'50k'",
    "'100M'",
    "'1G'",
    "'-1'",
    "'on'",
    "'off'",
    "'busy'",
    "'event'",
    "'adaptive'",
    "'raw'",
    "'qcow2'",
    "'raw:/a:3'",
    "'writeback'",
    "'iops-read=1000,bps-write=100M'",
    "'iops-total-max-length=0'",
    "{ iops-read = 1000 }",
    "{ iops-read = -1, bps-read-max = 'x' }",
    "{}",
    "[]",
    "[1]",
    "['/a', '/b']",
    "['20-29', 10]",
    "[[[[[[[[[[1]]]]]]]]]]",
    "{ a = { b = { c = 1 } } }",
    "1979-05-27T07:32:00Z",
    "'52:54:00:00:00:01'",
    "'ff:ff:ff:ff:ff:ff'",
    "'2001:db8::/64'",
    "'10.0.0.0/33'",
    "'é\u{202e}\u{1f4a9}'",
    "'''\nx\n'''",
    "\"\"\"\n\"\"\"",
    "'",
    "\"",
    "[",
    "]",
    "{",
    "=",
    "#",
    "\r",
    "\u{feff}",
    "tcp port 80 and (",
    "'tcp port 80 and ('",
    "10",
    "20",
    "1500",
    "68",
    "'660'",
    "'9999'",
    "'/'",
    "'.'",
    "'..'",
    "5",
    "3",
    "2",
    "8",
];

fn readers() -> [Reader; 2] {
    let blk = |f: &File| vhost_blk::cli::Options::of(f).map(|o| drop(o.disks())).map_err(|e| line(&e));
    let net = |f: &File| vhost_net::cli::Options::of(f).map(|o| drop(o.ports())).map_err(|e| line(&e));
    let examples = [include_str!("../../docs/vhost-blk.toml"), include_str!("../../docs/vhost-net.toml")];
    [
        Reader::new("vhost-blk", blk, examples[0], &["", "[[disk]]"]),
        Reader::new("vhost-net", net, examples[1], &["", "[[port]]", "[uplink]", "[[uplink]]", "[[switch]]"]),
    ]
}

/// Says how to have a failure again.
struct Case<'a>(u64, &'a str);

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("KICKLESS_FUZZ_SEED={}:\n{}", self.0, self.1);
        }
    }
}

#[test]
fn any_file_is_read_or_refused_in_a_line() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let until = Instant::now() + Duration::from_secs(number("KICKLESS_CONFIG_SECONDS").unwrap_or(2));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let first = number("KICKLESS_FUZZ_SEED").unwrap_or_else(now);
    let readers = readers();
    let scene = Scene::new().unwrap();
    let path = scene.path("f.toml");
    let (mut tried, mut read, mut run, mut refusals) = (0_u64, [0_u64; 2], 0_u64, BTreeSet::new());
    // A slow machine tries as many, too.
    while tried < 3000 || Instant::now() < until {
        let seed = first.wrapping_add(tried);
        let mut random = Random(seed);
        let which = (tried % 2) as usize;
        let reader = &readers[which];
        let text = match random.below(3) {
            0 => reader.generate(&mut random),
            1 => reader.change(reader.example, &mut random),
            _ => {
                let text = reader.generate(&mut random);
                reader.change(&text, &mut random)
            }
        };
        let _case = Case(seed, &text);
        let outcome = (reader.read)(&file(&text));
        match &outcome {
            Ok(()) => read[which] += 1,
            Err(said) => {
                assert!(said.starts_with("f:") && !said.contains('\n'), "{said}");
                // Its kind: without what it is about.
                let kind: String = said.chars().filter(|c| c.is_alphabetic() || *c == ' ').take(60).collect();
                refusals.insert(kind);
            }
        }
        if tried.is_multiple_of(500) {
            std::fs::write(&path, &text).unwrap();
            let program = built(reader.program).expect("cargo build --workspace --bins");
            let out = Command::new(program).args(["--check", "--config"]).arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            let code = i32::from(outcome.is_err());
            assert_eq!(out.status.code(), Some(code), "{said} is not {outcome:?}");
            assert!(said.lines().count() <= 1, "{said}");
            run += 1;
        }
        tried += 1;
    }
    println!("{tried} files: {read:?} read, {} kinds of refusals, {run} by the programs", refusals.len());
    assert!(read.iter().all(|n| *n > 50) && refusals.len() > 100, "they are too much alike");
}
