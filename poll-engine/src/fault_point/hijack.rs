//! What an attacker tries who runs code in one of our threads: `KICKLESS_HIJACK=THREAD:WHAT` has the first thread of that
//! name try WHAT, say on standard error what became of it (`hijack WHAT: 0`, or a negated errno), and go on.
#![allow(unsafe_code)] // system calls, on purpose without regard to what the process is for

use std::ptr::{null, null_mut};

use io_uring::opcode::{OpenAt, Socket};
use io_uring::types::Fd;

use crate::uring::Uring;

const USER_DATA: u64 = u64::MAX;

fn wanted(thread: &str) -> Option<String> {
    let text = std::env::var("KICKLESS_HIJACK").ok()?;
    let (name, what) = text.split_once(':')?;
    (name == thread).then(|| what.to_owned())
}

/// Where a thread of this name is hijacked.
pub fn hijack(thread: &str) {
    if let Some(what) = wanted(thread) {
        tell(&what, attempt(&what));
    }
}

/// As [`hijack`], with the reactor's own io_uring.
pub(crate) fn hijack_reactor(uring: &mut Uring) {
    let Some(what) = wanted("reactor") else { return };
    let entry = match what.as_str() {
        "uring-open" => OpenAt::new(Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
        "uring-socket" => Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        _ => return hijack("reactor"),
    };
    // SAFETY: it points to a path that is static, or to nothing.
    unsafe { uring.push(&entry.user_data(USER_DATA)) };
    let mut completions = Vec::new();
    while completions.is_empty() {
        uring.wait(None);
        uring.reap(&mut completions);
    }
    tell(&what, completions[0].result.into());
}

fn tell(what: &str, result: i64) {
    eprintln!("hijack {what}: {}", result.min(0));
}

fn attempt(what: &str) -> i64 {
    let errno = || i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
    let parent = nix::unistd::getppid().as_raw();
    // SAFETY: each call is given what it takes. What they do to this process is the point; a process that is made leaves at
    // once, by a call that touches no memory.
    let done = unsafe {
        match what {
            "open" => {
                libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), libc::O_RDONLY)
            }
            "create" => libc::syscall(
                libc::SYS_openat,
                libc::AT_FDCWD,
                c"made".as_ptr(),
                libc::O_CREAT | libc::O_WRONLY,
                0o600,
            ),
            "remove" => libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, c"victim".as_ptr(), 0),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "local-socket" => libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
            "process" => match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                0 => {
                    libc::syscall(libc::SYS_exit_group, 0);
                    0
                }
                other => other,
            },
            "program" => {
                let argv = [c"true".as_ptr(), null()];
                libc::syscall(libc::SYS_execve, c"/bin/true".as_ptr(), argv.as_ptr(), null::<*const u8>())
            }
            "ring" => {
                let mut params = [0_u32; 30];
                libc::syscall(libc::SYS_io_uring_setup, 8, params.as_mut_ptr())
            }
            // Its thread does nothing any more.
            "hang" => loop {
                std::thread::park();
            },
            "panic" => panic!("as was asked for"),
            "trace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, parent, 0, 0),
            "signal" => libc::syscall(libc::SYS_kill, parent, 0),
            "user" => libc::syscall(libc::SYS_setresuid, 0, 0, 0),
            "code" => {
                let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::syscall(libc::SYS_mmap, null_mut::<u8>(), 4096, protection, flags, -1, 0)
            }
            other => panic!("KICKLESS_HIJACK: '{other}' is nothing to try"),
        }
    };
    if done < 0 { -errno() } else { done }
}
