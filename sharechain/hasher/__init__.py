"""Proof of work and payout draws: the parts of the sharechain that must be fast.

This package picks the native extension `sharechain._native` (the crate in `rust/`), or, where that was not built, the
Python twin in `twin.py`. Both have the same interface and give the same values; the twin's docstrings document it.
`IMPLEMENTATION` says which one was picked, "rust" or "python". The extension in turn picks the fastest kernel that the
processor can run. The environment variable `P2POOL_HASHER` forces a choice, for tests and comparisons: "python", or one
of `kernels`.

All hashes are 32 bytes in internal order, read as little-endian numbers. Targets are ints in 0..2^256 - 1.

- `sha256d`, `meets_target`, `check_headers`, `fold_merkle`: hashes and proof of work.
- `kernels`, `kernel`, `use_kernel`: the code that the processor runs.
- `scan_nonces` with `StopFlag` and `ScanResult`: the nonces of one header.
- `Scanner` with `Find`: threads that scan for a miner, job after job.
- `merkle_roots`: many coinbases at once. `SubmissionChecker`: what miners of one job hand in.
- `WeightTable` with `Draw` and `Payment`: the weights of the PPLNS window, the payouts drawn from them, and the
  coinbase that pays them.
"""

from os import environ
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharechain._native import (
        IMPLEMENTATION,
        Draw,
        Find,
        Payment,
        Scanner,
        ScanResult,
        StopFlag,
        SubmissionChecker,
        WeightTable,
        check_headers,
        fold_merkle,
        kernel,
        kernels,
        meets_target,
        merkle_roots,
        scan_nonces,
        sha256d,
        use_kernel,
    )
else:
    _wanted = environ.get("P2POOL_HASHER", "")
    if _wanted == "python":
        from sharechain.hasher import twin as _picked
    else:
        try:
            from sharechain import _native as _picked
        except ImportError:
            if _wanted:
                raise ImportError(f"P2POOL_HASHER={_wanted} needs the native extension, which is not built") from None
            from sharechain.hasher import twin as _picked
        if _wanted:
            try:
                _picked.use_kernel(_wanted)
            except ValueError as _fault:
                raise ImportError(f"P2POOL_HASHER: {_fault}; python is there too") from None

    IMPLEMENTATION = _picked.IMPLEMENTATION
    Draw = _picked.Draw
    Find = _picked.Find
    Payment = _picked.Payment
    SubmissionChecker = _picked.SubmissionChecker
    merkle_roots = _picked.merkle_roots
    Scanner = _picked.Scanner
    ScanResult = _picked.ScanResult
    StopFlag = _picked.StopFlag
    WeightTable = _picked.WeightTable
    check_headers = _picked.check_headers
    fold_merkle = _picked.fold_merkle
    kernel = _picked.kernel
    kernels = _picked.kernels
    meets_target = _picked.meets_target
    scan_nonces = _picked.scan_nonces
    sha256d = _picked.sha256d
    use_kernel = _picked.use_kernel

__all__ = [
    "IMPLEMENTATION",
    "Draw",
    "Find",
    "Payment",
    "ScanResult",
    "Scanner",
    "StopFlag",
    "SubmissionChecker",
    "WeightTable",
    "check_headers",
    "fold_merkle",
    "kernel",
    "kernels",
    "meets_target",
    "merkle_roots",
    "scan_nonces",
    "sha256d",
    "use_kernel",
]
