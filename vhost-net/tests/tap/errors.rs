//! Taps that are there, that are not, and that are not what they should be.

use std::os::fd::OwnedFd;

use vhost_net::port::tap::Tap;

use super::host::ip;

fn is_there(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

pub fn what_was_there_before_stays() {
    let tap = Tap::open("kl0", 4, Some(9000)).unwrap();
    assert_eq!((tap.name(), tap.pairs(), tap.mtu()), ("kl0", 4, 9000));
    let shown = ip("link show kl0");
    assert!(shown.contains("mtu 9000") && shown.contains(",UP"), "{shown}");
    drop(tap);
    assert!(!is_there("kl0"));
    for (kind, pairs) in [("", 1), (" multi_queue", 1), (" multi_queue", 3)] {
        ip(&format!("tuntap add kl1 mode tap vnet_hdr{kind}"));
        ip("link set kl1 mtu 1400 up");
        let tap = Tap::open("kl1", pairs, None).unwrap();
        assert_eq!((tap.pairs(), tap.mtu()), (pairs, 1400));
        drop(tap);
        assert!(is_there("kl1"));
        ip("link delete kl1");
    }
    // The kernel finds a name.
    let tap = Tap::open("kl%d", 1, None).unwrap();
    assert!(is_there(tap.name()), "{}", tap.name());
}

#[track_caller]
fn refused(name: &str, pairs: u16, mtu: Option<u16>, wanted: &str) {
    let error = Tap::open(name, pairs, mtu).unwrap_err().to_string();
    assert_eq!(error, wanted);
}

pub fn taps_that_do_not_fit_are_refused() {
    refused("lo", 1, None, "lo is no tap: take another name, or remove it (ip link delete lo)");
    ip("tuntap add tn0 mode tun");
    refused("tn0", 1, None, "tn0 is no tap: take another name, or remove it (ip link delete tn0)");
    ip("tuntap add kl0 mode tap vnet_hdr");
    refused(
        "kl0",
        2,
        None,
        "tap kl0 has a single queue pair, and 2 are wanted: make it anew with multi_queue \
         (ip tuntap add kl0 mode tap vnet_hdr multi_queue), or ask for one",
    );
    refused(
        "kl0",
        1,
        Some(9000),
        "tap kl0 has an MTU of 1500, and the device is to have 9000: change the tap's (ip link set kl0 mtu 9000), \
         or leave the device's out to take the tap's over",
    );
    let _tap = Tap::open("kl0", 1, None).unwrap();
    refused("kl0", 1, None, "tap kl0 is in use: another program has its queue; stop it, or take another tap");
    refused("kl2", 1, Some(60), "tap kl2: setting the MTU: Invalid argument (os error 22)");
}

/// This thread alone is nobody from here on.
#[allow(unsafe_code)] // the C library would have all threads change
pub fn not_permitted() {
    use std::os::unix::fs::PermissionsExt;
    ip("tuntap add kl0 mode tap vnet_hdr user 1");
    ip("tuntap add kl1 mode tap vnet_hdr user 65534");
    let is_open = std::fs::metadata("/dev/net/tun").unwrap().permissions().mode() & 0o6 == 0o6;
    // SAFETY: plain numbers; the kernel changes the calling thread.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
    if is_open {
        for name in ["kl0", "kl2"] {
            let way_out = format!("(ip tuntap add {name} mode tap vnet_hdr multi_queue user NAME)");
            let why = Tap::open(name, 1, None).unwrap_err().to_string();
            assert!(why.contains("CAP_NET_ADMIN") && why.ends_with(&way_out), "{why}");
        }
        // One that is this user's.
        assert_eq!(Tap::open("kl1", 1, None).unwrap().name(), "kl1");
    } else {
        let why = Tap::open("kl0", 1, None).unwrap_err().to_string();
        assert!(why.starts_with("may not open /dev/net/tun: "), "{why}");
    }
}

/// One without any capability.
pub fn daemon_without_rights() {
    ip("tuntap add kl0 mode tap vnet_hdr user 1");
    let daemon = [env!("CARGO_BIN_EXE_vhost-net"), "--tap=kl0", "--socket-path=/nonexistent/socket"];
    let without = ["--bounding-set=-all", "--inh-caps=-all"];
    let out = std::process::Command::new("setpriv").args(without).args(daemon).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert_eq!(
        said,
        "vhost-net: may not use tap kl0: that needs CAP_NET_ADMIN, or a tap that is this user's \
         (ip tuntap add kl0 mode tap vnet_hdr multi_queue user NAME)\n"
    );
}

/// Descriptors as another program hands them on.
fn opened(name: &str, flags: i32) -> OwnedFd {
    super::host::attached(name, flags)
}

pub fn inherited() {
    let tap = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let several = tap | libc::IFF_MULTI_QUEUE;
    let fds = vec![opened("kl0", several), opened("kl0", several)];
    ip("link set kl0 up");
    let taken = Tap::inherit(fds, None).unwrap();
    assert_eq!((taken.name(), taken.pairs()), ("kl0", 2));
    let refused = |fds| Tap::inherit(fds, None).unwrap_err().to_string();
    let bad = |flags| refused(vec![opened("kl1", flags)]);
    let line = |why| {
        format!(
            "descriptor 0 is not attached to a tap: {why}; whoever opens it attaches it (TUNSETIFF) as well"
        )
    };
    assert_eq!(bad(libc::IFF_TAP | libc::IFF_NO_PI), line("it was attached without IFF_VNET_HDR"));
    assert_eq!(bad(libc::IFF_TUN | libc::IFF_NO_PI), line("it is a tun, which has no Ethernet frames"));
    assert_eq!(
        refused(vec![opened("kl2", several), opened("kl3", several)]),
        "the descriptors are of different taps: kl2 and kl3"
    );
    assert_eq!(
        refused(vec![opened("kl2", tap), opened("kl3", tap)]),
        line("it was attached without IFF_MULTI_QUEUE")
    );
    let unattached = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    assert!(refused(vec![unattached.into()]).contains("is not attached to a tap: "));
}
