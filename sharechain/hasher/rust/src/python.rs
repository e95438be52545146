//! The Python bindings of `sharechain._native`. No Python type is used in any other file.
//!
//! `sharechain/hasher/__init__.py` documents the interface and `sharechain/hasher/twin.py` is its reference.
use crate::sha256::Engine;
use crate::{draw, headers, payment, scanner, sha256, weights};
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const NONCES: u64 = 1 << 32;

/// From this length on Python's hashlib is faster than the `sha2` crate: OpenSSL hashes one message in assembly with
/// AVX2, twice as fast, but a call of it costs more.
const LONG_MESSAGE: usize = 1024;

fn header_of(bytes: &[u8]) -> PyResult<headers::Header> {
    bytes
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("a header has 80 bytes, got {}", bytes.len())))
}

fn hash_of(bytes: &[u8]) -> PyResult<[u8; 32]> {
    bytes
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("a hash has 32 bytes, got {}", bytes.len())))
}

/// The integer as `N` little-endian bytes, by Python's own `int.to_bytes`, for the stable ABI has no such call.
fn little_endian<const N: usize>(number: &Bound<'_, PyInt>) -> PyResult<[u8; N]> {
    let py = number.py();
    let bytes = number.call_method1(intern!(py, "to_bytes"), (N, intern!(py, "little")))?;
    Ok(bytes.cast::<PyBytes>()?.as_bytes().try_into()?)
}

fn target_of(number: &Bound<'_, PyInt>) -> PyResult<headers::Target> {
    little_endian(number)
        .map_err(|_| PyOverflowError::new_err(format!("a target is in 0..2^256 - 1, got {number}")))
}

/// A count or amount in 0..2^63.
fn amount_of(name: &str, number: &Bound<'_, PyInt>) -> PyResult<u64> {
    match number.extract::<i64>() {
        Ok(amount) if amount >= 0 => Ok(amount as u64),
        _ => Err(PyOverflowError::new_err(format!(
            "{name} is in 0..2^63 - 1, got {number}"
        ))),
    }
}

/// A weight as its absolute value and whether it is negative. Nearly all fit the first, cheapest conversion.
fn magnitude_of(weight: &Bound<'_, PyInt>) -> PyResult<(u128, bool)> {
    if let Ok(small) = weight.extract::<i64>() {
        return Ok((small.unsigned_abs() as u128, small < 0));
    }
    if let Ok(large) = weight.extract::<i128>() {
        return Ok((large.unsigned_abs(), large < 0));
    }
    let magnitude = weight.call_method0(intern!(weight.py(), "__abs__"))?;
    let bytes = little_endian::<16>(magnitude.cast()?)
        .map_err(|_| PyOverflowError::new_err(format!("a weight is below 2^128, got {weight}")))?;
    Ok((u128::from_le_bytes(bytes), weight.lt(0)?))
}

/// The double SHA-256 of a message of any length.
fn sha256d_of(py: Python<'_>, data: &[u8]) -> PyResult<[u8; 32]> {
    if data.len() < LONG_MESSAGE {
        return Ok(sha256::sha256d(data));
    }
    hash_of(
        sha256d(py, &PyBytes::new(py, data))?
            .cast::<PyBytes>()?
            .as_bytes(),
    )
}

