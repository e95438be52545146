"""What Bitcoin demands of a header: real headers, Core's own vectors, and a literal twin of Core's walk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.bitcoin_backend.headers import (
    CHAIN_RULES,
    ChainRules,
    Header,
    HeaderIndex,
    MissingHeader,
    check_header,
    decode_header,
    median_time,
    network_of,
    next_work,
    period_start,
)
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.template import BlockTemplate, HeaderFacts, SubmitResult, assemble_block
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.hasher import sha256d

MAINNET, TESTNET4, SIGNET, REGTEST = (CHAIN_RULES[name] for name in ("mainnet", "testnet4", "signet", "regtest"))
#: Testnet4 as it is, but with periods and targets that a test can afford.
SMALL = replace(TESTNET4, interval=8, timespan_s=8 * 600)
EASY = replace(SMALL, pow_limit=2**255 - 1)
LIMIT = 0x1D00FFFF
LATE_S = 1200


# A dumb twin: Bitcoin Core's rules, word for word, over a list that holds every header of a branch.


def twin_bits(rules: ChainRules, branch: Sequence[Header], time: int) -> int:
    """GetNextWorkRequired of Bitcoin Core's pow.cpp."""
    last = branch[-1]
    limit = target_to_bits(rules.pow_limit)
    if (last.height + 1) % rules.interval != 0:
        if rules.min_difficulty_after_s is not None:
            if time > last.time + 600 * 2:
                return limit
            position = len(branch) - 1
            while position > 0 and branch[position].height % rules.interval != 0 and branch[position].bits == limit:
                position -= 1
            return branch[position].bits
        return last.bits
    if rules.no_retarget:
        return last.bits
    first = branch[len(branch) - rules.interval]
    span = last.time - first.time
    if span < rules.timespan_s // 4:
        span = rules.timespan_s // 4
    if span > rules.timespan_s * 4:
        span = rules.timespan_s * 4
    new = bits_to_target(first.bits if rules.bip94 else last.bits) * span % 2**256 // rules.timespan_s
    return target_to_bits(min(new, rules.pow_limit))


