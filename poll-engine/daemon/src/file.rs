//! A configuration file: TOML, and where in it something is wrong.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Command, Id};
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

/// Options that no file says, and why.
pub const NOT_IN_A_FILE: [(&str, &str); 5] = [
    ("config", "it names the file"),
    ("check", "it asks whether the file is right"),
    ("print-capabilities", "it asks about the program"),
    ("takeover", "it is for one start, and the file is for the next one, too"),
    ("chroot", "the file itself is below it"),
];

/// Options that a file may say, of those of a program: by their long names.
pub fn said_by_files(program: &Command) -> impl Iterator<Item = &clap::Arg> {
    let is_said = |long: &str| NOT_IN_A_FILE.iter().all(|(other, _)| *other != long);
    program.get_arguments().filter(move |arg| arg.get_long().is_some_and(is_said))
}

/// Of these options each, none of which may be beside a file that says the same.
pub fn options_of<T: Args>() -> Vec<Id> {
    T::augment_args(Command::new("")).get_arguments().map(|arg| arg.get_id().clone()).collect()
}

/// A step into a file's tables: the value of a key, or an item of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A key.
    Key(&'static str),
    /// An item.
    Item(usize),
}

/// What does not go together, and where it stands in a file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Wrong {
    /// The place.
    pub at: Vec<Step>,
    /// One line.
    pub why: String,
}

impl Wrong {
    /// At this place, for this reason.
    pub fn new(at: &[Step], why: impl Into<String>) -> Wrong {
        Wrong { at: at.to_vec(), why: why.into() }
    }
}

/// A file that was read.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    text: String,
}

impl File {
    /// Reads it.
    pub fn read(path: &Path) -> Result<File> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(File::new(path, text))
    }

    /// One that would be at `path` and has this in it.
    pub fn new(path: &Path, text: String) -> File {
        File { path: path.to_owned(), text }
    }

    /// Fails if it has a key at the top that is no option of this program which a file may say. What it says is parsed into
    /// several types, none of which knows the keys of the others.
    pub fn expect_options(&self, program: &Command) -> Result<()> {
        // What is no TOML at all is said when it is parsed.
        let Ok(document) = DeTable::parse(&self.text) else { return Ok(()) };
        let known: Vec<_> = said_by_files(program).filter_map(|arg| arg.get_long()).collect();
        let unknown = document.get_ref().keys().find(|key| !known.contains(&key.get_ref().as_ref()));
        let Some(key) = unknown else { return Ok(()) };
        let (line, key) = (self.line(key.span().start), key.get_ref());
        if let Some((_, why)) = NOT_IN_A_FILE.iter().find(|(option, _)| option == key) {
            bail!("{line}: `{key}` is for the command line alone: {why}");
        }
        let known = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        bail!("{line}: {}", in_a_line(&format!("unknown field `{key}`, expected one of {known}")))
    }

    /// The error of what is wrong in it.
    pub fn error(&self, wrong: &Wrong) -> anyhow::Error {
        anyhow!("{}: {}", self.place(&wrong.at), in_a_line(&wrong.why))
    }

    /// What it says. What is wrong with it is one line, with the place and the key.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        toml::from_str(&self.text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let document = DeTable::parse(&self.text).ok();
            let key = document.as_ref().and_then(|table| key_at(table.get_ref(), at));
            let what = e.message().lines().collect::<Vec<_>>().join(", ");
            match key.filter(|key| !what.contains(&format!("`{key}`"))) {
                Some(key) => anyhow!("{}: {}", self.line(at), in_a_line(&format!("{key}: {what}"))),
                None => anyhow!("{}: {}", self.line(at), in_a_line(&what)),
            }
        })
    }

    /// The file and the line of what is found by these steps; as far as it is there. Without any, the file.
    pub fn place(&self, steps: &[Step]) -> String {
        let document = DeTable::parse(&self.text);
        let (Ok(document), [_, ..]) = (document, steps) else { return self.path.display().to_string() };
        let mut at = 0;
        let mut value: Option<&DeValue<'_>> = None;
        for step in steps {
            let table = match value {
                None => Some(document.get_ref()),
                Some(DeValue::Table(table)) => Some(table),
                Some(_) => None,
            };
            let found = match (step, table, value) {
                // The only one, which needs no list.
                (Step::Item(_), Some(_), Some(_)) => continue,
                (Step::Key(key), Some(table), _) => {
                    table.iter().find(|(k, _)| k.get_ref() == key).map(|(k, v)| (k.span(), v))
                }
                (Step::Item(item), _, Some(DeValue::Array(items))) => items.get(*item).map(|v| (v.span(), v)),
                _ => None,
            };
            let Some((span, next)) = found else { break };
            (at, value) = (span.start, Some(next.get_ref()));
        }
        self.line(at)
    }

    fn line(&self, at: usize) -> String {
        let line = self.text.get(..at).map_or(1, |before| before.matches('\n').count() + 1);
        format!("{}:{line}", self.path.display())
    }
}

