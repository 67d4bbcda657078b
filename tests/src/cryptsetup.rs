//! LUKS volumes, made and read by `cryptsetup`: without root and without the device mapper, since it can encipher a whole
//! file, and decipher it, in user space (`cryptsetup reencrypt`).

use std::path::{Path, PathBuf};

use aes::Aes256;
use aes::cipher::KeyInit;
use anyhow::{Context, Result, ensure};
use xts_mode::{Xts128, get_tweak_default};

use crate::process;

/// How many bytes before the data: what `cryptsetup` reserves unless it is told otherwise.
pub const OFFSET: u64 = 16 << 20;

/// What is missing to make volumes.
pub fn missing() -> Option<String> {
    process::find_program("cryptsetup").is_none().then(|| "no cryptsetup (package cryptsetup-bin)".to_owned())
}

/// Runs it; what it prints.
pub fn run(args: &[&str]) -> Result<String> {
    let (code, text) = process::run("cryptsetup", args)?;
    ensure!(code == 0, "cryptsetup {}: exit code {code}\n{text}", args.join(" "));
    Ok(text)
}

/// Slots that take no time: what they cost is not what is tested.
const CHEAP: [&str; 4] = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "-q", "--type=luks2"];

/// A volume, and its key in a file.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The volume.
    pub path: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Volume {
    /// A new volume `name` of `bytes` in this directory, with what there is in no particular order; and its key beside it.
    /// Some tenths of a second, and a file of 16 MiB more than `bytes`.
    pub fn format(dir: &Path, name: &str, bytes: u64, options: &[&str]) -> Result<Volume> {
        let volume = Volume { path: dir.join(name), key: dir.join(format!("{name}.key")) };
        std::fs::write(&volume.key, format!("the key of {name}\n"))?;
        let file = std::fs::File::create(&volume.path)?;
        file.set_len(OFFSET + bytes)?;
        let [path, key] = [&volume.path, &volume.key].map(|path| path.to_string_lossy());
        run(&[&["luksFormat"], &CHEAP[..], options, &[&*path, &*key]].concat())?;
        Ok(volume)
    }

    /// The same with these data, enciphered by `cryptsetup`.
    pub fn encrypt(dir: &Path, name: &str, data: &[u8], options: &[&str]) -> Result<Volume> {
        let volume = Volume { path: dir.join(name), key: dir.join(format!("{name}.key")) };
        std::fs::write(&volume.key, format!("the key of {name}\n"))?;
        std::fs::write(&volume.path, data)?;
        // Room for the header, at the end: data move up by half of it.
        let file = std::fs::File::options().write(true).open(&volume.path)?;
        file.set_len(data.len() as u64 + 2 * OFFSET)?;
        let [path, key] = [&volume.path, &volume.key].map(|path| path.to_string_lossy());
        let how = ["reencrypt", "--encrypt", "--force-offline-reencrypt", "--reduce-device-size=32M"];
        let key = format!("--key-file={key}");
        run(&[&how[..], &CHEAP[..], options, &[&*key, &*path]].concat())?;
        file.set_len(OFFSET + data.len() as u64)?;
        Ok(volume)
    }

    /// Its data, deciphered by `cryptsetup` in a copy.
    pub fn decrypt(&self) -> Result<Vec<u8>> {
        let [copy, header] = ["plain", "header"].map(|end| self.path.with_extension(end));
        let _ = std::fs::remove_file(&header);
        let len = std::fs::copy(&self.path, &copy)?.saturating_sub(OFFSET);
        let [copied, head, key] = [&copy, &header, &self.key].map(|path| path.to_string_lossy());
        let (head, key) = (format!("--header={head}"), format!("--key-file={key}"));
        run(&["reencrypt", "--decrypt", "-q", "--force-offline-reencrypt", &head, &key, &copied])?;
        let mut data = std::fs::read(&copy).context("no plain copy")?;
        data.truncate(len as usize);
        Ok(data)
    }

    /// The cipher of its data, which are in sectors of `sector` bytes.
    pub fn cipher(&self, sector: usize) -> Result<Cipher> {
        let dumped = self.path.with_extension("volume-key");
        let [path, key, out] = [&self.path, &self.key, &dumped].map(|path| path.to_string_lossy());
        let (key, out) = (format!("--key-file={key}"), format!("--volume-key-file={out}"));
        run(&["luksDump", "-q", "--dump-volume-key", &out, &key, &path])?;
        let bytes = std::fs::read(&dumped)?;
        std::fs::remove_file(&dumped)?;
        ensure!(bytes.len() == 64, "a key of {} bytes", bytes.len());
        let [data, tweak] = [&bytes[..32], &bytes[32..]].map(|half| Aes256::new(half.into()));
        Ok(Cipher { xts: Xts128::new(data, tweak), sector })
    }

    /// The arguments by which the daemon serves it.
    pub fn args(&self) -> [String; 2] {
        ["--format=luks".into(), format!("--key-file={}", self.key.display())]
    }
}

/// The cipher of a volume's data, by an implementation that the daemon has nothing to do with: in milliseconds, where
/// `cryptsetup` needs a second to find out how fast the machine is.
pub struct Cipher {
    xts: Xts128<Aes256>,
    sector: usize,
}

/// A sector's number counts 512 bytes each, whatever its size (dm-crypt's plain64).
fn tweak(sector: usize) -> impl Fn(u128) -> [u8; 16] {
    move |number| get_tweak_default(number * (sector / 512) as u128)
}

impl Cipher {
    /// What a volume's file has from [`OFFSET`] on for these data, whole sectors from the first one on.
    pub fn encipher(&self, data: &mut [u8]) {
        self.xts.encrypt_area(data, self.sector, 0, tweak(self.sector));
    }

    /// The data of which that is there.
    pub fn decipher(&self, data: &mut [u8]) {
        self.xts.decrypt_area(data, self.sector, 0, tweak(self.sector));
    }
}
