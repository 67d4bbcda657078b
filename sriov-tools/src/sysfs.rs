//! Reading sysfs, or a directory that looks like it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::str::FromStr;

/// What a file says, without white space around it; none if there is no such file, or nothing behind it.
pub fn text(path: &Path) -> io::Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
        // Attributes that a device has no answer for: speed of an interface that is down, for one.
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::NotFound | ErrorKind::InvalidInput | ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(nix::libc::ENODEV | nix::libc::EOPNOTSUPP | nix::libc::EIO)
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
}

/// A number, decimal or hexadecimal with 0x; none if there is none.
pub fn number<T: FromStr + TryFrom<u64>>(path: &Path) -> io::Result<Option<T>> {
    let Some(text) = text(path)? else { return Ok(None) };
    Ok(match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok().and_then(|n| T::try_from(n).ok()),
        None => text.parse().ok(),
    })
}

/// The last part of what a symbolic link points to.
pub fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// What is in a directory, sorted; nothing if there is none.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// How many MSI-X vectors a function has, by its configuration space (PCI 3.0, 6.8.2); none if it has no such
/// capability, or only root may see it.
pub fn msix_vectors(config: &[u8]) -> Option<u16> {
    const STATUS_CAPABILITIES: u8 = 1 << 4;
    const MSIX: u8 = 0x11;
    if config.get(6)? & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(*config.get(0x34)? & !3);
    // A list of a device that lies may be a circle.
    for _ in 0..48 {
        if at == 0 {
            return None;
        }
        if *config.get(at)? == MSIX {
            let control = u16::from_le_bytes([*config.get(at + 2)?, *config.get(at + 3)?]);
            return Some((control & 0x7ff) + 1);
        }
        at = usize::from(*config.get(at + 1)? & !3);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msix_is_found_behind_other_capabilities() {
        let mut config = [0; 256];
        assert_eq!(msix_vectors(&config), None);
        (config[6], config[0x34]) = (0x10, 0x40);
        (config[0x40], config[0x41]) = (0x01, 0x70);
        (config[0x70], config[0x72], config[0x73]) = (0x11, 9, 0x80);
        assert_eq!(msix_vectors(&config), Some(10));
        assert_eq!(msix_vectors(&config[..64]), None, "only root may see all");
        // A circle without MSI-X in it.
        (config[0x70], config[0x71]) = (0x05, 0x40);
        assert_eq!(msix_vectors(&config), None);
    }

    #[test]
    fn what_is_not_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(text(&dir.path().join("x")).unwrap(), None);
        assert_eq!(number::<u32>(&dir.path().join("x")).unwrap(), None);
        fs::write(dir.path().join("x"), "0x10\n").unwrap();
        assert_eq!(number::<u16>(&dir.path().join("x")).unwrap(), Some(16));
        assert_eq!(names(&dir.path().join("nothing")), Vec::<String>::new());
    }
}