def twin_median(branch: Sequence[Header]) -> int:
    times = [header.time for header in branch[-11:]]
    return sorted(times)[len(times) // 2]


def link(parent: Header | None, time: int, bits: int, salt: int = 0) -> Header:
    """A header after another one, without a proof of work."""
    previous = bytes(32) if parent is None else parent.block_hash
    return Header(
        block_hash=sha256d(previous + struct.pack("<qIq", time, bits, salt)),
        previous_block_hash=previous,
        height=0 if parent is None else parent.height + 1,
        time=time,
        bits=bits,
    )


def extend(rules: ChainRules, branch: Sequence[Header], steps: Sequence[int], salt: int = 0) -> list[Header]:
    """A branch made longer by blocks whose times are so many seconds after their parents'."""
    longer = list(branch)
    for step in steps:
        time = max(longer[-1].time + step, twin_median(longer) + 1)
        longer.append(link(longer[-1], time, twin_bits(rules, longer, time), salt))
    return longer


def start(bits: int = LIMIT) -> list[Header]:
    return [link(None, 1_700_000_000, bits)]


def index_of(rules: ChainRules, *branches: Sequence[Header], limit: int = 50_000) -> HeaderIndex:
    index = HeaderIndex(rules, limit)
    for branch in branches:
        for header in branch:
            index.add(header)
    return index


def twin_facts(rules: ChainRules, branch: Sequence[Header]) -> HeaderFacts:
    """What the twin demands after a branch; its moment of change is found by trying."""
    last = branch[-1]
    early, late = (twin_bits(rules, branch, last.time + after) for after in (LATE_S, LATE_S + 1))
    assert early == twin_bits(rules, branch, last.time - 7_000)
    assert late == twin_bits(rules, branch, last.time + 1_000_000)
    return HeaderFacts(
        block_hash=last.block_hash,
        height=last.height,
        next_bits=early,
        median_time=twin_median(branch),
        late=None if early == late else (last.time + LATE_S, late),
    )


# The networks.

GENESIS = {
    "mainnet": (1231006505, 0x1D00FFFF, 2083236893, "4a5e1e4baab89f3a32518a88c31bc87f618f76673e2cc77ab2127b7afdeda33b"),
    "testnet4": (1714777860, 0x1D00FFFF, 393743547, "7aa0a7ae1e223414cb807e40cd57e667b718e42aaf9306db9102fe28912b7b4e"),
    "signet": (1598918400, 0x1E0377AE, 52613770, "4a5e1e4baab89f3a32518a88c31bc87f618f76673e2cc77ab2127b7afdeda33b"),
    "regtest": (1296688602, 0x207FFFFF, 2, "4a5e1e4baab89f3a32518a88c31bc87f618f76673e2cc77ab2127b7afdeda33b"),
}


def genesis_of(network: str) -> bytes:
    time, bits, nonce, root = GENESIS[network]
    return struct.pack("<i32s32sIII", 1, bytes(32), bytes.fromhex(root)[::-1], time, bits, nonce)


@pytest.mark.parametrize("network", CHAIN_RULES)
def test_a_network_is_known_by_its_first_block(network: str) -> None:
    rules = CHAIN_RULES[network]
    genesis = decode_header(genesis_of(network), 0)
    assert rules.network == network
    assert genesis.block_hash == rules.genesis_hash
    assert network_of(genesis.block_hash) == network
    assert genesis.bits == rules.pow_limit_bits
    facts = index_of(rules, [genesis]).facts(genesis)
    assert facts == HeaderFacts(
        block_hash=genesis.block_hash, height=0, next_bits=genesis.bits, median_time=genesis.time, late=None
    )


def test_another_chain_is_no_network_of_ours() -> None:
    testnet3 = bytes.fromhex("000000000933ea01ad0ee984209779baaec3ced90fa3f408719526f8d77f4943")[::-1]
    assert network_of(testnet3) is None


@pytest.mark.parametrize("rules", [MAINNET, TESTNET4, SIGNET], ids=lambda rules: rules.network)
def test_a_retarget_never_leaves_the_256_bits_that_bitcoin_multiplies_in(rules: ChainRules) -> None:
    assert rules.pow_limit * rules.timespan_s * 4 < 2**256
    assert rules.timespan_s == rules.interval * 600


def test_regtest_has_periods_and_halvings_of_its_own() -> None:
    assert [rules.interval for rules in CHAIN_RULES.values()] == [2016, 2016, 2016, 144]
    assert [rules.halving_interval for rules in CHAIN_RULES.values()] == [210_000, 210_000, 210_000, 150]


# Real headers.

#: Mainnet's first and last headers of four periods, and the first one of the next. Each hashes to what follows it.
PERIODS = [
    (
        554400,
        "00004020d3b2d7d61ad2d95ffbd556d9e00f07877423600a8da015000000000000000000"
        "d192743a2c190a7421f92fefe92505579d7b8eda568cacee13b25751ac704c669d83195cf41e371721bae3e7",
    ),
    (
        556415,
        "00000020bc7d388bea14dab9caa937b909caecd6ece36e3c658920000000000000000000"
        "7c0900cf1a9b40411141859b98bf95fb9d414f49044e08acff21fa54506022a4e6492a5cf41e3717d2864679",
    ),
    (
        556416,
        "00000020120b3264562d49df59c400a0f276448db2a9aa4bf6f408000000000000000000"
        "5cb4b52150fe7dec217b74db424e442ef8b24105c244ebaeb59f638db9c48ef3c94f2a5ca5183217b412a530",
    ),
    (
        558431,
        "0000402022c9973a4f6c0623105f2a5d0dc349773848a4f02de60f000000000000000000"
        "e88eabc4c6398c80cea87f6d1d662c6640de4719f7949ae85afe75746dd04abbabef3b5ca5183217f6d45f41",
    ),
    (
        558432,
        "00c0ff2f6550b5dae76559589e3e3e135237072b6bc498949da628000000000000000000"
        "5988783435f506d2ccfbadb484e56d6f1d5dfdd480650acae1e3b43d3464ea73caf13b5c33d62f171d508fdb",
    ),
    (
        560447,
        "00000020d8e8e54ca5e33522b94fbba5de736efc55ff75e832cf23000000000000000000"
        "07b395f80858ee022c9c3c2f0f5cee4bd807039f0729b0559ae4326c3ba77d6b209f4e5c33d62f1746ee356d",
    ),
    (
        560448,
        "000000206b05bd2c4a06b3d8503a033c2593396a25a79e1dcadb14000000000000000000"
        "1b08df3d42cd9a38d8b66adf9dc5eb464f503633bd861085ffff723634531596a1a24e5c35683017bf67b72a",
    ),
]


@pytest.mark.parametrize("position", [0, 2, 4], ids=["easier to harder", "harder", "harder to easier"])
def test_real_retargets_of_mainnet_come_out(position: int) -> None:
    first, last = (decode_header(bytes.fromhex(raw), height) for height, raw in PERIODS[position : position + 2])
    last = replace(last, median_time=last.time - 3_600)
    raw = bytes.fromhex(PERIODS[position + 2][1])
    index = HeaderIndex(MAINNET)
    with pytest.raises(MissingHeader) as caught:
        index.facts(last)
    assert (caught.value.below, caught.value.height, caught.value.is_alone) == (last, first.height, True)
    index.add_period_start(first, caught.value.below)
    facts = index.facts(last)
    found = check_header(MAINNET, raw, last, facts, now=1.6e9)
    assert facts.bits_at(found.time) == found.bits != last.bits
    assert found.height == PERIODS[position + 2][0]
    for broken in range(80):
        damaged = raw[:broken] + bytes([raw[broken] ^ 1]) + raw[broken + 1 :]
        with pytest.raises(ValueError, match=r"high-hash|prev-blk-not-found"):
            check_header(MAINNET, damaged, last, facts, now=1.6e9)


def test_the_second_block_of_mainnet_follows_the_first() -> None:
    genesis = decode_header(genesis_of("mainnet"), 0)
    raw = bytes.fromhex(
        "010000006fe28c0ab6f1b372c1a6a246ae63f74f931e8365e15a089c68d6190000000000"
        "982051fd1e4ba744bbbe680e1fee14677ba1a3c3540bf7b1cdb606e857233e0e61bc6649ffff001d01e36299"
    )
    facts = index_of(MAINNET, [genesis]).facts(genesis)
    header = check_header(MAINNET, raw, genesis, facts, now=header_time(raw))
    assert header.block_hash[::-1].hex() == "00000000839a8e6886ab5951d76f411475428afc90947ee320161bbf18eb6048"
    with pytest.raises(ValueError, match="time-too-new"):
        check_header(MAINNET, raw, genesis, facts, now=header_time(raw) - 7_201)
    check_header(MAINNET, raw, genesis, facts, now=header_time(raw) - 7_200)


#: Testnet4's headers 116087 to 116089: two cheap blocks, each 1,201 seconds after the one before it.
CHEAP = [
    "00c0a520165303733ee5b0561d46da9dcce685fd12a807d64472931c46d5920c00000000"
    "c96f929654fc44fb69783b6cc4f2340ad85de5b10c5047836561901299ed23d162525469ffff001dda00dd53",
    "00c0fa213b04801d1b66efcf8f41290a675777893f5c6ac158a585654263ba0900000000"
    "fdf6162d92eee3af012f1ddab30a401bb371a0da32371d185fc25eb3655fd6d013575469ffff001db80220f8",
    "0000002002883f9d7847a35a0d371cd11bf95c0f9d252ed41f46dde04172bf0c00000000"
    "3d2af3ae86b3638665e6214df4dc12712fd7486348c3c319cedb3c69bc8a4ddac45b5469ffff001d1adfdc74",
]


def test_real_cheap_blocks_of_testnet4_are_valid_one_second_after_twenty_minutes() -> None:
    parent = replace(decode_header(bytes.fromhex(CHEAP[0]), 116_087), median_time=1_767_000_000)
    hard = link(None, 1_766_000_000, 0x19123456)
    hard = replace(hard, height=116_087 - 116_087 % 2016)
    index = HeaderIndex(TESTNET4)
    index.add_period_start(hard, parent)
    for raw in map(bytes.fromhex, CHEAP[1:]):
        facts = index.facts(parent)
        assert (facts.next_bits, facts.late) == (0x19123456, (parent.time + 1_200, LIMIT))
        header = check_header(TESTNET4, raw, parent, facts, now=1.8e9)
        assert header.time == parent.time + 1_201
        index.add(header)
        parent = replace(header, median_time=parent.median_time)


def header_time(raw: bytes) -> int:
    return int.from_bytes(raw[68:72], "little")


# Bitcoin Core's own vectors (pow_tests.cpp).


@pytest.mark.parametrize(
    ("height", "first_time", "last_time", "bits", "expected"),
    [
        (32255, 1261130161, 1262152739, 0x1D00FFFF, 0x1D00D86A),
        (2015, 1231006505, 1233061996, 0x1D00FFFF, 0x1D00FFFF),
        (68543, 1279008237, 1279297671, 0x1C05A3F4, 0x1C0168FD),
        (46367, 1263163443, 1269211443, 0x1C387F6F, 0x1D00E1FD),
    ],
    ids=["unconstrained", "easiest target", "four times harder", "four times easier"],
)
def test_cores_vectors_come_out(height: int, first_time: int, last_time: int, bits: int, expected: int) -> None:
    last = replace(link(None, last_time, bits), height=height)
    first = replace(link(None, first_time, bits), height=height - 2015)
    assert next_work(MAINNET, last, {first.height: first}.__getitem__) == (expected, None)


@pytest.mark.parametrize(
    "bits", [0x1D80FFFF, 0xFF7FFFFF, 0x1D01FFFE, 0x1D000000, 0x00000000, 0x2100FFFF, 0x1E00FFFF, 0x1D010000]
)
def test_a_target_that_is_none_is_never_met(bits: int) -> None:
    parent = link(None, 1_700_000_000, LIMIT)
    facts = HeaderFacts(block_hash=parent.block_hash, height=0, next_bits=bits, median_time=0)
    raw = struct.pack("<i32s32sIII", 4, parent.block_hash, bytes(32), parent.time + 1, bits, 0)
    with pytest.raises(ValueError, match="high-hash"):
        check_header(MAINNET, raw, parent, facts, now=2e9)


@given(
    st.integers(0, 2**32 - 1)
    | st.builds(lambda size, low: size << 24 | low, st.integers(0, 36), st.integers(0, 2**24 - 1))
)
def test_compact_targets_are_read_as_core_reads_them(bits: int) -> None:
    """SetCompact and GetCompact of Bitcoin Core's arith_uint256.cpp, word for word, against the sharechain's."""
    size, word = bits >> 24, bits & 0x007FFFFF
    if size <= 3:
        word >>= 8 * (3 - size)
        number = word
    else:
        number = (word << 8 * (size - 3)) % 2**256
    is_negative = word != 0 and bits & 0x00800000 != 0
    is_overflow = word != 0 and (size > 34 or (word > 0xFF and size > 33) or (word > 0xFFFF and size > 32))
    if is_negative or is_overflow or number == 0:
        with pytest.raises(ValueError, match="compact target"):
            bits_to_target(bits)
        return
    assert bits_to_target(bits) == number
    size = (number.bit_length() + 7) // 8
    compact = number << 8 * (3 - size) if size <= 3 else number >> 8 * (size - 3)
    if compact & 0x00800000:
        compact >>= 8
        size += 1
    assert target_to_bits(number) == compact | size << 24


# The target after a block, against the twin.

steps = st.lists(
    st.sampled_from([1, 60, 600, 1199, 1200, 1201, 1300, 5_000, 90_000, -500, -7_000]) | st.integers(-7_200, 10_000),
    max_size=40,
)
small_rules = st.sampled_from(
    [
        SMALL,
        replace(MAINNET, interval=8, timespan_s=4_800),
        replace(SIGNET, interval=8, timespan_s=4_800),
        REGTEST,
    ]
)
first_targets = st.sampled_from([0, 1, 3, 12, 60])


@pytest.mark.slow
@given(small_rules, first_targets, steps, steps, st.integers(0, 40), st.sampled_from([None, 1, -1]))
def test_any_branches_have_the_demands_of_cores_walk(
    rules: ChainRules, shift: int, trunk_steps: list[int], fork_steps: list[int], fork_at: int, upwards: int | None
) -> None:
    """Whether headers come branch by branch, or all of one height after another, up or down."""
    bits = rules.pow_limit_bits if rules.no_retarget else target_to_bits(rules.pow_limit >> shift)
    trunk = extend(rules, start(bits), trunk_steps)
    fork = extend(rules, trunk[: 1 + fork_at % len(trunk)], fork_steps, salt=1)
    headers = [*trunk, *fork]
    if upwards is not None:
        headers.sort(key=lambda header: header.height * upwards)
    index = index_of(rules, headers)
    for branch in (trunk, fork):
        for length in range(1, len(branch) + 1):
            assert index.facts(branch[length - 1]) == twin_facts(rules, branch[:length])


@pytest.mark.slow
@given(small_rules, first_targets, steps, st.booleans(), st.integers(16, 40))
def test_a_caller_that_fetches_what_is_missing_gets_there(
    rules: ChainRules, shift: int, times: list[int], is_on_best_chain: bool, limit: int
) -> None:
    """With the least memory that is allowed: what was fetched must not be dropped for what is fetched next."""
    bits = rules.pow_limit_bits if rules.no_retarget else target_to_bits(rules.pow_limit >> shift)
    branch = extend(rules, start(bits), times)
    node = {header.block_hash: header for header in branch}
    index = HeaderIndex(rules, max(limit, 2 * rules.interval))
    for length in [*range(len(branch), 0, -1), *range(1, len(branch) + 1)]:
        header = branch[length - 1]
        for _ in range(3 * rules.interval + 11):
            try:
                facts = index.facts(header)
                break
            except MissingHeader as missing:
                if missing.is_alone and is_on_best_chain:
                    index.add_period_start(branch[missing.height], missing.below)
                else:
                    index.add(node[missing.below.previous_block_hash])
        assert facts == twin_facts(rules, branch[:length])
        assert len(index) <= max(limit, 2 * rules.interval)


def test_a_missing_header_names_its_place() -> None:
    branch = extend(SMALL, start(), [600] * 31)
    index = index_of(SMALL, branch[25:])
    with pytest.raises(MissingHeader, match="height 21") as caught:
        index.facts(branch[31])
    assert (caught.value.below, caught.value.height, caught.value.is_alone) == (branch[25], 21, False)
    known_median = replace(branch[31], median_time=branch[26].time)
    with pytest.raises(MissingHeader, match="height 24") as caught:
        index.facts(known_median)
    assert (caught.value.below, caught.value.height, caught.value.is_alone) == (branch[25], 24, True)
    index.add_period_start(branch[24], caught.value.below)
    assert index.facts(known_median) == twin_facts(SMALL, branch)


@pytest.mark.parametrize("salt", [0, 1])
def test_a_known_median_time_is_believed(salt: int) -> None:
    header = replace(link(None, 1_700_000_000, LIMIT, salt), height=2016 * 50, median_time=1_699_990_000 + salt)
    assert index_of(MAINNET, [header]).facts(header).median_time == 1_699_990_000 + salt


# The edges, in full size.


@pytest.mark.parametrize("bip94", [True, False])
@pytest.mark.parametrize("rules", [MAINNET, TESTNET4], ids=lambda rules: rules.network)
def test_a_retarget_is_due_after_2016_blocks_and_not_one_earlier_or_later(rules: ChainRules, bip94: bool) -> None:
    rules = replace(rules, bip94=bip94)
    branch = extend(rules, start(0x1C00FFFF), [300] * 2020)
    assert {header.bits for header in branch[:2016]} == {0x1C00FFFF}
    assert (
        branch[2016].bits == branch[2020].bits == target_to_bits(bits_to_target(0x1C00FFFF) * 2015 * 300 // 1_209_600)
    )
    index = index_of(rules, branch)
    for height in (2014, 2015, 2016, 2017):
        assert index.facts(branch[height]) == twin_facts(rules, branch[: height + 1])
        assert (index.facts(branch[height]).late is None) == (rules.network == "mainnet" or height == 2015)


def test_after_fast_first_blocks_testnet4_is_four_times_harder() -> None:
    """Bitcoin Core's functional test mines the first 2,015 blocks of testnet4 and reads this target."""
    branch = start()
    while len(branch) < 2016:  # all of them of difficulty 1, as early or late as they are
        branch.append(link(branch[-1], branch[-1].time + 1, LIMIT))
    assert index_of(TESTNET4, branch).facts(branch[2015]).next_bits == 0x1C3FFFC0


def test_a_retarget_starts_from_the_first_block_so_that_a_cheap_last_one_does_not_reset_it() -> None:
    branch = extend(TESTNET4, start(0x1A00FFFF), [600] * 2014 + [1_201])
    assert branch[2015].bits == LIMIT
    after = index_of(TESTNET4, branch).facts(branch[2015])
    expected = bits_to_target(0x1A00FFFF) * (2014 * 600 + 1_201) // 1_209_600
    assert (after.next_bits, after.late) == (target_to_bits(expected), None)
    without = replace(TESTNET4, bip94=False)
    assert index_of(without, branch).facts(branch[2015]).next_bits == LIMIT


def test_a_whole_period_of_cheap_blocks_keeps_the_target_of_its_first() -> None:
    branch = extend(TESTNET4, start(0x1A00FFFF), [600] * 2015 + [1_201] * 2015)
    index = index_of(TESTNET4, branch)
    assert branch[2016].bits not in (LIMIT, 0x1A00FFFF)  # a first block is never cheap, however late
    assert {header.bits for header in branch[2017:]} == {LIMIT}
    for height in (2016, 2017, 3000, 4029):
        facts = index.facts(branch[height])
        assert (facts.next_bits, facts.late) == (branch[2016].bits, (branch[height].time + 1_200, LIMIT))
    assert index.facts(branch[4030]) == twin_facts(TESTNET4, branch)


def test_twenty_minutes_are_not_late_and_a_second_more_is() -> None:
    branch = extend(TESTNET4, start(0x1A00FFFF), [600] * 5)
    facts = index_of(TESTNET4, branch).facts(branch[5])
    assert facts.bits_at(branch[5].time + 1_200) == 0x1A00FFFF
    assert facts.bits_at(branch[5].time + 1_201) == LIMIT


def test_only_one_other_block_matters_and_mostly_none() -> None:
    def needed(rules: ChainRules, height: int, bits: int) -> int | None:
        return period_start(rules, replace(link(None, 0, bits), height=height))

    assert [needed(MAINNET, height, LIMIT) for height in (4030, 4031, 4032)] == [None, 2016, None]
    assert [needed(TESTNET4, height, 0x1A00FFFF) for height in (4030, 4031, 4032)] == [None, 2016, None]
    assert [needed(TESTNET4, height, LIMIT) for height in (4030, 4031, 4032)] == [2016, 2016, 4032]
    assert [needed(REGTEST, height, 0x207FFFFF) for height in (142, 143, 144)] == [None, None, None]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=11))
