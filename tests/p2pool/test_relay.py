"""Found blocks on their way: what completes, what is a lie, what must not be spoiled, and what Bitcoin says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend import BlockTemplate, HeaderFacts, TemplateTransaction
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.mempool import Spendable, read_transaction
from p2pool.bitcoin_backend.template import assemble_block, build_template
from p2pool.blocks import FoundBlock
from p2pool.errors import PeerError
from p2pool.p2p.wire import Announce, Message, Transactions, Wanted, decode_message, encode_message
from p2pool.relay import (
    ASSEMBLIES,
    ASSEMBLIES_OF_PEER,
    ASSEMBLY_S,
    HANDLED,
    INCLUDED_SIZE,
    KEPT_BLOCKS,
    MAX_COUNT,
    MESSAGE_SIZE,
    TEMPLATES,
    BlockRelay,
    CompletedBlock,
    read_block,
)
from sharechain import hasher
from sharechain.difficulty import bits_to_target
from sharechain.hasher import fold_merkle, sha256d
from tests.p2pool.network import ANYBODY_SCRIPT, Clock, mine_blocks, pay, solved_block, spend
from tests.p2pool.spending import unsigned

HEIGHT = 1_000
#: 65,536 hashes: a header with a flipped byte does not meet it by chance.
HARD = 0x1F00FFFF
EASY = 0x207FFFFF
NOTHING = Wanted(positions=())
ANYONE = b"\x51"  # OP_TRUE


def payment(number: int, *, witness: bool, size: int = 0) -> bytes:
    """A transaction that no other number gives, with so many bytes of script at least."""
    source = sha256d(b"coin %d" % number)
    if witness:
        return spend(source, 0, 1_000 + number)
    outputs = [(1_000 + number, ANYONE)]
    raw = unsigned([(source, 0, 0)], outputs)
    if not size:
        return raw
    script = b"\xfe" + size.to_bytes(4, "little") + bytes(size)
    return raw[:-6] + script + raw[-4:]


@cache
def template_transaction(raw: bytes) -> TemplateTransaction:
    read = read_transaction(raw)
    return TemplateTransaction(raw=raw, txid=read.txid, wtxid=read.wtxid, fee=0, weight=read.weight)


def template_of(raws: Sequence[bytes], *, bits: int = EASY, height: int = HEIGHT) -> BlockTemplate:
    """A template with these transactions on a block that nobody knows."""
    return build_template(
        version=0x20000000,
        previous_block_hash=sha256d(b"parent"),
        height=height,
        bits=bits,
        min_time=1_700_000_001,
        time=1_700_000_001,
        coinbase_value=5_000_000_000,
        transactions=[template_transaction(raw) for raw in raws],
    )


def block_of(template: BlockTemplate) -> bytes:
    return solved_block(template, pay(template, ANYBODY_SCRIPT))


@cache
def small_block(number: int = 0, *, bits: int = EASY) -> bytes:
    """A block of three transactions that no other number gives."""
    return block_of(template_of([payment(3 * number + i, witness=i != 1) for i in range(3)], bits=bits))


def bare(announce: Announce) -> Announce:
    return replace(announce, included=())


def told(raw: bytes) -> Announce:
    """What the finder of a block announces, without transactions."""
    return bare(BlockRelay().announcement(raw))


def having(raw: bytes) -> BlockRelay:
    """A node that has found a block."""
    node = BlockRelay()
    node.announcement(raw)
    return node


def parts_of(raw: bytes) -> Transactions:
    """All transactions of a small block in one message."""
    finder = BlockRelay()
    announce = finder.announcement(raw)
    (message,) = finder.transactions(sha256d(raw[:80]), range(len(announce.wtxids)))
    return message


def travelled(message: Message) -> Message:
    """A message after its trip over the wire."""
    decoded: Message = decode_message(encode_message(message), type(message))
    return decoded


def converse(finder: BlockRelay, receiver: BlockRelay, raw: bytes) -> CompletedBlock:
    """The whole talk of two nodes about a block."""
    answer = receiver.announced("finder", travelled(finder.announcement(raw)), 0.0)  # type: ignore[arg-type]
    if isinstance(answer, CompletedBlock):
        return answer
    for message in finder.transactions(sha256d(raw[:80]), answer.positions):
        answer = receiver.filled("finder", travelled(message), 0.0)  # type: ignore[arg-type]
    assert isinstance(answer, CompletedBlock)
    return answer


# What completes.


@pytest.mark.parametrize("count", [0, 1, 2, 3, 200, pytest.param(2_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("witness", [True, False])
def test_a_block_arrives_byte_for_byte(count: int, witness: bool) -> None:
    template = template_of([payment(i, witness=witness) for i in range(count)])
    raw = block_of(template)
    completed = converse(BlockRelay(), BlockRelay(), raw)
    assert completed == CompletedBlock(
        block_hash=sha256d(raw[:80]),
        block_height=HEIGHT,
        value=template.coinbase_value,
        payouts=raw_outputs(template),
        transactions=count,
        raw=raw,
    )
    assert read_block(raw) == completed


def raw_outputs(template: BlockTemplate) -> int:
    """Outputs of ``pay``'s coinbase: the finder, the share's commitment and the witnesses' if there are any."""
    return 2 + (template.witness_commitment is not None)


