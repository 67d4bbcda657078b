//! Runs scenarios as tests, with reasons for those that are skipped.

use std::process::ExitCode;

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::daemon::Kind;
use crate::scene::Scene;

/// What a scenario does; `Ok(Some(reason))` means that this machine has not what it takes.
pub type Scenario = Box<dyn FnOnce(&Scene) -> Result<Option<String>> + Send>;

/// One test.
pub struct Test {
    /// Its name.
    pub name: String,
    /// What is missing for it on this machine, if something is.
    pub needs: Box<dyn FnOnce() -> Option<String> + Send>,
    /// What it does.
    pub run: Scenario,
}

impl Test {
    /// One that may lack what `needs` names.
    pub fn new(name: &str, run: fn(&Scene) -> Result<Option<String>>, needs: fn() -> Option<String>) -> Test {
        Test { name: name.to_owned(), needs: Box::new(needs), run: Box::new(run) }
    }
}

impl std::fmt::Debug for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Test").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Runs the tests that the command line asks for, one after the other: a guest keeps more than one processor busy.
/// A test whose needs are not met ends as ignored, with the reason; or fails, with the variable `require` set.
pub fn run(tests: Vec<Test>, require: &'static str) -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(1);
    let trial = |test: Test| {
        let Test { name, needs, run } = test;
        Trial::ignorable_test(name, move || attempt(needs, run, require))
    };
    libtest_mimic::run(&args, tests.into_iter().map(trial).collect()).exit_code()
}

/// Runs one scenario; what it leaves in its logs is part of the message when it fails.
fn attempt(
    needs: Box<dyn FnOnce() -> Option<String> + Send>,
    run: Scenario,
    require: &str,
) -> Result<Completion, Failed> {
    let no_daemon = || Some("no daemon: run cargo build, or set KICKLESS_BIN_DIR".to_owned());
    let missing = if Kind::from_env().program().is_none() { no_daemon() } else { needs() };
    if let Some(reason) = missing {
        if std::env::var_os(require).is_some() {
            return Err(reason.into());
        }
        return Ok(Completion::ignored_with(reason));
    }
    let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
    match run(&scene) {
        Ok(None) => Ok(Completion::Completed),
        Ok(Some(reason)) => Ok(Completion::ignored_with(reason)),
        Err(error) => Err(format!("{error:#}\n{}", scene.report()).into()),
    }
}