def test_the_median_time_has_no_more_than_half_of_the_times_on_either_side(times: list[int]) -> None:
    middle = median_time(times)
    assert middle in times
    assert sum(time < middle for time in times) <= len(times) // 2
    assert sum(time > middle for time in times) <= (len(times) - 1) // 2


# One header.


def solve(
    parent: Header, bits: int, time: int, *, version: int = 4, previous: bytes | None = None, is_met: bool = True
) -> bytes:
    for nonce in range(10_000):
        previous = parent.block_hash if previous is None else previous
        raw = struct.pack("<i32s32sIII", version, previous, bytes(32), time, bits, nonce)
        if (int.from_bytes(sha256d(raw), "little") <= bits_to_target(bits)) == is_met:
            return raw
    raise AssertionError("no nonce")


EASIEST = EASY.pow_limit_bits
HARDER = 0x2007FFFF


@pytest.fixture
def branch() -> list[Header]:
    return extend(EASY, start(HARDER), [600] * 5)


def test_a_header_that_keeps_every_rule_is_read(branch: list[Header]) -> None:
    parent = branch[-1]
    facts = index_of(EASY, branch).facts(parent)
    for time, bits in ((facts.median_time + 1, HARDER), (parent.time + 1_200, HARDER), (parent.time + 1_201, EASIEST)):
        raw = solve(parent, bits, time)
        assert check_header(EASY, raw, parent, facts, now=time) == Header(
            block_hash=sha256d(raw), previous_block_hash=parent.block_hash, height=6, time=time, bits=bits
        )


