//! What is to go wrong with a disk on purpose, as somebody asks for it. What does it is [`crate::backend::fault`].

use std::fmt::{self, Display};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use daemon::said;
use fastrand::Rng;
use serde::Deserialize;
use serde::de::{self, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::request::Operation;

/// No request waits longer, so that a queue that is to stop does.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// Of any kind that has nothing of its own.
    Any,
    /// Reads.
    Read,
    /// Writes, discards, and what writes zeros.
    Write,
    /// Flushes.
    Flush,
}

const KINDS: [(Kind, &str); 4] =
    [(Kind::Any, ""), (Kind::Read, "-read"), (Kind::Write, "-write"), (Kind::Flush, "-flush")];

impl Kind {
    /// Of a request.
    pub fn of(operation: &Operation) -> Kind {
        match operation {
            Operation::Read { .. } | Operation::GetId { .. } => Kind::Read,
            Operation::Write { .. } | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                Kind::Write
            }
            Operation::Flush => Kind::Flush,
        }
    }
}

/// How often something happens: billionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chance(u32);

const ALWAYS: u32 = 1_000_000_000;

impl Chance {
    /// Whether it happens now.
    pub fn comes(self, random: &mut Rng) -> bool {
        random.u32(0..ALWAYS) < self.0
    }
}

impl FromStr for Chance {
    type Err = String;

    fn from_str(s: &str) -> Result<Chance, String> {
        let chance = s.parse::<f64>().ok().filter(|p| (0.0..=1.0).contains(p));
        let chance = chance.ok_or(format!("'{s}' is no probability from 0 to 1, such as 0.001"))?;
        Ok(Chance((chance * f64::from(ALWAYS)).round() as u32))
    }
}

impl Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / f64::from(ALWAYS))
    }
}

/// How long requests take beyond what they take anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Always as long.
    Constant(Duration),
    /// Anything from one to the other.
    Uniform(Duration, Duration),
    /// Exponential, with this mean: what comes at random waits so long.
    Exponential(Duration),
    /// Normal, with this mean and standard deviation; nothing is less than no time.
    Normal(Duration, Duration),
    /// Pareto, of at least this, and with this shape in hundredths: the smaller that is, the more wait very long.
    Pareto(Duration, u32),
}

impl Delay {
    /// The next request's.
    pub fn draw(self, random: &mut Rng) -> Duration {
        // More than 0, at most 1.
        let mut one = || 1.0 - random.f64();
        let seconds = match self {
            Delay::Constant(time) => return time,
            Delay::Uniform(from, to) => {
                to.saturating_sub(from).as_secs_f64().mul_add(one(), from.as_secs_f64())
            }
            Delay::Exponential(mean) => -one().ln() * mean.as_secs_f64(),
            Delay::Normal(mean, deviation) => {
                // Box and Muller's.
                let turned = (-2.0 * one().ln()).sqrt() * (std::f64::consts::TAU * one()).cos();
                turned.mul_add(deviation.as_secs_f64(), mean.as_secs_f64())
            }
            Delay::Pareto(least, shape) => least.as_secs_f64() / one().powf(100.0 / f64::from(shape)),
        };
        Duration::from_secs_f64(seconds.clamp(0.0, MAX_DELAY.as_secs_f64()))
    }
}

fn time(s: &str) -> Result<Duration, String> {
    let wrong = || format!("'{s}' is no time of at most {MAX_DELAY:?}, such as 500us, 2ms or 1s");
    let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &s[digits.len()..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    let time = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).map(Duration::from_nanos);
    time.filter(|&time| time <= MAX_DELAY).ok_or_else(wrong)
}

/// A time as [`time`] reads it.
struct Time(Duration);

impl Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos();
        let units = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns")];
        let (unit, name) = units.into_iter().find(|(unit, _)| ns.is_multiple_of(*unit)).unwrap_or((1, "ns"));
        write!(f, "{}{name}", ns / unit)
    }
}

impl FromStr for Delay {
    type Err = String;

    fn from_str(s: &str) -> Result<Delay, String> {
        let parts: Vec<_> = s.split(':').collect();
        match *parts.as_slice() {
            [all] | ["constant", all] => Ok(Delay::Constant(time(all)?)),
            ["uniform", from, to] => match (time(from)?, time(to)?) {
                (from, to) if from <= to => Ok(Delay::Uniform(from, to)),
                _ => Err(format!("'{s}' has more at its lower end than at its upper one")),
            },
            ["exp" | "exponential", mean] => Ok(Delay::Exponential(time(mean)?)),
            ["normal", mean, deviation] => Ok(Delay::Normal(time(mean)?, time(deviation)?)),
            ["pareto", least, shape] => {
                let hundredths = shape.parse::<f64>().ok().map(|shape| shape * 100.0);
                let hundredths = hundredths.filter(|h| (1.0..=10_000.0).contains(h));
                let shape = hundredths.ok_or(format!("'{shape}' is no shape from 0.01 to 100"))?;
                Ok(Delay::Pareto(time(least)?, shape.round() as u32))
            }
            _ => Err(format!(
                "'{s}' is none of TIME, uniform:LEAST:MOST, exponential:MEAN, normal:MEAN:DEVIATION, pareto:LEAST:SHAPE"
            )),
        }
    }
}

