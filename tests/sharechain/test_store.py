"""The store: what was written is what loads, after every batch and after a cut between any two."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cbor2
import pytest

from sharechain.chain import Accepted, Sharechain
from sharechain.errors import StoreError
from sharechain.share import Share
from sharechain.store import SCHEMA, Database, Store, read_params
from sharechain.validate import BlockFacts
from tests.builders import FINE, GENESIS_BLOCK, GENESIS_FACTS, START_TIME, add, grow, mine, new_chain, snapshot
from tests.leveldb import plyvel

SMALL = FINE.with_overrides({"name": "stored", "window_max_shares": 6})
MARGIN = 12


class FakeBatch:
    """A write batch of ``FakeDatabase``."""

    def __init__(self, database: FakeDatabase) -> None:
        self._database = database
        self._changes: list[tuple[bytes, bytes | None]] = []

    def put(self, key: bytes, value: bytes) -> None:
        self._changes.append((key, value))

    def delete(self, key: bytes) -> None:
        self._changes.append((key, None))

    def write(self) -> None:
        self._database.batches.append(self._changes)
        self._changes = []


class FakeDatabase:
    """LevelDB in memory, as a log of its batches: cut anywhere, it is what a crash would have left."""

    def __init__(self, batches: Iterable[Sequence[tuple[bytes, bytes | None]]] = ()) -> None:
        self.batches = list(batches)

    def _now(self) -> dict[bytes, bytes]:
        state: dict[bytes, bytes] = {}
        for batch in self.batches:
            for key, value in batch:
                if value is None:
                    state.pop(key, None)
                else:
                    state[key] = value
        return state

    def get(self, key: bytes) -> bytes | None:
        return self._now().get(key)

    def iterator(self, *, prefix: bytes, include_value: bool = True) -> Iterator[Any]:
        found = sorted((key, value) for key, value in self._now().items() if key.startswith(prefix))
        return iter(found if include_value else [key for key, _ in found])

    def write_batch(self, *, transaction: bool = False, sync: bool = False) -> FakeBatch:
        return FakeBatch(self)

    def put(self, key: bytes, value: bytes) -> None:
        self.batches.append([(key, value)])

    def delete(self, key: bytes) -> None:
        self.batches.append([(key, None)])

    def cut(self, batches: int) -> FakeDatabase:
        """The database after its first ``batches`` batches."""
        return FakeDatabase(self.batches[:batches])


@pytest.fixture(params=["plyvel", "fake"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """The real database and its fake: every test of this file that takes it is a contract that both keep."""
    if request.param == "fake":
        yield FakeDatabase()
        return
    real = plyvel.DB(str(tmp_path / "chain"), create_if_missing=True, paranoid_checks=True)
    yield real
    real.close()


def load(database: Database) -> Sharechain:
    """What a node does at start."""
    store = Store(database, SMALL)
    chain = Sharechain(SMALL, margin=MARGIN)
    shares = [stored.share for stored in store.shares()]
    assert store.count() == len(shares)
    chain.restore(shares, facts=store.facts(), tip=store.tip())
    return chain


def write(store: Store, change: Accepted, number: int = 0) -> None:
    store.write(change, first_seen_ms=1_000 + number, facts={GENESIS_BLOCK: GENESIS_FACTS}, sync=False)


def shares_of_a_life(count: int) -> list[Share]:
    """Shares with forks, uncles and a reorg now and then."""
    whole = new_chain(SMALL, margin=10**6)
    shares: list[Share] = []
    parent = None
    for number in range(count):
        tip = whole.tip
        parent = tip.parent if tip is not None and number % 4 == 2 else tip
        share = mine(whole, parent, miner=number % 5, uncles=whole.uncle_candidates(parent), salt=number)
        add(whole, share)
        shares.append(share)
    return shares


def hashes_of(chain: Sharechain) -> set[bytes]:
    return {entry.hash for entry in chain.entries()}


# -- contract of the fake --------------------------------------------------------------------------------------


def test_a_database_keeps_its_contract(database: Any) -> None:
    assert database.get(b"a") is None
    assert list(database.iterator(prefix=b"")) == []
    batch = database.write_batch(transaction=False, sync=True)
    for key in (b"b2", b"a", b"b1", b"c"):
        batch.put(key, b"value of " + key)
    batch.put(b"gone", b"")
    batch.delete(b"gone")
    batch.delete(b"never there")
    assert database.get(b"a") is None  # not before write()
    batch.write()
    assert database.get(b"a") == b"value of a"
    assert database.get(b"gone") is None
    assert list(database.iterator(prefix=b"b")) == [(b"b1", b"value of b1"), (b"b2", b"value of b2")]
    assert list(database.iterator(prefix=b"", include_value=False)) == [b"a", b"b1", b"b2", b"c"]
    second = database.write_batch()
    second.delete(b"a")
    second.put(b"a", b"again")
    second.put(b"b1", b"")
    second.write()
    assert database.get(b"a") == b"again"
    assert database.get(b"b1") == b""
    database.put(b"z", b"1")
    database.delete(b"c")
    assert [key for key, _ in database.iterator(prefix=b"")] == [b"a", b"b1", b"b2", b"z"]


# -- what is written loads -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_every_batch_the_load_equals_memory(database: Any) -> None:
    chain = new_chain(SMALL, margin=MARGIN)
    store = Store(database, SMALL)
    assert load(database).tip is None
    for number, share in enumerate(shares_of_a_life(60)):
        write(store, add(chain, share, START_TIME + 10**6), number)
        if number % 7 == 0 or number > 55:
            loaded = load(database)
            assert snapshot(loaded) == snapshot(chain)
            assert hashes_of(loaded) == hashes_of(chain)
            assert loaded.known_blocks() == chain.known_blocks()
    assert chain.base_height > 0
    assert store.sequence == 60
    assert Store(database, SMALL).sequence == 60


@pytest.mark.slow
def test_after_a_cut_between_any_two_batches_the_earlier_state_loads() -> None:
    database = FakeDatabase()
    chain = new_chain(SMALL, margin=MARGIN)
    store = Store(database, SMALL)
    shares = shares_of_a_life(45)
    states = [(snapshot(chain), hashes_of(chain))]
    for number, share in enumerate(shares):
        write(store, add(chain, share, START_TIME + 10**6), number)
        states.append((snapshot(chain), hashes_of(chain)))
    assert len(database.batches) == len(states)
    assert chain.base_height > 0
    for batches, (state, hashes) in enumerate(states, start=1):
        cut = database.cut(batches)
        loaded = load(cut)
        assert snapshot(loaded) == state
        assert hashes_of(loaded) == hashes
        assert Store(cut, SMALL).sequence == batches - 1
    # From any cut, the shares that were lost come again and lead to the same end.
    for batches in range(1, len(states), 6):
        loaded = load(database.cut(batches))
        loaded.learn_block(GENESIS_BLOCK, GENESIS_FACTS, START_TIME)
        for share in shares[batches - 1 :]:
            loaded.accept(share, START_TIME + 10**6)
        assert snapshot(loaded) == snapshot(chain)


def test_a_change_of_many_shares_is_one_batch() -> None:
    database = FakeDatabase()
    store = Store(database, SMALL)
    shares = shares_of_a_life(8)
    chain = new_chain(SMALL, margin=MARGIN)
    for share in reversed(shares[1:]):
        chain.accept(share, START_TIME + 10**6)
    change = add(chain, shares[0], START_TIME + 10**6)
    assert len(change.added) == 8
    write(store, change)
    assert len(database.batches) == 2
    assert snapshot(load(database)) == snapshot(chain)


def test_when_a_share_was_first_seen_and_what_bitcoin_said_are_kept(database: Any) -> None:
    chain = new_chain(SMALL)
    store = Store(database, SMALL)
    plain, block, rejected = grow(chain, 3)
    for number, share in enumerate((plain, block, rejected)):
        change = Accepted(added=(share,), old_tip=None, new_tip=share.hash)
        store.write(change, first_seen_ms=77 + number, block_outcomes={block.hash: ""}, sync=True)
    store.write_block_outcome(rejected.hash, "bad-cb-amount", sync=False)
    store.write_block_outcome(bytes(32), "no such share", sync=False)
    again = Store(database, SMALL)
    outcomes = {stored.share.hash: (stored.first_seen_ms, stored.block_outcome) for stored in again.shares()}
    assert outcomes == {plain.hash: (77, None), block.hash: (78, ""), rejected.hash: (79, "bad-cb-amount")}
    assert again.share(bytes(32)) is None
    assert again.tip() == rejected.hash
    assert again.sequence == 4


def test_syncing_writes_no_share_and_loses_nothing(database: Any) -> None:
    chain = filled(database)
    store = Store(database, SMALL)
    before = store.sequence
    store.sync()
    assert Store(database, SMALL).sequence == before + 1
    assert snapshot(load(database)) == snapshot(chain)


# -- what does not load ----------------------------------------------------------------------------------------


def filled(database: Any) -> Sharechain:
    chain = new_chain(SMALL, margin=MARGIN)
    store = Store(database, SMALL)
    for share in shares_of_a_life(6):
        write(store, add(chain, share, START_TIME + 10**6))
    return chain


def sealed(value: object) -> bytes:
    raw = cbor2.dumps(value)
    return raw + zlib.crc32(raw).to_bytes(4, "little")


def test_a_database_of_another_network_is_refused(database: Any) -> None:
    filled(database)
    with pytest.raises(StoreError, match="belongs to network 'stored'"):
        Store(database, FINE)
    with pytest.raises(StoreError, match="belongs to network"):
        Store(database, SMALL.with_overrides({"uncle_depth": 4}))
    assert read_params(database) == SMALL


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None, [1]])
def test_another_schema_is_refused(database: Any, schema: object) -> None:
    filled(database)
    database.put(b"m/schema", sealed(schema))
    with pytest.raises(StoreError, match="another version") as caught:
        Store(database, SMALL)
    assert caught.value.where == "m/schema"


def test_a_database_of_something_else_is_refused_and_left_alone(database: Any) -> None:
    database.put(b"obfuscate_key", b"\x00")
    with pytest.raises(StoreError, match="not one of a sharechain"):
        Store(database, SMALL)
    assert list(database.iterator(prefix=b"")) == [(b"obfuscate_key", b"\x00")]


def test_a_new_database_is_stamped() -> None:
    database = FakeDatabase()
    assert read_params(database) is None
    Store(database, SMALL)
    assert read_params(database) == SMALL
    assert Store(database, SMALL).tip() is None


@pytest.mark.parametrize("key", [b"m/params", b"m/sequence", b"m/schema"])
def test_a_missing_stamp_is_noticed(database: Any, key: bytes) -> None:
    filled(database)
    database.delete(key)
    with pytest.raises(StoreError) as caught:
        Store(database, SMALL)
    assert caught.value.where == key.decode()


def named(key: bytes) -> str:
    """How an error names a record."""
    if key[:1] == b"h":
        return f"h/{int.from_bytes(key[1:9], 'big')}/{key[9:][::-1].hex()}"
    return f"{key[:1].decode()}/{key[1:][::-1].hex()}" if key[:1] in (b"s", b"b") else key.decode()


@pytest.mark.slow
def test_any_flipped_byte_of_any_record_is_noticed_and_named() -> None:
    database = FakeDatabase()
    filled(database)
    records: list[tuple[bytes, bytes]] = list(database.iterator(prefix=b""))
    for key, value in records:
        for at in range(len(value)):
            flipped = bytearray(value)
            flipped[at] ^= 1 << at % 8
            damaged = FakeDatabase([[*records, (key, bytes(flipped))]])
            with pytest.raises(StoreError) as caught:
                load(damaged)
            assert caught.value.where == named(key)


@pytest.mark.parametrize(
    ("prefix", "value"),
    [
        pytest.param(b"s", [b"no share", 1, None], id="no share"),
        pytest.param(b"s", None, id="null for a record"),
        pytest.param(b"s", [1, 1, None], id="int for a share"),
        pytest.param(b"s", [None, 1, None], id="null for a share"),
        pytest.param(b"s", [b"", 1], id="record of two"),
        pytest.param(b"s", [b"", None, None], id="null for a time"),
        pytest.param(b"b", [1], id="one fact"),
        pytest.param(b"b", "1", id="text for facts"),
        pytest.param(b"b", [1.0, 2], id="float for a height"),
        pytest.param(b"h", 1, id="int in the index"),
        pytest.param(b"m/sequence", None, id="null for a number"),
        pytest.param(b"m/sequence", "many", id="text for a number"),
        pytest.param(b"m/params", [1], id="list for parameters"),
        pytest.param(b"m/params", None, id="null for parameters"),
    ],
)
def test_a_record_of_another_kind_is_noticed(database: Any, prefix: bytes, value: object) -> None:
    filled(database)
    ((key, _), *_) = database.iterator(prefix=prefix)
    database.put(key, sealed(value))
    with pytest.raises(StoreError) as caught:
        load(database)
    assert caught.value.where == named(key)


def _without_the_share(database: Any, chain: Sharechain) -> None:
    assert chain.tip is not None
    database.delete(b"s" + chain.tip.hash)


def _at_another_height(database: Any, chain: Sharechain) -> None:
    assert chain.tip is not None
    database.put(b"h" + (999).to_bytes(8, "big") + chain.tip.hash, bytes(4))


def _with_a_short_index_key(database: Any, chain: Sharechain) -> None:
    database.put(b"h" + bytes(8), bytes(4))


def _with_another_share(database: Any, chain: Sharechain) -> None:
    assert chain.tip is not None
    assert chain.tip.parent is not None
    database.put(b"s" + chain.tip.hash, database.get(b"s" + chain.tip.parent.hash))


@pytest.mark.parametrize(
    "damage", [_without_the_share, _at_another_height, _with_a_short_index_key, _with_another_share]
)
def test_an_index_that_does_not_fit_is_noticed(database: Any, damage: Callable[[Any, Sharechain], None]) -> None:
    damage(database, filled(database))
    with pytest.raises(StoreError):
        load(database)


def test_a_missing_index_entry_shows_in_the_count(database: Any) -> None:
    chain = filled(database)
    assert chain.tip is not None
    database.delete(b"h" + chain.tip.height.to_bytes(8, "big") + chain.tip.hash)
    store = Store(database, SMALL)
    assert store.count() == 1 + len(list(store.shares())) == len(chain)


def test_a_missing_tip_is_told_from_an_empty_store(database: Any) -> None:
    filled(database)
    database.delete(b"t")
    store = Store(database, SMALL)
    assert store.tip() is None
    assert store.count() > 0


def test_facts_come_back_as_they_were(database: Any) -> None:
    store = Store(database, SMALL)
    facts = {bytes([number]) * 32: BlockFacts(height=number, next_bits=0x1D00FFFF) for number in range(1, 5)}
    share = mine(new_chain(SMALL), None)
    change = Accepted(added=(share,), old_tip=None, new_tip=share.hash)
    store.write(change, first_seen_ms=0, facts=facts, sync=False)
    assert Store(database, SMALL).facts() == facts


@pytest.mark.slow
def test_facts_of_blocks_that_no_share_builds_on_do_not_pile_up() -> None:
    """The disk forgets a Bitcoin block when the chain does."""
    database = FakeDatabase()
    store = Store(database, SMALL)
    chain = new_chain(SMALL, margin=MARGIN)
    for number in range(330):
        block = (1 + number).to_bytes(32, "big")
        facts = BlockFacts(height=100 + number, next_bits=GENESIS_FACTS.next_bits)
        chain.learn_block(block, facts, START_TIME)
        change = add(chain, mine(chain, chain.tip, block=block), START_TIME + 10**6)
        store.write(change, first_seen_ms=0, facts={block: facts}, sync=False)
        if number % 50 == 49:  # keep the fake quick
            database.batches = [list(database._now().items())]
    assert len(store.facts()) < 330


# -- another history in the place of this one ------------------------------------------------------------------


def test_another_history_takes_the_place_of_the_stored_one_in_one_batch(database: Any) -> None:
    common = shares_of_a_life(12)
    old, new = new_chain(SMALL, margin=MARGIN), new_chain(SMALL, margin=MARGIN)
    store = Store(database, SMALL)
    for number, share in enumerate(common):
        add(new, share, START_TIME + 10**6)
        write(store, add(old, share, START_TIME + 10**6), number)
    store.write_block_outcome(common[3].hash, "", sync=False)
    ours = [mine(old, old.tip, miner=6, salt=number) for number in range(4)]
    for share in ours:
        write(store, Accepted(added=(share,), old_tip=None, new_tip=share.hash), 99)
    theirs = grow(new, 9)
    block = bytes([7]) * 32
    store.write(
        Accepted(added=(), old_tip=None, new_tip=ours[-1].hash),
        first_seen_ms=0,
        facts={block: BlockFacts(height=99, next_bits=GENESIS_FACTS.next_bits)},
        sync=False,
    )
    sequence = store.sequence
    assert new.tip is not None
    kept = [share for share in (*common, *theirs) if share.hash in new]
    store.replace(
        iter(kept), facts=new.known_blocks(), tip=new.tip.hash, short_history=True, first_seen_ms=5_000, sync=True
    )
    assert store.sequence == Store(database, SMALL).sequence == sequence + 1
    assert store.short_history
    assert Store(database, SMALL).short_history
    assert snapshot(load(database)) == snapshot(new)
    assert store.facts() == {GENESIS_BLOCK: GENESIS_FACTS}
    found = {stored.share.hash: (stored.first_seen_ms, stored.block_outcome) for stored in store.shares()}
    expected: dict[bytes, tuple[int, str | None]] = {s.hash: (1_000 + n, None) for n, s in enumerate(common)}
    expected[common[3].hash] = (1_003, "")
    expected.update({share.hash: (5_000, None) for share in theirs})
    assert found == {share.hash: expected[share.hash] for share in kept}
    assert store.count() == len(kept)


def test_replacing_is_one_batch_all_or_nothing() -> None:
    database = FakeDatabase()
    old = filled(database)
    batches = len(database.batches)
    new = new_chain(SMALL, margin=MARGIN)
    shares = grow(new, 9, miners=3)
    store = Store(database, SMALL)
    store.replace(
        shares, facts=new.known_blocks(), tip=shares[-1].hash, short_history=False, first_seen_ms=0, sync=False
    )
    assert len(database.batches) == batches + 1
    assert snapshot(load(database.cut(batches))) == snapshot(old)
    assert snapshot(load(database)) == snapshot(new)


def test_the_store_knows_whether_history_is_short(database: Any) -> None:
    share = mine(new_chain(SMALL), None)
    store = Store(database, SMALL)
    assert not store.short_history
    for short in (True, True, False, False, True):
        change = Accepted(added=(share,), old_tip=None, new_tip=share.hash, short_history=short)
        store.write(change, first_seen_ms=0, sync=False)
        store.write_block_outcome(share.hash, "", sync=False)
        store.sync()
        assert store.short_history == Store(database, SMALL).short_history == short
    database.put(b"m/short", sealed(False))
    with pytest.raises(StoreError) as caught:
        Store(database, SMALL)
    assert caught.value.where == "m/short"


def test_shares_are_read_as_they_are_sent(database: Any) -> None:
    filled(database)
    store = Store(database, SMALL)
    for stored in store.shares():
        assert store.encoded(stored.share.hash) == stored.share.encoded
    assert store.encoded(bytes(32)) is None


def test_a_damaged_share_is_not_sent() -> None:
    database = FakeDatabase()
    chain = filled(database)
    assert chain.tip is not None
    key = b"s" + chain.tip.hash
    whole = database.get(key)
    assert whole is not None
    damages = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for damaged in (*damages, b"", b"abc", sealed([1, 2, None]), sealed(b"text"), sealed([]), sealed(None)):
        database.put(key, damaged)
        with pytest.raises(StoreError) as caught:
            Store(database, SMALL).encoded(chain.tip.hash)
        assert caught.value.where == named(key)
