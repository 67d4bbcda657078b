//! What is left of its rights to our program in the guest, and to whoever has got into a thread of it.

use anyhow::{Result, ensure};
use kickless_tests::qemu::Vm;

use crate::guest::{LIMIT, serve, signal};

/// A thread, what it tries, and what becomes of it: refused with this errno, or `killed`.
const ATTEMPTS: &[(&str, &str)] = &[
    ("reactor:open", "-38"),
    ("reactor:ring", "killed"),
    ("reactor:socket", "killed"),
    ("reactor:process", "killed"),
    ("session:open", "-38"),
    ("session:ring", "killed"),
    ("session:socket", "killed"),
    ("session:program", "killed"),
    ("main:create", "-13"),
    ("main:socket", "killed"),
    ("main:process", "killed"),
];

/// Every thread of the device that is served under this name; the first one may still take it from the bus.
pub fn expect(vm: &mut Vm, name: &str) -> Result<()> {
    vm.check(&format!("grep -q ' confined: seccomp, Landlock ABI .*no_new_privs' /tmp/{name}.log"))?;
    let threads = vm.check(&format!(
        "cd /proc/$(cat /tmp/{name}.pid)/task && for t in *; do \
         echo $(cat $t/comm) $(sed -n 's/^\\(CapPrm\\|NoNewPrivs\\|Seccomp\\):[[:space:]]*//p' $t/status); done"
    ))?;
    ensure!(threads.lines().count() >= 5, "{threads}");
    for thread in threads.lines() {
        let rights =
            if thread.starts_with("vdpactl ") { "0000000000001000 1 2" } else { "0000000000000000 1 2" };
        ensure!(thread.ends_with(rights), "{thread}, of {threads}");
    }
    Ok(())
}

/// A disk and its first thread are another user's, who may ask whether somebody uses it, take it from the bus, and forget it;
/// and what root has is looked for below another root.
pub fn by_another_user(vm: &mut Vm) -> Result<()> {
    vm.check(
        "echo nobody:x:65534:65534::/:/bin/false >> /etc/passwd && mkdir -p /jail/dev /jail/sys && \
         mount --bind /dev /jail/dev && mount --bind /sys /jail/sys && mkdir -p /jail/state && \
         chown 65534 /jail/state && truncate -s 8M /jail/jailed.img && chmod 600 /jail/jailed.img",
    )?;
    let options = "attach /jailed.img --direct off --user nobody --chroot /jail --state-dir /state";
    for mounted in [false, true] {
        let node = serve(vm, "jailed", options)?;
        let threads = vm.check(
            "cd /proc/$(cat /tmp/jailed.pid)/task && for t in *; do \
             echo $(cat $t/comm) $(sed -n 's/^\\(Uid\\|CapPrm\\|Seccomp\\):[[:space:]]*//p' $t/status); done",
        )?;
        ensure!(threads.lines().count() >= 5, "{threads}");
        for thread in threads.lines() {
            // CAP_NET_ADMIN and CAP_DAC_READ_SEARCH.
            let rights = if thread.starts_with("vdpactl ") { "0000000000001004" } else { "0000000000000000" };
            ensure!(
                thread.ends_with(&format!(" 65534 65534 65534 65534 {rights} 2")),
                "{thread}, of {threads}"
            );
        }
        if mounted {
            vm.check(&format!(
                "mkfs.ext4 -q {node} && mount {node} /mnt && kill -TERM $(cat /tmp/jailed.pid)"
            ))?;
            vm.check_soon("grep -q 'is in use: unmount it' /tmp/jailed.log", LIMIT)?;
            vm.check("umount /mnt")?;
        }
        signal(vm, "jailed", "TERM")?;
        vm.check(&format!(
            "! test -e {node} && ! test -e /dev/vduse/jailed && ! test -e /jail/state/jailed"
        ))?;
    }
    vm.check("umount /jail/dev /jail/sys")?;
    Ok(())
}

/// Threads of a build with fault points that try what they may not. The kernel's log tells of those that are killed.
pub fn hijacked_threads_reach_nothing(vm: &mut Vm) -> Result<()> {
    let whats: Vec<_> = ATTEMPTS.iter().map(|(what, _)| *what).collect();
    let said = vm.check(&format!(
        "for what in {}; do \
           KICKLESS_HIJACK=$what vdpactl serve blk --name h --backend null:1M >/dev/null 2>/tmp/h.log & pid=$!; \
           for i in $(seq 600); do \
             grep -q ^hijack /tmp/h.log && break; test -e /proc/$pid/exe || break; sleep 0.1; \
           done; \
           kill -9 $pid 2>/dev/null; wait $pid; code=$?; \
           test $code = 159 && echo $what killed || echo $what $(sed -n 's/^hijack .*: //p' /tmp/h.log); \
           vdpactl detach h >/dev/null 2>&1; \
         done",
        whats.join(" ")
    ))?;
    // The shell says who was killed, too.
    let of_attempt = |(what, _): &(&str, &str)| whats.contains(what);
    let found: Vec<_> = said.lines().filter_map(|line| line.split_once(' ')).filter(of_attempt).collect();
    ensure!(found == ATTEMPTS, "{said}, not {ATTEMPTS:?}");
    Ok(())
}