fn hashes_of(hashes: &[Bound<'_, PyBytes>]) -> PyResult<Vec<[u8; 32]>> {
    hashes.iter().map(|hash| hash_of(hash.as_bytes())).collect()
}

#[pyfunction]
fn sha256d<'py>(py: Python<'py>, data: &Bound<'py, PyBytes>) -> PyResult<Bound<'py, PyAny>> {
    static SHA256: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let bytes = data.as_bytes();
    if bytes.len() < LONG_MESSAGE {
        return Ok(PyBytes::new(py, &sha256::sha256d(bytes)).into_any());
    }
    let inner = SHA256
        .import(py, "hashlib", "sha256")?
        .call1((data,))?
        .call_method0(intern!(py, "digest"))?;
    Ok(PyBytes::new(py, &sha256::sha256(inner.cast::<PyBytes>()?.as_bytes())).into_any())
}

#[pyfunction]
fn meets_target(header: &[u8], target: &Bound<'_, PyInt>) -> PyResult<bool> {
    Ok(headers::meets_target(
        &header_of(header)?,
        &target_of(target)?,
    ))
}

#[pyfunction]
fn check_headers(
    py: Python<'_>,
    headers: Vec<Bound<'_, PyBytes>>,
    targets: Vec<Bound<'_, PyInt>>,
) -> PyResult<Vec<bool>> {
    if headers.len() != targets.len() {
        return Err(PyValueError::new_err(format!(
            "as many targets as headers, got {} headers and {} targets",
            headers.len(),
            targets.len()
        )));
    }
    let headers = headers
        .iter()
        .map(|header| header_of(header.as_bytes()))
        .collect::<PyResult<Vec<_>>>()?;
    let targets = targets
        .iter()
        .map(target_of)
        .collect::<PyResult<Vec<_>>>()?;
    Ok(py.detach(|| headers::check_headers(&headers, &targets)))
}

#[pyfunction]
fn fold_merkle<'py>(
    py: Python<'py>,
    leaf: &[u8],
    branch: Vec<Bound<'py, PyBytes>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let branch = branch
        .iter()
        .map(|hash| hash_of(hash.as_bytes()))
        .collect::<PyResult<Vec<_>>>()?;
    Ok(PyBytes::new(
        py,
        &headers::fold_merkle(hash_of(leaf)?, &branch),
    ))
}

#[pyfunction]
fn merkle_roots<'py>(
    py: Python<'py>,
    coinbases: Vec<Bound<'py, PyBytes>>,
    branches: Vec<Vec<Bound<'py, PyBytes>>>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    if coinbases.len() != branches.len() {
        return Err(PyValueError::new_err(format!(
            "as many branches as coinbases, got {} coinbases and {} branches",
            coinbases.len(),
            branches.len()
        )));
    }
    let branches = branches
        .iter()
        .map(|branch| hashes_of(branch))
        .collect::<PyResult<Vec<_>>>()?;
    let views: Vec<&[u8]> = coinbases.iter().map(|bytes| bytes.as_bytes()).collect();
    let roots = py.detach(|| headers::merkle_roots(&views, &branches));
    Ok(roots.iter().map(|root| PyBytes::new(py, root)).collect())
}

#[pyclass(module = "sharechain._native", frozen)]
struct SubmissionChecker {
    /// The hash of the coinbase up to the extranonce.
    start: Sha256,
    prefix: Vec<u8>,
    suffix: Vec<u8>,
    branch: Vec<[u8; 32]>,
    previous_block_hash: [u8; 32],
    bits: u32,
    targets: Vec<headers::Target>,
}

#[pymethods]
impl SubmissionChecker {
    #[new]
    #[pyo3(signature = (*, prefix, suffix, branch, previous_block_hash, bits, targets))]
    fn new(
        prefix: Vec<u8>,
        suffix: Vec<u8>,
        branch: Vec<Bound<'_, PyBytes>>,
        previous_block_hash: &[u8],
        bits: u32,
        targets: Vec<Bound<'_, PyInt>>,
    ) -> PyResult<Self> {
        Ok(SubmissionChecker {
            start: Sha256::new_with_prefix(&prefix),
            prefix,
            suffix,
            branch: hashes_of(&branch)?,
            previous_block_hash: hash_of(previous_block_hash)?,
            bits,
            targets: targets.iter().map(target_of).collect::<PyResult<_>>()?,
        })
    }

    fn check<'py>(
        &self,
        py: Python<'py>,
        extranonce: &[u8],
        version: u32,
        time: u32,
        nonce: u32,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, Vec<bool>)> {
        let size = self.prefix.len() + extranonce.len() + self.suffix.len();
        let txid = if size < LONG_MESSAGE {
            let hash = self.start.clone().chain_update(extranonce);
            sha256::sha256(&hash.chain_update(&self.suffix).finalize())
        } else {
            sha256d_of(py, &[&self.prefix, extranonce, &self.suffix].concat())?
        };
        let mut header = [0; 80];
        header[..4].copy_from_slice(&version.to_le_bytes());
        header[4..36].copy_from_slice(&self.previous_block_hash);
        header[36..68].copy_from_slice(&headers::fold_merkle(txid, &self.branch));
        header[68..72].copy_from_slice(&time.to_le_bytes());
        header[72..76].copy_from_slice(&self.bits.to_le_bytes());
        header[76..].copy_from_slice(&nonce.to_le_bytes());
        let hash = sha256::sha256d(&header);
        let met = self
            .targets
            .iter()
            .map(|target| headers::is_at_most(&hash, target))
            .collect();
        Ok((PyBytes::new(py, &header), PyBytes::new(py, &hash), met))
    }
}

