//! Contents of the disks: each 64-bit word names its own place. The tests on the host use this file
//! as well.
#![forbid(unsafe_code)]

/// Size of a word in bytes.
pub(crate) const WORD: usize = 8;

/// Returns the word at the byte `offset` (a multiple of 8, below 2^43) of the disk `disk` (below
/// 256).
pub(crate) fn word(seed: u16, disk: usize, offset: u64) -> u64 {
    (u64::from(seed) << 48) + ((disk as u64) << 40) + offset / WORD as u64
}

/// Fills `bytes` with the words of the disk from the byte `offset` on.
pub(crate) fn fill(bytes: &mut [u8], seed: u16, disk: usize, offset: u64) {
    for (index, bytes) in bytes.chunks_exact_mut(WORD).enumerate() {
        bytes.copy_from_slice(&word(seed, disk, offset + (index * WORD) as u64).to_le_bytes());
    }
}

/// Returns how many words of `bytes` differ from those of the disk from the byte `offset` on.
pub(crate) fn wrong(bytes: &[u8], seed: u16, disk: usize, offset: u64) -> u64 {
    let words = bytes.chunks_exact(WORD).enumerate();
    words
        .filter(|(index, bytes)| {
            **bytes != word(seed, disk, offset + (index * WORD) as u64).to_le_bytes()
        })
        .count() as u64
}

/// Returns a sum over bytes and their places. The sums of the parts of a disk can be added
/// (`wrapping_add`) in any order.
pub(crate) fn sum(bytes: &[u8], offset: u64) -> u64 {
    let words = bytes.chunks_exact(WORD).enumerate();
    words.fold(0, |sum, (index, bytes)| {
        let place = offset / WORD as u64 + index as u64;
        let word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        sum.wrapping_add(mix(word ^ mix(place)))
    })
}

/// The finaliser of splitmix64: a permutation of the 64-bit words without visible order.
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