def test_a_completed_block_has_all_that_the_submitter_of_found_blocks_asks_for() -> None:
    completed = read_block(small_block())
    found = FoundBlock(**{name: getattr(completed, name) for name in CompletedBlock.__slots__})
    assert found.raw == completed.raw


def test_a_finder_that_knows_its_template_announces_the_same_as_one_that_parses() -> None:
    template = template_of([payment(i, witness=i % 2 == 0) for i in range(20)])
    raw = block_of(template)
    finder = BlockRelay()
    finder.learn(template_of([payment(i, witness=False) for i in range(20)]))
    finder.learn(template)
    assert finder.announcement(raw) == BlockRelay().announcement(raw)


def test_what_a_template_held_lately_does_not_travel() -> None:
    known = [payment(i, witness=True) for i in range(3)]
    raw = block_of(template_of([known[2], payment(7, witness=True), known[0], payment(8, witness=False)]))
    receiver = BlockRelay()
    receiver.learn(template_of(known))
    for number in range(TEMPLATES - 1):
        receiver.learn(template_of([payment(100 + number, witness=True)]))
    assert receiver.announced("a", told(raw), 0.0) == Wanted(positions=(1, 3))
    receiver.learn(template_of([]))
    assert receiver.announced("b", told(small_block(1)), 0.0) == Wanted(positions=(0, 1, 2))
    forgetful = BlockRelay()
    forgetful.learn(template_of(known))
    for _ in range(TEMPLATES):
        forgetful.learn(template_of([]))
    assert forgetful.announced("a", told(raw), 0.0) == Wanted(positions=(0, 1, 2, 3))


def test_a_small_block_needs_no_second_trip() -> None:
    raw = small_block()
    completed = BlockRelay().announced("a", BlockRelay().announcement(raw), 0.0)
    assert isinstance(completed, CompletedBlock)
    assert completed.raw == raw


def test_a_block_that_came_is_passed_on_from_memory() -> None:
    raw = small_block()
    middle = BlockRelay()
    converse(BlockRelay(), middle, raw)
    assert middle.transactions(sha256d(raw[:80]), [1]) == having(raw).transactions(sha256d(raw[:80]), [1])
    assert converse(middle, BlockRelay(), raw).raw == raw


@cache
def mined(raws: tuple[bytes, ...]) -> bytes:
    return block_of(template_of(raws, bits=HARD))


