//! What has changed while a daemon runs, written into the file that it was started with. Comments and what has not changed
//! stay as they are.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use daemon::running::RunOptions;
use poll_engine::engine::Engine;
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;
use poll_engine::engine::placement::auto::Cpus;
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, Value, value};

/// Something that a file has a list of.
pub trait Listed {
    /// The key of the list.
    const LIST: &'static str;
    /// Keys of the first one, where it is described by options of its own.
    const FIRST: &'static [&'static str];

    /// What it is told from others by.
    fn place(&self) -> Option<String>;

    /// All that it says, key by key.
    fn written(&self) -> Vec<(&'static str, Value)>;

    /// Has a table that says what `old` is say what this is, as far as that can change. `is_first`: the table is the file's
    /// own, with the first one's options; false then, if it cannot say that.
    fn update(&self, old: &Self, table: &mut Table, is_first: bool) -> bool;
}

/// The text of the file, to be changed.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Puts this into the place of the file, whole or not at all.
pub fn replace(path: &Path, text: &str) -> Result<()> {
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

/// Has a document that has all of `old`, of which the first is described by options of its own or not, have all of `now`.
pub fn update<T: Listed>(document: &mut DocumentMut, old: &[T], has_first: bool, now: &[T]) -> Result<()> {
    let same = |a: &T, b: &T| a.place() == b.place();
    let after = |old: &T| now.iter().find(|now| same(now, old));
    let mut fresh: Vec<&T> = now.iter().filter(|now| !old.iter().any(|old| same(old, now))).collect();
    let (first, listed) = old.split_at(usize::from(has_first).min(old.len()));
    for old in first {
        let new = after(old);
        if new.is_none_or(|new| !new.update(old, document.as_table_mut(), true)) {
            for key in T::FIRST {
                document.remove(key);
            }
            fresh.extend(new);
        }
    }
    let tables = document.remove(T::LIST).unwrap_or(Item::ArrayOfTables(ArrayOfTables::new()));
    let tables = tables.into_array_of_tables();
    let mut tables = tables.map_err(|_| anyhow!("{} is no list of tables", T::LIST))?;
    for (i, old) in listed.iter().enumerate().rev() {
        match (after(old), tables.get_mut(i)) {
            (None, _) => drop(tables.remove(i)),
            (Some(new), Some(table)) => _ = new.update(old, table, false),
            (Some(_), None) => {}
        }
    }
    for new in fresh {
        let mut table = Table::new();
        for (key, written) in new.written() {
            table.insert(key, value(written));
        }
        tables.push(table);
    }
    if !tables.is_empty() {
        document.insert(T::LIST, Item::ArrayOfTables(tables));
    }
    Ok(())
}

/// What the reactors do that there are.
#[derive(Clone, Debug)]
pub struct Reactors {
    pacing: Pacing,
    /// Not, if one is not pinned: that cannot be said beside others that are.
    cpus: Option<Vec<usize>>,
    began_on: Vec<usize>,
}

impl Reactors {
    /// Those of this engine.
    pub fn of(engine: &Engine) -> Reactors {
        let cpus = engine.list().iter().map(|reactor| reactor.cpu).collect();
        Reactors::new(engine.pacing(), cpus, engine.began_on().0)
    }

    /// Those that run on `cpus` now, and at the start ran on others.
    pub fn new(pacing: Pacing, cpus: Option<Vec<usize>>, began_on: Vec<usize>) -> Reactors {
        Reactors { pacing, cpus: cpus.map(sorted), began_on: sorted(began_on) }
    }

    /// Has a document that says `was` of them say what they do, which is returned. CPUs that were chosen are chosen again at
    /// the next start, unless somebody has chosen others.
    pub fn update(&self, document: &mut DocumentMut, was: &RunOptions) -> RunOptions {
        let mut now = RunOptions { poll: self.pacing, ..was.clone() };
        if now.poll != was.poll {
            document["poll"] = value(now.poll.name());
        }
        if let Some(cpus) = &self.cpus {
            let is_said = match &was.cpus {
                Some(Cpus::These(list)) => sorted(list.0.clone()) == *cpus,
                Some(Cpus::Auto(_)) => self.began_on == *cpus,
                None => false,
            };
            if !is_said {
                document["cpus"] = value(numbers(cpus));
                now.cpus = Some(Cpus::These(CpuList(cpus.clone())));
            }
        }
        now
    }
}

fn sorted(mut cpus: Vec<usize>) -> Vec<usize> {
    cpus.sort_unstable();
    cpus
}

/// Has a key say this, or not be there.
pub fn set(table: &mut Table, key: &str, to: Option<Value>) {
    match to {
        Some(to) => drop(table.insert(key, value(to))),
        None => drop(table.remove(key)),
    }
}

/// A list of numbers.
fn numbers(all: &[usize]) -> Value {
    let list: Array = all.iter().map(|n| i64::try_from(*n).unwrap_or(i64::MAX)).collect();
    list.into()
}
