//! Numbers as fio writes them: sizes, times, counts, and lists of block sizes.

use std::time::Duration;

/// Largest request.
const MAX_BLOCK: u64 = 32 << 20;

/// A number with fio's suffixes, which are powers of 1024 (`4k`, `1m`, `2g`, `1t`, `4KiB`).
pub fn bytes(s: &str) -> Result<u64, String> {
    let bad = || format!("'{s}' is no number (write 4096, 4k, 1m or 2g)");
    let lower = s.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// A time: seconds, or with `us`, `ms`, `s`, `m`, `h` or `d`.
pub fn time(s: &str) -> Result<Duration, String> {
    let bad = || format!("'{s}' is no time (write 5, 1.5, 300ms or 2m)");
    let s = s.trim();
    let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = s.split_at(digits);
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(bad()),
    };
    let seconds: f64 = number.parse().map_err(|_| bad())?;
    Duration::try_from_secs_f64(seconds * scale).map_err(|_| bad())
}

/// A whole number in a range.
pub fn count(s: &str, min: u64, max: u64) -> Result<u64, String> {
    let n = bytes(s)?;
    if n < min || n > max { Err(format!("'{s}' is not between {min} and {max}")) } else { Ok(n) }
}

/// `1`, `0`, or nothing, which means 1.
pub fn switch(s: &str) -> Result<bool, String> {
    match s {
        "" | "1" | "true" | "yes" => Ok(true),
        "0" | "false" | "no" => Ok(false),
        _ => Err(format!("'{s}' is neither 0 nor 1")),
    }
}

/// Whether each write is durable before it is answered, in the words of fio's `sync`.
pub fn sync(s: &str) -> Result<bool, String> {
    match s {
        "none" | "0" => Ok(false),
        "sync" | "dsync" | "1" => Ok(true),
        _ => Err(format!("'{s}' is none of none, sync, dsync")),
    }
}

/// A part of the disk: bytes, or a percentage of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Bytes.
    Bytes(u64),
    /// Percent of the disk.
    Percent(u64),
}

impl Amount {
    /// Reads `64m` or `50%`.
    pub fn parse(s: &str) -> Result<Amount, String> {
        if let Some(percent) = s.trim().strip_suffix('%') {
            return Ok(Amount::Percent(count(percent, 0, 100)?));
        }
        let n = bytes(s)?;
        let whole = n.is_multiple_of(512);
        whole.then_some(Amount::Bytes(n)).ok_or_else(|| format!("'{s}' is no multiple of 512 bytes"))
    }

    /// In bytes, whole sectors, of a disk of `disk` bytes.
    pub fn of(self, disk: u64) -> u64 {
        match self {
            Amount::Bytes(n) => n,
            Amount::Percent(p) => (u128::from(disk) * u128::from(p) / 100) as u64 / 512 * 512,
        }
    }
}

/// Block sizes to choose from, each with the sum of percentages up to and with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes(Vec<(u32, u32)>);

impl Sizes {
    /// One size.
    pub fn one(size: u32) -> Sizes {
        Sizes(vec![(size, 100)])
    }

    /// The size for a random number.
    #[inline]
    pub fn pick(&self, random: u64) -> u32 {
        if let [(only, _)] = self.0[..] {
            return only;
        }
        let percent = (random >> 32) as u32 % 100;
        self.0.iter().find(|(_, until)| percent < *until).or(self.0.last()).map_or(0, |(size, _)| *size)
    }

    /// The only size, if there is one.
    pub fn only(&self) -> Option<u32> {
        if let [(only, _)] = self.0[..] { Some(only) } else { None }
    }

    /// Smallest and largest.
    pub fn range(&self) -> (u32, u32) {
        let sizes = || self.0.iter().map(|(size, _)| *size);
        (sizes().min().unwrap_or(512), sizes().max().unwrap_or(512))
    }

    fn parse_block(s: &str) -> Result<u32, String> {
        let n = bytes(s)?;
        let fits = n > 0 && n.is_multiple_of(512) && n <= MAX_BLOCK;
        fits.then_some(n as u32).ok_or_else(|| format!("'{s}' is no multiple of 512 bytes up to 32m"))
    }

