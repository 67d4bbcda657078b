//! Memory for the guest's own tables. Rings and buffers that devices see come from the arena of an order.

use linked_list_allocator::LockedHeap;

const SIZE: usize = 8 << 20;

static mut MEMORY: [u8; SIZE] = [0; SIZE];

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Before anything is allocated, once.
pub fn init() {
    // SAFETY: the memory is used for nothing else, and this runs once, on the first CPU, before the others start.
    unsafe { HEAP.lock().init((&raw mut MEMORY).cast(), SIZE) };
}
