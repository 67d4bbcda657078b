//! What a LUKS2 header says, as far as it has to be right for a volume that we serve (LUKS2 On-Disk Format Specification 1.1.4,
//! chapter 3).

use std::collections::BTreeMap;

use serde::Deserialize;

/// Bytes of what both headers begin with.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// The one cipher.
const CIPHER: &str = "aes-xts-plain64";

/// The metadata: what of it matters here.
#[derive(Deserialize)]
struct Metadata {
    segments: BTreeMap<String, Segment>,
    config: Config,
}

#[derive(Deserialize)]
struct Segment {
    r#type: String,
    offset: String,
    size: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u32,
    integrity: Option<serde_json::Value>,
    #[serde(default)]
    flags: Vec<String>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    flags: Vec<String>,
    requirements: Option<Requirements>,
}

#[derive(Deserialize)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

/// Where and how the data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Where they begin in the file, bytes.
    pub offset: u64,
    /// How many bytes; `None` is up to the end of the file.
    pub len: Option<u64>,
    /// Bytes that are enciphered together: a power of two from 512 to 4096.
    pub sector: u32,
    /// The number of the first 512 bytes.
    pub first: u64,
    /// Whether the header allows discards (`cryptsetup --persistent --allow-discards`).
    pub discards: bool,
}

/// Why a header that is whole is not one of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Its metadata make no sense.
    #[error("its header makes no sense: {0}")]
    Senseless(String),
    /// Something is under way, or needed.
    #[error(
        "it needs {0}, which is not supported here; finish that with cryptsetup (reencrypt --resume-only)"
    )]
    Requirement(String),
    /// Not one segment of data.
    #[error("its data are in {0} segments, and one is what is supported")]
    Segments(usize),
    /// With checksums.
    #[error("it has integrity protection, which is not supported here")]
    Integrity,
    /// Another cipher.
    #[error("its cipher is {0}; only {CIPHER} is supported, which cryptsetup luksFormat makes by itself")]
    Cipher(String),
    /// Another length of the key.
    #[error("its key has {0} bits; only AES-256 is supported, which takes 512 (--key-size 512)")]
    KeySize(u32),
}

impl Data {
    /// By this metadata.
    pub fn parse(json: &str) -> Result<Data, Unsupported> {
        let senseless = |why: &str| Unsupported::Senseless(why.to_owned());
        let metadata: Metadata = serde_json::from_str(json).map_err(|e| senseless(&e.to_string()))?;
        let mandatory = metadata.config.requirements.into_iter().flat_map(|r| r.mandatory);
        if let Some(needed) = mandatory.into_iter().next() {
            return Err(Unsupported::Requirement(needed));
        }
        let count = metadata.segments.len();
        let (Some(segment), 1) = (metadata.segments.into_values().next(), count) else {
            return Err(Unsupported::Segments(count));
        };
        if segment.r#type != "crypt" || segment.flags.iter().any(|flag| flag.starts_with("backup-")) {
            return Err(Unsupported::Requirement(format!("a segment of type {}", segment.r#type)));
        }
        if segment.integrity.is_some() {
            return Err(Unsupported::Integrity);
        }
        if segment.encryption != CIPHER {
            return Err(Unsupported::Cipher(segment.encryption));
        }
        let number = |text: &str| text.parse::<u64>().map_err(|_| senseless("a number is none"));
        let sector = segment.sector_size;
        let (offset, first) = (number(&segment.offset)?, number(&segment.iv_tweak)?);
        let len = (segment.size != "dynamic").then(|| number(&segment.size)).transpose()?;
        let fits = |n: u64| n.is_multiple_of(512) && n < 1 << 62;
        let sector_fits = sector.is_power_of_two() && (512..=4096).contains(&sector);
        if !sector_fits || !fits(offset) || !fits(len.unwrap_or(0)) || offset == 0 || len == Some(0) {
            return Err(senseless("its segment is misplaced"));
        }
        let discards = metadata.config.flags.iter().any(|flag| flag == "allow-discards");
        Ok(Data { offset, len, sector, first, discards })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(segments: &str, config: &str) -> Result<Data, Unsupported> {
        Data::parse(&format!(r#"{{"segments":{{{segments}}},"config":{{{config}}},"keyslots":{{}}}}"#))
    }

    fn segment(changes: &[(&str, &str)]) -> String {
        let mut segment = r#""0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512}"#.to_owned();
        for (from, to) in changes {
            assert!(segment.contains(from));
            segment = segment.replace(from, to);
        }
        segment
    }

    #[test]
    fn a_volume_as_cryptsetup_makes_it() {
        let plain = Data { offset: 16 << 20, len: None, sector: 512, first: 0, discards: false };
        assert_eq!(with(&segment(&[]), ""), Ok(plain));
        let fine =
            segment(&[("512", "4096"), ("dynamic", "8192"), (r#""iv_tweak":"0""#, r#""iv_tweak":"7""#)]);
        let data = Data { sector: 4096, len: Some(8192), first: 7, discards: true, ..plain };
        assert_eq!(with(&fine, r#""flags":["allow-discards"]"#), Ok(data));
    }

    #[test]
    fn what_is_not_supported_is_said() {
        let two = format!("{},{}", segment(&[]), segment(&[(r#""0":{"#, r#""1":{"#)]));
        assert_eq!(with(&two, ""), Err(Unsupported::Segments(2)));
        assert_eq!(with("", ""), Err(Unsupported::Segments(0)));
        let requirement = r#""requirements":{"mandatory":["online-reencrypt-v2"]}"#;
        assert!(matches!(with(&segment(&[]), requirement), Err(Unsupported::Requirement(_))));
        let integrity =
            segment(&[("\"sector_size\"", r#""integrity":{"type":"hmac(sha256)"},"sector_size""#)]);
        assert_eq!(with(&integrity, ""), Err(Unsupported::Integrity));
        let linear = segment(&[("\"crypt\"", "\"linear\"")]);
        assert!(matches!(with(&linear, ""), Err(Unsupported::Requirement(_))));
        let serpent = segment(&[("aes-xts", "serpent-xts")]);
        assert_eq!(with(&serpent, ""), Err(Unsupported::Cipher("serpent-xts-plain64".into())));
        for (from, to) in [
            ("512", "513"),
            ("512", "0"),
            ("512", "8192"),
            ("16777216", "16777217"),
            ("16777216", "0"),
            ("16777216", "-1"),
            ("16777216", "99999999999999999999"),
            ("16777216", "18446744073709551104"),
            ("dynamic", "0"),
            ("dynamic", "all"),
        ] {
            let refused = with(&segment(&[(from, to)]), "");
            assert!(matches!(refused, Err(Unsupported::Senseless(_))), "{to}: {refused:?}");
        }
        assert!(matches!(Data::parse("{}"), Err(Unsupported::Senseless(_))));
    }
}