impl Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Delay::Constant(all) => write!(f, "{}", Time(all)),
            Delay::Uniform(from, to) => write!(f, "uniform:{}:{}", Time(from), Time(to)),
            Delay::Exponential(mean) => write!(f, "exponential:{}", Time(mean)),
            Delay::Normal(mean, deviation) => write!(f, "normal:{}:{}", Time(mean), Time(deviation)),
            Delay::Pareto(least, shape) => {
                write!(f, "pareto:{}:{}", Time(least), f64::from(shape) / 100.0)
            }
        }
    }
}

/// What is to go wrong with a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    delay: [Option<Delay>; KINDS.len()],
    error: [Option<Chance>; KINDS.len()],
    /// Writes of which only the beginning is carried out, before they fail.
    pub torn: Option<Chance>,
    /// What random numbers begin with: the same requests have the same fate.
    pub seed: Option<u64>,
    /// A new file that all changes of the disk's files are written down in, for power cuts
    /// ([`crate::backend::power_cut`]).
    pub log_writes: Option<PathBuf>,
}

impl Faults {
    /// How long requests of a kind are held up.
    pub fn delay(&self, kind: Kind) -> Option<Delay> {
        self.delay[kind as usize].or(self.delay[Kind::Any as usize])
    }

    /// How often they fail.
    pub fn error(&self, kind: Kind) -> Option<Chance> {
        self.error[kind as usize].or(self.error[Kind::Any as usize])
    }

    /// Whether anything is to go wrong with requests.
    pub fn strike(&self) -> bool {
        self.torn.is_some()
            || self.delay.iter().any(Option::is_some)
            || self.error.iter().any(Option::is_some)
    }

    fn say(&mut self, key: &str, value: &str) -> Result<(), String> {
        let kind = |of: &str| {
            let rest = key.strip_prefix(of)?;
            KINDS.into_iter().find(|(_, suffix)| *suffix == rest).map(|(kind, _)| kind as usize)
        };
        let of = |e: String| format!("{key}: {e}");
        let twice = match (kind("delay"), kind("error"), key) {
            (Some(kind), ..) => self.delay[kind].replace(value.parse().map_err(of)?).is_some(),
            (_, Some(kind), _) => self.error[kind].replace(value.parse().map_err(of)?).is_some(),
            (.., "torn") => self.torn.replace(value.parse().map_err(of)?).is_some(),
            (.., "seed") => {
                let seed = value.parse().map_err(|_| of(format!("'{value}' is no number")))?;
                self.seed.replace(seed).is_some()
            }
            (.., "log-writes") if value.is_empty() => return Err(of("it is empty".into())),
            (.., "log-writes") => self.log_writes.replace(value.into()).is_some(),
            _ => {
                return Err(format!(
                    "unknown fault '{key}' (delay, error, each also with -read, -write or -flush; torn, seed, log-writes)"
                ));
            }
        };
        if twice { Err(format!("{key} is there twice")) } else { Ok(()) }
    }

    /// As keys and values.
    fn pairs(&self) -> impl Iterator<Item = (String, String)> {
        fn each<T: Display>(of: &str, all: &[Option<T>]) -> Vec<(String, String)> {
            let pairs = KINDS.iter().zip(all);
            pairs
                .filter_map(|((_, kind), t)| Some((format!("{of}{kind}"), t.as_ref()?.to_string())))
                .collect()
        }
        let rest = [
            ("torn", self.torn.map(|torn| torn.to_string())),
            ("seed", self.seed.map(|seed| seed.to_string())),
            ("log-writes", self.log_writes.as_ref().map(|path| path.display().to_string())),
        ];
        let rest = rest.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        each("delay", &self.delay).into_iter().chain(each("error", &self.error)).chain(rest)
    }
}

impl Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.pairs().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

impl FromStr for Faults {
    type Err = String;

    /// A list such as `delay=exponential:2ms,error-read=0.001,seed=7`; with `+` for the comma inside of another list.
    fn from_str(s: &str) -> Result<Faults, String> {
        let mut faults = Faults::default();
        for pair in s.split([',', '+']).filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or(format!("'{pair}' is no fault such as error=0.001"))?;
            faults.say(key, value)?;
        }
        Ok(faults)
    }
}

impl Serialize for Faults {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.to_string().serialize(to)
    }
}

/// A value in a table: a number, or a text.
struct Value(String);

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
        said::parsed(from, |s| Ok::<_, String>(Value(s.to_owned())))
    }
}

impl<'de> Deserialize<'de> for Faults {
    /// From a table of the keys, a text, or a list of texts.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Faults, D::Error> {
        struct AsFaults;
        impl<'de> Visitor<'de> for AsFaults {
            type Value = Faults;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("faults such as delay=2ms,error=0.001, or a table of them")
            }

