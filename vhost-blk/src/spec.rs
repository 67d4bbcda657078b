//! A disk as it is asked for: by `--disk` as a list of keys and values, and in a file as a table.

use std::path::PathBuf;
use std::str::FromStr;

use daemon::said::{self, from_keys};
use daemon::{Place, Switch, from_text, on_off, ring_size};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::backend::formatted::Format;
use crate::backend::luks::KeySource;
use crate::backend::rbd::is_address;
use crate::cli::{CacheMode, DeviceOptions, Synthetic, block_size, cache_mode, num_queues, serial};
use crate::clone::Base;
use crate::faults::Faults;
use crate::limits::Limits;
use crate::takeover::Medium;

/// Longest name.
const MAX_NAME: usize = 128;

/// One `--disk` or `[[disk]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = DiskSpec)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// For people, and for whoever manages it.
    #[serde(deserialize_with = "some_name")]
    #[schema(value_type = String, min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    pub name: Option<String>,
    /// Where to listen.
    #[schema(value_type = String)]
    pub socket_path: Option<PathBuf>,
    /// Or what was inherited for that.
    #[serde(deserialize_with = "some_fd")]
    #[schema(value_type = i32)]
    pub fd: Option<i32>,
    /// Image file.
    #[schema(value_type = String)]
    pub blk_file: Option<PathBuf>,
    /// What the bytes of that mean.
    #[serde(deserialize_with = "some_format")]
    pub format: Format,
    /// The file that the key of a LUKS volume is in.
    #[schema(value_type = String)]
    pub key_file: Option<PathBuf>,
    /// Or a descriptor that was inherited for that.
    #[serde(deserialize_with = "some_fd")]
    #[schema(value_type = i32)]
    pub key_fd: Option<i32>,
    /// Or the service's credential that it is in.
    #[serde(deserialize_with = "some_credential")]
    #[schema(value_type = String, pattern = "^[^/]+$")]
    pub key_credential: Option<String>,
    /// Have what a guest discards on such a volume given up in its file, where it is seen then.
    #[serde(deserialize_with = "on_off_")]
    #[schema(value_type = bool)]
    pub allow_discards: bool,
    /// What that is a clone of, as [FORMAT:]PATH: it is made if it is not there.
    #[serde(deserialize_with = "some_base")]
    #[schema(value_type = String, example = "base.qcow2")]
    pub clone_of: Option<Base>,
    /// Or no file.
    #[serde(deserialize_with = "some_backend")]
    #[schema(value_type = String, example = "ram:1G", pattern = "^(ram|null):[0-9]+[KMGTkmgt]?$")]
    pub backend: Option<Synthetic>,
    /// Serial number.
    #[serde(deserialize_with = "text")]
    #[schema(value_type = String, max_length = 20, pattern = "^[ -~]*$")]
    pub serial: String,
    /// Leave the image to another daemon until the guest arrives.
    #[serde(deserialize_with = "on_off_")]
    #[schema(value_type = bool)]
    pub incoming: bool,
    /// Record requests here.
    #[schema(value_type = String)]
    pub record: Option<PathBuf>,

    /// Refuse writes. This and what follows is that of all disks if it is not said.
    #[serde(deserialize_with = "some_on_off")]
    #[schema(value_type = bool)]
    pub read_only: Option<bool>,
    /// Request queues.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u16, minimum = 1, maximum = 256)]
    pub num_queues: Option<u16>,
    /// Largest ring.
    #[serde(deserialize_with = "some_size")]
    #[schema(value_type = u16, minimum = 4, maximum = 32768)]
    pub queue_size: Option<u16>,
    /// Offer packed rings.
    #[serde(deserialize_with = "some_switch")]
    #[schema(value_type = bool)]
    pub packed: Option<Switch>,
    /// Write cache.
    #[serde(deserialize_with = "some_cache")]
    #[schema(value_type = String, pattern = "^(writeback|writethrough)$")]
    pub cache: Option<CacheMode>,
    /// Bypass the host's page cache.
    #[serde(deserialize_with = "some_switch")]
    #[schema(value_type = bool)]
    pub direct: Option<Switch>,
    /// Logical block size in bytes.
    #[serde(deserialize_with = "some_blocks")]
    #[schema(value_type = u32, minimum = 512, maximum = 65536)]
    pub block_size: Option<u32>,
    /// How much may be done in a second.
    #[schema(value_type = Object)]
    pub limit: Option<Limits>,
    /// What is to go wrong on purpose, for rehearsals.
    #[schema(value_type = Object)]
    pub fault: Option<Faults>,
}

