//! Configuration files of both daemons: whatever is in one, it is read or refused in one line.
#![no_main]

use std::path::Path;

use daemon::file::File;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = File::new(Path::new("f"), text.to_owned());
    let outcomes = [
        vhost_blk::cli::Options::of(&file).map(|options| drop(options.disks())),
        vhost_net::cli::Options::of(&file).map(|options| drop(options.ports())),
    ];
    for e in outcomes.into_iter().filter_map(Result::err) {
        let said = format!("{e:#}");
        assert!(said.starts_with("f:") && !said.contains('\n'), "{said}");
    }
});