#[pyclass(module = "sharechain._native", frozen)]
struct StopFlag(Arc<AtomicBool>);

#[pymethods]
impl StopFlag {
    #[new]
    fn new() -> Self {
        StopFlag(Arc::default())
    }

    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[pyclass(module = "sharechain._native", frozen, get_all, eq, hash)]
#[derive(PartialEq, Eq, Hash)]
struct ScanResult {
    nonce: Option<u32>,
    hashes: u64,
}

#[pymethods]
impl ScanResult {
    #[new]
    #[pyo3(signature = (*, nonce, hashes))]
    fn new(nonce: Option<u32>, hashes: u64) -> Self {
        ScanResult { nonce, hashes }
    }

    fn __repr__(&self) -> String {
        let nonce = self.nonce.map_or("None".into(), |nonce| nonce.to_string());
        format!("ScanResult(nonce={nonce}, hashes={})", self.hashes)
    }
}

#[pyfunction]
fn kernels() -> Vec<&'static str> {
    Engine::available().into_iter().map(Engine::name).collect()
}

#[pyfunction]
fn kernel() -> &'static str {
    Engine::current().name()
}

#[pyfunction]
fn use_kernel(name: &str) -> PyResult<()> {
    engine_of(Some(name))?.set_current();
    Ok(())
}

/// The engine of this name, or the one in use.
fn engine_of(name: Option<&str>) -> PyResult<Engine> {
    let Some(name) = name else {
        return Ok(Engine::current());
    };
    Engine::named(name).ok_or_else(|| {
        PyValueError::new_err(format!(
            "this processor has the kernels {}, got {name:?}",
            kernels().join(", ")
        ))
    })
}

#[pyfunction]
#[pyo3(signature = (header, start, count, target, stop=None, kernel=None))]
fn scan_nonces(
    py: Python<'_>,
    header: &[u8],
    start: &Bound<'_, PyInt>,
    count: &Bound<'_, PyInt>,
    target: &Bound<'_, PyInt>,
    stop: Option<&Bound<'_, StopFlag>>,
    kernel: Option<&str>,
) -> PyResult<ScanResult> {
    let engine = engine_of(kernel)?;
    let header = header_of(header)?;
    let target = target_of(target)?;
    let (start, count) = match (start.extract::<u64>(), count.extract::<u64>()) {
        (Ok(start), Ok(count)) if start <= NONCES && count <= NONCES - start => (start, count),
        _ => {
            return Err(PyValueError::new_err(format!(
                "nonces are in 0..2^32 - 1, got {count} from {start} on"
            )));
        }
    };
    let stop = stop.map(|flag| flag.get().0.clone());
    let (nonce, hashes) =
        py.detach(|| headers::scan_nonces(engine, &header, start, count, &target, stop.as_deref()));
    Ok(ScanResult { nonce, hashes })
}

#[pyclass(module = "sharechain._native", frozen, eq, hash)]
#[derive(PartialEq, Eq, Hash)]
struct Find(scanner::Find);

#[pymethods]
impl Find {
    #[getter]
    fn tag(&self) -> u64 {
        self.0.tag
    }

    #[getter]
    fn extranonce<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.extranonce)
    }

    #[getter]
    fn version(&self) -> u32 {
        self.0.version
    }

    #[getter]
    fn time(&self) -> u32 {
        self.0.time
    }

    #[getter]
    fn nonce(&self) -> u32 {
        self.0.nonce
    }
}

#[pyclass(module = "sharechain._native", frozen)]
struct Scanner(scanner::Scanner);

#[pymethods]
impl Scanner {
    #[new]
    #[pyo3(signature = (threads, kernel=None))]
    fn new(threads: usize, kernel: Option<&str>) -> PyResult<Self> {
        if threads == 0 {
            return Err(PyValueError::new_err("a scanner has threads, got 0"));
        }
        Ok(Scanner(scanner::Scanner::new(engine_of(kernel)?, threads)?))
    }

