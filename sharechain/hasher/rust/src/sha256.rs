//! SHA-256 of one message, and of sixteen messages side by side.
//!
//! A payout draw hashes thousands of short messages and a miner hashes one header with billions of nonces: in both
//! cases the messages are independent, so word `i` of sixteen of them can share one vector register. The compression
//! function is written once, as a loop over lanes with a straight body, and compiled for each vector width: the
//! compiler turns that loop into vector instructions. Only the choice between those copies needs `unsafe`.
//!
//! Where the processor has SHA instructions but no AVX-512, the `sha2` crate does the lanes one after another.
//!
//! The nonce scan, where every instruction counts, has kernels of its own in `kernels.rs`.

use crate::buckets::order_by_bucket;
use sha2::block_api::compress256;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Messages hashed side by side.
pub const LANES: usize = 16;

/// Messages from this length on are rare, and sorted apart from the others.
const LONG: usize = 128;

/// One 32-bit word of each lane.
pub type Words = [u32; LANES];
/// The chaining value of each lane, by word.
pub type LaneState = [Words; 8];
/// One 64-byte block of each lane, by word (big endian, as SHA-256 reads them).
pub type LaneBlock = [Words; 16];

/// The initial chaining value (FIPS 180-4, 5.3.3).
pub const INITIAL: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

/// The round constants (FIPS 180-4, 4.2.2).
#[rustfmt::skip]
pub const K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

/// One round, with the roles of the working variables passed instead of moved.
macro_rules! round {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        let sum1 = $e.rotate_right(6) ^ $e.rotate_right(11) ^ $e.rotate_right(25);
        let choose = $g ^ ($e & ($f ^ $g));
        let first = $h
            .wrapping_add(sum1)
            .wrapping_add(choose)
            .wrapping_add($k)
            .wrapping_add($w);
        let sum0 = $a.rotate_right(2) ^ $a.rotate_right(13) ^ $a.rotate_right(22);
        let majority = ($a & $b) | ($c & ($a | $b));
        $d = $d.wrapping_add(first);
        $h = first.wrapping_add(sum0).wrapping_add(majority);
    };
}

/// The next word of the message schedule, in place of the one sixteen rounds ago.
macro_rules! extend {
    ($w:ident, $i:expr) => {
        let (w1, w14) = ($w[($i + 1) & 15], $w[($i + 14) & 15]);
        let sigma0 = w1.rotate_right(7) ^ w1.rotate_right(18) ^ (w1 >> 3);
        let sigma1 = w14.rotate_right(17) ^ w14.rotate_right(19) ^ (w14 >> 10);
        $w[$i] = $w[$i]
            .wrapping_add(sigma0)
            .wrapping_add($w[($i + 9) & 15])
            .wrapping_add(sigma1);
    };
}

macro_rules! sixteen_rounds {
    ($v:ident, $w:ident, $from:expr, $schedule:ident) => {
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = $v;
        sixteen_rounds!(@eight a b c d e f g h, $w, $from, 0, $schedule);
        sixteen_rounds!(@eight a b c d e f g h, $w, $from, 8, $schedule);
        $v = [a, b, c, d, e, f, g, h];
    };
    (@eight $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident,
     $w:ident, $from:expr, $i:expr, $schedule:ident) => {
        $schedule!($w, $i);
        round!($a $b $c $d $e $f $g $h, K[$from + $i], $w[$i]);
        $schedule!($w, $i + 1);
        round!($h $a $b $c $d $e $f $g, K[$from + $i + 1], $w[$i + 1]);
        $schedule!($w, $i + 2);
        round!($g $h $a $b $c $d $e $f, K[$from + $i + 2], $w[$i + 2]);
        $schedule!($w, $i + 3);
        round!($f $g $h $a $b $c $d $e, K[$from + $i + 3], $w[$i + 3]);
        $schedule!($w, $i + 4);
        round!($e $f $g $h $a $b $c $d, K[$from + $i + 4], $w[$i + 4]);
        $schedule!($w, $i + 5);
        round!($d $e $f $g $h $a $b $c, K[$from + $i + 5], $w[$i + 5]);
        $schedule!($w, $i + 6);
        round!($c $d $e $f $g $h $a $b, K[$from + $i + 6], $w[$i + 6]);
        $schedule!($w, $i + 7);
        round!($b $c $d $e $f $g $h $a, K[$from + $i + 7], $w[$i + 7]);
    };
}

