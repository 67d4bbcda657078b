//! Puts a seccomp filter into force for the calling thread, and asks what the kernel has.
#![allow(unsafe_code)] // seccomp(2) takes a pointer to a program; landlock_create_ruleset(2) has no wrapper that only asks

use std::io;

use seccompiler::BpfProgramRef;

/// `SECCOMP_SET_MODE_FILTER`.
const SET_MODE_FILTER: libc::c_uint = 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: before Linux 5.16 a filter switched off, for its thread, that the CPU guesses at what
/// loads will find behind stores. A reactor feels that, and protects nothing by it: it runs no code of a guest's.
const SPEC_ALLOW: libc::c_ulong = 1 << 2;

/// Filters the system calls of this thread, and of those that it starts from now on.
pub fn install(program: BpfProgramRef<'_>) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies the program, whose instructions have the same form there (linux/filter.h), and keeps
    // nothing of ours.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, SPEC_ALLOW, std::ptr::from_ref(&program))
    };
    if done != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the kernel has filters.
pub fn has_seccomp() -> bool {
    /// `SECCOMP_GET_ACTION_AVAIL`.
    const GET_ACTION_AVAIL: libc::c_uint = 2;
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads the number of an action.
    unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action)) == 0 }
}

/// The version of Landlock that the kernel has.
pub fn landlock_abi() -> io::Result<i32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`.
    const VERSION: libc::c_uint = 1;
    let none = std::ptr::null::<u8>();
    // SAFETY: with this flag nothing is pointed to.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    if abi < 0 { Err(io::Error::last_os_error()) } else { Ok(abi as i32) }
}
