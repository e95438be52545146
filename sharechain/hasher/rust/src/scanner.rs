//! Threads that scan: from a job with room for extranonces to headers, without end.
//!
//! A thread takes an extranonce that no other has, and for each version that may be rolled scans the nonces of its
//! header, a slice at a time. Between slices it looks whether the generation is still its own: a new job raises it, so
//! that work on the old one ends within the slice, some milliseconds at most.
#![forbid(unsafe_code)]

use crate::headers::{Header, POLL_INTERVAL, Scan, Target, fold_merkle};
use crate::sha256::Engine;
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Finds that nobody has taken yet, before the threads wait. Where finds come so fast, hashing is not what is scarce.
pub const MAX_FINDS: usize = 64;

/// What there is to work on.
pub struct Job {
    /// Whatever tells the caller's jobs apart.
    pub tag: u64,
    /// The coinbase before and behind the extranonce that is rolled.
    pub prefix: Vec<u8>,
    pub suffix: Vec<u8>,
    /// The bytes of that extranonce, at most 8 of which are rolled.
    pub extranonce_size: usize,
    pub branch: Vec<[u8; 32]>,
    pub version: u32,
    /// The bits of the version that may be rolled.
    pub version_mask: u32,
    pub previous_block_hash: [u8; 32],
    pub time: u32,
    pub bits: u32,
    pub target: Target,
    /// How many nonces of each header are tried.
    pub nonces: u64,
}

/// A header that meets the target.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Find {
    pub tag: u64,
    pub extranonce: Vec<u8>,
    pub version: u32,
    pub time: u32,
    pub nonce: u32,
}

impl Job {
    /// How many extranonces there are; `u64::MAX` for all that a thread could ever count.
    fn extranonces(&self) -> u64 {
        match self.extranonce_size {
            0..8 => 1 << (8 * self.extranonce_size),
            _ => u64::MAX,
        }
    }

    /// The extranonce of this number, big-endian, the number taken modulo how many there are.
    fn extranonce(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.extranonce_size];
        for (byte, of_number) in bytes.iter_mut().rev().zip(number.to_le_bytes()) {
            *byte = of_number;
        }
        bytes
    }

    /// The versions to try: the job's own bits, with those of the mask counted up from zero.
    fn versions(&self) -> impl Iterator<Item = u32> {
        let mask = self.version_mask;
        let fixed = self.version & !mask;
        // Counting in the bits of a mask: the carry jumps over all others.
        let next = move |rolled: &u32| match rolled.wrapping_sub(mask) & mask {
            0 => None,
            next => Some(next),
        };
        std::iter::successors(Some(0), next).map(move |rolled| fixed | rolled)
    }

    fn header(&self, version: u32, root: &[u8; 32], time: u32) -> Header {
        let mut header = [0; 80];
        header[..4].copy_from_slice(&version.to_le_bytes());
        header[4..36].copy_from_slice(&self.previous_block_hash);
        header[36..68].copy_from_slice(root);
        header[68..72].copy_from_slice(&time.to_le_bytes());
        header[72..76].copy_from_slice(&self.bits.to_le_bytes());
        header
    }
}

/// What the threads and their owner share.
///
/// Mutable fields: `generation` counts the changes of the job; `hashes` all nonces tried; `time` is the header time in
/// force; `state` the rest. Invariant: `generation` and `time` change only while `state` is locked, so that a thread that
/// takes a job under the lock knows which generation and time it belongs to.
#[derive(Default)]
struct Shared {
    generation: AtomicU64,
    hashes: AtomicU64,
    time: AtomicU32,
    state: Mutex<State>,
    /// A job came, there is room for finds again, or all is over.
    wake: Condvar,
    /// A find came.
    found: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Arc<Job>>,
    /// The next extranonce that nobody has; it goes on from job to job, lest two equal jobs mean the same headers.
    next_extranonce: u64,
    /// The extranonces that the job's threads may still take.
    extranonces_left: u64,
    finds: VecDeque<Find>,
    is_closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_current(&self, generation: u64) -> bool {
        self.generation.load(Ordering::Relaxed) == generation
    }

