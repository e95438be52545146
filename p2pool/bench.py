"""Benchmarks: one function each, rows of {bench, case, metric, value, unit}, each with a reference in the same run.

The shares are real where they are measured (proof of work, coinbase, every rule); the history under them is made
without, since loading it judges nothing.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from p2pool.database import DataDirectory, open_copy
from sharechain import hasher
from sharechain.chain import Accepted, Sharechain
from sharechain.coinbase import COINBASE_TAG, build_coinbase, fold_coinbase
from sharechain.difficulty import bits_to_target, target_to_bits, work_of
from sharechain.entry import ancestors
from sharechain.hasher import twin
from sharechain.params import DUST, NETWORKS, Params
from sharechain.payout import build_payouts, draw_seed
from sharechain.share import (
    NULL_HASH,
    Share,
    ShareData,
    bip34_push,
    decode_share,
    pack_header,
    share_commitment,
)
from sharechain.validate import BlockFacts, derive_data, median_time, window_work
from sharechain.window import Window, unit_parts

__all__ = ["BENCHES", "Row", "make_row", "mine_share", "miner_scripts", "run_bench", "window_params", "winners"]

MINERS: Final = 2_000
PAYOUT_CLASS: Final = 367
BLOCK_BITS: Final = 0x207FFFFF
BLOCK_HASH: Final = bytes(range(32))
BLOCK_HEIGHT: Final = 800_000
VALUE: Final = 312_500_000
START_TIME: Final = 1_700_000_000

Row = dict[str, Any]


def run_bench(name: str, *, quick: bool, **choices: Any) -> Iterator[Row]:
    """Run one of ``BENCHES``, row by row.

    Args:
        name: which one.
        quick: a tenth of the size.
        choices: what the benchmark takes besides; ``template`` and ``hasher`` do.
    """
    for row in BENCHES[name](quick, **choices):
        yield {"bench": name, **row}


def make_row(case: str, metric: str, value: float, unit: str) -> Row:
    return {"case": case, "metric": metric, "value": value, "unit": unit}


def window_params(window: int) -> Params:
    """A network whose window is full at ``window`` shares of the easiest target."""
    return NETWORKS["regtest"].with_overrides(
        {
            "name": f"bench-{window}",
            "share_period_ms": 10_000,
            "half_life_s": 1200,
            "max_target": 2**255 - 1,
            "window_max_shares": window,
            "block_target_divisor": window,
        }
    )


def miner_scripts() -> list[bytes]:
    """One payout script for each miner: half P2WPKH, half P2TR."""
    digests = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(MINERS)]
    return [b"\x51\x20" + digest if number % 2 else b"\x00\x14" + digest[:20] for number, digest in enumerate(digests)]


def winners(count: int) -> Iterator[int]:
    """Which miner finds each share: Zipf hash rates, and everybody at least once."""
    wheel = [sum(1 / (rank + 1) for rank in range(number + 1)) for number in range(MINERS)]
    for share in range(count):
        if share < MINERS:
            yield share
            continue
        draw = int.from_bytes(hashlib.sha256(b"who%d" % share).digest()[:8], "big") / 2**64 * wheel[-1]
        low, high = 0, MINERS - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if wheel[middle] < draw else (low, middle)
        yield low


def _history(params: Params, count: int) -> Iterator[Share]:
    """Linked shares without proof of work or coinbase: what ``restore`` loads."""
    scripts = miner_scripts()
    bits = target_to_bits(params.max_target)
    work = work_of(bits_to_target(bits))
    parent = NULL_HASH
    script = bip34_push(BLOCK_HEIGHT + 1) + COINBASE_TAG + bytes(12)
    branch = tuple(bytes([level]) * 32 for level in range(12))
    for height, miner in enumerate(winners(count)):
        header = pack_header(
            version=0x20000000,
            previous_block_hash=BLOCK_HASH,
            merkle_root=height.to_bytes(32, "big"),
            time=START_TIME + 10 * height,
            bits=BLOCK_BITS,
            nonce=0,
        )
        data = ShareData(
            version=1,
            parent=parent,
            uncles=(),
            bits=bits,
            max_bits=bits,
            height=height,
            total_work=work * (height + 1),
            payout_script=scripts[miner],
            payout_class=PAYOUT_CLASS,
        )
        share = Share(
            header=header,
            coinbase_script=script,
            coinbase_value=VALUE,
            witness_commitment=bytes(32),
            merkle_branch=branch,
            data=data,
        )
        parent = share.hash
        yield share


def _chain(params: Params, shares: int) -> Sharechain:
    chain = Sharechain(params)
    facts = {BLOCK_HASH: BlockFacts(height=BLOCK_HEIGHT, next_bits=BLOCK_BITS)}
    chain.restore(_history(params, shares), facts=facts, tip=None)
    return chain


def mine_share(chain: Sharechain, script: bytes, *, block_height: int = BLOCK_HEIGHT) -> Share:
    """One whole share on the tip: a coinbase of the largest class, twelve levels of merkle branch, proof of work."""
    params, parent = chain.params, chain.tip
    data = derive_data(
        params,
        parent=parent,
        uncles=(),
        bits=target_to_bits(params.max_target),
        payout_script=script,
        payout_class=PAYOUT_CLASS,
    )
    payouts = chain.payouts(
        parent, value=VALUE, payout_class=PAYOUT_CLASS, max_bits=data.max_bits, block_bits=BLOCK_BITS
    )
    coinbase_script = bip34_push(block_height + 1) + COINBASE_TAG + bytes(12)
    commitment = share_commitment(params.network_id, data)
    coinbase = build_coinbase(coinbase_script, payouts, script, bytes(32), commitment)
    branch = tuple(bytes([level]) * 32 for level in range(12))
    header = pack_header(
        version=0x20000000,
        previous_block_hash=BLOCK_HASH,
        merkle_root=fold_coinbase(coinbase, branch),
        time=START_TIME if parent is None else max(parent.time + 10, median_time(parent) + 1),
        bits=BLOCK_BITS,
        nonce=0,
    )
    nonce = hasher.scan_nonces(header, 0, 2**32, params.max_target).nonce
    assert nonce is not None
    return Share(
        header=header[:76] + nonce.to_bytes(4, "little"),
        coinbase_script=coinbase_script,
        coinbase_value=VALUE,
        witness_commitment=bytes(32),
        merkle_branch=branch,
        data=data,
    )


def _bench_accept(quick: bool) -> Iterator[Row]:
    """Decode, judge by every rule, and store: shares of another node, on a full window."""
    count = 200 if quick else 2_000
    for window in (8_640, 60_480):
        params = window_params(window // 10 if quick else window)
        chain = _chain(params, params.window_max_shares + 10)
        scripts = miner_scripts()
        raw = []
        miner = _chain(params, params.window_max_shares + 10)
        for number in range(count):
            share = mine_share(miner, scripts[number % MINERS])
            miner.accept(share, share.time)
            raw.append(share.encoded)
        case = f"window {params.window_max_shares}, {MINERS} miners, class {PAYOUT_CLASS}"
        with tempfile.TemporaryDirectory() as scratch:
            directory = DataDirectory(Path(scratch) / "data", params)
            start = time.perf_counter()
            for encoded in raw:
                share = decode_share(encoded)
                change = chain.accept(share, share.time)
                assert isinstance(change, Accepted)
                directory.store.write(change, first_seen_ms=0, sync=False)
            seconds = time.perf_counter() - start
            directory.close()
        yield make_row(case, "accept", count / seconds, "shares/s")
        yield from _accept_parts(case, chain, raw[-1])
        sample = raw[: max(5, count // 100)]
        rebuilt = _chain(params, params.window_max_shares + 10)
        start = time.perf_counter()
        for encoded in sample:
            share = decode_share(encoded)
            _rebuild(rebuilt, share)
            rebuilt.accept(share, share.time)
        yield make_row(
            f"{case}, reference: window added up anew for each share in Python",
            "accept",
            len(sample) / (time.perf_counter() - start),
            "shares/s",
        )


def _accept_parts(case: str, chain: Sharechain, encoded: bytes) -> Iterator[Row]:
    """Where the time goes."""
    share = decode_share(encoded)
    table = chain.window_at(chain.tip, window_work(chain.params, share.data.max_bits, BLOCK_BITS)).table
    seed = draw_seed(share.hash, PAYOUT_CLASS)
    outputs = table.draw(VALUE, PAYOUT_CLASS, chain.params.min_payout, DUST, seed).outputs
    parts: dict[str, Callable[[], object]] = {
        "decode": lambda: decode_share(encoded),
        "draw": lambda: table.draw(VALUE, PAYOUT_CLASS, chain.params.min_payout, DUST, seed),
        "hash coinbase": lambda: hasher.sha256d(outputs),
    }
    for name, call in parts.items():
        yield make_row(case, f"part: {name}", _best_us(call), "us")


def _rebuild(chain: Sharechain, share: Share) -> dict[bytes, int]:
    """The dumb twin of the window: everything added up from the tip down."""
    wanted = window_work(chain.params, share.data.max_bits, share.block_bits)
    weights: dict[bytes, int] = {}
    for entry in ancestors(chain.tip, chain.params.window_max_shares):
        kept = min(wanted, entry.unit_work)
        for script, weight in unit_parts(chain.params, entry, kept):
            weights[script] = weights.get(script, 0) + weight
        wanted -= kept
        if not wanted:
            break
    return weights


def _bench_payout(quick: bool) -> Iterator[Row]:
    """What a new tip costs: the window moved by one share, the draw, the coinbase."""
    for window in (8_640, 60_480):
        params = window_params(window // 10 if quick else window)
        chain = _chain(params, params.window_max_shares + 510)
        tip = chain.tip
        assert tip is not None
        case = f"window {params.window_max_shares}, {MINERS} miners"
        moved = Window(params)
        wanted = window_work(params, tip.max_bits, BLOCK_BITS)
        line = list(ancestors(tip, 500))[::-1]
        moved.move_to(line[0], wanted)
        start = time.perf_counter()
        for entry in line[1:]:
            moved.move_to(entry, wanted)
        yield make_row(case, "move window by one share", (time.perf_counter() - start) / (len(line) - 1) * 1e6, "us")
        anew = []
        for _ in range(3):
            start = time.perf_counter()
            Window(params).move_to(tip, wanted)
            anew.append(time.perf_counter() - start)
        yield make_row(f"{case}, reference: window built anew", "move window by one share", min(anew) * 1e6, "us")
        slow = twin.WeightTable()
        for script, weight in moved.table.items():
            slow.add(script, weight)
        for payout_class in params.payout_classes:
            of_class = f"{case}, class {payout_class}"
            yield make_row(of_class, "draw and serialise", _build_us(params, moved.table, payout_class), "us")
            reference = f"{of_class}, reference: Python twin"
            yield make_row(reference, "draw and serialise", _build_us(params, slow, payout_class), "us")


def _build_us(params: Params, table: Any, payout_class: int) -> float:
    return _best_us(
        lambda: build_payouts(params, table, value=VALUE, parent=BLOCK_HASH, payout_class=payout_class), repeats=5
    )


_RELOAD: Final = """
import json, sys, time
from pathlib import Path
from p2pool.database import open_copy
from p2pool.report import load_chain
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
from p2pool.node import Node
before = resident()
with open_copy(Path(sys.argv[1])) as (params, store):
    start = time.perf_counter()
    chain = load_chain(params, store)
    seconds = time.perf_counter() - start
    chain.payouts(chain.tip, value=312_500_000, payout_class=367, max_bits=chain.tip.max_bits, block_bits=0x207fffff)
    print(json.dumps({"seconds": seconds, "shares": len(chain), "before": before, "resident": resident()}))