from_text! {
    some_name: Option<String> = |s| name(s).map(Some);
    some_fd: Option<i32> = |s| s.parse().map(Some).map_err(|_| format!("'{s}' is no descriptor number"));
    some_format: Format = format;
    some_credential: Option<String> = |s| credential(s).map(Some);
    some_base: Option<Base> = |s| s.parse().map(Some);
    some_backend: Option<Synthetic> = |s| s.parse().map(Some);
    text: String = serial;
    on_off_: bool = on_off;
    some_on_off: Option<bool> = |s| on_off(s).map(Some);
    some_count: Option<u16> = |s| num_queues(s).map(Some);
    some_size: Option<u16> = |s| ring_size(s).map(Some);
    some_switch: Option<Switch> = |s| said::switch(s).map(Some);
    some_cache: Option<CacheMode> = |s| cache_mode(s).map(Some);
    some_blocks: Option<u32> = |s| block_size(s).map(Some);
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<DiskSpec, String> {
        from_keys(s)
    }
}

impl DiskSpec {
    /// Where its front ends come from, if that is said.
    pub fn place(&self) -> Option<Place> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) => Some(Place::Path(path.clone())),
            (None, Some(fd)) => Some(Place::Fd(fd)),
            (None, None) => None,
        }
    }

    /// What it is known by: its name, or where it is served.
    pub fn key(&self) -> String {
        self.name.clone().or_else(|| self.place().map(|place| place.key())).unwrap_or_default()
    }

    /// What it is called in the log and in statistics: its name, or what is served.
    pub fn title(&self) -> String {
        match (&self.name, &self.blk_file, self.backend) {
            (Some(name), ..) => name.clone(),
            (None, Some(path), _) => path.display().to_string(),
            (None, None, Some(Synthetic::Ram(_))) => "ram".into(),
            (None, None, _) => "null".into(),
        }
    }

    /// What the bytes of its file mean. A clone is a qcow2 image.
    pub fn format(&self) -> Format {
        if self.clone_of.is_some() { Format::Qcow2 } else { self.format }
    }

    /// Where its key is, if that is said.
    pub fn key_source(&self) -> Option<KeySource> {
        let file = self.key_file.clone().map(KeySource::File);
        let credential = || self.key_credential.clone().map(KeySource::Credential);
        file.or_else(|| self.key_fd.map(KeySource::Fd)).or_else(credential)
    }

    /// What it is made of, if that is said.
    pub fn medium(&self) -> Option<Medium> {
        match (&self.blk_file, self.backend) {
            (Some(path), _) if is_address(path) => Some(Medium::Rbd),
            (Some(_), _) if self.format() == Format::Raw => Some(Medium::File),
            (Some(_), _) => Some(Medium::Image(self.format())),
            (None, Some(Synthetic::Ram(size))) => Some(Medium::Ram(size)),
            (None, Some(Synthetic::Null(_))) => Some(Medium::Null),
            (None, None) => None,
        }
    }

    /// What it is to its guest, where `all` holds for what it does not say itself.
    pub fn device(&self, all: &DeviceOptions) -> DeviceOptions {
        DeviceOptions {
            read_only: self.read_only.unwrap_or(all.read_only),
            num_queues: self.num_queues.unwrap_or(all.num_queues),
            queue_size: self.queue_size.unwrap_or(all.queue_size),
            packed: self.packed.unwrap_or(all.packed),
            cache: self.cache.unwrap_or(all.cache),
            direct: self.direct.unwrap_or(all.direct),
            block_size: self.block_size.unwrap_or(all.block_size),
            limit: self.limit.or(all.limit),
            fault: self.fault.clone().or_else(|| all.fault.clone()),
            serial: self.serial.clone(),
            fixed_buffers: all.fixed_buffers,
            shared_depth: all.shared_depth,
        }
    }
}

/// A value as a file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// In quotes.
    Text(String),
    /// A number.
    Number(i64),
    /// True or false.
    Truth(bool),
}

