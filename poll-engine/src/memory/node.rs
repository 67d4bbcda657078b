//! Which node's memory something is in.
#![allow(unsafe_code)] // a system call that is told an address

use std::ptr::NonNull;

/// `MPOL_F_NODE | MPOL_F_ADDR` of get_mempolicy(2): on which node an address is.
pub const NODE_OF_ADDRESS: u64 = 1 | 2;

/// The node of the page at this address. None if it cannot be had, or the kernel does not say.
pub fn node_of(host: NonNull<u8>) -> Option<usize> {
    let mut node = -1i32;
    // SAFETY: with these flags get_mempolicy(2) writes one number, and reads the page in the kernel: it is brought into our
    // tables (which move_pages(2) would want to be so before), and if there is none an error.
    let result = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut node, 0usize, 0usize, host.as_ptr(), NODE_OF_ADDRESS)
    };
    (result == 0).then_some(node)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_there_is_on_a_node() {
        let mut here = 1u8;
        let node = node_of(NonNull::from(&mut here));
        // A container may not ask.
        let online = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
        let nodes =
            online.trim().parse::<crate::engine::placement::CpuList>().map(|list| list.0).unwrap_or_default();
        assert!(node.is_none_or(|node| nodes.contains(&node)), "{node:?} of {nodes:?}");
        assert_eq!(node_of(NonNull::dangling()), None);
    }
}
