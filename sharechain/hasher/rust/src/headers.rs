//! Proof of work: header hashes against targets, merkle branches and the nonce scan.
#![forbid(unsafe_code)]

use crate::sha256::{Engine, INITIAL, LANES, LaneBlock, LaneState, bytes_of, sha256d};
use sha2::block_api::compress256;
use std::sync::atomic::{AtomicBool, Ordering};

/// A 256-bit target, least significant byte first, as a hash is.
pub type Target = [u8; 32];
/// A serialised block header.
pub type Header = [u8; 80];

/// The nonce scan looks at its stop flag each time it has done this many hashes.
pub const POLL_INTERVAL: u64 = 1 << 14;

/// Whether `hash <= target`, both read as little-endian integers.
fn is_at_most(hash: &[u8; 32], target: &Target) -> bool {
    hash.iter().rev().le(target.iter().rev())
}

/// Whether the header's double SHA-256, read as a little-endian integer, is at most `target`.
pub fn meets_target(header: &Header, target: &Target) -> bool {
    is_at_most(&sha256d(header), target)
}

/// [`meets_target`] of each header and the target beside it.
pub fn check_headers(headers: &[Header], targets: &[Target]) -> Vec<bool> {
    let engine = Engine::best();
    let mut met = vec![false; headers.len()];
    let views: Vec<&[u8]> = headers.iter().map(|header| header.as_slice()).collect();
    let mut inner = vec![[0; 32]; headers.len()];
    engine.digest_all(&[], &views, |i, digest| inner[i] = bytes_of(&digest));
    let views: Vec<&[u8]> = inner.iter().map(|hash| hash.as_slice()).collect();
    engine.digest_all(&[], &views, |i, hash| {
        met[i] = is_at_most(&bytes_of(&hash), &targets[i])
    });
    met
}

/// The merkle root over `leaf`, whose siblings are `branch`, lowest first, each on the right-hand side.
pub fn fold_merkle(leaf: [u8; 32], branch: &[[u8; 32]]) -> [u8; 32] {
    branch.iter().fold(leaf, |left, right| {
        let mut pair = [0; 64];
        pair[..32].copy_from_slice(&left);
        pair[32..].copy_from_slice(right);
        sha256d(&pair)
    })
}

/// The first nonce in `start..start + count` whose header meets the target, and the number of hashes tried for it.
/// `start + count` must not exceed 2^32.
pub fn scan_nonces(
    header: &Header,
    start: u64,
    count: u64,
    target: &Target,
    stop: Option<&AtomicBool>,
) -> (Option<u32>, u64) {
    let stopped = || stop.is_some_and(|flag| flag.load(Ordering::Relaxed));
    let scan = Scan::new(Engine::best(), header, target);
    let mut done = 0;
    while done < count && !stopped() {
        let batch = POLL_INTERVAL.min(count - done);
        for step in (0..batch).step_by(LANES) {
            let nonce = start + done + step;
            if let Some(lane) =
                scan.first_lane(nonce as u32, (batch - step).min(LANES as u64) as usize)
            {
                let lane = lane as u64;
                return (Some((nonce + lane) as u32), done + step + lane + 1);
            }
        }
        done += batch;
    }
    (None, done)
}

/// What is the same for all nonces of one header.
struct Scan {
    engine: Engine,
    target: Target,
    /// The most significant 32 bits of the target: nearly all hashes fail on these.
    target_top: u32,
    /// The state after the first 64 bytes of the header.
    midstate: LaneState,
    /// The last 16 bytes of the header and the padding of 80 bytes; word 3 is the nonce's place.
    tail: LaneBlock,
    /// The padding of a 32-byte message; words 0 to 7 are the inner hash's place.
    outer: LaneBlock,
}