    #[pyo3(signature = (
        *, tag, prefix, extranonce_size, suffix, branch, version, version_mask=0, previous_block_hash, time, bits,
        target, nonces=NONCES
    ))]
    #[allow(clippy::too_many_arguments)]
    fn start(
        &self,
        py: Python<'_>,
        tag: u64,
        prefix: Vec<u8>,
        extranonce_size: usize,
        suffix: Vec<u8>,
        branch: Vec<Bound<'_, PyBytes>>,
        version: u32,
        version_mask: u32,
        previous_block_hash: &[u8],
        time: u32,
        bits: u32,
        target: &Bound<'_, PyInt>,
        nonces: u64,
    ) -> PyResult<()> {
        if nonces > NONCES {
            return Err(PyValueError::new_err(format!(
                "a header has 2^32 nonces, got {nonces}"
            )));
        }
        let job = scanner::Job {
            tag,
            prefix,
            suffix,
            extranonce_size,
            branch: branch
                .iter()
                .map(|hash| hash_of(hash.as_bytes()))
                .collect::<PyResult<_>>()?,
            version,
            version_mask,
            previous_block_hash: hash_of(previous_block_hash)?,
            time,
            bits,
            target: target_of(target)?,
            nonces,
        };
        py.detach(|| self.0.start(Some(job)));
        Ok(())
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.start(None));
    }

    fn set_time(&self, py: Python<'_>, time: u32) {
        py.detach(|| self.0.set_time(time));
    }

    fn wait(&self, py: Python<'_>, patience_ms: u64) -> Vec<Find> {
        let finds = py.detach(|| self.0.wait(Duration::from_millis(patience_ms)));
        finds.into_iter().map(Find).collect()
    }

    #[getter]
    fn hashes(&self) -> u64 {
        self.0.hashes()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

#[pyclass(module = "sharechain._native", frozen, eq, hash)]
#[derive(PartialEq, Eq, Hash)]
struct Draw {
    outputs: Vec<u8>,
    #[pyo3(get)]
    count: usize,
    #[pyo3(get)]
    paid: u64,
    #[pyo3(get)]
    threshold: u64,
}

#[pymethods]
impl Draw {
    #[new]
    #[pyo3(signature = (*, outputs, count, paid, threshold))]
    fn new(outputs: Vec<u8>, count: usize, paid: u64, threshold: u64) -> Self {
        Draw {
            outputs,
            count,
            paid,
            threshold,
        }
    }

    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.outputs)
    }

    fn __repr__(&self) -> String {
        format!(
            "Draw(count={}, paid={}, threshold={})",
            self.count, self.paid, self.threshold
        )
    }
}

#[pyclass(module = "sharechain._native", frozen, eq, hash)]
#[derive(PartialEq, Eq, Hash)]
struct Payment {
    outputs: Vec<u8>,
    #[pyo3(get)]
    count: usize,
    #[pyo3(get)]
    finder_amount: u64,
    #[pyo3(get)]
    threshold: u64,
    txid: [u8; 32],
    merkle_root: [u8; 32],
}

#[pymethods]
impl Payment {
    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.outputs)
    }

    #[getter]
    fn txid<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.txid)
    }

    #[getter]
    fn merkle_root<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.merkle_root)
    }
}

/// The four numbers of a draw; all but the value are at least 1.
fn terms_of(
    value: &Bound<'_, PyInt>,
    payout_class: &Bound<'_, PyInt>,
    min_payout: &Bound<'_, PyInt>,
    dust: &Bound<'_, PyInt>,
) -> PyResult<draw::Terms> {
    let terms = draw::Terms {
        value: amount_of("value", value)?,
        payout_class: amount_of("payout_class", payout_class)?,
        min_payout: amount_of("min_payout", min_payout)?,
        dust: amount_of("dust", dust)?,
    };
    for (name, number) in [
        ("payout_class", terms.payout_class),
        ("min_payout", terms.min_payout),
        ("dust", terms.dust),
    ] {
        if number == 0 {
            return Err(PyValueError::new_err(format!(
                "{name} is at least 1, got 0"
            )));
        }
    }
    Ok(terms)
}

#[pyclass(module = "sharechain._native")]
struct WeightTable(weights::WeightTable);

#[pymethods]
impl WeightTable {
    #[new]
    fn new() -> Self {
        WeightTable(weights::WeightTable::default())
    }

