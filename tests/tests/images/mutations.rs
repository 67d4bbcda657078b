//! Damage done to images, from a seed: to the header and what follows it, to each of the tables, to names and to
//! descriptors; by chance, and by numbers at which arithmetic ends.

use kickless_tests::random::Random;

/// Fields of a qcow2 header: where, and how many bytes (QEMU's docs/interop/qcow2.txt).
const FIELDS: [(usize, usize); 19] = [
    (0, 4),   // magic
    (4, 4),   // version
    (8, 8),   // backing_file_offset
    (16, 4),  // backing_file_size
    (20, 4),  // cluster_bits
    (24, 8),  // size
    (32, 4),  // crypt_method
    (36, 4),  // l1_size
    (40, 8),  // l1_table_offset
    (48, 8),  // refcount_table_offset
    (56, 4),  // refcount_table_clusters
    (60, 4),  // nb_snapshots
    (64, 8),  // snapshots_offset
    (72, 8),  // incompatible_features
    (80, 8),  // compatible_features
    (88, 8),  // autoclear_features
    (96, 4),  // refcount_order
    (100, 4), // header_length
    (104, 8), // the first extension
];

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(std::array::from_fn(|i| b[i])))
}

fn put(bytes: &mut [u8], at: usize, len: usize, value: u64) {
    if let Some(field) = bytes.get_mut(at..at + len) {
        field.copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

/// A number that somebody may not have thought of.
fn odd(random: &mut Random, file_len: u64) -> u64 {
    let cluster = 4096;
    match random.below(12) {
        0 => random.number(),
        1 => u64::MAX >> random.below(64),
        2 => 1 << random.below(64),
        3 => (1u64 << random.below(64)).wrapping_sub(1),
        // Behind the end, by little and by much.
        4 => file_len.next_multiple_of(cluster),
        5 => file_len.next_multiple_of(cluster) + (cluster << random.below(40)),
        // Where something else is.
        6..=8 => random.below((file_len / cluster).max(1) as usize) as u64 * cluster,
        9 => random.below(70) as u64,
        10 => 0,
        _ => random.below(file_len as usize) as u64,
    }
}

/// Where each kind of table of a sound image with clusters of 4 KiB is: L1, L2, refcount table, refcount blocks.
fn tables(bytes: &[u8]) -> Vec<usize> {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let (l1, refcounts) = (long(bytes, 40) as usize, long(bytes, 48) as usize);
    let pointed = |table: usize| (0..8).map(move |i| (long(bytes, table + 8 * i) & OFFSET) as usize);
    let all = [l1, refcounts].into_iter().chain(pointed(l1)).chain(pointed(refcounts).take(1));
    all.filter(|&at| at != 0 && at < bytes.len()).collect()
}

/// Damages a qcow2 image with clusters of 4 KiB.
pub fn qcow2(bytes: &mut Vec<u8>, random: &mut Random) {
    let tables = tables(bytes);
    for _ in 0..=random.below(3) {
        let len = bytes.len() as u64;
        let value = odd(random, len);
        match random.below(10) {
            0..=2 => {
                let (at, size) = FIELDS[random.below(FIELDS.len())];
                put(bytes, at, size, value);
            }
            // An entry of a table: an offset anywhere, with flags or without.
            3..=6 if !tables.is_empty() => {
                let most = [8, 512][random.below(2)];
                let at = tables[random.below(tables.len())] + 8 * random.below(most);
                let flags = [0, 1 << 63, 1 << 62, 3 << 62, 1][random.below(5)];
                put(bytes, at, 8, value | flags);
            }
            // Names and extensions.
            7 => {
                let at = 104 + random.below(400);
                put(bytes, at, [1, 4, 8][random.below(3)], value);
            }
            // Cut short.
            8 => bytes.truncate(random.below(len as usize + 1)),
            _ => {
                if let Some(byte) = bytes.get_mut(random.below(len.max(1) as usize)) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
}

/// Damages a VMDK: the text of its descriptor, or any of its bytes.
pub fn vmdk(bytes: &mut Vec<u8>, random: &mut Random) {
    const TOKENS: [&str; 16] = [
        "RW 99999999999999999999 FLAT \"disk-flat.vmdk\" 0\n",
        "RW 9223372036854775807 FLAT \"disk-flat.vmdk\" 0\n",
        "RW 18014398509481984 FLAT \"disk-flat.vmdk\" 18446744073709551615\n",
        "RW 6144 SPARSE \"disk.vmdk\"\n",
        "RW 6144 FLAT \"disk.vmdk\" 0\n",
        "RW 36028797018963968 ZERO\n",
        "RW 6144 FLAT \"../../../../dev/zero\" 0\n",
        "NOACCESS 0 FLAT \"\" 0\n",
        "parentCID=12345678\n",
        "parentFileNameHint=\"disk.vmdk\"\n",
        "createType=\"streamOptimized\"\n",
        "createType=\"\"\n",
        "version=99\n",
        "CID=\n",
        "\0",
        "# Disk DescriptorFile\n",
    ];
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len().clamp(1, 600));
        match random.below(6) {
            0..=2 => {
                // Where a line begins.
                let at = bytes
                    .iter()
                    .skip(at)
                    .position(|&b| b == b'\n')
                    .map_or(at, |n| at + n + 1)
                    .min(bytes.len());
                let token = TOKENS[random.below(TOKENS.len())].bytes();
                bytes.splice(at..at, token);
            }
            3 => bytes.truncate(at),
            4 if at < bytes.len() => bytes[at] = random.number() as u8,
            _ => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
        }
    }
}