def test_a_header_that_breaks_one_rule_is_refused_in_cores_words(branch: list[Header]) -> None:
    parent = branch[-1]
    facts = index_of(EASY, branch).facts(parent)
    time, late = parent.time + 600, parent.time + 1_201
    cases = [
        (solve(parent, HARDER, time, previous=bytes(32)), "prev-blk-not-found"),
        (solve(parent, HARDER, time, is_met=False), "high-hash"),
        (solve(parent, EASIEST, time), "bad-diffbits: expected 0x2007ffff, got 0x207fffff"),
        (solve(parent, HARDER, late), "bad-diffbits: expected 0x207fffff, got 0x2007ffff"),
        (solve(parent, HARDER, facts.median_time), "time-too-old"),
        (solve(parent, HARDER, time + 1), "time-too-new"),
        (solve(parent, HARDER, time, version=3), "bad-version: expected at least 4, got 3"),
        (solve(parent, HARDER, time, version=-1), "bad-version: expected at least 4, got -1"),
        (solve(parent, HARDER, time) + b"\0", "80 bytes, got 81"),
        (b"", "80 bytes, got 0"),
    ]
    for raw, reason in cases:
        now = late if "diffbits" in reason else time - 7_200
        with pytest.raises(ValueError, match=reason):
            check_header(EASY, raw, parent, facts, now=now)
    check_header(EASY, solve(parent, HARDER, time), parent, facts, now=time - 7_200)


