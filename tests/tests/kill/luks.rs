//! Kills with an enciphered volume: whoever comes next opens it anew, and all data pass through buffers of a daemon that may
//! be gone by then.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Result;
use kickless_tests::cryptsetup::{OFFSET, Volume};
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;

use crate::front::BLOCKS;
use crate::model::BLOCK;
use crate::{Body, killed_with, kills};

const SIZE: usize = BLOCKS * BLOCK;

fn killed(scene: &Scene) -> Result<()> {
    let volume = Volume::format(&scene.path(""), "volume", SIZE as u64, &["--sector-size=512"])?;
    let cipher = volume.cipher(BLOCK)?;
    let mut zeros = vec![0; SIZE];
    cipher.encipher(&mut zeros);
    File::options().write(true).open(&volume.path)?.write_all_at(&zeros, OFFSET)?;
    let image = Image::at(volume.path.clone());
    let content = || {
        let mut data = image.read(OFFSET, SIZE)?;
        cipher.decipher(&mut data);
        Ok(data)
    };
    let luks = volume.args();
    killed_with(scene, &image, true, kills() / 8, &["--direct=on", &luks[0], &luks[1]], content)
}

pub const TESTS: &[(&str, Body)] = &[("killed_at_random_luks", killed)];