/// The message schedule of the first sixteen rounds is the block itself.
macro_rules! given {
    ($w:ident, $i:expr) => {};
}

/// Compresses one block into the state of every lane. The body must stay free of inner loops over rounds and of
/// branches, or the loop over lanes is no longer turned into vector instructions.
#[inline(always)]
fn compress_lanes(state: &mut LaneState, block: &LaneBlock) {
    for lane in 0..LANES {
        let before: [u32; 8] = [
            state[0][lane],
            state[1][lane],
            state[2][lane],
            state[3][lane],
            state[4][lane],
            state[5][lane],
            state[6][lane],
            state[7][lane],
        ];
        let mut w: [u32; 16] = [
            block[0][lane],
            block[1][lane],
            block[2][lane],
            block[3][lane],
            block[4][lane],
            block[5][lane],
            block[6][lane],
            block[7][lane],
            block[8][lane],
            block[9][lane],
            block[10][lane],
            block[11][lane],
            block[12][lane],
            block[13][lane],
            block[14][lane],
            block[15][lane],
        ];
        let mut v = before;
        sixteen_rounds!(v, w, 0, given);
        sixteen_rounds!(v, w, 16, extend);
        sixteen_rounds!(v, w, 32, extend);
        sixteen_rounds!(v, w, 48, extend);
        state[0][lane] = before[0].wrapping_add(v[0]);
        state[1][lane] = before[1].wrapping_add(v[1]);
        state[2][lane] = before[2].wrapping_add(v[2]);
        state[3][lane] = before[3].wrapping_add(v[3]);
        state[4][lane] = before[4].wrapping_add(v[4]);
        state[5][lane] = before[5].wrapping_add(v[5]);
        state[6][lane] = before[6].wrapping_add(v[6]);
        state[7][lane] = before[7].wrapping_add(v[7]);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn compress_avx512(state: &mut LaneState, block: &LaneBlock) {
    compress_lanes(state, block);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn compress_avx2(state: &mut LaneState, block: &LaneBlock) {
    compress_lanes(state, block);
}

#[inline(never)]
fn compress_portable(state: &mut LaneState, block: &LaneBlock) {
    compress_lanes(state, block);
}

/// One lane after another by the `sha2` crate, which knows the SHA instructions of x86 and ARM.
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
fn compress_one_by_one(state: &mut LaneState, block: &LaneBlock) {
    for lane in 0..LANES {
        let mut one = state.map(|words| words[lane]);
        let mut bytes = [0; 64];
        for (chunk, words) in bytes.chunks_exact_mut(4).zip(block) {
            chunk.copy_from_slice(&words[lane].to_be_bytes());
        }
        compress256(&mut one, &[bytes]);
        for (words, word) in state.iter_mut().zip(one) {
            words[lane] = word;
        }
    }
}

/// A way to hash. Values are made only by [`Engine::available`], so a value proves that this processor can run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// SHA instructions, of x86 or of ARM.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Sha,
    Portable,
}

/// The position in [`Engine::available`] of the engine in use.
static CURRENT: AtomicUsize = AtomicUsize::new(0);

impl Engine {
    /// The engines that this processor can run, fastest first.
    pub fn available() -> Vec<Engine> {
        let mut kinds = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx512f") {
                kinds.push(Kind::Avx512);
            }
            let sha = cfg!(feature = "emulated-sha") || std::is_x86_feature_detected!("sha");
            if sha
                && std::is_x86_feature_detected!("ssse3")
                && std::is_x86_feature_detected!("sse4.1")
            {
                kinds.push(Kind::Sha);
            }
            if std::is_x86_feature_detected!("avx2") {
                kinds.push(Kind::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon")
            && std::arch::is_aarch64_feature_detected!("sha2")
        {
            kinds.push(Kind::Sha);
        }
        kinds.push(Kind::Portable);
        kinds.into_iter().map(Engine).collect()
    }

    /// What it is called on the outside.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Sha => "sha-ni",
            #[cfg(target_arch = "aarch64")]
            Kind::Sha => "sha2",
            Kind::Portable => "portable",
        }
    }

    /// The engine of this name, if this processor can run it.
    pub fn named(name: &str) -> Option<Engine> {
        Engine::available()
            .into_iter()
            .find(|engine| engine.name() == name)
    }

    /// The engine in use: the fastest, unless [`Engine::set_current`] was called.
    pub fn current() -> Engine {
        static AVAILABLE: std::sync::OnceLock<Vec<Engine>> = std::sync::OnceLock::new();
        AVAILABLE.get_or_init(Engine::available)[CURRENT.load(Ordering::Relaxed)]
    }

    /// Makes this the engine in use.
    pub fn set_current(self) {
        let position = Engine::available().iter().position(|&one| one == self);
        CURRENT.store(position.unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    /// Whether lanes go one after another, so that there is nothing to gain from lining messages up.
    fn is_one_by_one(self) -> bool {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        return self.0 == Kind::Sha;
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        return false;
    }

    /// Compresses one block into the state of every lane.
    #[allow(unsafe_code)]
    #[inline]
    pub fn compress(self, state: &mut LaneState, block: &LaneBlock) {
        match self.0 {
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have AVX-512F.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { compress_avx512(state, block) },
            // SAFETY: an `Engine` of this kind is made only after the processor was seen to have AVX2.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { compress_avx2(state, block) },
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Kind::Sha => compress_one_by_one(state, block),
            Kind::Portable => compress_portable(state, block),
        }
    }

    /// Calls `visit` with the position of each message and SHA-256(prefix || message) as eight big-endian words. The
    /// order of the calls is unspecified.
    pub fn digest_all(
        self,
        prefix: &[u8],
        messages: &[&[u8]],
        mut visit: impl FnMut(usize, [u32; 8]),
    ) {
        // Lanes are filled by whole words, so the messages must begin at one.
        if self.is_one_by_one() || !prefix.len().is_multiple_of(4) {
            let start = Sha256::new_with_prefix(prefix);
            for (i, message) in messages.iter().enumerate() {
                visit(
                    i,
                    words_of(&start.clone().chain_update(message).finalize().into()),
                );
            }
            return;
        }
        let (whole, rest) = prefix.as_chunks::<64>();
        let mut midstate = INITIAL;
        compress256(&mut midstate, whole);
        let (rest, _) = rest.as_chunks::<4>();
        let mut first = [[0; LANES]; 16];
        for (lanes, word) in first.iter_mut().zip(rest) {
            *lanes = [u32::from_be_bytes(*word); LANES];
        }

        // Lanes run in step, so messages are taken by their number of blocks. Sorting by the length itself makes the
        // processor's branch prediction right nearly always.
        let mut order = order_by_bucket(messages.len(), LONG + 1, |i| messages[i].len().min(LONG));
        let long = order.partition_point(|&i| messages[i as usize].len() < LONG);
        order[long..].sort_unstable_by_key(|&i| messages[i as usize].len());
        let blocks_of = |i: u32| (rest.len() * 4 + messages[i as usize].len() + 9).div_ceil(64);
        let mut order = order.as_slice();
        while let [shortest, ..] = *order {
            let blocks = blocks_of(shortest);
            let (same, longer) = order.split_at(order.partition_point(|&i| blocks_of(i) == blocks));
            order = longer;
            for chunk in same.chunks(LANES) {
                let mut state = midstate.map(|word| [word; LANES]);
                for number in 0..blocks {
                    let mut block = if number == 0 { first } else { [[0; LANES]; 16] };
                    for (lane, &i) in chunk.iter().enumerate() {
                        let message = messages[i as usize];
                        fill_lane(&mut block, lane, number * 16, rest.len(), message);
                        if number + 1 == blocks {
                            let bits = (prefix.len() + message.len()) as u64 * 8;
                            block[14][lane] = (bits >> 32) as u32;
                            block[15][lane] = bits as u32;
                        }
                    }
                    self.compress(&mut state, &block);
                }
                for (lane, &i) in chunk.iter().enumerate() {
                    visit(i as usize, std::array::from_fn(|word| state[word][lane]));
                }
            }
        }
    }
}

/// Writes the part of `message` and of its terminating bit that lies in the sixteen words from word `from` on of a
/// stream in which the message begins at word `begin`, which is below 16.
#[inline]
fn fill_lane(block: &mut LaneBlock, lane: usize, from: usize, begin: usize, message: &[u8]) {
    let first = begin.saturating_sub(from);
    let mut rest = message
        .get((from + first - begin) * 4..)
        .unwrap_or_default();
    for lanes in &mut block[first..] {
        let Some((word, behind)) = rest.split_first_chunk::<4>() else {
            break;
        };
        lanes[lane] = u32::from_be_bytes(*word);
        rest = behind;
    }
    let end = begin + message.len() / 4;
    if (from..from + 16).contains(&end) {
        let last = match *rest {
            [a] => [a, 0x80, 0, 0],
            [a, b] => [a, b, 0x80, 0],
            [a, b, c] => [a, b, c, 0x80],
            _ => [0x80, 0, 0, 0],
        };
        block[end - from][lane] = u32::from_be_bytes(last);
    }
}

/// A digest as eight big-endian words.
fn words_of(digest: &[u8; 32]) -> [u32; 8] {
    let (words, _) = digest.as_chunks::<4>();
    std::array::from_fn(|i| u32::from_be_bytes(words[i]))
}

/// Eight big-endian words as a digest.
pub fn bytes_of(words: &[u32; 8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// SHA-256 of one message.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    Sha256::digest(data).into()
}

/// SHA-256(SHA-256(data)), Bitcoin's hash.
pub fn sha256d(data: &[u8]) -> [u8; 32] {
    sha256(&sha256(data))
}

/// SHA-256(SHA-256(tag) || SHA-256(tag) || message), the tagged hash of BIP 340.
pub fn tagged_hash(tag: &str, message: &[u8]) -> [u8; 32] {
    let tag = sha256(tag.as_bytes());
    Sha256::new()
        .chain_update(tag)
        .chain_update(tag)
        .chain_update(message)
        .finalize()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: usize, salt: u8) -> Vec<u8> {
        (0..len)
            .map(|i| (i as u8).wrapping_mul(31).wrapping_add(salt))
            .collect()
    }

    #[test]
    fn test_every_engine_equals_the_sha2_crate() {
        let messages: Vec<Vec<u8>> = (0..200).map(|i| pattern(i, i as u8)).collect();
        let views: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
        for engine in Engine::available() {
            for prefix_len in [0, 1, 4, 31, 32, 52, 56, 60, 63, 64, 65, 128, 200] {
                let prefix = pattern(prefix_len, 7);
                let mut seen = 0;
                engine.digest_all(&prefix, &views, |i, digest| {
                    let whole = [prefix.as_slice(), views[i]].concat();
                    assert_eq!(
                        bytes_of(&digest),
                        sha256(&whole),
                        "{engine:?}, {prefix_len} + {i}"
                    );
                    seen += 1;
                });
                assert_eq!(seen, views.len());
            }
        }
    }

    #[test]
    fn test_lanes_one_by_one_equal_the_portable_ones() {
        let block: LaneBlock =
            std::array::from_fn(|i| std::array::from_fn(|lane| (i * 77 + lane) as u32));
        let mut state = INITIAL.map(|word| [word; LANES]);
        let mut other = state;
        Engine(Kind::Portable).compress(&mut state, &block);
        compress_one_by_one(&mut other, &block);
        assert_eq!(state, other);
    }

    #[test]
    fn test_no_messages_no_digests() {
        Engine::current().digest_all(b"seed", &[], |_, _| panic!("a digest of no message"));
    }

    #[test]
    fn test_sha256d_of_nothing() {
        let hex: String = sha256d(b"")
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "5df6e0e2761359d30a8275058e299fcc0381534545f55cf43e41983f5d4c9456"
        );
    }
}
