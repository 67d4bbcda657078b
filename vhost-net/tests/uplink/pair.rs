//! Two interfaces that are each other's wire, `near` and `far`, where nothing else is.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use poll_engine::memory::ram::Ram;
use poll_engine::memory::slice::GuestSlice;
use vhost_net::header::VnetHdr;
use vhost_net::port::{Refused, Uplink};

/// What a machine must have for these tests and does not.
pub fn lacking() -> Option<String> {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|why| format!("no network namespace: {why}"))?;
        let made = try_ip("link add near type veth peer name far");
        made.map_err(|why| format!("no pair of virtual interfaces: {why}"))
    })
    .join()
    .expect("no panic")
    .err()
}

fn try_ip(args: &str) -> Result<(), String> {
    let ran = Command::new("ip").args(args.split(' ')).output().map_err(|why| format!("`ip`: {why}"))?;
    if ran.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&ran.stderr).trim().to_owned()) }
}

/// Runs `ip`.
pub fn ip(args: &str) {
    try_ip(args).unwrap_or_else(|why| panic!("ip {args}: {why}"));
}

/// The pair, both ends up. Addresses of IPv6 would have the kernel send frames of its own.
pub fn make() {
    ip("link add near type veth peer name far");
    for name in ["near", "far"] {
        ip(&format!("link set {name} addrgenmode none"));
        ip(&format!("link set {name} up"));
    }
    let shown = || Command::new("ip").args(["link", "show", "near"]).output().unwrap().stdout;
    until(|| String::from_utf8_lossy(&shown()).contains("LOWER_UP"));
}

/// Waits for what the kernel does in its own time, as it does with carriers.
pub fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come to that");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a test on a thread in a network namespace of its own, which goes with it.
pub fn alone(run: fn()) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        // The kernel of a tap would send frames of its own.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        run();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A frame as a guest has it, sent: all behind the first `head` bytes is in guest memory, in parts of `part` bytes.
pub fn send(
    port: &mut dyn Uplink,
    header: &VnetHdr,
    frame: &[u8],
    head: usize,
    part: usize,
) -> Result<(), Refused> {
    let mut ram = Ram::new(0, 1 << 20, false).unwrap();
    let len = frame.len();
    let (head, rest) = frame.split_at(head.min(len));
    let parts: Vec<(u64, u32)> = rest
        .chunks(part)
        .map(|chunk| {
            let at = ram.alloc(chunk.len() as u64, 1).unwrap();
            // Apart, so that nothing is right by chance.
            ram.alloc(7, 1).unwrap();
            (at, chunk.len() as u32)
        })
        .collect();
    let map = ram.map();
    let slices: Vec<GuestSlice<'_>> = parts.iter().map(|(at, len)| map.slice(*at, *len).unwrap()).collect();
    for (slice, chunk) in slices.iter().zip(rest.chunks(part)) {
        slice.write(chunk);
    }
    let sent = port.send(header, len, head, &mut slices.iter().copied());
    // What waits to be sent must not depend on the guest any more.
    for slice in &slices {
        slice.fill(0xee);
    }
    sent
}

/// The frames that come in, until there are `count` of them.
pub fn receive(port: &mut dyn Uplink, count: usize) -> Vec<(VnetHdr, Vec<u8>)> {
    let mut frames = Vec::new();
    until(|| {
        let most = count - frames.len();
        let got = port.receive(most, &mut |header, frame| frames.push((*header, frame.to_vec())));
        assert!(got <= most);
        frames.len() == count
    });
    frames
}

/// Nothing comes in for a while.
pub fn is_quiet(port: &mut dyn Uplink) -> bool {
    let end = Instant::now() + Duration::from_millis(200);
    let mut quiet = true;
    while quiet && Instant::now() < end {
        quiet = port.receive(1, &mut |_, _| ()) == 0;
    }
    quiet
}

/// To somebody else's address: what is not promiscuous does not see it.
pub fn frame(len: usize, number: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i * 7 + number * 13) as u8).collect();
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5]);
    frame
}

/// This thread alone is nobody from here on.
#[allow(unsafe_code)] // the C library would have all threads change
pub fn drop_rights() {
    // SAFETY: plain numbers; the kernel changes the calling thread.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
}