@st.composite
def talks(draw: st.DrawFn) -> tuple[bytes, list[BlockTemplate], Announce, list[Transactions]]:
    """A block, templates that a receiver has seen, an announcement, and messages with every transaction that is needed:
    in any order and split, some more than once.
    """
    kinds = draw(st.lists(st.booleans(), max_size=7))
    raws = [payment(number, witness=witness) for number, witness in enumerate(kinds)]
    raw = mined(tuple(raws))
    places = list(range(len(raws)))
    subsets = st.lists(st.sampled_from(places), unique=True) if places else st.just([])
    templates = [template_of([raws[at] for at in draw(subsets)]) for _ in range(draw(st.integers(0, 2)))]
    announce = replace(told(raw), included=tuple((at, raws[at]) for at in draw(subsets)))
    order = [*draw(st.permutations(places)), *draw(subsets)]
    messages = []
    while order:
        size = draw(st.integers(1, len(order)))
        batch, order = dict.fromkeys(order[:size]), order[size:]
        messages.append(Transactions(block_hash=sha256d(raw[:80]), transactions=tuple((at, raws[at]) for at in batch)))
    return raw, templates, announce, messages


@pytest.mark.slow
@given(talks())
def test_any_order_split_and_repetition_completes_to_the_block(
    talk: tuple[bytes, list[BlockTemplate], Announce, list[Transactions]],
) -> None:
    raw, templates, announce, messages = talk
    receiver = BlockRelay()
    for template in templates:
        receiver.learn(template)
    answers = [receiver.announced("a", announce, 0.0)]
    answers += [receiver.filled("a", message, 0.0) for message in messages]
    answers.append(receiver.announced("b", announce, 0.0))
    done = [answer for answer in answers if isinstance(answer, CompletedBlock)]
    assert done == [read_block(raw)]
    assert done[0].raw == raw
    at = answers.index(done[0])
    wanted = [set(answer.positions) for answer in answers[:at] if isinstance(answer, Wanted)]
    assert all(later <= earlier for earlier, later in pairwise(wanted))
    assert all(wanted)
    assert answers[at + 1 :] == [NOTHING] * (len(answers) - at - 1)


@pytest.mark.slow
@given(talks(), st.data())
def test_a_flipped_byte_never_makes_another_block(
    talk: tuple[bytes, list[BlockTemplate], Announce, list[Transactions]], data: st.DataObject
) -> None:
    raw, templates, announce, messages = talk
    frames = [encode_message(announce), *(encode_message(message) for message in messages)]
    spoiled = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[spoiled]) - 1))
    flip = data.draw(st.integers(1, 255))
    frame = bytearray(frames[spoiled])
    frame[at] ^= flip
    frames[spoiled] = bytes(frame)
    receiver = BlockRelay()
    for template in templates:
        receiver.learn(template)
    answers: list[Wanted | CompletedBlock] = []
    for sent in frames:
        with suppress(PeerError):
            message = decode_message(sent, Announce, Transactions)
            take = receiver.announced if isinstance(message, Announce) else receiver.filled
            answers.append(take("liar", message, 0.0))
    # Whatever the liar said, the block itself comes through once, and nothing else does.
    answers.append(receiver.announced("honest", having(raw).announcement(raw), 0.0))
    assert [answer.raw for answer in answers if isinstance(answer, CompletedBlock)] == [raw]


# Lies.


def rooted(announce: Announce, root: bytes) -> Announce:
    """The announcement with another merkle root, and the work for it."""
    header = announce.header[:36] + root + announce.header[68:76] + bytes(4)
    nonce = hasher.scan_nonces(header, 0, 2**32, bits_to_target(EASY)).nonce
    assert nonce is not None
    return replace(announce, header=header[:76] + nonce.to_bytes(4, "little"))


def with_coinbase(coinbase: bytes) -> Announce:
    """A block of nothing but a coinbase, whose root is right."""
    announce = replace(told(small_block()), coinbase=coinbase, wtxids=())
    return rooted(announce, sha256d(coinbase))


