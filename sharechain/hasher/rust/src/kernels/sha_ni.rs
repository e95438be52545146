//! The nonce scan by the SHA instructions of x86, which do two rounds, or four words of the schedule, at a time.
//!
//! Each instruction waits for the one before, some four cycles, and another could begin every two: so two nonces go
//! side by side. The state stands in two registers, (f, e, b, a) and (h, g, d, c) from the lowest word on.

use super::{HASH_BITS, HEADER_BITS, Job, PADDING, scalar};
use crate::sha256::{INITIAL, K};
#[cfg(feature = "emulated-sha")]
use emulated::{_mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32};
use std::arch::x86_64::*;

pub const LANES: usize = 2;

/// One register of each nonce.
type Pair = [__m128i; LANES];

/// Four round constants, from that of round `4 * group` on, plus `extra` in the first and last word.
const fn constants(group: usize, first: u32, last: u32) -> [u32; 4] {
    let at = 4 * group;
    [
        K[at].wrapping_add(first),
        K[at + 1],
        K[at + 2],
        K[at + 3].wrapping_add(last),
    ]
}

/// Sixteen groups of four.
const GROUPS: [[u32; 4]; 16] = {
    let mut groups = [[0; 4]; 16];
    let mut group = 0;
    while group < 16 {
        groups[group] = constants(group, 0, 0);
        group += 1;
    }
    groups
};

#[inline]
#[target_feature(enable = "sse2")]
fn vector(words: [u32; 4]) -> __m128i {
    let [a, b, c, d] = words.map(|word| word as i32);
    _mm_setr_epi32(a, b, c, d)
}

/// Four rounds: constants plus words in `kw`.
#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn four_rounds(abef: &mut Pair, cdgh: &mut Pair, kw: Pair) {
    for lane in 0..LANES {
        cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], kw[lane]);
    }
    for lane in 0..LANES {
        let upper = _mm_shuffle_epi32::<0x0e>(kw[lane]);
        abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], upper);
    }
}

#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn add(words: Pair, constants: [u32; 4]) -> Pair {
    words.map(|words| _mm_add_epi32(words, vector(constants)))
}

/// What the words sixteen, fifteen and seven before give the next four: they begin `x0`, `x1` and, one word late, `x2`
/// and `x3`.
#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn extend_by_old(x0: Pair, x1: Pair, x2: Pair, x3: Pair) -> Pair {
    std::array::from_fn(|lane| {
        _mm_add_epi32(
            _mm_sha256msg1_epu32(x0[lane], x1[lane]),
            _mm_alignr_epi8::<4>(x3[lane], x2[lane]),
        )
    })
}

/// Adds what the words two before give, `x3` being the last four.
#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn extend_by_new(old: Pair, x3: Pair) -> Pair {
    std::array::from_fn(|lane| _mm_sha256msg2_epu32(old[lane], x3[lane]))
}

/// The rounds of groups 8 to 14, and the words of group 15: the same in both hashes.
#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn later_rounds(abef: &mut Pair, cdgh: &mut Pair, x: [Pair; 4]) -> Pair {
    let [mut x0, mut x1, mut x2, mut x3] = x;
    for constants in &GROUPS[8..15] {
        let next = extend_by_new(extend_by_old(x0, x1, x2, x3), x3);
        (x0, x1, x2, x3) = (x1, x2, x3, next);
        four_rounds(abef, cdgh, add(x3, *constants));
    }
    extend_by_new(extend_by_old(x0, x1, x2, x3), x3)
}