impl DiskSpec {
    /// All that it says, key by key.
    pub fn written(&self) -> Vec<(&'static str, Written)> {
        let text = |value: Option<String>| value.map(Written::Text);
        let path = |path: &Option<PathBuf>| path.as_ref().map(|p| Written::Text(p.display().to_string()));
        let switch = |switch: Option<Switch>| switch.map(|s| Written::Truth(s == Switch::On));
        let backend = self.backend.map(|backend| backend.to_string());
        let cache = self.cache.map(|cache| match cache {
            CacheMode::Writeback => "writeback".to_owned(),
            CacheMode::Writethrough => "writethrough".to_owned(),
        });
        let all = [
            ("name", text(self.name.clone())),
            ("socket-path", path(&self.socket_path)),
            ("fd", self.fd.map(|fd| Written::Number(fd.into()))),
            ("blk-file", path(&self.blk_file)),
            ("format", (self.format != Format::Raw).then(|| Written::Text(self.format.to_string()))),
            ("key-file", path(&self.key_file)),
            ("key-fd", self.key_fd.map(|fd| Written::Number(fd.into()))),
            ("key-credential", text(self.key_credential.clone())),
            ("allow-discards", self.allow_discards.then_some(Written::Truth(true))),
            ("clone-of", text(self.clone_of.as_ref().map(Base::to_string))),
            ("backend", text(backend)),
            ("serial", text(Some(self.serial.clone()).filter(|serial| !serial.is_empty()))),
            ("incoming", self.incoming.then_some(Written::Truth(true))),
            ("record", path(&self.record)),
            ("read-only", self.read_only.map(Written::Truth)),
            ("num-queues", self.num_queues.map(|n| Written::Number(n.into()))),
            ("queue-size", self.queue_size.map(|n| Written::Number(n.into()))),
            ("packed", switch(self.packed)),
            ("cache", text(cache)),
            ("direct", switch(self.direct)),
            ("limit", self.limit.map(|limits| Written::Text(limits.to_string()))),
            ("fault", text(self.fault.as_ref().map(Faults::to_string))),
            ("block-size", self.block_size.map(|n| Written::Number(n.into()))),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// A format.
fn format(s: &str) -> Result<Format, String> {
    <Format as clap::ValueEnum>::from_str(s, false)
        .map_err(|_| format!("'{s}' is none of raw, qcow2, vmdk, luks"))
}

/// The name of a credential (systemd.exec(5)).
pub(crate) fn credential(s: &str) -> Result<String, String> {
    if s.is_empty() || s.contains('/') || s == "." || s == ".." {
        return Err(format!("'{s}' is no name of a credential, which is that of a file in one directory"));
    }
    Ok(s.to_owned())
}

fn name(s: &str) -> Result<String, String> {
    if (1..=MAX_NAME).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(s.to_owned());
    }
    Err(format!("a name has 1 to {MAX_NAME} printable ASCII characters without spaces"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_disks_are_key_value_lists() {
        let disk: DiskSpec =
            "name=a,socket-path=/s,blk-file=/f,read-only,record=/r,queue-size=64".parse().unwrap();
        assert_eq!((disk.key(), disk.title()), ("a".into(), "a".into()));
        assert_eq!((disk.blk_file.clone(), disk.record.clone()), (Some("/f".into()), Some("/r".into())));
        let device = disk.device(&DeviceOptions::default());
        assert_eq!((device.read_only, device.queue_size, device.num_queues), (true, 64, 1));
        let limited: DiskSpec = "limit=iops-read=5+bps-total=1M,num-queues=2".parse().unwrap();
        assert_eq!((limited.limit, limited.num_queues), ("bps-total=1M,iops-read=5".parse().ok(), Some(2)));
        let faulty: DiskSpec = "fault=delay=2ms+error=0.5,num-queues=2".parse().unwrap();
        assert_eq!((faulty.fault, faulty.num_queues), ("delay=2ms,error=0.5".parse().ok(), Some(2)));
        let unnamed: DiskSpec = "socket-path=/s,blk-file=/f".parse().unwrap();
        assert_eq!((unnamed.key(), unnamed.title()), ("/s".into(), "/f".into()));
        for bad in ["", "x=y", "name=", "name=a b", "fd=x", "num-queues=0", "backend=disk:1", "cache=none"] {
            assert!(bad.parse::<DiskSpec>().is_err(), "{bad}");
        }
    }
}
