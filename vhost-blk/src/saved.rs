//! What has changed while a daemon runs, written into its file ([`control::saved`]).

use std::path::Path;

use anyhow::{Context, Result, bail};
use control::saved::{self, Listed, Reactors, set};
use daemon::file::File;
use toml_edit::{DocumentMut, Table, Value};

use crate::cli::Options;
use crate::spec::{DiskSpec, Written};

/// Brings the file at `path` up to date.
pub fn saved(path: &Path, disks: &[DiskSpec], reactors: &Reactors) -> Result<()> {
    let text = saved::read(path)?;
    saved::replace(path, &updated(path, &text, disks, reactors)?)
}

fn updated(path: &Path, text: &str, disks: &[DiskSpec], reactors: &Reactors) -> Result<String> {
    let was = Options::of(&File::new(path, text.to_owned())).context("it has changed since the start")?;
    let mut document: DocumentMut = text.parse()?;
    reactors.update(&mut document, &was.run);
    let old = was.disks();
    let has_first = old.len() > was.disk.len();
    saved::update(&mut document, &old, has_first, disks).with_context(|| path.display().to_string())?;
    let text = document.to_string();
    let read = Options::of(&File::new(path, text.clone())).context("what would be saved is wrong")?;
    let place = |disk: &DiskSpec| disk.place().map(|place| place.key());
    let (read, now) = (read.disks(), disks);
    if read.len() != now.len() || now.iter().any(|disk| !read.iter().any(|r| place(r) == place(disk))) {
        bail!("what would be saved are other disks; please report this");
    }
    Ok(text)
}

impl Listed for DiskSpec {
    const LIST: &'static str = "disk";
    const FIRST: &'static [&'static str] = &[
        "socket-path",
        "fd",
        "blk-file",
        "format",
        "key-file",
        "key-fd",
        "key-credential",
        "allow-discards",
        "clone-of",
        "backend",
        "serial",
        "record",
    ];

    fn place(&self) -> Option<String> {
        DiskSpec::place(self).map(|place| place.key())
    }

    fn written(&self) -> Vec<(&'static str, Value)> {
        DiskSpec::written(self).into_iter().map(|(key, written)| (key, item(written))).collect()
    }

    fn update(&self, old: &DiskSpec, table: &mut Table, _: bool) -> bool {
        if old.limit != self.limit {
            // An empty text is none, in the place of what all disks have.
            set(table, "limit", Some(self.limit.unwrap_or_default().to_string().into()));
        }
        if old.record != self.record {
            set(table, "record", self.record.as_ref().map(|path| path.display().to_string().into()));
        }
        true
    }
}

fn item(written: Written) -> Value {
    match written {
        Written::Text(text) => Value::from(text),
        Written::Number(n) => Value::from(n),
        Written::Truth(on) => Value::from(on),
    }
}

#[cfg(test)]
mod tests {
    use poll_engine::engine::pacing::Pacing;
    use poll_engine::engine::placement::CpuList;
    use poll_engine::engine::placement::auto::Cpus;

    use super::*;

    const FILE: &str = "# Ours.\npoll = 'event' # sleeps\napi = '/api'\n\n\
        # The first.\n[[disk]]\nname = 'a'\nsocket-path = '/a'\nbackend = 'null:1M'\n\n\
        [[disk]]\nname = 'b'\nsocket-path = '/b'\nbackend = 'ram:1M' # gone at the end\n";

    fn disk(s: &str) -> DiskSpec {
        s.parse().unwrap()
    }

    fn after(text: &str, disks: &[DiskSpec], pacing: Pacing, cpus: Option<Vec<usize>>) -> (String, Options) {
        let reactors = Reactors::new(pacing, cpus, vec![7, 2]);
        let text = updated(Path::new("f"), text, disks, &reactors).unwrap();
        let read = Options::of(&File::new(Path::new("f"), text.clone())).unwrap();
        (text, read)
    }

    #[test]
    fn what_has_not_changed_stays_as_it_was_written() {
        let disks =
            [disk("name=a,socket-path=/a,backend=null:1M"), disk("name=b,socket-path=/b,backend=ram:1M")];
        assert_eq!(after(FILE, &disks, Pacing::Event, None).0, FILE);
    }

    #[test]
    fn disks_come_and_go_and_comments_stay() {
        let disks = [
            disk("name=a,socket-path=/a,backend=null:1M,record=/r"),
            disk(
                "name=c,socket-path=/c,blk-file=/img,read-only,num-queues=4,cache=writethrough,direct=off,serial=x",
            ),
        ];
        let (text, read) = after(FILE, &disks, Pacing::Busy, Some(vec![0, 3]));
        assert_eq!(read.disks(), disks);
        assert_eq!((read.run.poll, read.run.cpus), (Pacing::Busy, Some(Cpus::These(CpuList(vec![0, 3])))));
        assert!(
            text.contains("# Ours.") && text.contains("# The first.") && !text.contains("gone"),
            "{text}"
        );
        // And back.
        let (text, read) = after(&text, &[], Pacing::Adaptive, None);
        assert!(read.disks().is_empty() && !text.contains("[[disk]]"), "{text}");
    }

    #[test]
    fn reactors_that_were_placed_are_placed_again() {
        let file = format!("cpus = 'auto' # chosen\n{FILE}");
        let disks = after(&file, &[], Pacing::Event, None).1.disks();
        let saved = |cpus: &[usize]| after(&file, &disks, Pacing::Event, Some(cpus.to_vec())).1.run.cpus;
        assert_eq!(saved(&[2, 7]), Some(Cpus::Auto(None)));
        assert_eq!(saved(&[5, 7]), Some(Cpus::These(CpuList(vec![5, 7]))));
    }

    #[test]
    fn a_first_disk_of_options_of_its_own_goes_with_them() {
        let file = "api = '/api'\nsocket-path = '/a'\nbackend = 'null:1M'\nserial = '1'\n";
        let (text, read) = after(file, &[disk("socket-path=/b,backend=null:1M")], Pacing::Adaptive, None);
        assert_eq!(read.disks(), [disk("socket-path=/b,backend=null:1M")]);
        assert!(!text.contains("serial"), "{text}");
        let inline = "api = '/api'\ndisk = [{ socket-path = '/a', backend = 'null:1M' }]\n";
        let both = [disk("socket-path=/a,backend=null:1M"), disk("socket-path=/b,backend=null:1M")];
        assert_eq!(after(inline, &both, Pacing::Adaptive, None).1.disks(), both);
    }
}