    fn add(&mut self, script: &[u8], weight: &Bound<'_, PyInt>) -> PyResult<()> {
        let (magnitude, subtract) = magnitude_of(weight)?;
        self.0
            .add(script, magnitude, subtract)
            .map_err(|fault| match fault {
                weights::AddError::Negative(present) => PyValueError::new_err(format!(
                    "a weight must not fall below 0, got {weight} for a script of weight {present}"
                )),
                weights::AddError::Overflow => PyOverflowError::new_err(format!(
                    "the total weight stays below 2^128, got {weight} on top of {}",
                    self.0.total()
                )),
            })
    }

    #[getter]
    fn total(&self) -> u128 {
        self.0.total()
    }

    fn __len__(&self) -> usize {
        self.0.payees().len()
    }

    fn weight(&self, script: &[u8]) -> u128 {
        self.0.weight(script)
    }

    fn items<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u128)> {
        let mut payees: Vec<&weights::Payee> = self.0.payees().iter().collect();
        payees.sort_unstable_by(|a, b| a.script.cmp(&b.script));
        payees
            .into_iter()
            .map(|payee| (PyBytes::new(py, &payee.script), payee.weight))
            .collect()
    }

    fn copy(&self) -> Self {
        WeightTable(self.0.clone())
    }

    fn draw(
        &self,
        value: &Bound<'_, PyInt>,
        payout_class: &Bound<'_, PyInt>,
        min_payout: &Bound<'_, PyInt>,
        dust: &Bound<'_, PyInt>,
        seed: &[u8],
    ) -> PyResult<Draw> {
        let terms = terms_of(value, payout_class, min_payout, dust)?;
        // The interpreter lock is kept: this takes less than a fraction of the interval after which another thread
        // would be let in anyway, and the table must not change meanwhile.
        let draw::Draw {
            outputs,
            count,
            paid,
            threshold,
        } = draw::draw(&self.0, &terms, seed).ok_or_else(|| {
            PyValueError::new_err("a draw needs at least one weight, got an empty table")
        })?;
        Ok(Draw {
            outputs,
            count,
            paid,
            threshold,
        })
    }

    #[pyo3(signature = (
        *, value, bonus, payout_class, min_payout, dust, seed, coinbase_script, finder_script, witness_commitment,
        commitment, branch
    ))]
    #[allow(clippy::too_many_arguments)]
    fn pay(
        &self,
        py: Python<'_>,
        value: &Bound<'_, PyInt>,
        bonus: &Bound<'_, PyInt>,
        payout_class: &Bound<'_, PyInt>,
        min_payout: &Bound<'_, PyInt>,
        dust: &Bound<'_, PyInt>,
        seed: &[u8],
        coinbase_script: &[u8],
        finder_script: &[u8],
        witness_commitment: Option<&[u8]>,
        commitment: &[u8],
        branch: Vec<Bound<'_, PyBytes>>,
    ) -> PyResult<Payment> {
        let mut terms = terms_of(value, payout_class, min_payout, dust)?;
        let bonus = amount_of("bonus", bonus)?;
        terms.value = terms.value.checked_sub(bonus).ok_or_else(|| {
            PyValueError::new_err(format!("a bonus is part of the value {value}, got {bonus}"))
        })?;
        for script in [coinbase_script, finder_script] {
            if script.len() >= 0xfd {
                return Err(PyValueError::new_err(format!(
                    "a script has at most 252 bytes, got {}",
                    script.len()
                )));
            }
        }
        let witness_commitment = witness_commitment.map(hash_of).transpose()?;
        let frame = payment::Frame {
            coinbase_script,
            finder_script,
            witness_commitment: witness_commitment.as_ref(),
            commitment: &hash_of(commitment)?,
        };
        let branch = hashes_of(&branch)?;
        let payment = payment::pay(&self.0, &terms, bonus, seed, &frame);
        let txid = sha256d_of(py, &payment.coinbase)?;
        Ok(Payment {
            outputs: payment.outputs,
            count: payment.count,
            finder_amount: payment.finder_amount,
            threshold: payment.threshold,
            txid,
            merkle_root: headers::fold_merkle(txid, &branch),
        })
    }
}

#[pymodule]
mod _native {
    #[pymodule_export]
    const IMPLEMENTATION: &str = "rust";
    #[pymodule_export]
    use super::{
        Draw, Find, Payment, ScanResult, Scanner, StopFlag, SubmissionChecker, WeightTable,
        check_headers, fold_merkle, kernel, kernels, meets_target, merkle_roots, scan_nonces,
        sha256d, use_kernel,
    };
}