PLAIN = pay(template_of([]), ANYBODY_SCRIPT)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: replace(a, header=unworked(a.header)), "does not meet its target"),
        (lambda a: replace(a, header=a.header[:72] + bytes(4) + a.header[76:]), "is zero"),
        (lambda a: replace(a, header=a.header[:72] + b"\xff" * 4 + a.header[76:]), "negative"),
        (lambda a: replace(a, wtxids=a.wtxids[:-1]), "commits to other witnesses"),
        (lambda a: replace(a, wtxids=a.wtxids[::-1]), "commits to other witnesses"),
        (lambda a: replace(a, wtxids=(*a.wtxids, a.wtxids[-1])), "a transaction twice"),
        (
            lambda a: replace(a, wtxids=tuple(sha256d(b"%d" % n) for n in range(MAX_COUNT + 1))),
            "no block has more than",
        ),
        (lambda a: replace(a, coinbase=a.coinbase[:-5] + b"\x01" + a.coinbase[-4:]), "commits to other witnesses"),
        (lambda a: replace(a, coinbase=a.coinbase[:4] + a.coinbase[6:-38] + a.coinbase[-4:]), "must have a witness"),
        (lambda a: replace(a, coinbase=a.coinbase[:-38] + b"\x00" + a.coinbase[-4:]), "without any part"),
        (lambda a: replace(a, coinbase=a.coinbase[:-38] + b"\x01\x01\x07" + a.coinbase[-4:]), "must have a witness"),
        (lambda a: replace(a, coinbase=a.coinbase + b"\x00"), "bytes behind"),
        (lambda a: replace(a, coinbase=a.coinbase[:-1]), "cut off"),
        (lambda a: replace(a, coinbase=payment(0, witness=True)), "is no coinbase"),
        (lambda a: replace(a, included=((3, payment(0, witness=True)),)), "position"),
        (lambda a: replace(a, included=((0, payment(0, witness=True)),) * 2), "comes twice"),
        (lambda a: replace(a, included=((0, payment(9, witness=True)),)), "is not the one that was announced"),
        (lambda a: rooted(a, bytes(32)), ""),
        (lambda a: replace(told(block_of(template_of([]))), wtxids=a.wtxids), "commits to other transactions"),
        (
            lambda _: with_coinbase(PLAIN[:4] + b"\x00\x01" + PLAIN[4:-4] + b"\x01\x20" + bytes(32) + bytes(4)),
            "witness",
        ),
        (lambda _: with_coinbase(PLAIN.replace(b"\x02\xe8\x03/", b"\x03\xe8\x03\x00")), "not minimally encoded"),
        (
            lambda _: with_coinbase(PLAIN.replace(b"\x02\xe8\x03", b"\x00\xe8\x03")),
            "does not start with a block height",
        ),
        (lambda _: with_coinbase(PLAIN[:41] + b"\x01\x51" + PLAIN[42 + PLAIN[41] :]), "2 to 100 bytes"),
        (lambda _: with_coinbase(PLAIN[:4] + b"\xfd\x01\x00" + PLAIN[5:]), "not in its shortest form"),
        (lambda _: with_coinbase(PLAIN[:4] + b"\xff" + b"\xff" * 8 + PLAIN[5:]), "cut off"),
        (lambda _: with_coinbase(PLAIN.replace((5_000_000_000).to_bytes(8, "little"), b"\xff" * 8)), "more than there"),
    ],
)
def test_a_false_announcement_is_the_peers_fault(spoil: Callable[[Announce], Announce], said: str) -> None:
    receiver = BlockRelay()
    true = told(small_block())
    false = spoil(true)
    if said:
        with pytest.raises(PeerError, match=said) as caught:
            receiver.announced("liar", false, 0.0)
        assert caught.value.rule == "block"
    else:  # a root of other txids shows only when all are there
        assert receiver.announced("liar", false, 0.0) == Wanted(positions=(0, 1, 2))
        message = replace(parts_of(small_block()), block_hash=sha256d(false.header))
        with pytest.raises(PeerError, match="commits to other transactions"):
            receiver.filled("liar", message, 0.0)
        assert receiver.filled("liar", message, 0.0) == NOTHING
    assert receiver.announced("honest", true, 0.0) == Wanted(positions=(0, 1, 2))
    assert isinstance(receiver.filled("honest", parts_of(small_block()), 0.0), CompletedBlock)


