//! `packaging DIR`: manual pages into DIR/man, completions for bash, zsh and fish into DIR/completions, out of what the
//! programs' command lines say themselves.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory, Parser};
use clap_complete::Shell;

/// Makes manual pages and completions of the programs' command lines.
#[derive(Debug, Parser)]
#[command(name = "packaging")]
struct Cli {
    /// Where they go, into man/ and completions/
    dir: PathBuf,
}

fn main() -> Result<()> {
    let Cli { dir } = Cli::parse();
    let programs = [
        vhost_blk::cli::Cli::command(),
        vhost_net::cli::Cli::command(),
        vdpa::cli::Cli::command(),
        sriov_tools::cli::Cli::command(),
        vhostctl::command(),
        vbench::command(),
    ];
    programs.into_iter().try_for_each(|program| make(program, &dir))
}

fn make(program: Command, dir: &Path) -> Result<()> {
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let name = program.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut program.clone(), &name, &completions)
            .with_context(|| format!("completions of {name}"))?;
    }
    // A page for each subcommand, too.
    clap_mangen::generate_to(program, &man).with_context(|| format!("manual pages of {name}"))?;
    Ok(())
}