    fn parse_split(s: &str) -> Result<Sizes, String> {
        let mut entries = Vec::new();
        for entry in s.split(':') {
            let (size, percent) = entry.split_once('/').unwrap_or((entry, ""));
            let percent = if percent.is_empty() { None } else { Some(count(percent, 0, 100)? as u32) };
            entries.push((Sizes::parse_block(size)?, percent));
        }
        let given: u32 = entries.iter().filter_map(|e| e.1).sum();
        let blank = entries.iter().filter(|e| e.1.is_none()).count() as u32;
        if given > 100 || (blank == 0 && given != 100) {
            return Err(format!("the percentages of '{s}' add up to {given}, not 100"));
        }
        let mut sum = 0;
        let share = (100 - given).checked_div(blank).unwrap_or(0);
        Ok(Sizes(
            entries
                .into_iter()
                .map(|(size, percent)| {
                    sum += percent.unwrap_or(share);
                    (size, sum)
                })
                .collect(),
        ))
    }

    /// `4k`, `4k,8k` or `,8k` (reads, writes) into sizes for both.
    pub fn set_blocks(both: &mut [Sizes; 2], s: &str) -> Result<(), String> {
        Sizes::set(both, s, |part| Sizes::parse_block(part).map(Sizes::one))
    }

    /// `4k/50:64k/50` and, after a comma, the same for writes.
    pub fn set_splits(both: &mut [Sizes; 2], s: &str) -> Result<(), String> {
        Sizes::set(both, s, Sizes::parse_split)
    }

    fn set(
        both: &mut [Sizes; 2],
        s: &str,
        parse: impl Fn(&str) -> Result<Sizes, String>,
    ) -> Result<(), String> {
        let (read, write) = s.split_once(',').unwrap_or((s, s));
        for (sizes, part) in both.iter_mut().zip([read, write]) {
            if !part.trim().is_empty() {
                *sizes = parse(part.trim())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (s, n) in
            [("512", 512), ("4k", 4096), ("4K", 4096), ("4KiB", 4096), ("1mb", 1 << 20), ("2g", 2 << 30)]
        {
            assert_eq!(bytes(s), Ok(n), "{s}");
        }
        for bad in ["", "k", "4x", "-1", "1.5k", "99999999999t"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        assert_eq!(time("5"), Ok(Duration::from_secs(5)));
        assert_eq!(time("0.3"), Ok(Duration::from_millis(300)));
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        assert!(time("5x").is_err() && time("").is_err() && time("-1").is_err());
    }

    #[test]
    fn amounts_are_whole_sectors() {
        assert_eq!(Amount::parse("64m").unwrap().of(1), 64 << 20);
        assert_eq!(Amount::parse("50%").unwrap().of(1 << 20), 1 << 19);
        assert!(Amount::parse("100").is_err() && Amount::parse("101%").is_err());
    }

    #[test]
    fn block_sizes_for_reads_and_writes() {
        let mut both = [Sizes::one(512), Sizes::one(512)];
        Sizes::set_blocks(&mut both, "4k").unwrap();
        assert_eq!(both.each_ref().map(Sizes::only), [Some(4096), Some(4096)]);
        Sizes::set_blocks(&mut both, ",8k").unwrap();
        assert_eq!(both.each_ref().map(Sizes::only), [Some(4096), Some(8192)]);
        for bad in ["0", "100", "64m", "4k,x"] {
            assert!(Sizes::set_blocks(&mut both, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn splits_are_met() {
        let mut both = [Sizes::one(512), Sizes::one(512)];
        Sizes::set_splits(&mut both, "4k/25:64k/75,8k/:16k/").unwrap();
        let small = |sizes: &Sizes, size| (0..100u64).filter(|n| sizes.pick(n << 32) == size).count();
        assert_eq!((small(&both[0], 4096), small(&both[1], 8192)), (25, 50));
        assert_eq!(both[0].range(), (4096, 65536));
        for bad in ["4k/50", "4k/60:8k/60", "4k/x"] {
            assert!(Sizes::set_splits(&mut both, bad).is_err(), "{bad}");
        }
    }
}