def unworked(header: bytes) -> bytes:
    """The header with a nonce that does not meet its target."""
    nonce = 0
    while int.from_bytes(sha256d(header), "little") <= bits_to_target(EASY):
        nonce += 1
        header = header[:76] + nonce.to_bytes(4, "little")
    return header


def test_a_witness_that_nothing_commits_to_is_the_peers_fault() -> None:
    """Its finder mined over the wtxid: only so the list can match the header."""
    raw = payment(0, witness=True)
    announce = replace(told(block_of(template_of([]))), wtxids=(sha256d(raw),), included=((0, raw),))
    false = rooted(announce, fold_merkle(sha256d(announce.coinbase), (sha256d(raw),)))
    with pytest.raises(PeerError, match="a witness that nothing commits to"):
        BlockRelay().announced("liar", false, 0.0)


def test_what_is_no_transaction_is_the_peers_fault_even_if_it_was_announced() -> None:
    raw = b"\x07" * 80
    announce = replace(told(block_of(template_of([]))), wtxids=(sha256d(raw),), included=((0, raw),))
    false = rooted(announce, fold_merkle(sha256d(announce.coinbase), (sha256d(raw),)))
    with pytest.raises(PeerError, match="cut off"):
        BlockRelay().announced("liar", false, 0.0)


def test_the_parent_says_what_bits_height_and_time_must_be() -> None:
    raw = small_block()
    announce = BlockRelay().announcement(raw)
    facts = HeaderFacts(block_hash=sha256d(b"parent"), height=HEIGHT - 1, next_bits=EASY, median_time=1_700_000_000)
    for changed, said in (
        (replace(facts, next_bits=HARD), "Bitcoin demands 0x1f00ffff"),
        (replace(facts, height=HEIGHT), "says height 1000"),
        (replace(facts, median_time=1_700_000_001), "not after the median"),
    ):
        with pytest.raises(PeerError, match=said):
            BlockRelay().announced("liar", announce, 0.0, changed)
    with pytest.raises(ValueError, match="another block than the parent"):
        BlockRelay().announced("a", announce, 0.0, replace(facts, block_hash=bytes(32)))
    assert isinstance(BlockRelay().announced("a", announce, 0.0, facts), CompletedBlock)


def test_a_block_that_is_too_large_is_given_up() -> None:
    raw = block_of(template_of([payment(i, witness=False, size=2_100_000) for i in range(2)]))
    finder, receiver = BlockRelay(), BlockRelay()
    assert receiver.announced("a", finder.announcement(raw), 0.0) == Wanted(positions=(0, 1))
    first, second = finder.transactions(sha256d(raw[:80]), (0, 1))
    assert receiver.filled("a", first, 0.0) == Wanted(positions=(1,))
    with pytest.raises(PeerError, match="more than 4000000 bytes"):
        receiver.filled("a", second, 0.0)
    assert receiver.filled("a", second, 0.0) == NOTHING