impl Scan {
    fn new(engine: Engine, header: &Header, target: &Target) -> Scan {
        let mut first = [0; 64];
        first.copy_from_slice(&header[..64]);
        let mut midstate = INITIAL;
        compress256(&mut midstate, &[first]);
        let mut tail = [[0; LANES]; 16];
        let (words, _) = header[64..].as_chunks::<4>();
        for (lanes, word) in tail.iter_mut().zip(words) {
            *lanes = [u32::from_be_bytes(*word); LANES];
        }
        tail[4] = [0x8000_0000; LANES];
        tail[15] = [80 * 8; LANES];
        let mut outer = [[0; LANES]; 16];
        outer[8] = [0x8000_0000; LANES];
        outer[15] = [32 * 8; LANES];
        Scan {
            engine,
            target: *target,
            target_top: u32::from_le_bytes([target[28], target[29], target[30], target[31]]),
            midstate: midstate.map(|word| [word; LANES]),
            tail,
            outer,
        }
    }

    /// The first of the `lanes` nonces from `nonce` on that meets the target.
    #[inline]
    fn first_lane(&self, nonce: u32, lanes: usize) -> Option<usize> {
        let mut tail = self.tail;
        for (lane, word) in tail[3].iter_mut().enumerate() {
            *word = nonce.wrapping_add(lane as u32).swap_bytes();
        }
        let mut inner = self.midstate;
        self.engine.compress(&mut inner, &tail);
        let mut block = self.outer;
        block[..8].copy_from_slice(&inner);
        let mut state = INITIAL.map(|word| [word; LANES]);
        self.engine.compress(&mut state, &block);
        let close = state[7].iter().fold(false, |any, word| {
            any | (word.swap_bytes() <= self.target_top)
        });
        if !close {
            return None;
        }
        (0..lanes)
            .find(|&lane| is_at_most(&bytes_of(&state.map(|words| words[lane])), &self.target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn genesis() -> Header {
        let mut header = [0; 80];
        header[0] = 1;
        let merkle_root = "3ba3edfd7a7b12b27ac72c3e67768f617fc81bc3888a51323a9fb8aa4b1e5e4a";
        for (i, byte) in header[36..68].iter_mut().enumerate() {
            *byte = u8::from_str_radix(&merkle_root[2 * i..2 * i + 2], 16).unwrap();
        }
        header[68..72].copy_from_slice(&1_231_006_505u32.to_le_bytes());
        header[72..76].copy_from_slice(&0x1d00_ffffu32.to_le_bytes());
        header[76..80].copy_from_slice(&2_083_236_893u32.to_le_bytes());
        header
    }

    fn genesis_target() -> Target {
        let mut target = [0; 32];
        target[26..28].copy_from_slice(&[0xff, 0xff]);
        target
    }

    #[test]
    fn test_genesis_meets_its_target_and_not_a_harder_one() {
        let hash = sha256d(&genesis());
        assert!(meets_target(&genesis(), &genesis_target()));
        assert!(meets_target(&genesis(), &hash));
        let mut harder = hash;
        harder[0] -= 1;
        assert!(!meets_target(&genesis(), &harder));
        assert_eq!(
            check_headers(&[genesis(); 2], &[hash, harder]),
            [true, false]
        );
    }

    #[test]
    fn test_scan_finds_genesis_by_every_engine() {
        for engine in Engine::available() {
            let scan = Scan::new(engine, &genesis(), &genesis_target());
            assert_eq!(scan.first_lane(2_083_236_890, 16), Some(3), "{engine:?}");
            assert_eq!(scan.first_lane(2_083_236_890, 3), None, "{engine:?}");
        }
        let found = scan_nonces(&genesis(), 2_083_200_000, 1 << 20, &genesis_target(), None);
        assert_eq!(found, (Some(2_083_236_893), 36_894));
    }

    #[test]
    fn test_scan_reaches_the_last_nonce_and_obeys_the_flag() {
        assert_eq!(
            scan_nonces(&genesis(), u32::MAX as u64, 1, &[0xff; 32], None),
            (Some(u32::MAX), 1)
        );
        assert_eq!(
            scan_nonces(&genesis(), (1 << 32) - 21, 21, &[0; 32], None),
            (None, 21)
        );
        let stop = AtomicBool::new(true);
        assert_eq!(
            scan_nonces(&genesis(), 0, 100, &[0xff; 32], Some(&stop)),
            (None, 0)
        );
    }
}