            fn visit_str<E: de::Error>(self, s: &str) -> Result<Faults, E> {
                s.parse().map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Faults, A::Error> {
                let mut all = Vec::new();
                while let Some(Value(item)) = items.next_element()? {
                    all.push(item);
                }
                self.visit_str(&all.join(","))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Faults, A::Error> {
                let mut faults = Faults::default();
                while let Some((key, Value(value))) = map.next_entry::<String, Value>()? {
                    faults.say(&key, &value).map_err(A::Error::custom)?;
                }
                Ok(faults)
            }
        }
        from.deserialize_any(AsFaults)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(s: &str) -> Result<Faults, String> {
        s.parse()
    }

    #[test]
    fn a_list_and_a_table_say_the_same() {
        let list = "delay=exp:2ms,delay-flush=1s,error-read=0.001,torn=1,seed=7,log-writes=/w";
        let faults = said(list).unwrap();
        assert_eq!(faults.delay(Kind::Read), Some(Delay::Exponential(Duration::from_millis(2))));
        assert_eq!(faults.delay(Kind::Flush), Some(Delay::Constant(Duration::from_secs(1))));
        assert_eq!((faults.error(Kind::Read), faults.error(Kind::Write)), (Some(Chance(1_000_000)), None));
        assert_eq!((faults.seed, faults.log_writes.clone()), (Some(7), Some("/w".into())));
        assert!(faults.strike() && !said("seed=7,log-writes=/w").unwrap().strike());
        assert_eq!(said(&list.replace(',', "+")).as_ref(), Ok(&faults));
        assert_eq!(said(&faults.to_string()).as_ref(), Ok(&faults));
        let table = "delay = 'exponential:2ms'\ndelay-flush = '1000ms'\nerror-read = 0.001\ntorn = 1\nseed = 7\n\
                     log-writes = '/w'";
        assert_eq!(toml::from_str(table).as_ref(), Ok(&faults));
        let json = serde_json::to_value(&faults).unwrap();
        assert_eq!(serde_json::from_value::<Faults>(json).unwrap(), faults);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        for (list, why) in [
            ("delay", "'delay' is no fault such as"),
            ("delays=1ms", "unknown fault 'delays' (delay, error"),
            ("delay-discard=1ms", "unknown fault 'delay-discard'"),
            ("delay=1", "delay: '1' is no time of at most 60s"),
            ("delay=61s", "delay: '61s' is no time"),
            ("delay=uniform:2ms:1ms", "delay: 'uniform:2ms:1ms' has more at its lower end"),
            ("delay=gauss:1ms", "delay: 'gauss:1ms' is none of TIME, uniform"),
            ("delay=pareto:1ms:0", "delay: '0' is no shape"),
            ("error=1.5", "error: '1.5' is no probability"),
            ("error=nan", "error: 'nan' is no probability"),
            ("torn=1,torn=1", "torn is there twice"),
            ("seed=x", "seed: 'x' is no number"),
            ("log-writes=", "log-writes: it is empty"),
        ] {
            let e = said(list).unwrap_err();
            assert!(e.starts_with(why), "{list}: {e}");
        }
    }

    /// Mean and, of what is asked for in `share`, the part that is not longer than this.
    fn drawn(delay: &str, share: Duration) -> (f64, f64) {
        let (delay, mut random) = (delay.parse::<Delay>().unwrap(), Rng::with_seed(5));
        let all: Vec<_> = std::iter::repeat_with(|| delay.draw(&mut random)).take(100_000).collect();
        let mean = all.iter().sum::<Duration>().as_secs_f64() / all.len() as f64;
        (mean * 1e3, all.iter().filter(|&&t| t <= share).count() as f64 / all.len() as f64)
    }

    #[test]
    fn delays_are_distributed_as_they_say() {
        let ms = Duration::from_millis;
        for (delay, mean, (at, part)) in [
            ("2ms", 2.0, (ms(2), 1.0)),
            ("uniform:1ms:5ms", 3.0, (ms(2), 0.25)),
            ("exp:2ms", 2.0, (ms(2), 0.632)),
            ("normal:10ms:2ms", 10.0, (ms(12), 0.841)),
            // Half a normal distribution is left at 0.
            ("normal:0s:2ms", 0.798, (Duration::ZERO, 0.5)),
            ("pareto:1ms:3", 1.5, (ms(2), 0.875)),
            ("pareto:1ms:2.5", 1.667, (ms(4), 0.969)),
        ] {
            let (found, below) = drawn(delay, at);
            assert!(
                (found - mean).abs() < 0.03 * mean && (below - part).abs() < 0.01,
                "{delay}: {found} {below}"
            );
        }
        assert!(drawn("pareto:1s:0.01", MAX_DELAY).1 > 0.999, "nothing is longer than a minute");
    }

    #[test]
    fn the_same_seed_is_the_same_fate() {
        let fates = |seed| {
            let (mut random, chance) = (Rng::with_seed(seed), "0.1".parse::<Chance>().unwrap());
            std::iter::repeat_with(|| chance.comes(&mut random)).take(10_000).collect::<Vec<_>>()
        };
        let first = fates(1);
        assert_eq!(first, fates(1));
        assert_ne!(first, fates(2));
        let times = first.iter().filter(|&&comes| comes).count();
        assert!((900..1100).contains(&times), "{times}");
    }
}