def test_whoever_wants_what_is_not_there_is_at_fault() -> None:
    raw = small_block()
    finder = having(raw)
    for positions in ([3], [-1], [0, 0]):
        with pytest.raises(PeerError, match="wants a transaction twice, or one that"):
            finder.transactions(sha256d(raw[:80]), positions)
    assert finder.transactions(bytes(32), [0]) == ()
    assert finder.transactions(sha256d(raw[:80]), []) == ()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (bytes(80), "it has no transactions"),
        (bytes(80) + b"\x00", "it has no transactions"),
        (bytes(80) + b"\x01" + bytes(10), "no input or no output"),
        (bytes(80) + b"\x01" + unsigned([(bytes(32), 0, 0)], []), "no input or no output"),
        (bytes(80) + b"\x01" + unsigned([(bytes(32), 0, 0)], [(0, ANYONE)]), "is no coinbase"),
    ],
)
def test_what_is_no_block_is_not_read_as_one(raw: bytes, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        read_block(raw)


def every_cut(raw: bytes) -> Iterator[bytes]:
    for size in range(len(raw)):
        yield raw[:size]
    yield raw + b"\x00"


def test_a_cut_block_is_refused_wherever_it_is_cut() -> None:
    for cut in every_cut(small_block()):
        with pytest.raises(PeerError):
            BlockRelay().announcement(cut)


@given(st.binary(max_size=300))
def test_bytes_of_strangers_give_an_answer_or_a_peer_error(raw: bytes) -> None:
    for attempt in (
        lambda: read_block(bytes(80) + raw),
        lambda: read_block(raw),
        lambda: BlockRelay().announcement(bytes(80) + b"\x01" + raw),
        lambda: BlockRelay().announced("a", replace(told(small_block()), coinbase=raw), 0.0),
        lambda: BlockRelay().announced("a", with_coinbase(PLAIN[:42] + raw), 0.0),
    ):
        with suppress(PeerError):
            attempt()


# What a peer must not spoil for another.


def test_a_false_list_under_a_real_header_does_not_touch_the_true_one() -> None:
    raw = small_block()
    true = told(raw)
    other = told(small_block(1))
    false = replace(other, header=true.header)
    receiver = BlockRelay()
    assert receiver.announced("liar", false, 0.0) == Wanted(positions=(0, 1, 2))
    assert receiver.announced("honest", true, 0.0) == Wanted(positions=(0, 1, 2))
    lies = replace(parts_of(small_block(1)), block_hash=sha256d(raw[:80]))
    with pytest.raises(PeerError, match="commits to other transactions"):
        receiver.filled("liar", lies, 0.0)
    with pytest.raises(PeerError, match="is not the one that was announced"):
        receiver.filled("honest", lies, 0.0)
    assert receiver.announced("honest", true, 0.0) == Wanted(positions=(0, 1, 2))
    assert isinstance(receiver.filled("honest", parts_of(raw), 0.0), CompletedBlock)


def test_peers_with_one_list_fill_one_block_and_a_bad_one_is_left_out() -> None:
    raw = small_block()
    first, second, third = parts_of(raw).transactions
    receiver = BlockRelay()
    for peer in ("a", "b", "bad"):
        assert receiver.announced(peer, told(raw), 0.0) == Wanted(positions=(0, 1, 2))

    def send(peer: str, *parts: tuple[int, bytes]) -> Wanted | CompletedBlock:
        return receiver.filled(peer, Transactions(block_hash=sha256d(raw[:80]), transactions=parts), 0.0)

    assert send("a", second) == Wanted(positions=(0, 2))
    with pytest.raises(PeerError):
        send("bad", (2, first[1]))
    assert send("bad", third) == NOTHING
    assert send("stranger", third) == NOTHING
    assert send("b", third, second) == Wanted(positions=(0,))
    assert send("b") == Wanted(positions=(0,))
    completed = send("a", first)
    assert isinstance(completed, CompletedBlock)
    assert completed.raw == raw
    assert send("b", first) == NOTHING


def test_a_peer_that_announces_anew_has_one_list_of_a_block() -> None:
    raw = small_block()
    false = replace(told(small_block(1)), header=raw[:80])
    receiver = BlockRelay()
    receiver.announced("a", false, 0.0)
    receiver.announced("b", told(raw), 0.0)
    receiver.announced("a", told(raw), 0.0)
    completed = receiver.filled("a", parts_of(raw), 0.0)
    assert isinstance(completed, CompletedBlock)
    assert receiver.filled("b", parts_of(raw), 0.0) == NOTHING


# Bounds.


def is_under_way(receiver: BlockRelay, peer: str, number: int, now: float = 0.0) -> bool:
    empty = Transactions(block_hash=sha256d(small_block(number)[:80]), transactions=())
    return receiver.filled(peer, empty, now) != NOTHING


def test_an_announcement_waits_a_minute_and_can_come_again() -> None:
    receiver = BlockRelay()
    receiver.announced("a", told(small_block()), 100.0)
    assert is_under_way(receiver, "a", 0, 99.9 + ASSEMBLY_S)
    assert not is_under_way(receiver, "a", 0, 100.0 + ASSEMBLY_S)
    receiver.announced("a", told(small_block()), 100.0 + ASSEMBLY_S)
    assert is_under_way(receiver, "a", 0, 100.0 + ASSEMBLY_S)


def test_of_many_announcements_the_oldest_give_way() -> None:
    receiver = BlockRelay()
    for number in range(ASSEMBLIES + 2):
        receiver.announced(f"peer {number}", told(small_block(number)), float(number))
    under_way = [is_under_way(receiver, f"peer {n}", n, 10.0) for n in range(ASSEMBLIES + 2)]
    assert under_way == [False] * 2 + [True] * ASSEMBLIES


def test_one_peer_drives_out_only_itself() -> None:
    receiver = BlockRelay()
    receiver.announced("honest", told(small_block(0)), 0.0)
    for number in range(1, 9):
        receiver.announced("busy", told(small_block(number)), float(number))
    assert is_under_way(receiver, "honest", 0, 10.0)
    assert [n for n in range(1, 9) if is_under_way(receiver, "busy", n, 10.0)] == list(range(9 - ASSEMBLIES_OF_PEER, 9))


def test_blocks_on_an_unknown_parent_give_way_to_those_whose_work_is_known() -> None:
    receiver = BlockRelay()
    facts = HeaderFacts(block_hash=sha256d(b"parent"), height=HEIGHT - 1, next_bits=EASY, median_time=1_700_000_000)
    receiver.announced("real 0", told(small_block(0)), 0.0, facts)
    for number in range(1, ASSEMBLIES):
        receiver.announced(f"cheap {number}", told(small_block(number)), 1.0)
    for number in range(1, ASSEMBLIES):
        receiver.announced(f"real {number}", told(small_block(10 + number)), 2.0, facts)
    assert is_under_way(receiver, "real 0", 0)
    assert not any(is_under_way(receiver, f"cheap {number}", number) for number in range(1, ASSEMBLIES))
    assert receiver.announced("cheap", told(small_block(50)), 3.0) == NOTHING
    assert receiver.announced("real", told(small_block(51)), 3.0, facts) == Wanted(positions=(0, 1, 2))
    assert not is_under_way(receiver, "real 0", 0)


def test_too_little_work_on_an_unknown_parent_is_not_wanted_and_no_fault() -> None:
    receiver = BlockRelay()
    receiver.learn(template_of([], bits=HARD))
    facts = HeaderFacts(block_hash=sha256d(b"parent"), height=HEIGHT - 1, next_bits=EASY, median_time=1_700_000_000)
    easier = [HARD + 3 * 0xFFFF, HARD + 3 * 0xFFFF + 1]
    answers = [receiver.announced("a", told(small_block(0, bits=bits)), 0.0) for bits in (HARD, *easier, EASY)]
    assert answers == [Wanted(positions=(0, 1, 2))] * 2 + [NOTHING] * 2
    assert receiver.announced("a", told(small_block()), 0.0, facts) == Wanted(positions=(0, 1, 2))


def test_the_last_blocks_are_kept_and_more_are_remembered() -> None:
    blocks = [block_of(template_of([payment(number, witness=True)])) for number in range(KEPT_BLOCKS + 1)]
    node = BlockRelay()
    for raw in blocks:
        node.announcement(raw)
    assert [len(node.transactions(sha256d(raw[:80]), [0])) for raw in blocks] == [0] + [1] * KEPT_BLOCKS
    assert [node.announced("a", told(raw), 0.0) for raw in blocks] == [NOTHING] * len(blocks)


def test_what_is_remembered_has_an_end() -> None:
    node = BlockRelay()
    raw = small_block()
    raws = [b"%04d" % number + raw[4:] for number in range(HANDLED + 1)]
    for raw in raws:
        node.announcement(raw)
    assert len(node._handled) == HANDLED
    assert len(node._kept) == KEPT_BLOCKS
    assert sha256d(raws[0][:80]) not in node._handled


@pytest.mark.slow
def test_an_announcement_carries_what_fits_and_messages_stay_small() -> None:
    sizes = [INCLUDED_SIZE, *[100_000] * 22, 1_100_000]
    raws = [payment(number, witness=False, size=size) for number, size in enumerate(sizes)]
    raw = block_of(template_of(raws))
    finder = BlockRelay()
    announce = finder.announcement(raw)
    assert [position for position, _ in announce.included] == [1, 2]
    wanted = [position for position in range(len(raws)) if position not in (1, 2)]
    messages = finder.transactions(sha256d(raw[:80]), wanted)
    assert [position for message in messages for position, _ in message.transactions] == wanted
    for message in messages:
        assert len(encode_message(message)) <= MESSAGE_SIZE or len(message.transactions) == 1
    assert len(messages) == 4
    assert converse(finder, BlockRelay(), raw).raw == raw


# What Bitcoin says.


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KernelBackend, KernelBackend]]:
    """Two Bitcoins with one chain, on which two old coinbases can be spent: one with a witness, one without."""
    opened = [KernelBackend.open(tmp_path_factory.mktemp("kernel"), clock=Clock()) for _ in range(2)]
    first, second = opened
    mine_blocks(first, 6)
    mine_blocks(first, 6, ANYONE)
    mine_blocks(first, 100)
    for raw in first.blocks_after_now((), 2**20):
        assert second.submit_block_now(raw).accepted
    yield first, second
    for backend in opened:
        backend.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["witness", "plain", "mixed"])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_relayed_block_is_accepted_by_another_bitcoin(
    kernels: tuple[KernelBackend, KernelBackend], count: int, kind: str
) -> None:
    first, second = kernels
    script = ANYBODY_SCRIPT if kind == "witness" else ANYONE
    coin = first.mature_coinbases(script)[0]
    for number in range(count):
        value = coin.value - 1
        if kind == "witness" or (kind == "mixed" and number > 0):
            raw = spend(coin.txid, coin.vout, value)
        else:
            raw = unsigned([coin], [(value, ANYONE if kind == "plain" else ANYBODY_SCRIPT)])
        first.add_transaction(raw)
        coin = Spendable(read_transaction(raw).txid, 0, value)
    template = first.block_template_now()
    assert len(template.transactions) == count
    coinbase = pay(template, ANYBODY_SCRIPT)
    raw = solved_block(template, coinbase)
    assert raw == assemble_block(raw[:80], coinbase, template)
    assert first.submit_block_now(raw).accepted
    finder, receiver = BlockRelay(), BlockRelay()
    finder.learn(template)
    receiver.learn(second.block_template_now())
    facts = second.header_facts_now(raw[4:36])
    assert facts is not None
    answer = receiver.announced("finder", bare(finder.announcement(raw)), 0.0, facts)
    if isinstance(answer, Wanted):
        (message,) = finder.transactions(sha256d(raw[:80]), answer.positions)
        answer = receiver.filled("finder", message, 0.0)
    assert isinstance(answer, CompletedBlock)
    assert second.submit_block_now(answer.raw).accepted
    assert answer.block_height == second.tip_now().height
    assert answer.value == template.coinbase_value
