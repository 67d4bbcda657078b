//! How much may be done with a disk in a second, as somebody asks for it. What keeps to it is [`crate::throttle`].
//!
//! Keys are those of QEMU's `-drive throttling.*` and libvirt's `iotune`: `iops-read`, and with `-max` what it may go up to
//! for `-max-length` seconds.

use std::fmt::{self, Display};
use std::str::FromStr;

use daemon::said;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde::{Deserialize, de};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::{PartialSchema, ToSchema};

/// What is counted, and of which requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// Requests.
    IopsTotal,
    /// Requests that read.
    IopsRead,
    /// Requests that write, discard or zero.
    IopsWrite,
    /// Bytes read and written.
    BpsTotal,
    /// Bytes read.
    BpsRead,
    /// Bytes written.
    BpsWrite,
}

/// Keys of [`Kind`], in order.
pub const KINDS: [(Kind, &str); 6] = [
    (Kind::IopsTotal, "iops-total"),
    (Kind::IopsRead, "iops-read"),
    (Kind::IopsWrite, "iops-write"),
    (Kind::BpsTotal, "bps-total"),
    (Kind::BpsRead, "bps-read"),
    (Kind::BpsWrite, "bps-write"),
];

/// Longest burst, in seconds.
const MAX_LENGTH: u64 = 86_400;

/// How much in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// For ever; more than 0.
    pub average: u64,
    /// For a while, after less than the average was used.
    pub max: Option<Burst>,
}

/// More than the average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    /// How much in a second, at least the average.
    pub max: u64,
    /// For so many seconds, at least one, if it was saved up for: what is not used of the average.
    pub length: u64,
}

/// Limits of a disk. All that are there hold at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits([Option<Rate>; KINDS.len()]);

impl Limits {
    /// The limit of this kind.
    pub fn get(&self, kind: Kind) -> Option<Rate> {
        self.0[kind as usize]
    }

    /// With this limit, or without it.
    #[must_use]
    pub fn with(mut self, kind: Kind, rate: Option<Rate>) -> Limits {
        self.0[kind as usize] = rate;
        self
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// As keys and values.
    fn pairs(&self) -> impl Iterator<Item = (String, u64)> {
        KINDS.into_iter().filter_map(|(kind, key)| Some((key, self.get(kind)?))).flat_map(|(key, rate)| {
            let burst =
                rate.max.map(|b| [(format!("{key}-max"), b.max), (format!("{key}-max-length"), b.length)]);
            std::iter::once((key.to_owned(), rate.average)).chain(burst.into_iter().flatten())
        })
    }
}

impl Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.pairs().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

impl ToSchema for Limits {}

impl PartialSchema for Limits {
    /// A table of the keys.
    fn schema() -> RefOr<Schema> {
        let amount = |about: String, pattern: &str| {
            ObjectBuilder::new()
                .schema_type(SchemaType::from_iter([Type::Integer, Type::String]))
                .minimum(Some(0))
                .pattern(Some(pattern))
                .description(Some(about))
        };
        let limits = KINDS.into_iter().fold(ObjectBuilder::new(), |limits, (_, key)| {
            let what = if key.starts_with("bps") { "Bytes" } else { "Requests" };
            let number = "^[0-9]+[KMGTkmgt]?$";
            let length = amount("For at most so many seconds".into(), "^[1-9][0-9]*$")
                .minimum(Some(1))
                .maximum(Some(MAX_LENGTH as f64));
            limits
                .property(key, amount(format!("{what} in a second; 0 is no limit"), number))
                .property(format!("{key}-max"), amount(format!("{what} in a second, after less"), number))
                .property(format!("{key}-max-length"), length)
        });
        limits.additional_properties(Some(AdditionalProperties::FreeForm(false))).into()
    }
}

/// What has been said so far.
#[derive(Default)]
struct Said {
    average: [Option<u64>; KINDS.len()],
    max: [Option<u64>; KINDS.len()],
    length: [Option<u64>; KINDS.len()],
}

impl Said {
    fn say(&mut self, key: &str, value: &str) -> Result<(), String> {
        let (name, into) = match (key.strip_suffix("-max-length"), key.strip_suffix("-max")) {
            (Some(name), _) => (name, &mut self.length),
            (None, Some(name)) => (name, &mut self.max),
            (None, None) => (key, &mut self.average),
        };
        let Some((kind, _)) = KINDS.into_iter().find(|(_, known)| *known == name) else {
            let keys = KINDS.map(|(_, known)| known).join(", ");
            return Err(format!("unknown limit '{key}' ({keys}; each with -max and -max-length)"));
        };
        let unit = if name.starts_with("bps") { 1024 } else { 1000 };
        let amount = if key.ends_with("-length") { length(value) } else { amount(value, unit) };
        let amount = amount.map_err(|e| format!("{key}: {e}"))?;
        if into[kind as usize].replace(amount).is_some() {
            return Err(format!("{key} is there twice"));
        }
        Ok(())
    }

