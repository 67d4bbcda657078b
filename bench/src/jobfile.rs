//! Job files: fio's format, and the same as TOML.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::options::{Given, Named, named};
use crate::spec::Spec;

/// A section that describes jobs.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Its name.
    pub name: Option<String>,
    /// Options for all sections, as far as they stand before it.
    pub global: Given,
    /// Its own.
    pub own: Given,
}

/// Reads a file; what is wrong with it is one line with the place.
pub fn read(path: &Path) -> Result<Vec<Section>, String> {
    let at = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {at}: {e}"))?;
    let toml = path.extension().is_some_and(|e| e == "toml");
    let sections = if toml { from_toml(&text) } else { from_ini(&text) };
    let sections = sections.map_err(|(line, e)| format!("{at}:{line}: {e}"))?;
    if sections.is_empty() { Err(format!("{at}: there is no job in it")) } else { Ok(sections) }
}

/// A line and what is wrong there.
type Wrong = (usize, String);

/// Checks an option and adds it.
fn add(given: &mut Given, line: usize, key: &str, value: &str) -> Result<(), Wrong> {
    match named(key) {
        Named::Known(opt) => {
            opt.apply(&mut Spec::default(), value).map_err(|e| (line, format!("{key}: {e}")))?;
            given.0.push((opt.name, value.to_owned()));
            Ok(())
        }
        Named::Ignored => Ok(()),
        Named::Unknown => Err((line, format!("unknown option '{key}'"))),
    }
}

fn from_ini(text: &str) -> Result<Vec<Section>, Wrong> {
    let mut sections: Vec<Section> = Vec::new();
    let mut global = Given::default();
    // Outside of any section at first.
    let mut in_global = None;
    for (number, line) in text.lines().enumerate() {
        let (number, line) = (number + 1, line.trim());
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let name = rest.strip_suffix(']').ok_or((number, format!("'{line}' is no section")))?;
            in_global = Some(name == "global");
            if name != "global" {
                let (name, own) = (Some(name.to_owned()), Given::default());
                sections.push(Section { name, global: global.clone(), own });
            }
            continue;
        }
        // A comment may follow, after a blank.
        let line = line.split(" #").next().and_then(|l| l.split(" ;").next()).unwrap_or(line).trim();
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let into = match (in_global, sections.last_mut()) {
            (Some(true), _) => &mut global,
            (Some(false), Some(section)) => &mut section.own,
            _ => return Err((number, format!("'{line}' stands before the first section"))),
        };
        add(into, number, key.trim(), value.trim())?;
    }
    Ok(sections)
}

fn from_toml(text: &str) -> Result<Vec<Section>, Wrong> {
    let line = |at: usize| text.get(..at).map_or(1, |before| before.matches('\n').count() + 1);
    let document =
        DeTable::parse(text).map_err(|e| (e.span().map_or(1, |s| line(s.start)), e.message().to_owned()))?;
    let options = |table: &DeTable<'_>, name: &mut Option<String>| {
        let mut given = Given::default();
        for (key, value) in table {
            let number = line(key.span().start);
            let value = match value.get_ref() {
                DeValue::String(s) => s.to_string(),
                DeValue::Integer(n) => n.to_string(),
                DeValue::Float(n) => n.to_string(),
                DeValue::Boolean(b) => u8::from(*b).to_string(),
                _ => return Err((number, format!("{} is no plain value", key.get_ref()))),
            };
            if key.get_ref() == "name" {
                *name = Some(value.clone());
            }
            add(&mut given, number, key.get_ref(), &value)?;
        }
        Ok(given)
    };
    let (mut global, mut jobs) = (Given::default(), Vec::<Section>::new());
    for (key, value) in document.get_ref() {
        let number = line(key.span().start);
        match (&**key.get_ref(), value.get_ref()) {
            ("global", DeValue::Table(table)) => global = options(table, &mut None)?,
            ("job", DeValue::Array(array)) => {
                for job in array {
                    let DeValue::Table(table) = job.get_ref() else {
                        return Err((number, "job is no table: write [[job]]".into()));
                    };
                    let mut section = Section { name: Some("job".into()), ..Section::default() };
                    section.own = options(table, &mut section.name)?;
                    jobs.push(section);
                }
            }
            ("global" | "job", _) => {
                return Err((number, format!("{} is no table: write [global] and [[job]]", key.get_ref())));
            }
            (other, _) => return Err((number, format!("unknown key '{other}': write [global] and [[job]]"))),
        }
    }
    for job in &mut jobs {
        job.global.clone_from(&global);
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const INI: &str = "; a comment\n[global]\nioengine=libaio\nbs=8k\nrunning=1\n";

    #[test]
    fn fios_format() {
        let text = "# first\n[global]\nbs = 8k ; as the disk has it\nioengine=libaio\n\n[one]\nrw=randread\n\
                    [global]\niodepth=4\n[two]\nstonewall\nrw=write\n";
        let sections = from_ini(text).unwrap();
        let names: Vec<_> = sections.iter().map(|s| s.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(sections[0].global.0, [("bs", "8k".to_owned())]);
        assert_eq!(sections[1].global.0.len(), 2);
        assert_eq!(sections[1].own.0, [("stonewall", String::new()), ("rw", "write".to_owned())]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        assert_eq!(from_ini(INI).unwrap_err(), (5, "unknown option 'running'".into()));
        assert_eq!(from_ini("bs=4k\n").unwrap_err().0, 1);
        assert_eq!(from_ini("[a]\n\nbs=x\n").unwrap_err().0, 3);
        assert_eq!(from_ini("[a\n").unwrap_err().0, 1);
        let toml = "[global]\nbs = '4k'\n\n[[job]]\nname = 'a'\nrunning = true\n";
        assert_eq!(from_toml(toml).unwrap_err(), (6, "unknown option 'running'".into()));
        assert_eq!(from_toml("[jobs]\n").unwrap_err().0, 1);
        assert_eq!(from_toml("\n[[job]]\nbs = [1]\n").unwrap_err().0, 3);
        assert_eq!(from_toml("\n\n[[job]\n").unwrap_err().0, 3);
    }

    #[test]
    fn the_same_as_toml() {
        let text = "[global]\nbs = '8k'\n[[job]]\nname = 'one'\niodepth = 4\n[[job]]\nname = 'two'\nstonewall = true\n";
        let sections = from_toml(text).unwrap();
        assert_eq!(sections.len(), 2);
        assert_eq!(sections[1].name.as_deref(), Some("two"));
        assert_eq!(sections[1].global.0, [("bs", "8k".to_owned())]);
        let mut spec = Spec::default();
        sections[0].own.apply(&mut spec).unwrap();
        assert_eq!((spec.iodepth, spec.stonewall), (4, false));
        sections[1].own.apply(&mut spec).unwrap();
        assert!(spec.stonewall);
    }
}