    /// The next piece of work, as soon as there is one; `None` at the end.
    fn take(&self) -> Option<(u64, Arc<Job>, u64)> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if state.extranonces_left > 0
                && let Some(job) = state.job.clone()
            {
                state.extranonces_left -= 1;
                let number = state.next_extranonce;
                state.next_extranonce = number.wrapping_add(1);
                return Some((self.generation.load(Ordering::Relaxed), job, number));
            }
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands a find over, when there is room; drops it if the job ends before.
    fn put(&self, generation: u64, find: Find) {
        let mut state = self.lock();
        while state.finds.len() >= MAX_FINDS && self.is_current(generation) {
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if self.is_current(generation) {
            state.finds.push_back(find);
            self.found.notify_all();
        }
    }

    /// Goes through all headers of one extranonce, or until there is another job.
    fn work(&self, engine: Engine, generation: u64, job: &Job, number: u64) {
        let extranonce = job.extranonce(number);
        let inner = Sha256::new()
            .chain_update(&job.prefix)
            .chain_update(&extranonce)
            .chain_update(&job.suffix)
            .finalize();
        let root = fold_merkle(Sha256::digest(inner).into(), &job.branch);
        for version in job.versions() {
            let mut time = self.time.load(Ordering::Relaxed);
            let mut scan = Scan::new(engine, &job.header(version, &root, time), &job.target);
            let mut at = 0;
            while at < job.nonces {
                if !self.is_current(generation) {
                    return;
                }
                let now = self.time.load(Ordering::Relaxed);
                if now != time {
                    time = now;
                    scan = Scan::new(engine, &job.header(version, &root, time), &job.target);
                }
                let count = POLL_INTERVAL.min(job.nonces - at);
                let found = scan.first(at, count);
                let done = found.map_or(count, |nonce| nonce as u64 - at + 1);
                self.hashes.fetch_add(done, Ordering::Relaxed);
                at += done;
                if let Some(nonce) = found {
                    let find = Find {
                        tag: job.tag,
                        extranonce: extranonce.clone(),
                        version,
                        time,
                        nonce,
                    };
                    self.put(generation, find);
                }
            }
        }
    }
}

/// Scanning threads. They end when it is dropped.
pub struct Scanner {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Scanner {
    pub fn new(engine: Engine, threads: usize) -> std::io::Result<Scanner> {
        let shared = Arc::<Shared>::default();
        let scanner = Scanner {
            shared: shared.clone(),
            threads: Mutex::default(),
        };
        for _ in 0..threads {
            let shared = shared.clone();
            let thread = std::thread::Builder::new()
                .name("scan".into())
                .spawn(move || {
                    while let Some((generation, job, number)) = shared.take() {
                        shared.work(engine, generation, &job, number);
                    }
                })?;
            scanner
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(scanner)
    }

    /// Gives all threads another job, or none.
    pub fn start(&self, job: Option<Job>) {
        let mut state = self.shared.lock();
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
        state.extranonces_left = job.as_ref().map_or(0, Job::extranonces);
        if let Some(job) = &job {
            self.shared.time.store(job.time, Ordering::Relaxed);
        }
        state.job = job.map(Arc::new);
        self.shared.wake.notify_all();
    }

    /// The header time of the job in hand, from the next slice on.
    pub fn set_time(&self, time: u32) {
        let _state = self.shared.lock();
        self.shared.time.store(time, Ordering::Relaxed);
    }

    /// What was found since the last call; waits for it for so long.
    pub fn wait(&self, patience: Duration) -> Vec<Find> {
        let until = Instant::now() + patience;
        let mut state = self.shared.lock();
        while state.finds.is_empty() && !state.is_closed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.found.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.shared.wake.notify_all();
        state.finds.drain(..).collect()
    }

    /// All nonces that were tried since the start.
    pub fn hashes(&self) -> u64 {
        self.shared.hashes.load(Ordering::Relaxed)
    }

    /// Ends the threads, and waits until they have ended.
    pub fn close(&self) {
        {
            let mut state = self.shared.lock();
            state.is_closed = true;
            state.job = None;
            self.shared.generation.fetch_add(1, Ordering::Relaxed);
            self.shared.wake.notify_all();
            self.shared.found.notify_all();
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Scanner {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::meets_target;
    use crate::sha256::sha256d;
    use std::collections::HashSet;

    fn job(tag: u64) -> Job {
        Job {
            tag,
            prefix: vec![1; 50],
            suffix: vec![2; 70],
            extranonce_size: 1,
            branch: vec![[3; 32]],
            version: 0x2000_0000,
            version_mask: 0x0000_6000,
            previous_block_hash: [4; 32],
            time: 5,
            bits: 6,
            target: [0xff; 32],
            nonces: 3,
        }
    }

    #[test]
    fn test_all_headers_of_a_job_are_tried_and_none_twice() {
        let scanner = Scanner::new(Engine::current(), 3).unwrap();
        scanner.start(Some(job(7)));
        let mut seen = HashSet::new();
        while seen.len() < 256 * 4 * 3 {
            for find in scanner.wait(Duration::from_secs(10)) {
                let coinbase = [vec![1; 50].as_slice(), &find.extranonce, &[2; 70]].concat();
                let root = fold_merkle(sha256d(&coinbase), &[[3; 32]]);
                let mut header = job(7).header(find.version, &root, find.time);
                header[76..].copy_from_slice(&find.nonce.to_le_bytes());
                assert!(meets_target(&header, &[0xff; 32]));
                assert_eq!((find.tag, find.time), (7, 5));
                assert_eq!(find.version & !0x6000, 0x2000_0000);
                assert!(seen.insert(header));
            }
        }
        assert!(scanner.wait(Duration::from_millis(20)).is_empty());
        assert_eq!(scanner.hashes(), 256 * 4 * 3);
    }

    #[test]
    fn test_threads_wait_for_who_takes_what_they_find() {
        let scanner = Scanner::new(Engine::current(), 2).unwrap();
        scanner.start(Some(Job {
            nonces: 1 << 32,
            ..job(1)
        }));
        assert!(!scanner.wait(Duration::from_secs(10)).is_empty());
        std::thread::sleep(Duration::from_millis(20));
        assert!(scanner.hashes() <= 3 * MAX_FINDS as u64);
        scanner.start(Some(job(2)));
        loop {
            if scanner
                .wait(Duration::from_secs(10))
                .iter()
                .any(|find| find.tag == 2)
            {
                break;
            }
        }
        scanner.close();
        scanner.close();
    }
}
