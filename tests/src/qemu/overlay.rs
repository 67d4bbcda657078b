//! Files of a test's own in the guest: an archive that the kernel unpacks over the image.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::release::Release;
use crate::scene::Scene;

/// Files to be laid over the image of a guest. An executable `/etc/start` runs at each boot, before the first command.
#[derive(Debug)]
pub struct Overlay {
    root: PathBuf,
}

impl Overlay {
    /// Without a file as yet; `name` is that of its directory in the scene.
    pub fn new(scene: &Scene, name: &str) -> Result<Self> {
        let root = scene.path(name);
        fs::create_dir(&root).with_context(|| root.display().to_string())?;
        Ok(Self { root })
    }

    /// Adds a file with this text, at a path of the guest; one that begins with `#!` is executable.
    pub fn text(&self, path: &str, text: &str) -> Result<()> {
        let place = self.place(path)?;
        fs::write(&place, text)?;
        let mode = if text.starts_with("#!") { 0o755 } else { 0o644 };
        Ok(fs::set_permissions(&place, fs::Permissions::from_mode(mode))?)
    }

    /// Adds a copy of a file of this machine.
    pub fn file(&self, path: &str, from: &Path) -> Result<()> {
        fs::copy(from, self.place(path)?).with_context(|| from.display().to_string())?;
        Ok(())
    }

    /// Adds a program into `/bin`, with the libraries it is linked with.
    pub fn program(&self, from: &Path) -> Result<()> {
        let name = from.file_name().context("a program has a name")?;
        self.file(&format!("/bin/{}", name.to_string_lossy()), from)?;
        self.libraries(from)
    }

    /// Adds a program of ours into `/bin` under this name, as small as it can be: it is unpacked into the guest's memory.
    pub fn stripped(&self, name: &str, from: &Path) -> Result<()> {
        let place = self.place(&format!("/bin/{name}"))?;
        let status = Command::new("strip").arg("-o").arg(place).arg(from).status().context("strip")?;
        ensure!(status.success(), "strip: {status}");
        self.libraries(from)
    }

    fn libraries(&self, from: &Path) -> Result<()> {
        let said = Command::new("ldd").arg(from).output().context("ldd")?;
        let said = String::from_utf8_lossy(&said.stdout);
        for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
            self.file(library, Path::new(library))?;
        }
        Ok(())
    }

    /// The guest's image with the files on top (the kernel takes archives one behind the other).
    pub(super) fn pack(&self, release: Release, to: &Path) -> Result<()> {
        let mut image = fs::read(release.guest("initramfs"))?;
        image.resize(image.len().next_multiple_of(512), 0);
        fs::write(to, image)?;
        let archive = fs::File::options().append(true).open(to)?;
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-o", "-H", "newc", "-R", "0:0"])
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(archive)
            .spawn()
            .context("cpio")?;
        let names = Command::new("find").arg(".").current_dir(&self.root).output().context("find")?.stdout;
        cpio.stdin.take().context("cpio's input")?.write_all(&names)?;
        let status = cpio.wait()?;
        ensure!(status.success(), "cpio: {status}");
        Ok(())
    }

    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.root.join(path.trim_start_matches('/'));
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(place)
    }
}