def test_the_first_block_of_a_period_may_lie_ten_minutes_before_its_parent() -> None:
    branch = extend(EASY, start(HARDER), [600] * 6 + [7_200])
    parent = branch[-1]
    facts = index_of(EASY, branch).facts(parent)
    assert facts.median_time < parent.time - 601
    check_header(EASY, solve(parent, facts.next_bits, parent.time - 600), parent, facts, now=parent.time)
    warped = solve(parent, facts.next_bits, parent.time - 601)
    with pytest.raises(ValueError, match="time-timewarp-attack"):
        check_header(EASY, warped, parent, facts, now=parent.time)
    check_header(replace(EASY, bip94=False), warped, parent, facts, now=parent.time)
    inside = extend(EASY, start(HARDER), [600] * 5 + [7_200])
    facts = index_of(EASY, inside).facts(inside[-1])
    early = solve(inside[-1], facts.next_bits, inside[-1].time - 601)
    check_header(EASY, early, inside[-1], facts, now=inside[-1].time)


@pytest.mark.parametrize(
    ("height", "least"), [(227_930, 1), (227_931, 2), (363_724, 2), (363_725, 3), (388_380, 3), (388_381, 4)]
)
def test_mainnet_demands_a_version_from_a_height_on(height: int, least: int) -> None:
    rules = replace(MAINNET, pow_limit=2**255 - 1)
    parent = replace(link(None, 1_400_000_000, EASIEST), height=height - 1)
    facts = HeaderFacts(block_hash=parent.block_hash, height=height - 1, next_bits=EASIEST, median_time=0)
    for version in (-1, 0, 1, 2, 3, 4, 0x20000000):
        raw = solve(parent, EASIEST, parent.time, version=version)
        if version >= least or least == 1:
            assert check_header(rules, raw, parent, facts, now=2e9).height == height
        else:
            with pytest.raises(ValueError, match=f"bad-version: expected at least {least}"):
                check_header(rules, raw, parent, facts, now=2e9)


