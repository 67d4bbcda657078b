//! Which system calls a kind of thread may make: two seccomp filters, of which the stricter answer counts.
//!
//! The first is a list of all that is needed. Anything else fails with `ENOSYS`, the answer that libraries know from older
//! kernels and have another way for: glibc tries `clone3`, and looks into /proc when it gives memory back, and a new
//! version of it must not end a process that serves guests.
//!
//! The second is a list of what nobody here does by mistake: a new program, another process's memory, more rights, a
//! socket to the outside, code that is made at run time. Whoever tries is not us any more, so the process ends at once
//! (`SIGSYS`). That costs little: the next one resumes what was in flight, as after any crash.
//!
//! Calls that are allowed whatever their arguments cost nothing to check: the kernel keeps a bitmap of them (Linux 5.11).
//! `io_uring_enter` is one; what goes through the ring is limited where it is made (`poll_engine::uring`).

use std::collections::BTreeMap;

use poll_engine::confine::Role;
use poll_engine::memory::node::NODE_OF_ADDRESS;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Who a filter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A thread of this kind.
    Thread(Role),
    /// The program's first thread, and those that it starts later and that are no such thread.
    Main,
}

/// The filters of one kind of thread.
#[derive(Debug)]
pub struct Filters {
    /// What may be done; without, all that is not deadly.
    pub allow: Option<BpfProgram>,
    /// What ends the process.
    pub kill: BpfProgram,
}

/// What a filter does with calls that are not for `who`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Refuse, or kill.
    Enforce,
    /// Let pass, and have the kernel's audit log tell.
    Log,
}

/// Makes the filters.
pub fn filters(who: Who, verdict: Verdict) -> Result<Filters, seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let (refuse, kill) = match verdict {
        Verdict::Enforce => (SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::KillProcess),
        Verdict::Log => (SeccompAction::Log, SeccompAction::Log),
    };
    let allow = match who {
        // It opens what the kernel and its drivers have, in ways of theirs.
        Who::Thread(Role::Opener) => None,
        _ => Some(SeccompFilter::new(allowed(who)?, refuse, SeccompAction::Allow, arch)?.try_into()?),
    };
    let kill = SeccompFilter::new(deadly(who)?, SeccompAction::Allow, kill, arch)?.try_into()?;
    Ok(Filters { allow, kill })
}

fn add(rules: &mut Rules, calls: &[i64]) {
    rules.extend(calls.iter().map(|&call| (call, Vec::new())));
}

/// A call is meant if its argument `index` is one of `values`.
fn add_if_one_of(
    rules: &mut Rules,
    call: i64,
    index: u8,
    values: &[u64],
) -> Result<(), seccompiler::BackendError> {
    let rule = |&value| SeccompRule::new(vec![SeccompCondition::new(index, Width::Dword, Op::Eq, value)?]);
    rules.insert(call, values.iter().map(rule).collect::<Result<_, _>>()?);
    Ok(())
}

/// A call is meant if these bits of its argument `index` have this value.
fn add_if_bits(
    rules: &mut Rules,
    call: i64,
    index: u8,
    (mask, value): (u64, u64),
) -> Result<(), seccompiler::BackendError> {
    let condition = SeccompCondition::new(index, Width::Dword, Op::MaskedEq(mask), value)?;
    rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
    Ok(())
}

/// Memory, time, locks, signals to ourselves, descriptors that are open.
const ALL: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_getcpu,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fcntl,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

const REACTOR: &[i64] = &[
    libc::SYS_io_uring_enter,
    // Of those that are left to a restricted ring.
    libc::SYS_io_uring_register,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockopt,
    // Of taps and packet sockets that are open.
    libc::SYS_ioctl,
];

/// Sockets that are open, memory that comes with descriptors, socket files that come and go, and watchers for guests that
/// come before their memory.
const SESSION: &[i64] = &[
    libc::SYS_userfaultfd,
    libc::SYS_ioctl,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_pidfd_open,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    // Into and out of the pipe that a device's state goes by.
    libc::SYS_splice,
    libc::SYS_memfd_create,
    // Keys are kept from being swapped out.
    libc::SYS_mlock,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fstatfs,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    libc::SYS_sched_getaffinity,
];

/// Of threads that begin: a reactor's ring, its CPU, and giving up still more.
const STARTER: &[i64] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
    libc::SYS_landlock_restrict_self,
    libc::SYS_capget,
    libc::SYS_capset,
];

