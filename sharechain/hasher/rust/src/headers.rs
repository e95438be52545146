//! Proof of work: header hashes against targets, merkle branches and the nonce scan.
#![forbid(unsafe_code)]

use crate::kernels::Job;
use crate::sha256::{Engine, bytes_of, sha256d};
use std::sync::atomic::{AtomicBool, Ordering};

/// A 256-bit target, least significant byte first, as a hash is.
pub type Target = [u8; 32];
/// A serialised block header.
pub type Header = [u8; 80];

/// The nonce scan looks at its stop flag each time it has done this many hashes.
pub const POLL_INTERVAL: u64 = 1 << 14;

/// Whether `hash <= target`, both read as little-endian integers.
pub fn is_at_most(hash: &[u8; 32], target: &Target) -> bool {
    hash.iter().rev().le(target.iter().rev())
}

/// Whether the header's double SHA-256, read as a little-endian integer, is at most `target`.
pub fn meets_target(header: &Header, target: &Target) -> bool {
    is_at_most(&sha256d(header), target)
}

/// From so many on a batch is worth another thread: starting one costs some fifty microseconds.
const BATCH_OF_A_THREAD: usize = 256;

/// Has pieces of `0..len` done on all cores and joins what comes of them, in order.
fn on_all_cores<T: Send>(
    len: usize,
    least: usize,
    piece: impl Fn(std::ops::Range<usize>) -> Vec<T> + Sync,
) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.min(len / least.max(1)).max(1);
    if threads == 1 {
        return piece(0..len);
    }
    let range = |thread: usize| len * thread / threads..len * (thread + 1) / threads;
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|thread| {
                let piece = &piece;
                scope.spawn(move || piece(range(thread)))
            })
            .collect();
        let mut all = piece(range(0));
        for other in others {
            match other.join() {
                Ok(more) => all.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

/// The double SHA-256 of each message, side by side.
fn sha256d_all(messages: &[&[u8]]) -> Vec<[u8; 32]> {
    let engine = Engine::current();
    let mut inner = vec![[0; 32]; messages.len()];
    engine.digest_all(&[], messages, |i, digest| inner[i] = bytes_of(&digest));
    let views: Vec<&[u8]> = inner.iter().map(|hash| hash.as_slice()).collect();
    let mut outer = vec![[0; 32]; messages.len()];
    engine.digest_all(&[], &views, |i, digest| outer[i] = bytes_of(&digest));
    outer
}

/// [`meets_target`] of each header and the target beside it.
pub fn check_headers(headers: &[Header], targets: &[Target]) -> Vec<bool> {
    on_all_cores(headers.len(), BATCH_OF_A_THREAD, |range| {
        let views: Vec<&[u8]> = headers[range.clone()]
            .iter()
            .map(|header| header.as_slice())
            .collect();
        let hashes = sha256d_all(&views);
        hashes
            .iter()
            .zip(&targets[range])
            .map(|(hash, target)| is_at_most(hash, target))
            .collect()
    })
}

/// The merkle root over each coinbase and the branch beside it.
pub fn merkle_roots(coinbases: &[&[u8]], branches: &[Vec<[u8; 32]>]) -> Vec<[u8; 32]> {
    on_all_cores(coinbases.len(), crate::sha256::LANES, |range| {
        let mut roots = sha256d_all(&coinbases[range.clone()]);
        let branches = &branches[range];
        for level in 0..branches.iter().map(Vec::len).max().unwrap_or(0) {
            let rising: Vec<usize> = (0..roots.len())
                .filter(|&i| branches[i].len() > level)
                .collect();
            let pairs: Vec<[u8; 64]> = rising
                .iter()
                .map(|&i| {
                    let mut pair = [0; 64];
                    pair[..32].copy_from_slice(&roots[i]);
                    pair[32..].copy_from_slice(&branches[i][level]);
                    pair
                })
                .collect();
            let views: Vec<&[u8]> = pairs.iter().map(|pair| pair.as_slice()).collect();
            for (&i, hash) in rising.iter().zip(sha256d_all(&views)) {
                roots[i] = hash;
            }
        }
        roots
    })
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
    engine: Engine,
    header: &Header,
    start: u64,
    count: u64,
    target: &Target,
    stop: Option<&AtomicBool>,
) -> (Option<u32>, u64) {
    let stopped = || stop.is_some_and(|flag| flag.load(Ordering::Relaxed));
    let scan = Scan::new(engine, header, target);
    let mut done = 0;
    while done < count && !stopped() {
        let slice = POLL_INTERVAL.min(count - done);
        if let Some(nonce) = scan.first(start + done, slice) {
            return (Some(nonce), nonce as u64 - start + 1);
        }
        done += slice;
    }
    (None, done)
}

/// What is the same for all nonces of one header.
pub struct Scan {
    engine: Engine,
    header: Header,
    target: Target,
    job: Job,
}

impl Scan {
    pub fn new(engine: Engine, header: &Header, target: &Target) -> Scan {
        Scan {
            engine,
            header: *header,
            target: *target,
            job: Job::new(header, target),
        }
    }

    /// The first of `count` nonces from `start` on that meets the target. The last must not exceed 2^32 - 1.
    ///
    /// Batches begin at multiples of their size, so the first and the last may reach over the ends.
    pub fn first(&self, start: u64, count: u64) -> Option<u32> {
        let size = self.engine.batch() as u64;
        let end = start + count;
        let mut at = start - start % size;
        while at < end {
            let batches = (end - at).div_ceil(size) as u32;
            let (batch, hits) = self.engine.scan(&self.job, at as u32, batches)?;
            at += batch as u64 * size;
            let found = (0..size)
                .filter(|lane| hits >> lane & 1 == 1)
                .map(|lane| at + lane)
                .find(|nonce| (start..end).contains(nonce) && self.meets_target(*nonce as u32));
            if let Some(nonce) = found {
                return Some(nonce as u32);
            }
            at += size;
        }
        None
    }

    fn meets_target(&self, nonce: u32) -> bool {
        let mut header = self.header;
        header[76..].copy_from_slice(&nonce.to_le_bytes());
        meets_target(&header, &self.target)
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
    fn test_every_engine_finds_genesis() {
        for engine in Engine::available() {
            let scan = Scan::new(engine, &genesis(), &genesis_target());
            assert_eq!(
                scan.first(2_083_236_890, 4),
                Some(2_083_236_893),
                "{engine:?}"
            );
            assert_eq!(scan.first(2_083_236_890, 3), None, "{engine:?}");
            assert_eq!(scan.first(2_083_236_894, 3), None, "{engine:?}");
            let found = scan_nonces(
                engine,
                &genesis(),
                2_083_200_000,
                40_000,
                &genesis_target(),
                None,
            );
            assert_eq!(found, (Some(2_083_236_893), 36_894));
        }
    }

    /// The nonces of a range that meet a target, one full hash each.
    fn slow(header: &Header, start: u64, count: u64, target: &Target) -> Vec<u32> {
        let mut header = *header;
        (start..start + count)
            .map(|nonce| nonce as u32)
            .filter(|nonce| {
                header[76..].copy_from_slice(&nonce.to_le_bytes());
                meets_target(&header, target)
            })
            .collect()
    }

    fn random_headers() -> impl Iterator<Item = Header> {
        let random = (0..4u8).map(|salt| {
            let mut header = [0; 80];
            header[..32].copy_from_slice(&sha256d(&[salt]));
            header[32..64].copy_from_slice(&sha256d(&[salt, 1]));
            header[64..80].copy_from_slice(&sha256d(&[salt, 2])[..16]);
            header
        });
        random.chain([[0; 80], [0xff; 80], genesis()])
    }

    /// Every nonce of a range is found, one after another, whatever the lane and wherever the range begins or ends.
    #[test]
    fn test_every_engine_finds_what_full_hashes_find() {
        for (i, header) in random_headers().enumerate() {
            for start in [
                0,
                1,
                15,
                0x00ff_fff0 + i as u64,
                0x1234_5678,
                (1 << 32) - 100,
            ] {
                for zeros in [0, 1, 3, 8] {
                    let mut target = [0xff; 32];
                    target[31] = (0xffu32 >> zeros) as u8;
                    let count = 100 - i as u64;
                    let expected = slow(&header, start, count, &target);
                    for engine in Engine::available() {
                        let scan = Scan::new(engine, &header, &target);
                        let (mut found, mut at) = (Vec::new(), start);
                        while let Some(nonce) = scan.first(at, start + count - at) {
                            found.push(nonce);
                            at = nonce as u64 + 1;
                        }
                        assert_eq!(found, expected, "{engine:?}, from {start}");
                    }
                }
            }
        }
    }

    /// The exact hash of each lane is found and a target one less is not.
    #[test]
    fn test_every_lane_of_every_engine_is_exact() {
        for engine in Engine::available() {
            for header in random_headers() {
                for nonce in (1 << 32) - 2 * engine.batch() as u64..1 << 32 {
                    let mut whole = header;
                    whole[76..].copy_from_slice(&(nonce as u32).to_le_bytes());
                    let hash = sha256d(&whole);
                    let found = Scan::new(engine, &header, &hash).first(nonce, 1);
                    assert_eq!(found, Some(nonce as u32), "{engine:?}");
                    let mut harder = hash;
                    harder[0] = harder[0].wrapping_sub(1);
                    if harder[0] < hash[0] {
                        assert_eq!(Scan::new(engine, &header, &harder).first(nonce, 1), None);
                    }
                }
            }
        }
    }

    #[test]
    fn test_scan_reaches_the_last_nonce_and_obeys_the_flag() {
        for engine in Engine::available() {
            let scan = |start, count, target: u8, stop| {
                scan_nonces(engine, &genesis(), start, count, &[target; 32], stop)
            };
            assert_eq!(scan(u32::MAX as u64, 1, 0xff, None), (Some(u32::MAX), 1));
            assert_eq!(scan((1 << 32) - 21, 21, 0, None), (None, 21));
            let stop = AtomicBool::new(true);
            assert_eq!(scan(0, 100, 0xff, Some(&stop)), (None, 0));
        }
    }
}
