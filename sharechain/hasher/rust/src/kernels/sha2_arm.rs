//! The nonce scan by the SHA-2 instructions of ARMv8, which do four rounds, or four words of the schedule, at a time.
//!
//! Each instruction waits for the one before, so two nonces go side by side.

use super::{HASH_BITS, HEADER_BITS, Job, PADDING, scalar};
use crate::sha256::{INITIAL, K};
use std::arch::aarch64::*;

pub const LANES: usize = 2;

/// One register of each nonce.
type Pair = [uint32x4_t; LANES];

#[inline]
#[target_feature(enable = "neon")]
fn vector(words: [u32; 4]) -> uint32x4_t {
    let low = vcreate_u32(u64::from(words[0]) | u64::from(words[1]) << 32);
    let high = vcreate_u32(u64::from(words[2]) | u64::from(words[3]) << 32);
    vcombine_u32(low, high)
}

/// Four round constants, from that of round `4 * group` on.
const fn constants(group: usize) -> [u32; 4] {
    let at = 4 * group;
    [K[at], K[at + 1], K[at + 2], K[at + 3]]
}

#[inline]
#[target_feature(enable = "neon")]
fn add(words: Pair, constants: [u32; 4]) -> Pair {
    words.map(|words| vaddq_u32(words, vector(constants)))
}

/// Rounds `4 * group` to `4 * group + 3`, for the words `x`.
#[inline]
#[target_feature(enable = "neon,sha2")]
fn four_rounds(abcd: &mut Pair, efgh: &mut Pair, x: Pair, group: usize) {
    let kw = add(x, constants(group));
    for lane in 0..LANES {
        let before = abcd[lane];
        abcd[lane] = vsha256hq_u32(before, efgh[lane], kw[lane]);
        efgh[lane] = vsha256h2q_u32(efgh[lane], before, kw[lane]);
    }
}

/// The four words that follow the sixteen given.
#[inline]
#[target_feature(enable = "neon,sha2")]
fn extend(x: [Pair; 4]) -> Pair {
    let [x0, x1, x2, x3] = x;
    std::array::from_fn(|lane| {
        vsha256su1q_u32(vsha256su0q_u32(x0[lane], x1[lane]), x2[lane], x3[lane])
    })
}

/// The rounds of groups 4 to 15, `x` being the words of groups 0 to 3.
#[inline]
#[target_feature(enable = "neon,sha2")]
fn later_rounds(abcd: &mut Pair, efgh: &mut Pair, mut x: [Pair; 4]) {
    for group in 4..16 {
        let next = extend(x);
        x = [x[1], x[2], x[3], next];
        four_rounds(abcd, efgh, next, group);
    }
}

/// See `scan_lanes` in the parent's `lanes`: the first of `batches` batches of `LANES` nonces in which the masked last
/// word of a hash is zero, and the lanes.
#[target_feature(enable = "neon,sha2")]
pub fn scan(job: &Job, first: u32, batches: u32) -> Option<(u32, u32)> {
    for batch in 0..batches {
        let nonce = first.wrapping_add(batch * LANES as u32).swap_bytes();
        let last = last_word(job, nonce);
        let hits = (0..LANES).fold(0, |hits, lane| {
            hits | u32::from(last[lane] & job.mask == 0) << lane
        });
        if hits != 0 {
            return Some((batch, hits));
        }
    }
    None
}

/// The last word of each hash; `nonce` is the first one's word, and even in the byte that the lane is added to.
#[inline]
#[target_feature(enable = "neon,sha2")]
fn last_word(job: &Job, nonce: u32) -> [u32; LANES] {
    let nonces: [u32; LANES] = std::array::from_fn(|lane| nonce.wrapping_add((lane as u32) << 24));
    let same = |words: [u32; 4]| [vector(words); LANES];

    // The first hash, from round 4 on; words 16 to 19 hold all that is known of words 0 to 3.
    let [a, b, c, d, e, f, g, h] = job.after_round_3;
    let mut abcd = nonces.map(|n| vector([a.wrapping_add(n), b, c, d]));
    let mut efgh = nonces.map(|n| vector([e.wrapping_add(n), f, g, h]));
    let x1 = same([PADDING, 0, 0, 0]);
    let x2 = same([0; 4]);
    let x3 = same([0, 0, 0, HEADER_BITS]);
    let mut x = [x1, x2, x3, x3];
    for (group, words) in [x1, x2, x3].into_iter().enumerate() {
        four_rounds(&mut abcd, &mut efgh, words, group + 1);
    }
    x[3] = nonces.map(|n| {
        let w18 = job.w18.wrapping_add(scalar::small_sigma0(n));
        vector([job.w16, job.w17, w18, job.w19.wrapping_add(n)])
    });
    four_rounds(&mut abcd, &mut efgh, x[3], 4);
    for group in 5..16 {
        let next = extend(x);
        x = [x[1], x[2], x[3], next];
        four_rounds(&mut abcd, &mut efgh, next, group);
    }

    // The second hash, of the first.
    let [a, b, c, d, e, f, g, h] = job.midstate;
    let x0 = add(abcd, [a, b, c, d]);
    let x1 = add(efgh, [e, f, g, h]);
    let x = [x0, x1, same([PADDING, 0, 0, 0]), same([0, 0, 0, HASH_BITS])];
    let [a, b, c, d, e, f, g, h] = INITIAL;
    let mut abcd = same([a, b, c, d]);
    let mut efgh = same([e, f, g, h]);
    for (group, words) in x.into_iter().enumerate() {
        four_rounds(&mut abcd, &mut efgh, words, group);
    }
    later_rounds(&mut abcd, &mut efgh, x);
    std::array::from_fn(|lane| vgetq_lane_u32::<3>(efgh[lane]).wrapping_add(INITIAL[7]))
}