/// Files where Landlock lets it, local sockets, and what a server of requests takes.
const MAIN: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_getdents64,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_mkdirat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_flock,
    libc::SYS_statfs,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_socketpair,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_getgid,
    libc::SYS_getppid,
    libc::SYS_sysinfo,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

fn allowed(who: Who) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    add(&mut rules, ALL);
    let own = [std::process::id().into()];
    // How a process aborts.
    add_if_one_of(&mut rules, libc::SYS_tgkill, 0, &own)?;
    add_if_one_of(&mut rules, libc::SYS_kill, 0, &own)?;
    // Memory never becomes code.
    let not_executable = (libc::PROT_EXEC as u64, 0);
    add_if_bits(&mut rules, libc::SYS_mmap, 2, not_executable)?;
    add_if_bits(&mut rules, libc::SYS_mprotect, 2, not_executable)?;
    let names = [libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64];
    add_if_one_of(&mut rules, libc::SYS_prctl, 0, &names)?;
    match who {
        Who::Thread(Role::Writer) => return Ok(rules),
        Who::Thread(Role::Worker) => {
            add(&mut rules, &[libc::SYS_fallocate]);
            return Ok(rules);
        }
        Who::Thread(Role::Reactor) => {
            add(&mut rules, REACTOR);
            return Ok(rules);
        }
        // Held to no list.
        Who::Thread(Role::Cluster | Role::Opener) => {}
        Who::Thread(Role::Session) => {
            add(&mut rules, SESSION);
            // On which node the guest's memory is.
            add_if_one_of(&mut rules, libc::SYS_get_mempolicy, 4, &[NODE_OF_ADDRESS])?;
        }
        Who::Thread(Role::Starter) => {
            // All that those may do whom it starts.
            add(&mut rules, &[SESSION, REACTOR, STARTER].concat());
            add_if_one_of(&mut rules, libc::SYS_get_mempolicy, 4, &[NODE_OF_ADDRESS])?;
            let reductions = [
                libc::PR_SET_NO_NEW_PRIVS,
                libc::PR_CAPBSET_READ,
                libc::PR_CAPBSET_DROP,
                libc::PR_CAP_AMBIENT,
            ];
            let reductions = reductions.map(|option| option as u64);
            add_if_one_of(&mut rules, libc::SYS_prctl, 0, &[&names[..], &reductions].concat())?;
        }
        Who::Main => {
            add(&mut rules, SESSION);
            add(&mut rules, MAIN);
            add_if_one_of(&mut rules, libc::SYS_socket, 0, &[libc::AF_UNIX as u64])?;
        }
    }
    // Threads are made by clone where there is no clone3, whose flags no filter can see.
    let thread = libc::CLONE_THREAD as u64;
    add_if_bits(&mut rules, libc::SYS_clone, 0, (thread, thread))?;
    Ok(rules)
}

/// Programs, other processes, rights, the kernel itself.
const DEADLY: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

fn deadly_always() -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    add(&mut rules, DEADLY);
    add_if_bits(&mut rules, libc::SYS_clone, 0, (libc::CLONE_THREAD as u64, 0))?;
    let executable = libc::PROT_EXEC as u64;
    add_if_bits(&mut rules, libc::SYS_mmap, 2, (executable, executable))?;
    add_if_bits(&mut rules, libc::SYS_mprotect, 2, (executable, executable))?;
    Ok(rules)
}

fn deadly(who: Who) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = deadly_always()?;
    match who {
        Who::Main => {
            let local = SeccompCondition::new(0, Width::Dword, Op::Ne, libc::AF_UNIX as u64)?;
            rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![local])?]);
            // Reactors that are added are started elsewhere.
            add(&mut rules, &[libc::SYS_io_uring_setup]);
        }
        // Its sockets are accepted. A ring would open others, such as of UDP, which Landlock does not see either.
        Who::Thread(Role::Session) => {
            add(&mut rules, &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind, libc::SYS_io_uring_setup]);
        }
        Who::Thread(Role::Starter) => add(&mut rules, &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind]),
        Who::Thread(Role::Cluster) => {}
        // Of packet sockets, whose programs go with them.
        Who::Thread(Role::Opener) => drop(rules.remove(&libc::SYS_bpf)),
        Who::Thread(Role::Reactor | Role::Writer | Role::Worker) => add(
            &mut rules,
            &[
                libc::SYS_socket,
                libc::SYS_socketpair,
                libc::SYS_connect,
                libc::SYS_bind,
                libc::SYS_accept4,
                libc::SYS_io_uring_setup,
                libc::SYS_userfaultfd,
                libc::SYS_clone,
            ],
        ),
    }
    Ok(rules)
}
