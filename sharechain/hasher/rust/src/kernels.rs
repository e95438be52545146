//! The nonce scan, once for each kind of processor.
//!
//! A scan hashes one header with many nonces. [`Job`] adds up what does not depend on the nonce; the kernels do the
//! rest for some nonces at a time and only look at the last word of the hash, which is the first that a target is
//! compared with. What they let through is hashed again by the caller.
//!
//! `docs/explanation/hasher.md` says why each shortcut is valid and what limits the speed.

mod lanes;
#[cfg(target_arch = "aarch64")]
mod sha2_arm;
#[cfg(target_arch = "x86_64")]
mod sha_ni;

use crate::sha256::{Engine, INITIAL, K, Kind};
use sha2::block_api::compress256;

/// The word that ends a message, and the lengths of a header and of a hash in bits.
const PADDING: u32 = 0x8000_0000;
const HEADER_BITS: u32 = 80 * 8;
const HASH_BITS: u32 = 32 * 8;

/// What round 0 of the second hash adds its word to: the `e` and the `a` after it.
const E_AFTER_ROUND_0: u32 = scalar::round(INITIAL, K[0])[4];
const A_AFTER_ROUND_0: u32 = scalar::round(INITIAL, K[0])[0];

/// The functions of SHA-256 (FIPS 180-4, 4.1.2) on single words.
pub mod scalar {
    pub const fn big_sigma0(a: u32) -> u32 {
        a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22)
    }

    pub const fn big_sigma1(e: u32) -> u32 {
        e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25)
    }

    pub const fn small_sigma0(w: u32) -> u32 {
        w.rotate_right(7) ^ w.rotate_right(18) ^ (w >> 3)
    }

    pub const fn small_sigma1(w: u32) -> u32 {
        w.rotate_right(17) ^ w.rotate_right(19) ^ (w >> 10)
    }

    /// One round, for constant plus word.
    pub const fn round(state: [u32; 8], kw: u32) -> [u32; 8] {
        let [a, b, c, d, e, f, g, h] = state;
        let first = h
            .wrapping_add(big_sigma1(e))
            .wrapping_add((e & f) ^ (!e & g))
            .wrapping_add(kw);
        let second = big_sigma0(a).wrapping_add((a & b) ^ (a & c) ^ (b & c));
        [
            first.wrapping_add(second),
            a,
            b,
            c,
            d.wrapping_add(first),
            e,
            f,
            g,
        ]
    }
}

/// The constants of the rounds of both hashes, with all that is constant besides: padding words, and in rounds 1 to 3 of
/// the second hash what stands in `h`.
const CONSTANTS: [u32; 128] = {
    let mut constants = [0; 128];
    let mut i = 0;
    while i < 64 {
        constants[i] = K[i];
        constants[64 + i] = K[i];
        i += 1;
    }
    constants[4] = K[4].wrapping_add(PADDING);
    constants[15] = K[15].wrapping_add(HEADER_BITS);
    constants[64 + 8] = K[8].wrapping_add(PADDING);
    constants[64 + 15] = K[15].wrapping_add(HASH_BITS);
    constants[64 + 1] = K[1].wrapping_add(INITIAL[6]);
    constants[64 + 2] = K[2].wrapping_add(INITIAL[5]);
    constants[64 + 3] = K[3].wrapping_add(INITIAL[4]);
    constants
};

/// What is the same for all nonces of one header and target.
pub struct Job {
    /// The state after the first block.
    midstate: [u32; 8],
    /// The state after round 3 of the second block with a nonce of 0; the nonce is added to the first and the fifth.
    after_round_3: [u32; 8],
    /// Words 16 and 17 of its schedule.
    w16: u32,
    w17: u32,
    /// What is constant in words 18, 19, 31 and 32.
    w18: u32,
    w19: u32,
    w31: u32,
    w32: u32,
    /// The bits of the hash's last word that must be zero for the hash to meet the target.
    mask: u32,
}

impl Job {
    /// `header` is 80 bytes, of which the last four do not matter; `target` has its least significant byte first.
    pub fn new(header: &[u8; 80], target: &[u8; 32]) -> Job {
        let (words, _) = header[64..76].as_chunks::<4>();
        let [w0, w1, w2] = std::array::from_fn(|i| u32::from_be_bytes(words[i]));
        let mut midstate = INITIAL;
        let (first, _) = header.as_chunks::<64>();
        compress256(&mut midstate, &first[..1]);
        let state = scalar::round(midstate, K[0].wrapping_add(w0));
        let state = scalar::round(state, K[1].wrapping_add(w1));
        let state = scalar::round(state, K[2].wrapping_add(w2));
        let w16 = w0.wrapping_add(scalar::small_sigma0(w1));
        let w17 = w1
            .wrapping_add(scalar::small_sigma0(w2))
            .wrapping_add(scalar::small_sigma1(HEADER_BITS));
        // The hash is compared with its last byte first, so its last word is read backwards.
        let top = u32::from_le_bytes([target[28], target[29], target[30], target[31]]);
        let must_be_zero = u32::MAX.checked_shl(u32::BITS - top.leading_zeros());
        Job {
            midstate,
            after_round_3: scalar::round(state, K[3]),
            w16,
            w17,
            w18: w2.wrapping_add(scalar::small_sigma1(w16)),
            w19: scalar::small_sigma0(PADDING).wrapping_add(scalar::small_sigma1(w17)),
            w31: scalar::small_sigma0(w16).wrapping_add(HEADER_BITS),
            w32: scalar::small_sigma0(w17).wrapping_add(w16),
            mask: must_be_zero.unwrap_or(0).swap_bytes(),
        }
    }
}