    fn limits(self) -> Result<Limits, String> {
        let mut limits = Limits::default();
        for (i, (kind, key)) in KINDS.into_iter().enumerate() {
            let given = |n: Option<u64>| n.filter(|&n| n > 0);
            let (average, max) = (given(self.average[i]), given(self.max[i]));
            let rate = match (average, max, self.length[i]) {
                (None, None, None) => continue,
                (None, ..) if self.average[i] == Some(0) => continue,
                (None, ..) => return Err(format!("{key}-max and {key}-max-length go with {key}")),
                (Some(_), None, Some(_)) => return Err(format!("{key}-max-length goes with {key}-max")),
                (Some(average), Some(max), _) if max < average => {
                    return Err(format!("{key}-max is {max}, which is less than {key}, {average}"));
                }
                (Some(average), max, length) => {
                    let length = length.unwrap_or(1);
                    Rate { average, max: max.map(|max| Burst { max, length }) }
                }
            };
            limits = limits.with(kind, Some(rate));
        }
        Ok(limits)
    }
}

/// A number, with K, M, G or T for powers of `unit`.
fn amount(s: &str, unit: u64) -> Result<u64, String> {
    let (digits, power) = match s.char_indices().last() {
        Some((at, 'K' | 'k')) => (&s[..at], 1),
        Some((at, 'M' | 'm')) => (&s[..at], 2),
        Some((at, 'G' | 'g')) => (&s[..at], 3),
        Some((at, 'T' | 't')) => (&s[..at], 4),
        _ => (s, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit.pow(power)));
    number.ok_or(format!("'{s}' is no number such as 500, 20K or 100M"))
}

fn length(s: &str) -> Result<u64, String> {
    let length = s.parse().ok().filter(|n| (1..=MAX_LENGTH).contains(n));
    length.ok_or(format!("'{s}' is no number of seconds from 1 to {MAX_LENGTH}"))
}

impl FromStr for Limits {
    type Err = String;

    /// A list such as `iops-read=1000,bps-write=100M`; with `+` for the comma inside of another list.
    fn from_str(s: &str) -> Result<Limits, String> {
        let mut said = Said::default();
        for pair in s.split([',', '+']).filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or(format!("'{pair}' is no limit such as iops-read=1000"))?;
            said.say(key, value)?;
        }
        said.limits()
    }
}

impl Serialize for Limits {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for (key, value) in self.pairs() {
            map.serialize_entry(&key, &value)?;
        }
        map.end()
    }
}

/// A value in a table: a number, or a text.
struct Value(String);

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
        said::parsed(from, |s| Ok::<_, String>(Value(s.to_owned())))
    }
}

impl<'de> Deserialize<'de> for Limits {
    /// From a table of the keys, a text, or a list of texts.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Limits, D::Error> {
        struct AsLimits;
        impl<'de> Visitor<'de> for AsLimits {
            type Value = Limits;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("limits such as iops-read=1000,bps-write=100M, or a table of them")
            }

            fn visit_str<E: de::Error>(self, s: &str) -> Result<Limits, E> {
                s.parse().map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Limits, A::Error> {
                let mut all = Vec::new();
                while let Some(Value(item)) = items.next_element()? {
                    all.push(item);
                }
                self.visit_str(&all.join(","))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Limits, A::Error> {
                let mut said = Said::default();
                while let Some((key, Value(value))) = map.next_entry::<String, Value>()? {
                    said.say(&key, &value).map_err(A::Error::custom)?;
                }
                said.limits().map_err(A::Error::custom)
            }
        }
        from.deserialize_any(AsLimits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(s: &str) -> Result<Limits, String> {
        s.parse()
    }

    #[test]
    fn a_list_and_a_table_say_the_same() {
        let burst = Some(Burst { max: 5000, length: 10 });
        let limits = Limits::default()
            .with(Kind::IopsRead, Some(Rate { average: 1000, max: burst }))
            .with(Kind::BpsWrite, Some(Rate { average: 100 << 20, max: None }));
        let list = "iops-read=1k,bps-write=100M,iops-read-max=5000,iops-read-max-length=10";
        assert_eq!(said(list), Ok(limits));
        assert_eq!(said(&list.replace(',', "+")), Ok(limits));
        assert_eq!(said(&limits.to_string()), Ok(limits));
        let table = "iops-read = '1k'\nbps-write = '100M'\niops-read-max = 5000\niops-read-max-length = 10";
        assert_eq!(toml::from_str(table), Ok(limits));
        let json = serde_json::to_value(limits).unwrap();
        assert_eq!(json["bps-write"], 104_857_600);
        assert_eq!(serde_json::from_value::<Limits>(json).unwrap(), limits);
    }

    #[test]
    fn nothing_and_zero_are_no_limit() {
        for list in ["", "iops-read=0", "iops-read=0,iops-read-max=5"] {
            assert!(said(list).unwrap().is_empty(), "{list}");
        }
        let one = said("bps-total=1,bps-total-max=1").unwrap();
        assert_eq!(one.get(Kind::BpsTotal).and_then(|r| r.max).map(|b| b.length), Some(1));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        for (list, why) in [
            ("iops", "'iops' is no limit"),
            ("iops=5", "unknown limit 'iops' (iops-total, iops-read"),
            ("iops-read=x", "iops-read: 'x' is no number"),
            ("iops-read=-1", "iops-read: '-1' is no number"),
            ("bps-read=99999999999T", "bps-read: '99999999999T' is no number"),
            ("iops-read=1,iops-read=2", "iops-read is there twice"),
            ("iops-read-max=5", "iops-read-max and iops-read-max-length go with iops-read"),
            ("iops-read=5,iops-read-max=4", "iops-read-max is 4, which is less than iops-read, 5"),
            ("iops-read=5,iops-read-max-length=4", "iops-read-max-length goes with iops-read-max"),
            (
                "iops-read=5,iops-read-max=9,iops-read-max-length=0",
                "iops-read-max-length: '0' is no number of seconds",
            ),
        ] {
            let e = said(list).unwrap_err();
            assert!(e.starts_with(why), "{list}: {e}");
        }
    }
}
