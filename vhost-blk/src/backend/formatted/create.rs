//! Making an image over another one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;

use super::Format;
use super::file::ImageFile;
use crate::open::FileTraits;

/// Bytes of a cluster, as `qemu-img create` has it.
const CLUSTER: usize = 64 << 10;
/// Longest name of a backing file that the format has room for.
const MAX_NAME: usize = 1023;

/// Makes a qcow2 image of `size` bytes over `backing`, which has this format; all of it is durable but its name. The file
/// must not be there, and is not if this fails. It takes as long for any size.
pub fn create(path: &Path, size: u64, backing: &Path, format: Format) -> io::Result<()> {
    let name = backing.to_str().filter(|name| name.len() <= MAX_NAME);
    let name = name.ok_or_else(|| io::Error::other("the path of its base is too long, or no UTF-8"))?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    let made = fill(path, &file, size, (name.to_owned(), format.to_string()));
    if made.is_err() {
        let _ = fs::remove_file(path);
    }
    made
}

fn fill(path: &Path, file: &File, size: u64, (name, format): (String, String)) -> io::Result<()> {
    let traits = FileTraits { direct: false, in_memory: false, mem_align: 1, offset_align: 512 };
    let image = ImageFile::new(0, path, file.try_clone()?, traits, None)?;
    let builder = Qcow2::<ImageFile>::create_builder(image).size(size).cluster_size(CLUSTER);
    builder.backing(name, format).create()?;
    file.sync_all()
}