# The index.


def test_an_index_gives_ancestors_of_its_own_branch() -> None:
    trunk = extend(SMALL, start(), [600] * 40)
    fork = extend(SMALL, trunk[:12], [700] * 30, salt=1)
    index = index_of(SMALL, trunk, fork)
    for branch in (trunk, fork):
        for height, header in enumerate(branch):
            for below in range(height + 1):
                assert index.ancestor(header, below) == branch[below]
    for height in (-1, 41):
        with pytest.raises(ValueError, match="expected a height from 0 to 40"):
            index.ancestor(trunk[40], height)


@pytest.mark.parametrize("upwards", [1, -1])
def test_two_branches_that_grow_at_once_keep_their_own_periods(upwards: int) -> None:
    trunk = extend(SMALL, start(), [300] * 40)
    fork = extend(SMALL, trunk[:5], [500] * 36, salt=1)
    headers = [header for pair in zip(trunk, fork, strict=True) for header in pair][::upwards]
    index = index_of(SMALL, headers)
    for branch in (trunk, fork):
        for length in range(1, len(branch) + 1):
            assert index.facts(branch[length - 1]) == twin_facts(SMALL, branch[:length])


def test_an_index_keeps_what_was_added_last() -> None:
    branch = extend(SMALL, start(), [600] * 50)
    index = index_of(SMALL, branch, limit=16)
    assert len(index) == 16
    assert [header for header in branch if index.get(header.block_hash)] == branch[-16:]
    index.add(branch[-16])
    index.add(branch[0])
    assert [header.height for header in branch if index.get(header.block_hash)] == [0, 35, *range(37, 51)]
    with pytest.raises(ValueError, match="at least 16 headers, got a limit of 15"):
        HeaderIndex(SMALL, 15)