impl Engine {
    /// The number of nonces that [`Engine::scan`] tries at a time.
    pub fn batch(self) -> usize {
        match self.kind() {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Kind::Sha => sha_ni::LANES,
            #[cfg(target_arch = "aarch64")]
            Kind::Sha => sha2_arm::LANES,
            Kind::Portable => portable::LANES,
        }
    }

    /// The first of `batches` batches of nonces, from `first` on, in which a hash may meet the target, and a bit for
    /// each nonce that is a candidate, the first of the batch in the least significant. `first` is a multiple of
    /// [`Engine::batch`].
    #[allow(unsafe_code)]
    pub fn scan(self, job: &Job, first: u32, batches: u32) -> Option<(u32, u32)> {
        debug_assert!((first as usize).is_multiple_of(self.batch()));
        match self.kind() {
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have AVX-512F.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::scan(job, first, batches) },
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have AVX2.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2::scan(job, first, batches) },
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have SHA, SSSE3 and SSE4.1.
            #[cfg(target_arch = "x86_64")]
            Kind::Sha => unsafe { sha_ni::scan(job, first, batches) },
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have NEON and SHA-2.
            #[cfg(target_arch = "aarch64")]
            Kind::Sha => unsafe { sha2_arm::scan(job, first, batches) },
            Kind::Portable => portable::scan(job, first, batches),
        }
    }
}

