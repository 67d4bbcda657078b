//! What has changed while a daemon runs, written into the file that it was started with. Comments and what has not changed
//! stay as they are.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use daemon::file::File;
use poll_engine::engine::pacing::Pacing;
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, Value, value};

use crate::cli::Options;
use crate::spec::{DiskSpec, Written};

/// Keys of the first disk, where it is described by options of its own.
const FIRST: [&str; 6] = ["socket-path", "fd", "blk-file", "backend", "serial", "record"];

/// Brings the file at `path` up to date.
pub fn saved(path: &Path, disks: &[DiskSpec], pacing: Pacing, cpus: Option<Vec<usize>>) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = updated(path, &text, disks, pacing, cpus)?;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let beside = Path::new(&name);
    let write = || {
        let mut file = fs::File::create(beside)?;
        file.set_permissions(fs::metadata(path)?.permissions())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(beside, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(beside)))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn updated(
    path: &Path,
    text: &str,
    disks: &[DiskSpec],
    pacing: Pacing,
    cpus: Option<Vec<usize>>,
) -> Result<String> {
    let was = Options::of(&File::new(path, text.to_owned())).context("it has changed since the start")?;
    let mut document: DocumentMut = text.parse()?;
    if was.poll != pacing {
        document["poll"] = value(pacing.name());
    }
    // One that is not pinned cannot be said beside others that are.
    if let Some(cpus) = cpus
        && was.cpus.as_ref().map(|list| &list.0) != Some(&cpus)
    {
        let list: Array = cpus.iter().map(|cpu| i64::try_from(*cpu).unwrap_or(i64::MAX)).collect();
        document["cpus"] = value(list);
    }
    let place = |disk: &DiskSpec| disk.place().map(|place| place.key());
    let now = |old: &DiskSpec| disks.iter().find(|disk| place(disk) == place(old));
    let old = was.disks();
    let listed = old.len() - was.disk.len();
    if let Some(first) = old.first().filter(|_| listed == 1) {
        match now(first) {
            None => FIRST.iter().for_each(|key| drop(document.remove(key))),
            Some(disk) => update(document.as_table_mut(), first, disk),
        }
    }
    let tables = document.remove("disk").unwrap_or(Item::ArrayOfTables(ArrayOfTables::new()));
    let mut tables = tables
        .into_array_of_tables()
        .map_err(|_| anyhow!("{}: disk is no list of tables", path.display()))?;
    for (i, old) in old.iter().skip(listed).enumerate().rev() {
        match (now(old), tables.get_mut(i)) {
            (None, _) => drop(tables.remove(i)),
            (Some(disk), Some(table)) => update(table, old, disk),
            (Some(_), None) => {}
        }
    }
    for disk in disks.iter().filter(|disk| !old.iter().any(|old| place(old) == place(disk))) {
        let mut table = Table::new();
        disk.written().into_iter().for_each(|(key, written)| drop(table.insert(key, item(written))));
        tables.push(table);
    }
    if !tables.is_empty() {
        document.insert("disk", Item::ArrayOfTables(tables));
    }
    let text = document.to_string();
    let read = Options::of(&File::new(path, text.clone())).context("what would be saved is wrong")?;
    let (read, now) = (read.disks(), disks);
    if read.len() != now.len() || now.iter().any(|disk| !read.iter().any(|r| place(r) == place(disk))) {
        bail!("what would be saved are other disks; please report this");
    }
    Ok(text)
}

/// What can change of a disk.
fn update(table: &mut Table, old: &DiskSpec, new: &DiskSpec) {
    if old.limit != new.limit {
        // An empty text is none, in the place of what all disks have.
        drop(table.insert("limit", value(new.limit.unwrap_or_default().to_string())));
    }
    if old.record != new.record {
        match &new.record {
            Some(path) => drop(table.insert("record", value(path.display().to_string()))),
            None => drop(table.remove("record")),
        }
    }
}

fn item(written: Written) -> Item {
    value(match written {
        Written::Text(text) => Value::from(text),
        Written::Number(n) => Value::from(n),
        Written::Truth(on) => Value::from(on),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# Ours.\npoll = 'event' # sleeps\napi = '/api'\n\n\
        # The first.\n[[disk]]\nname = 'a'\nsocket-path = '/a'\nbackend = 'null:1M'\n\n\
        [[disk]]\nname = 'b'\nsocket-path = '/b'\nbackend = 'ram:1M' # gone at the end\n";

    fn disk(s: &str) -> DiskSpec {
        s.parse().unwrap()
    }

    fn after(text: &str, disks: &[DiskSpec], pacing: Pacing, cpus: Option<Vec<usize>>) -> (String, Options) {
        let text = updated(Path::new("f"), text, disks, pacing, cpus).unwrap();
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
        assert_eq!((read.poll, read.cpus.unwrap().0), (Pacing::Busy, vec![0, 3]));
        assert!(
            text.contains("# Ours.") && text.contains("# The first.") && !text.contains("gone"),
            "{text}"
        );
        // And back.
        let (text, read) = after(&text, &[], Pacing::Adaptive, None);
        assert!(read.disks().is_empty() && !text.contains("[[disk]]"), "{text}");
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
