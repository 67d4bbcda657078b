//! Images in formats of their own, made and looked at by `qemu-img`.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use crate::process;

/// What is missing to use it.
pub fn missing() -> Option<String> {
    process::find_program("qemu-img").is_none().then(|| "no qemu-img (package qemu-utils)".to_owned())
}

/// Runs it; what it prints.
pub fn run(args: &[&str]) -> Result<String> {
    let (code, text) = process::run("qemu-img", args)?;
    ensure!(code == 0, "qemu-img {}: exit code {code}\n{text}", args.join(" "));
    Ok(text)
}

/// Makes a qcow2 image of `bytes` with these options (`-o`), and further arguments.
pub fn create(path: &Path, bytes: u64, options: &str, more: &[&str]) -> Result<()> {
    let (path, bytes) = (path.to_string_lossy(), bytes.to_string());
    let options: &[&str] = if options.is_empty() { &[] } else { &["-o", options] };
    run(&[&["create", "-q", "-f", "qcow2"], options, more, &[&path, &bytes]].concat())?;
    Ok(())
}

/// Fails unless the image is sound. Clusters that nobody uses may be left over.
pub fn check(path: &Path) -> Result<()> {
    // Whoever was killed may have operations in the kernel that hold its lock for a moment.
    let (code, text) = process::run("qemu-img", &["check", "-U", "-f", "qcow2", &path.to_string_lossy()])?;
    match code {
        0 | 3 => Ok(()),
        _ => bail!("qemu-img check {}: exit code {code}\n{text}", path.display()),
    }
}

/// Fails unless two images have the same content.
pub fn compare(a: (&Path, &str), b: (&Path, &str)) -> Result<()> {
    let [left, right] = [a, b].map(|(path, _)| path.to_string_lossy());
    run(&["compare", "-U", "-f", a.1, "-F", b.1, &left, &right])?;
    Ok(())
}
