"""An embedded regtest Bitcoin: Bitcoin Core's own consensus code (libbitcoinkernel) in this process.

With it a whole pool runs, and finds real blocks, on a machine without a Bitcoin node; and every block that
the tests mine is judged by the rules of Bitcoin themselves. What a full node has beyond consensus - peers, a
wallet, a mempool, RPC - is not here, except for a small mempool that takes transactions by hand.

Theory of operation. The library (module `pbk`) validates, stores and connects blocks. It leaves six things
to us:

* Verdicts. `process_block` says whether a block is new, not whether it is valid. The verdict is the
  `block_checked` callback, which runs inside the call and in its thread; without one the block went to a side
  branch, unvalidated. The reason is only in Core's log, so we listen to it, per thread, during the call.
* Durability. Nothing but the raw blocks is on disk before a clean close, and opening what a kill left behind
  would drop them. So a marker file is synced to disk before the library opens, and removed after it has
  closed. Whoever finds the marker rebuilds the databases from the raw blocks before anything else.
* Exclusivity. Two instances on one directory corrupt it: a lock file keeps other processes out, a table of
  open directories our own.
* Safety. Misuse crashes the process rather than raising. One lock serialises all calls and the closing; no
  object of the library outlives the call that made it, but for the manager and its context.
* A network. Blocks are read for other nodes, and theirs submitted (`BlockSource`); the lock is let go between a few
  dozen reads, so that no block of ours waits behind a stranger's catching up.
* Templates. Subsidy, target and times of regtest are computed here. For the transactions that a user adds we
  keep the unspent outputs ourselves (`mempool.py`); they are collected from the chain at their first use, so
  that a node which never adds any pays nothing. Added transactions are not stored: a close forgets them.

The log of the library goes to Python's logging at DEBUG, and never to the terminal.

Source: bitcoinkernel.h of Bitcoin Core, and what was measured with py-bitcoinkernel 0.1.0a5.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from p2pool.bitcoin_backend.mempool import Coin, Mempool, Spendable, Transaction, read_transaction
from p2pool.bitcoin_backend.template import (
    BlockTemplate,
    HeaderFacts,
    SubmitResult,
    block_subsidy,
    build_template,
)
from p2pool.errors import BackendError
from sharechain.hasher import sha256d

_logger = logging.getLogger(__name__)

HALVING_INTERVAL = 150  # blocks, regtest
_BLOCK_VERSION = 0x20000000  # BIP9, no bit set
_RETARGET_INTERVAL = 144  # blocks, regtest: one day of ten-minute blocks
_TIMEWARP_GRACE_S = 600  # BIP94, in force on regtest
_MEDIAN_SPAN = 11  # blocks
_FACTS_LIMIT = 10_000  # headers remembered, 200 bytes each
_LOCATOR_DENSE = 10  # hashes of a locator without gaps; behind them each gap is twice the one before
_ANSWER_LIMIT = 1_000  # blocks given at once: 0.1 s of reading
_BLOCKS_PER_LOCK = 32  # blocks read before others have their turn: some 3 ms


class KernelBackend:
    """A regtest Bitcoin of one's own, as a `BitcoinBackend`.

    The methods of the protocol are asynchronous and run in worker threads. Each has a synchronous twin
    (`..._now`) for tests and tools that have no event loop; the twins wake nobody who waits for a tip.

    State, all of it under `_lock`: `_manager` and `_context` are set from open to close; `_tip` and
    `_tip_time` are what the library's active chain ends in; `_facts` remembers headers, which never change;
    `_mempool` is None until first used and then follows the tip when it is used again; `_locator` is that of
    the tip which is its first hash, or empty.
    """

    def __init__(
        self, pbk: Any, directory: Path, lock: _DirectoryLock, clock: Callable[[], float], check_scripts: bool
    ) -> None:
        """Use `KernelBackend.open`."""
        self._pbk = pbk
        self._clib = pbk.capi.bindings
        self._directory = directory
        self._directory_lock = lock
        self._clock = clock
        self._check_scripts = check_scripts
        self._lock = threading.Lock()
        self._verdicts: dict[bytes, Any] = {}
        self._faults: list[str] = []
        self._facts: dict[bytes, HeaderFacts] = {}
        self._mempool: Mempool | None = None
        self._locator: tuple[bytes, ...] = ()
        self._tip_moved = trio.Event()
        self._manager: Any = None
        self._context: Any = None
        self._start()
        self._tip, self._tip_time = self._read_tip()

    @classmethod
    def open(
        cls, directory: Path, *, clock: Callable[[], float] = time.time, check_scripts: bool = True
    ) -> KernelBackend:
        """Open the regtest chain in a directory, or begin one there. Close it with `close` or `aclose`.

        Takes a few hundredths of a second. After a kill the databases are rebuilt from the raw blocks: 0.3 s
        for 500 blocks, 2.4 s for 2,000, 11 s for 4,000; it grows with the square because Core checks its
        whole block index at every block on regtest. For the same reason a block at height 8,000 takes 5 ms,
        the first 0.5 ms.

        Arguments:
            directory: made if it does not exist. It belongs to one open backend at a time.
            clock: gives the time that templates carry, Unix seconds. (Core itself reads the system's clock.)
            check_scripts: whether `add_transaction` verifies signatures. Without it, a block with a bad one
                is made, and Core refuses it: which is what tests want to see.

        Raises:
            BackendError: the library is not installed, or the directory is in use, unwritable or damaged.
        """
        pbk = _import_pbk()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = _DirectoryLock(directory)
        except OSError as error:
            raise BackendError(f"cannot use {directory} for the embedded Bitcoin node: {error}") from error
        try:
            return cls(pbk, directory.resolve(), lock, clock, check_scripts)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """Write everything to disk and let go of the directory. Closing twice is harmless.

        Raises:
            BackendError: the library could not write; the chain will be rebuilt from the raw blocks when
            opened.
        """
        with self._lock:
            if self._manager is None:
                return
            manager, context = self._manager, self._context
            self._manager = self._context = self._mempool = None
            manager.__exit__(None, None, None)
            context.__exit__(None, None, None)
            try:
                if self._faults:
                    raise BackendError(f"the embedded Bitcoin node did not close cleanly: {self._faults[0]}")
                self._marker.unlink()
                _sync_directory(self._directory)
            finally:
                self._directory_lock.release()

    async def aclose(self) -> None:
        """Close, as `close` does, also when cancelled; whoever waits for a tip gets a `BackendError`."""
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.close)
        finally:
            self._announce_tip()

    # The protocol.

    @property
    def network(self) -> str:
        """The embedded node is always on regtest."""
        return "regtest"

    async def block_template(self) -> BlockTemplate:
        """Give a block to mine on the tip, with all transactions that were added, parents first."""
        return await trio.to_thread.run_sync(self.block_template_now)

    async def header_facts(self, block_hash: bytes) -> HeaderFacts | None:
        """Give the facts of a header on any branch, or None; that of an invalid block may be known too."""
        known = self._facts.get(block_hash)
        if known is not None and self._manager is not None:
            await trio.lowlevel.checkpoint()
            return known
        return await trio.to_thread.run_sync(self.header_facts_now, block_hash)

    async def is_on_chain(self, block_hash: bytes) -> bool:
        """See `BitcoinBackend`."""
        return await trio.to_thread.run_sync(self.is_on_chain_now, block_hash)

    async def submit_block(self, raw: bytes) -> SubmitResult:
        """Have Core judge a block, and tell those who wait for a tip if it moved."""
        before = self._tip.block_hash
        result = await trio.to_thread.run_sync(self.submit_block_now, raw)
        if self._tip.block_hash != before:
            self._announce_tip()
        return result

    async def tip(self) -> HeaderFacts:
        """Give the block in which the chain ends."""
        await trio.lowlevel.checkpoint()
        return self.tip_now()

    async def wait_for_tip(self, known: bytes, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Wait until the chain ends in another block than `known`, or for the timeout; give the tip's hash."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(math.inf if timeout is None else timeout):
            while self.tip_now().block_hash == known:
                await self._tip_moved.wait()
        return self.tip_now().block_hash

    # What other nodes ask for: `BlockSource`.

    async def block_locator(self) -> tuple[bytes, ...]:
        """See `BlockSource`."""
        await trio.lowlevel.checkpoint()
        tip, locator = self.tip_now().block_hash, self._locator
        return locator if locator[:1] == (tip,) else await trio.to_thread.run_sync(self.block_locator_now)

    async def block(self, block_hash: bytes) -> bytes | None:
        """See `BlockSource`."""
        return await trio.to_thread.run_sync(self._branch_block_now, block_hash)

    async def block_hash_at(self, height: int) -> bytes | None:
        """See `BlockReader`."""
        return await trio.to_thread.run_sync(self.block_hash_at_now, height)

    async def blocks_after(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...]:
        """See `BlockSource`."""
        await trio.lowlevel.checkpoint()
        if self.tip_now().block_hash in locator[:1]:
            return ()
        return await trio.to_thread.run_sync(self.blocks_after_now, locator, max_bytes)

    # The synchronous twins.

    def block_template_now(self) -> BlockTemplate:
        """Give what `block_template` gives."""
        with self._library():
            height = self._tip.height + 1
            min_time = self._tip.median_time + 1
            if height % _RETARGET_INTERVAL == 0:
                min_time = max(min_time, self._tip_time - _TIMEWARP_GRACE_S)
            transactions = self._followed_mempool().template_transactions() if self._mempool is not None else []
            return build_template(
                version=_BLOCK_VERSION,
                previous_block_hash=self._tip.block_hash,
                height=height,
                bits=self._tip.next_bits,
                min_time=min_time,
                time=max(min_time, int(self._clock())),
                coinbase_value=block_subsidy(height, HALVING_INTERVAL) + sum(t.fee for t in transactions),
                transactions=transactions,
            )

    def header_facts_now(self, block_hash: bytes) -> HeaderFacts | None:
        """Give what `header_facts` gives."""
        with self._library():
            known = self._facts.get(block_hash)
            if known is not None:
                return known
            entry = self._entry_of(block_hash)
            return None if entry is None else self._read_facts(entry)

    def submit_block_now(self, raw: bytes) -> SubmitResult:
        """Give what `submit_block` gives."""
        raw = bytes(raw)
        with self._library():
            pointer = self._clib.btck_block_create(ctypes.c_char_p(raw), len(raw))
            if not pointer:
                return SubmitResult(accepted=False, reason="decode-failed")
            block = self._pbk.Block._from_handle(pointer)
            block_hash = sha256d(raw[:80])
            self._verdicts.clear()
            states: dict[str, str] = {}
            _heard.states = states
            try:
                is_new = self._manager.process_block(block)
            except self._pbk.ProcessBlockException:
                is_new = None
            finally:
                _heard.states = None
            self._tip, self._tip_time = self._read_tip()
            if self._faults:
                raise BackendError(f"the embedded Bitcoin node failed: {self._faults[0]}")
            verdict = self._verdicts.get(block_hash)
            state = states.get(block_hash[::-1].hex(), "")
            if verdict is None:
                if is_new is None:
                    raise BackendError(f"the embedded Bitcoin node is silent on {block_hash[::-1].hex()}")
                return SubmitResult(accepted=False, reason="inconclusive" if is_new else "duplicate")
            if verdict[0] == self._pbk.ValidationMode.VALID:
                return SubmitResult(accepted=True)
            if self._mempool is not None:
                self._mempool.forget_culprit(state, raw)
            # Core's submitblock gives the reason without the details that follow the comma.
            return SubmitResult(accepted=False, reason=state.partition(", ")[0] or verdict[1].name.lower())

    def block_now(self, block_hash: bytes) -> bytes | None:
        """Give a whole block of the active chain by its hash (internal order), or None if it is not in it."""
        with self._library():
            height = self._height_on_chain(block_hash)
            if height is None:
                return None
            return self._read_block(self._manager.get_active_chain().block_tree_entries[height])

    def block_hash_at_now(self, height: int) -> bytes | None:
        """Give what `block_hash_at` gives."""
        with self._library():
            if not 0 <= height <= self._tip.height:
                return None
            return bytes(self._manager.get_active_chain().block_tree_entries[height].block_hash)

    def _branch_block_now(self, block_hash: bytes) -> bytes | None:
        with self._library():
            entry = self._entry_of(block_hash)
            return None if entry is None or entry.height == 0 else self._read_block(entry)

    def block_locator_now(self) -> tuple[bytes, ...]:
        """Give what `block_locator` gives."""
        with self._library():
            if self._locator[:1] != (self._tip.block_hash,):
                entries = self._manager.get_active_chain().block_tree_entries
                height, gap, hashes = self._tip.height, 1, []
                while height > 0:
                    hashes.append(bytes(entries[height].block_hash))
                    gap *= 2 if len(hashes) >= _LOCATOR_DENSE else 1
                    height -= gap
                self._locator = (*hashes, bytes(entries[0].block_hash))
            return self._locator

    def blocks_after_now(self, locator: Sequence[bytes], max_bytes: int) -> tuple[bytes, ...]:
        """Give what `blocks_after` gives."""
        blocks: list[bytes] = []
        height, last, room = 0, b"", max_bytes
        while True:
            with self._library():
                entries = self._manager.get_active_chain().block_tree_entries
                if not blocks:
                    height = next((at for at in map(self._height_on_chain, locator) if at is not None), 0)
                elif self._height_on_chain(last) != height:  # a reorg in between: what comes now does not follow
                    return tuple(blocks)
                for _ in range(_BLOCKS_PER_LOCK):
                    if height == self._tip.height or len(blocks) == _ANSWER_LIMIT:
                        return tuple(blocks)
                    raw = self._read_block(entries[height + 1])
                    room -= len(raw)
                    if blocks and room < 0:
                        return tuple(blocks)
                    blocks.append(raw)
                    height += 1
            last = sha256d(raw[:80])

    def is_on_chain_now(self, block_hash: bytes) -> bool:
        """Give what `is_on_chain` gives."""
        with self._library():
            return self._height_on_chain(block_hash) is not None

    def tip_now(self) -> HeaderFacts:
        """Give what `tip` gives."""
        if self._manager is None:
            raise BackendError("the embedded Bitcoin node is closed")
        return self._tip

    # Transactions, which only this backend takes by hand.

    def add_transaction(self, raw: bytes) -> None:
        """Put a transaction into the blocks to come.

        It must be valid in the next block, counting the transactions added before. Blocks that contain it,
        or that contradict it, remove it; a reorg that undoes its block puts it back if it is still valid.
        One that makes Core refuse a block is removed, so that no transaction can stop the chain.

        Arguments:
            raw: the whole transaction with its witness.

        Raises:
            BackendError: the transaction cannot be mined now; the message begins with Core's word for the
            reason.
        """
        raw = bytes(raw)
        with self._library():
            pointer = self._clib.btck_transaction_create(ctypes.c_char_p(raw), len(raw))
            if not pointer:
                raise BackendError("decode-failed: these bytes are not a transaction")
            core_transaction = self._pbk.Transaction._from_handle(pointer)
            transaction = read_transaction(raw)
            mempool = self._followed_mempool()
            coins = mempool.check(transaction)
            if self._check_scripts:
                self._verify_scripts(core_transaction, coins)
            mempool.add(transaction, coins)

    def mempool_txids(self) -> tuple[bytes, ...]:
        """Give the ids (internal order) of the transactions that wait to be mined, parents first."""
        with self._library():
            return tuple(self._followed_mempool().pool) if self._mempool is not None else ()

    def mature_coinbases(self, script: bytes) -> tuple[Spendable, ...]:
        """Give the coinbase outputs paying `script` that the next block may spend, the oldest first.

        Arguments:
            script: an output script (scriptPubKey).
        """
        with self._library():
            return tuple(self._followed_mempool().mature_coinbases(script))

    # The library, under the lock.

    @property
    def _marker(self) -> Path:
        return self._directory / "DIRTY"

    @contextmanager
    def _library(self) -> Iterator[None]:
        with self._lock:
            self.tip_now()  # raises if closed
            yield

    def _announce_tip(self) -> None:
        self._tip_moved.set()
        self._tip_moved = trio.Event()

    def _start(self) -> None:
        """Open the library on the directory; rebuild its databases if the last owner did not close it."""
        pbk = self._pbk
        must_rebuild = self._marker.exists()
        if not must_rebuild:
            _write_durably(self._marker, b"Open, or not closed cleanly: the databases must be rebuilt.\n")
        options = pbk.ContextOptions()
        options.set_chainparams(pbk.ChainParameters(pbk.ChainType.REGTEST))
        verdicts = pbk.ValidationInterfaceCallbacks(block_checked=self._on_block_checked)
        options.set_validation_interface(verdicts)
        options.set_notifications(
            pbk.notifications.NotificationInterfaceCallbacks(flush_error=self._on_fault, fatal_error=self._on_fault)
        )
        context = pbk.Context(options)
        paths = (str(self._directory), str(self._directory / "blocks"))
        if must_rebuild:
            _logger.warning("%s was not closed cleanly: rebuilding from its blocks", self._directory)
        try:
            manager_options = pbk.ChainstateManagerOptions(context, *paths)
            if must_rebuild:
                manager_options.set_wipe_dbs(True, True)
            manager = pbk.ChainstateManager(manager_options)
        except RuntimeError as error:
            raise BackendError(f"cannot open the Bitcoin node in {self._directory}: {error}") from error
        if must_rebuild and manager.import_blocks([]) != 0:
            manager.__exit__(None, None, None)
            raise BackendError(f"cannot rebuild the Bitcoin node from the blocks in {self._directory}")
        self._context, self._manager = context, manager

    def _on_block_checked(self, _user_data: Any, block: Any, state: Any) -> None:
        self._verdicts[bytes(block.block_hash)] = (state.validation_mode, state.block_validation_result)

    def _on_fault(self, _user_data: Any, message: Any, size: int) -> None:
        self._faults.append(ctypes.string_at(message, size).decode("utf-8", "replace"))

    def _read_tip(self) -> tuple[HeaderFacts, int]:
        chain = self._manager.get_active_chain()
        entry = chain.block_tree_entries[chain.height]
        return self._read_facts(entry), _header_time(entry)

    def _read_facts(self, entry: Any) -> HeaderFacts:
        block_hash = bytes(entry.block_hash)
        known = self._facts.get(block_hash)
        if known is not None:
            return known
        height, ancestor = entry.height, entry
        times = [_header_time(entry)]
        for _ in range(min(height, _MEDIAN_SPAN - 1)):
            ancestor = ancestor.previous
            times.append(_header_time(ancestor))
        facts = HeaderFacts(
            block_hash=block_hash,
            height=height,
            next_bits=entry.block_header.bits,  # regtest never retargets
            median_time=sorted(times)[len(times) // 2],
        )
        if len(self._facts) >= _FACTS_LIMIT:
            self._facts.clear()
        self._facts[block_hash] = facts
        return facts

    def _height_on_chain(self, block_hash: bytes) -> int | None:
        entry = self._entry_of(block_hash)
        if entry is None or entry.height > self._tip.height:
            return None
        height: int = entry.height
        on_chain = self._manager.get_active_chain().block_tree_entries[height]
        return height if bytes(on_chain.block_hash) == block_hash else None

    def _entry_of(self, block_hash: bytes) -> Any:
        wanted = self._pbk.BlockHash(block_hash)
        pointer = self._clib.btck_chainstate_manager_get_block_tree_entry_by_hash(self._manager, wanted)
        return self._pbk.BlockTreeEntry._from_view(pointer) if pointer else None

    def _read_block(self, entry: Any) -> bytes:
        parts: list[bytes] = []

        def take(data: int, size: int, _user_data: Any) -> int:
            parts.append(ctypes.string_at(data, size))
            return 0

        block = self._manager.blocks[entry]
        if self._clib.btck_block_to_bytes(block, self._clib.btck_WriteBytes(take), None) != 0:
            raise BackendError(f"cannot read the block at height {entry.height} from {self._directory}")
        return b"".join(parts)

    def _followed_mempool(self) -> Mempool:
        """Give the mempool, brought to the tip: blocks undone and connected, transactions judged anew."""
        entries = self._manager.get_active_chain().block_tree_entries
        if self._mempool is None:
            self._mempool = Mempool(bytes(entries[0].block_hash))
        mempool = self._mempool
        if mempool.block_hashes[-1] == self._tip.block_hash:
            return mempool
        undone: list[Transaction] = []
        while True:
            height = len(mempool.block_hashes) - 1
            if height < len(entries) and bytes(entries[height].block_hash) == mempool.block_hashes[height]:
                break
            undone = mempool.disconnect() + undone
        for height in range(len(mempool.block_hashes), len(entries)):
            mempool.connect(bytes(entries[height].block_hash), self._read_block(entries[height]))
        mempool.judge_anew(undone, self._tip.median_time)
        return mempool

    def _verify_scripts(self, core_transaction: Any, coins: list[Coin]) -> None:
        pbk = self._pbk
        outputs = [pbk.TransactionOutput(pbk.ScriptPubkey(coin.script), coin.value) for coin in coins]
        precomputed = pbk.script.PrecomputedTransactionData(core_transaction, outputs)
        flags = pbk.ScriptVerificationFlags.ALL
        for index, output in enumerate(outputs):
            script = output.script_pubkey
            if not script.verify(output.amount, core_transaction, precomputed, index, flags):
                raise BackendError(f"block-script-verify-flag-failed: a bad signature or script in input {index}")


# The library, its log and its directory.

_process_lock = threading.Lock()  # guards the next two
_open_directories: set[Path] = set()
_log_connection: Any = None
_heard = threading.local()  # .states: block hash (displayed) -> validation state, while a block is processed


def _import_pbk() -> Any:
    """Load the library, and its log into ours. Late, because only this backend needs it."""
    global _log_connection
    try:
        import pbk
        import pbk.notifications
        import pbk.script
    except ImportError as error:
        raise BackendError("the embedded Bitcoin node is not installed: pip install 'p2pool[kernel]'") from error
    with _process_lock:
        if _log_connection is None:
            pbk.logging_set_options(pbk.LoggingOptions(log_timestamps=False))
            pbk.set_log_level_category(pbk.LogCategory.VALIDATION, pbk.LogLevel.DEBUG)
            pbk.enable_log_category(pbk.LogCategory.VALIDATION)
            _log_connection = pbk.LoggingConnection(_on_log_line)
    return pbk


def _on_log_line(line: str) -> None:
    _logger.debug("%s", line.rstrip())
    states = getattr(_heard, "states", None)
    _, found, event = line.partition("BlockChecked: block hash=")
    if found and states is not None:
        block_hash, _, state = event.strip().partition(" state=")
        states[block_hash] = state


class _DirectoryLock:
    """A directory of our own, against other processes (a lock on a file) and against this one (a table).

    Raises:
        BackendError: somebody else has it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        with _process_lock:
            if self._directory in _open_directories:
                raise BackendError(f"{directory} is already open in this process: close it first")
            descriptor = os.open(self._directory / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise BackendError(
                    f"{directory} is in use by another process: stop that one, or use another directory"
                ) from None
            self._descriptor = descriptor
            _open_directories.add(self._directory)

    def release(self) -> None:
        with _process_lock:
            _open_directories.discard(self._directory)
            os.close(self._descriptor)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header_time(entry: Any) -> int:
    return int(entry.block_header.timestamp.timestamp())