/// Sixteen lanes: AVX-512 rotates in one instruction and has any function of three bits in one.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::lanes::{eight_rounds, extended, given, last_word, round, round_of_e, scan_lanes};
    use super::*;

    mod ops {
        use std::arch::x86_64::*;

        pub const LANES: usize = 16;
        pub type Vector = __m512i;
        /// An instruction may take one word from memory for all lanes.
        pub type Constant = u32;
        pub static CONSTANTS: [Constant; 128] = super::CONSTANTS;

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn constant(word: &Constant) -> Vector {
            splat(*word)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn splat(word: u32) -> Vector {
            _mm512_set1_epi32(word as i32)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn add(a: Vector, b: Vector) -> Vector {
            _mm512_add_epi32(a, b)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn add_lane(a: Vector) -> Vector {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            _mm512_add_epi32(a, _mm512_slli_epi32::<24>(lanes))
        }

        /// The exclusive or of three.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn parity(a: Vector, b: Vector, c: Vector) -> Vector {
            _mm512_ternarylogic_epi32::<0x96>(a, b, c)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn choose(e: Vector, f: Vector, g: Vector) -> Vector {
            _mm512_ternarylogic_epi32::<0xca>(e, f, g)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn majority(a: Vector, b: Vector, c: Vector) -> Vector {
            _mm512_ternarylogic_epi32::<0xe8>(a, b, c)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn big_sigma0(a: Vector) -> Vector {
            parity(
                _mm512_ror_epi32::<2>(a),
                _mm512_ror_epi32::<13>(a),
                _mm512_ror_epi32::<22>(a),
            )
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn big_sigma1(e: Vector) -> Vector {
            parity(
                _mm512_ror_epi32::<6>(e),
                _mm512_ror_epi32::<11>(e),
                _mm512_ror_epi32::<25>(e),
            )
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn small_sigma0(w: Vector) -> Vector {
            parity(
                _mm512_ror_epi32::<7>(w),
                _mm512_ror_epi32::<18>(w),
                _mm512_srli_epi32::<3>(w),
            )
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn small_sigma1(w: Vector) -> Vector {
            parity(
                _mm512_ror_epi32::<17>(w),
                _mm512_ror_epi32::<19>(w),
                _mm512_srli_epi32::<10>(w),
            )
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        pub fn zeros_of_last_word(word: Vector, mask: u32) -> u32 {
            _mm512_testn_epi32_mask(word, splat(mask)) as u32
        }
    }

    pub use ops::LANES;
    scan_lanes!(ops, target_feature(enable = "avx512f"));
}

/// Eight lanes: AVX2 rotates by two shifts and an exclusive or.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::lanes::{eight_rounds, extended, given, last_word, round, round_of_e, scan_lanes};
    use super::*;

    mod ops {
        use std::arch::x86_64::*;

        pub const LANES: usize = 8;
        pub type Vector = __m256i;
        /// The word in each lane: an instruction can take that from memory, but not one word for all lanes.
        pub type Constant = Lanes;
        pub static CONSTANTS: [Constant; 128] = {
            let mut constants = [Lanes([0; LANES]); 128];
            let mut i = 0;
            while i < 128 {
                constants[i] = Lanes([super::CONSTANTS[i]; LANES]);
                i += 1;
            }
            constants
        };

        #[derive(Clone, Copy)]
        #[repr(align(32))]
        pub struct Lanes([u32; LANES]);

        #[inline]
        #[target_feature(enable = "avx2")]
        #[allow(unsafe_code)]
        pub fn constant(words: &Constant) -> Vector {
            // SAFETY: `Lanes` has the 32 bytes that are read, and is aligned to 32.
            unsafe { _mm256_load_si256(words.0.as_ptr().cast()) }
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn splat(word: u32) -> Vector {
            _mm256_set1_epi32(word as i32)
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn add(a: Vector, b: Vector) -> Vector {
            _mm256_add_epi32(a, b)
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn add_lane(a: Vector) -> Vector {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_add_epi32(a, _mm256_slli_epi32::<24>(lanes))
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        fn xor(a: Vector, b: Vector) -> Vector {
            _mm256_xor_si256(a, b)
        }

        /// The exclusive or of the two shifts that make a rotation to the right by `RIGHT`; `LEFT` is 32 less that.
        #[inline]
        #[target_feature(enable = "avx2")]
        fn rotate<const RIGHT: i32, const LEFT: i32>(a: Vector) -> Vector {
            xor(_mm256_srli_epi32::<RIGHT>(a), _mm256_slli_epi32::<LEFT>(a))
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn choose(e: Vector, f: Vector, g: Vector) -> Vector {
            xor(g, _mm256_and_si256(e, xor(f, g)))
        }

        /// `b ^ c` was `a ^ b` a round before, so the compiler has it already.
        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn majority(a: Vector, b: Vector, c: Vector) -> Vector {
            xor(b, _mm256_and_si256(xor(a, b), xor(b, c)))
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn big_sigma0(a: Vector) -> Vector {
            xor(
                xor(rotate::<2, 30>(a), rotate::<13, 19>(a)),
                rotate::<22, 10>(a),
            )
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn big_sigma1(e: Vector) -> Vector {
            xor(
                xor(rotate::<6, 26>(e), rotate::<11, 21>(e)),
                rotate::<25, 7>(e),
            )
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn small_sigma0(w: Vector) -> Vector {
            xor(
                xor(rotate::<7, 25>(w), rotate::<18, 14>(w)),
                _mm256_srli_epi32::<3>(w),
            )
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn small_sigma1(w: Vector) -> Vector {
            xor(
                xor(rotate::<17, 15>(w), rotate::<19, 13>(w)),
                _mm256_srli_epi32::<10>(w),
            )
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        pub fn zeros_of_last_word(word: Vector, mask: u32) -> u32 {
            let masked = _mm256_and_si256(word, splat(mask));
            let zeros = _mm256_cmpeq_epi32(masked, _mm256_setzero_si256());
            _mm256_movemask_ps(_mm256_castsi256_ps(zeros)) as u32
        }
    }

    pub use ops::LANES;
    scan_lanes!(ops, target_feature(enable = "avx2"));
}

/// Plain numbers. The loop over the lanes, which has no branch in it, the compiler turns into whatever vectors all
/// processors of the kind have.
mod portable {
    use super::lanes::{eight_rounds, extended, given, last_word, round, round_of_e};
    use super::*;

    pub const LANES: usize = 16;

    mod ops {
        pub use super::scalar::*;

        pub type Vector = u32;
        pub type Constant = u32;

        #[inline(always)]
        pub fn splat(word: u32) -> Vector {
            word
        }

        #[inline(always)]
        pub fn constant(word: &Constant) -> Vector {
            *word
        }

        #[inline(always)]
        pub fn add(a: Vector, b: Vector) -> Vector {
            a.wrapping_add(b)
        }

        #[inline(always)]
        pub fn choose(e: Vector, f: Vector, g: Vector) -> Vector {
            g ^ (e & (f ^ g))
        }

        #[inline(always)]
        pub fn majority(a: Vector, b: Vector, c: Vector) -> Vector {
            b ^ ((a ^ b) & (b ^ c))
        }
    }

    last_word!(ops, inline(always));

    /// See `scan_lanes`.
    pub fn scan(job: &Job, first: u32, batches: u32) -> Option<(u32, u32)> {
        for batch in 0..batches {
            let nonce = first.wrapping_add(batch * LANES as u32).swap_bytes();
            let mut last = [0; LANES];
            for (lane, last) in last.iter_mut().enumerate() {
                *last =
                    last_word(job, &CONSTANTS, nonce.wrapping_add((lane as u32) << 24)) & job.mask;
            }
            if last.contains(&0) {
                let bit = |lane: usize| u32::from(last[lane] == 0) << lane;
                return Some((batch, (0..LANES).map(bit).sum()));
            }
        }
        None
    }
}