/// A name in a file may have line ends in it, and whatever else a terminal or a log would act upon.
fn in_a_line(said: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    said.chars().map(escape).collect()
}

/// The innermost key that byte `at` is of.
fn key_at(table: &DeTable<'_>, at: usize) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let inner = match value.get_ref() {
            DeValue::Table(table) => key_at(table, at),
            DeValue::Array(items) => items.iter().find_map(|item| match item.get_ref() {
                DeValue::Table(table) => key_at(table, at),
                _ => None,
            }),
            _ => None,
        };
        let is_table = matches!(value.get_ref(), DeValue::Table(_));
        let is_here = key.span().contains(&at) || !is_table && value.span().contains(&at);
        inner.or_else(|| is_here.then(|| key.get_ref().to_string()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;
    use serde::Deserialize;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    #[allow(dead_code)] // parsed only
    struct Zoo {
        name: String,
        pet: Vec<Pet>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    #[allow(dead_code)] // parsed only
    struct Pet {
        legs: u8,
    }

    fn file(text: &str) -> File {
        File::new(Path::new("f"), text.into())
    }

    #[test]
    fn keys_that_nobody_knows_are_said_with_their_line() {
        let program =
            Command::new("zoo").args(["name", "pet", "chroot"].map(|name| Arg::new(name).long(name)));
        assert!(file("name = 'a'\n[[pet]]\nlegs = 4\n").expect_options(&program).is_ok());
        for (text, said) in [
            ("name = 'a'\nwings = 2\n", "f:2: unknown field `wings`, expected one of `name`, `pet`"),
            ("chroot = '/'\n", "f:1: `chroot` is for the command line alone: the file itself is below it"),
        ] {
            assert_eq!(file(text).expect_options(&program).unwrap_err().to_string(), said);
        }
        assert!(file("no toml").expect_options(&program).is_ok(), "that is for the parser to say");
    }

    #[test]
    fn what_is_wrong_is_said_with_line_and_key() {
        for (text, said) in [
            ("name = 1", "f:1: name: invalid type"),
            ("name = 'a'\n\n[[pet]]\nlegs = 4\n[[pet]]\nlegs = 400\n", "f:6: legs: invalid value"),
            ("\n[[pet]]\nwings = 2\n", "f:3: unknown field `wings`"),
            ("\n\nname = \n", "f:3: "),
            ("name = 'a'\nname = 'b'\n", "f:2: "),
        ] {
            let e = file(text).parse::<Zoo>().unwrap_err().to_string();
            assert!(e.starts_with(said) && !e.contains('\n'), "{text}: {e}");
        }
    }

    #[test]
    fn a_name_with_a_line_end_in_it_is_said_in_a_line() {
        let f = file("'a\\nb' = 1\n\"c\\nd\" = 1\n");
        let said = f.expect_options(&Command::new("")).unwrap_err().to_string();
        assert!(!said.contains('\n'), "{said}");
        let wrong = Wrong::new(&[], "disk /run/\n\x1b[2J: no image");
        assert!(f.error(&wrong).to_string().ends_with("disk /run/\\n\\u{1b}[2J: no image"));
    }

    #[test]
    fn places_are_found_by_steps() {
        let file = file("name = 'a'\n\n[[pet]]\nlegs = 4\n\n[[pet]]\n\nlegs = 3\n");
        let [pet, legs] = [Step::Key("pet"), Step::Key("legs")];
        assert_eq!(file.place(&[Step::Key("name")]), "f:1");
        assert_eq!(file.place(&[]), "f");
        assert_eq!(file.place(&[pet, Step::Item(1), legs]), "f:8");
        assert_eq!(file.place(&[pet, Step::Item(1), Step::Key("wings")]), "f:6", "as far as it is there");
        assert_eq!(file.place(&[pet, Step::Item(7), legs]), "f:3");
        let one = self::file("[pet]\n\nlegs = 3\n");
        assert_eq!(one.place(&[pet, Step::Item(0), legs]), "f:3");
    }
}