def test_what_does_not_start_the_period_is_not_taken_for_it() -> None:
    branch = extend(SMALL, start(), [600] * 20)
    index = HeaderIndex(SMALL)
    for wrong in (8, 15, 17, 20):
        with pytest.raises(ValueError, match="does not start the period of height 20"):
            index.add_period_start(branch[wrong], branch[20])
    assert len(index) == 0


# The embedded Bitcoin, real.


def regtest_block(template: BlockTemplate, previous: bytes, height: int, time: int, value: int) -> bytes:
    number = height.to_bytes(height.bit_length() // 8 + 1, "little")
    number = bytes([len(number)]) + number if height > 16 else bytes([0x50 + height])
    script = number + b"\x08" + time.to_bytes(4, "big") + previous[:4]
    coinbase = b"\x02\0\0\0\x01" + bytes(32) + b"\xff" * 4 + bytes([len(script)]) + script + b"\xff" * 4
    coinbase += b"\x01" + struct.pack("<q", value) + b"\x01\x51" + bytes(4)
    for nonce in range(10_000):
        raw = struct.pack("<i32s32sIII", 0x20000000, previous, sha256d(coinbase), time, 0x207FFFFF, nonce)
        if sha256d(raw)[31] < 0x7F:
            return assemble_block(raw, coinbase, template)
    raise AssertionError("no nonce")


@pytest.mark.slow
def test_bitcoin_core_says_the_same_of_every_block_of_two_branches(tmp_path: Path) -> None:
    backend = KernelBackend.open(tmp_path)
    index = HeaderIndex(REGTEST)
    genesis = decode_header(genesis_of("regtest"), 0)
    index.add(genesis)
    trunk = [genesis]
    template = backend.block_template_now()

    def mine(parent: Header, step: int) -> Header:
        facts = index.facts(parent)
        time = max(facts.median_time + 1, parent.time + step)
        block = regtest_block(template, parent.block_hash, parent.height + 1, time, 5_000_000_000)
        result = backend.submit_block_now(block)
        assert result == SubmitResult(accepted=True) or result.reason == "inconclusive"
        header = check_header(REGTEST, block[:80], parent, facts, now=template.time)
        index.add(header)
        assert index.facts(header) == backend.header_facts_now(header.block_hash)
        return header

    for height in range(1, 40):
        trunk.append(mine(trunk[-1], height * 7_919 % 9_000 - 2_000))
    tip = trunk[20]
    for height in range(21, 36):
        tip = mine(tip, height * 104_729 % 9_000 - 2_000)
    assert backend.tip_now() == index.facts(trunk[-1])
    parent = trunk[-1]
    facts = index.facts(parent)
    stale = regtest_block(template, parent.block_hash, 40, facts.median_time, 5_000_000_000)
    assert backend.submit_block_now(stale).reason == "time-too-old"
    with pytest.raises(ValueError, match="time-too-old"):
        check_header(REGTEST, stale[:80], parent, facts, now=template.time)
    backend.close()


@pytest.mark.slow
def test_bitcoin_core_lets_regtest_warp_time(tmp_path: Path) -> None:
    """BIP94 is off on regtest, though the templates of Bitcoin Core keep it everywhere."""
    backend = KernelBackend.open(tmp_path)
    index = HeaderIndex(REGTEST)
    parent = decode_header(genesis_of("regtest"), 0)
    index.add(parent)
    template = backend.block_template_now()
    for height in range(1, 145):
        time = parent.time + {143: 7_000, 144: -601}.get(height, 600)
        block = regtest_block(template, parent.block_hash, height, time, 5_000_000_000)
        assert backend.submit_block_now(block) == SubmitResult(accepted=True)
        parent = check_header(REGTEST, block[:80], parent, index.facts(parent), now=template.time)
        index.add(parent)
    assert backend.tip_now() == index.facts(parent)
    backend.close()