"""


def _bench_store(quick: bool) -> Iterator[Row]:
    """Write a long history, and load it in a fresh process."""
    count = 6_048 if quick else 60_480
    params = window_params(count)
    case = f"{count} shares"
    shares = list(_history(params, count))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data"
        directory = DataDirectory(path, params)
        start = time.perf_counter()
        for share in shares:
            change = Accepted(added=(share,), old_tip=None, new_tip=share.hash)
            directory.store.write(change, first_seen_ms=0, sync=False)
        yield make_row(case, "write, a batch each", count / (time.perf_counter() - start), "shares/s")
        start = time.perf_counter()
        for share in shares[:200]:
            directory.store.write(
                Accepted(added=(share,), old_tip=None, new_tip=shares[-1].hash), first_seen_ms=0, sync=True
            )
        yield make_row("200 shares", "write, a synced batch each", 200 / (time.perf_counter() - start), "shares/s")
        directory.close()
        done = subprocess.run([sys.executable, "-c", _RELOAD, str(path)], capture_output=True, text=True, check=True)
        size = sum(file.stat().st_size for file in (path / "sharechain").iterdir())
        loaded = json.loads(done.stdout)
        assert loaded["shares"] == count
        yield make_row(case, "reload", loaded["seconds"], "s")
        with open_copy(path) as (_, store):
            start = time.perf_counter()
            for _stored in store.shares():
                pass
            yield make_row(f"{case}, reference: read and decode only", "reload", time.perf_counter() - start, "s")
        yield make_row(case, "resident memory", loaded["resident"], "MB")
        yield make_row(f"{case}, reference: the same process before loading", "resident memory", loaded["before"], "MB")
        yield make_row(case, "on disk", size / 1e6, "MB")


def _bench_hasher(quick: bool, *, against: str | None = None) -> Iterator[Row]:
    """The nonce scan by kernel, hashes and checks."""
    from p2pool.bench_hasher import bench_hasher

    yield from bench_hasher(quick, against)


def _bench_sync(quick: bool) -> Iterator[Row]:
    """Fresh syncs over loopback libp2p, against a bare stream."""
    from p2pool.bench_network import bench_sync

    yield from bench_sync(quick)


def _bench_template(quick: bool, **choices: Any) -> Iterator[Row]:
    """A new Bitcoin block, from the Bitcoin node to the miners, against a bare fetch and a bare loop of send."""
    from p2pool.bench_template import bench_template

    yield from bench_template(quick, **choices)


def _bench_stratum(quick: bool) -> Iterator[Row]:
    """A whole node under a load of submissions, against a bare server."""
    from p2pool.bench_stratum import bench_stratum

    yield from bench_stratum(quick)


def _best_us(call: Callable[[], object], *, repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


#: Name to benchmark. Each is given ``quick`` and yields its rows.
BENCHES: Final[Mapping[str, Callable[..., Iterator[Row]]]] = {
    "accept": _bench_accept,
    "payout": _bench_payout,
    "store": _bench_store,
    "hasher": _bench_hasher,
    "sync": _bench_sync,
    "template": _bench_template,
    "stratum": _bench_stratum,
}