/// See `scan_lanes` in the parent's `lanes`: the first of `batches` batches of `LANES` nonces in which the masked last
/// word of a hash is zero, and the lanes.
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
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
#[target_feature(enable = "ssse3,sse4.1")]
#[cfg_attr(not(feature = "emulated-sha"), target_feature(enable = "sha"))]
fn last_word(job: &Job, nonce: u32) -> [u32; LANES] {
    let nonces: [u32; LANES] = std::array::from_fn(|lane| nonce.wrapping_add((lane as u32) << 24));
    let same = |words: [u32; 4]| [vector(words); LANES];

    // The first hash, from round 4 on.
    let [a, b, c, d, e, f, g, h] = job.after_round_3;
    let mut abef = nonces.map(|n| vector([f, e.wrapping_add(n), b, a.wrapping_add(n)]));
    let mut cdgh = same([h, g, d, c]);
    four_rounds(&mut abef, &mut cdgh, same(constants(1, PADDING, 0)));
    four_rounds(&mut abef, &mut cdgh, same(constants(2, 0, 0)));
    four_rounds(&mut abef, &mut cdgh, same(constants(3, 0, HEADER_BITS)));
    let x4 = nonces.map(|n| {
        let w18 = job.w18.wrapping_add(scalar::small_sigma0(n));
        vector([job.w16, job.w17, w18, job.w19.wrapping_add(n)])
    });
    four_rounds(&mut abef, &mut cdgh, add(x4, GROUPS[4]));
    let x5 = extend_by_new(same([PADDING, 0, HEADER_BITS, job.w16]), x4);
    four_rounds(&mut abef, &mut cdgh, add(x5, GROUPS[5]));
    let x6 = std::array::from_fn(|lane| _mm_alignr_epi8::<4>(x5[lane], x4[lane]));
    let x6 = extend_by_new(x6, x5);
    four_rounds(&mut abef, &mut cdgh, add(x6, GROUPS[6]));
    let x7 = std::array::from_fn(|lane| _mm_alignr_epi8::<4>(x6[lane], x5[lane]));
    let x7 = add(x7, [0, 0, scalar::small_sigma0(HEADER_BITS), job.w31]);
    let x7 = extend_by_new(x7, x6);
    four_rounds(&mut abef, &mut cdgh, add(x7, GROUPS[7]));
    let x15 = later_rounds(&mut abef, &mut cdgh, [x4, x5, x6, x7]);
    four_rounds(&mut abef, &mut cdgh, add(x15, GROUPS[15]));

    // The second hash, of the first.
    let [a, b, c, d, e, f, g, h] = job.midstate;
    let abef_out = add(abef, [f, e, b, a]).map(|words| _mm_shuffle_epi32::<0x1b>(words));
    let cdgh_out = add(cdgh, [h, g, d, c]).map(|words| _mm_shuffle_epi32::<0x1b>(words));
    let x0 = std::array::from_fn(|lane| _mm_unpacklo_epi64(abef_out[lane], cdgh_out[lane]));
    let x1 = std::array::from_fn(|lane| _mm_unpackhi_epi64(abef_out[lane], cdgh_out[lane]));
    let x2 = same([PADDING, 0, 0, 0]);
    let x3 = same([0, 0, 0, HASH_BITS]);
    let [a, b, c, d, e, f, g, h] = INITIAL;
    let mut abef = same([f, e, b, a]);
    let mut cdgh = same([h, g, d, c]);
    four_rounds(&mut abef, &mut cdgh, add(x0, GROUPS[0]));
    four_rounds(&mut abef, &mut cdgh, add(x1, GROUPS[1]));
    four_rounds(&mut abef, &mut cdgh, same(constants(2, PADDING, 0)));
    four_rounds(&mut abef, &mut cdgh, same(constants(3, 0, HASH_BITS)));
    let x4 = std::array::from_fn(|lane| _mm_sha256msg1_epu32(x0[lane], x1[lane]));
    let x4 = extend_by_new(x4, x3);
    four_rounds(&mut abef, &mut cdgh, add(x4, GROUPS[4]));
    let x5 = extend_by_new(extend_by_old(x1, x2, x3, x4), x4);
    four_rounds(&mut abef, &mut cdgh, add(x5, GROUPS[5]));
    let x6 = std::array::from_fn(|lane| _mm_alignr_epi8::<4>(x5[lane], x4[lane]));
    let x6 = extend_by_new(add(x6, [PADDING, 0, 0, 0]), x5);
    four_rounds(&mut abef, &mut cdgh, add(x6, GROUPS[6]));
    let x7 = extend_by_new(extend_by_old(x3, x4, x5, x6), x6);
    four_rounds(&mut abef, &mut cdgh, add(x7, GROUPS[7]));
    let x15 = later_rounds(&mut abef, &mut cdgh, [x4, x5, x6, x7]);
    // Rounds 60 and 61: the `f` behind them is the `e` of round 60.
    let kw = add(x15, GROUPS[15]);
    std::array::from_fn(|lane| {
        let abef = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], kw[lane]);
        (_mm_cvtsi128_si32(abef) as u32).wrapping_add(INITIAL[7])
    })
}

/// What the three instructions do, by Intel's description, to test this file on processors without them.
#[cfg(feature = "emulated-sha")]
mod emulated {
    use crate::kernels::scalar;
    use std::arch::x86_64::*;

    #[target_feature(enable = "sse4.1")]
    fn words(vector: __m128i) -> [u32; 4] {
        [
            _mm_extract_epi32::<0>(vector) as u32,
            _mm_extract_epi32::<1>(vector) as u32,
            _mm_extract_epi32::<2>(vector) as u32,
            _mm_extract_epi32::<3>(vector) as u32,
        ]
    }

    #[target_feature(enable = "sse4.1")]
    pub fn _mm_sha256rnds2_epu32(cdgh: __m128i, abef: __m128i, kw: __m128i) -> __m128i {
        let ([h, g, d, c], [f, e, b, a]) = (words(cdgh), words(abef));
        let [first, second, _, _] = words(kw);
        let state = scalar::round([a, b, c, d, e, f, g, h], first);
        let [a, b, _, _, e, f, _, _] = scalar::round(state, second);
        super::vector([f, e, b, a])
    }

    #[target_feature(enable = "sse4.1")]
    pub fn _mm_sha256msg1_epu32(a: __m128i, b: __m128i) -> __m128i {
        let ([w0, w1, w2, w3], [w4, _, _, _]) = (words(a), words(b));
        super::vector([
            w0.wrapping_add(scalar::small_sigma0(w1)),
            w1.wrapping_add(scalar::small_sigma0(w2)),
            w2.wrapping_add(scalar::small_sigma0(w3)),
            w3.wrapping_add(scalar::small_sigma0(w4)),
        ])
    }

    #[target_feature(enable = "sse4.1")]
    pub fn _mm_sha256msg2_epu32(a: __m128i, b: __m128i) -> __m128i {
        let ([a0, a1, a2, a3], [_, _, w14, w15]) = (words(a), words(b));
        let w16 = a0.wrapping_add(scalar::small_sigma1(w14));
        let w17 = a1.wrapping_add(scalar::small_sigma1(w15));
        super::vector([
            w16,
            w17,
            a2.wrapping_add(scalar::small_sigma1(w16)),
            a3.wrapping_add(scalar::small_sigma1(w17)),
        ])
    }
}
