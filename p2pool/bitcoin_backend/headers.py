"""What Bitcoin demands of a header after its parent: target, time and proof of work, on each of its networks.

A Bitcoin node tells what it demands on its own tip and nothing about other blocks. A share may build on any block, so
the same rules are computed here, in the same integers, from headers alone.

Theory of operation. The demands on a block follow from its parent, from the times of ten blocks before that, and
sometimes from one block far below: the first one of the parent's retarget period. `HeaderIndex` keeps headers by hash
and says with `MissingHeader` which one it lacks; whoever talks to a Bitcoin node fetches it, adds it and asks again.

On a test network with cheap blocks Bitcoin Core walks back to the last block that was not cheap. There is a shorter
way to the same answer: within a period every block is either cheap or has the target of the period's first block,
where the walk ends at the latest. So the first block has the answer, and one header does instead of two thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from p2pool.bitcoin_backend.template import HeaderFacts
from sharechain.difficulty import bits_to_target, target_to_bits
from sharechain.hasher import sha256d

__all__ = [
    "CHAIN_RULES",
    "ChainRules",
    "Header",
    "HeaderIndex",
    "MissingHeader",
    "check_header",
    "decode_header",
    "median_time",
    "network_of",
    "next_work",
    "period_start",
]

#: Length of a header.
HEADER_BYTES: Final = 80
#: Blocks whose times make a median, the block itself included. Source: nMedianTimeSpan in Bitcoin Core's chain.h.
MEDIAN_SPAN: Final = 11
#: How far a header's time may be ahead of the clock. Source: MAX_FUTURE_BLOCK_TIME in Bitcoin Core's chain.h.
MAX_FUTURE_S: Final = 2 * 60 * 60
#: How far the time of a period's first block may lie before its parent's. Source: BIP94, MAX_TIMEWARP.
TIME_WARP_GRACE_S: Final = 600
#: Headers that an index keeps: about a year of blocks, under 20 MB.
INDEX_LIMIT: Final = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainRules:
    """What the networks of Bitcoin do differently, as far as headers and subsidies go.

    Arguments:
        network: mainnet, testnet4, signet or regtest.
        genesis_hash: of the first block, 32 bytes, internal order.
        pow_limit: the easiest target.
        interval: blocks between two retargets.
        timespan_s: seconds that these blocks should take.
        no_retarget: the target never changes.
        min_difficulty_after_s: a block whose time is more seconds than this after its parent's must have the easiest
            target, unless a retarget is due; None if there is no such exception. Bitcoin Core has it on regtest too,
            where it changes nothing: there every target is the easiest.
        bip94: a retarget starts from the target of the period's first block instead of its last one, which may be
            cheap, and the time of a period's first block may lie `TIME_WARP_GRACE_S` before its parent's at most.
            Bitcoin Core has it on regtest if asked (`-test=bip94`): a header that breaks it is valid on other nodes.
        halving_interval: blocks between two halvings of the subsidy.
        version_heights: the heights from which a header's version must be at least 2, 3 and 4 (BIP34, BIP66, BIP65).

    Source: Bitcoin Core, kernel/chainparams.cpp.
    """

    network: str
    genesis_hash: bytes
    pow_limit: int
    interval: int = 2016
    timespan_s: int = 14 * 24 * 60 * 60
    no_retarget: bool = False
    min_difficulty_after_s: int | None = None
    bip94: bool = False
    halving_interval: int = 210_000
    version_heights: tuple[int, int, int] = (1, 1, 1)
    #: The easiest target's compact form.
    pow_limit_bits: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pow_limit_bits", target_to_bits(self.pow_limit))


def _rules_of_all() -> Mapping[str, ChainRules]:
    mainnet = ChainRules(
        network="mainnet",
        genesis_hash=bytes.fromhex("000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f")[::-1],
        pow_limit=2**224 - 1,
        version_heights=(227_931, 363_725, 388_381),
    )
    testnet4 = ChainRules(
        network="testnet4",
        genesis_hash=bytes.fromhex("00000000da84f2bafbbc53dee25a72ae507ff4914b867c565be350b0da8bf043")[::-1],
        pow_limit=2**224 - 1,
        min_difficulty_after_s=2 * 600,
        bip94=True,
    )
    signet = ChainRules(
        network="signet",
        genesis_hash=bytes.fromhex("00000008819873e925422c1ff0f99f7cc9bbb232af63a077a480a3633bee1ef6")[::-1],
        pow_limit=0x0377AE << 216,
    )
    regtest = ChainRules(
        network="regtest",
        genesis_hash=bytes.fromhex("0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206")[::-1],
        pow_limit=2**255 - 1,
        interval=144,
        timespan_s=24 * 60 * 60,
        no_retarget=True,
        halving_interval=150,
    )
    return MappingProxyType({rules.network: rules for rules in (mainnet, testnet4, signet, regtest)})


#: The rules of each network by its name.
CHAIN_RULES: Final = _rules_of_all()


def network_of(genesis_hash: bytes) -> str | None:
    """Give the network whose first block has this hash, or None if it is none of ours.

    Private signets have the public signet's first block: only the challenge tells them apart.

    Arguments:
        genesis_hash: 32 bytes, internal order.
    """
    return next((name for name, rules in CHAIN_RULES.items() if rules.genesis_hash == genesis_hash), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A block header, as far as headers after it depend on it.

    Arguments:
        block_hash: 32 bytes, internal order.
        previous_block_hash: 32 bytes, internal order; zeros for the first block.
        height: of the block.
        time: as the header says it, Unix seconds.
        bits: its compact target.
        median_time: of its time and the ten before it, if the Bitcoin node told; else it is computed from them.
    """

    block_hash: bytes
    previous_block_hash: bytes
    height: int
    time: int
    bits: int
    median_time: int | None = field(default=None, compare=False)


class MissingHeader(LookupError):
    """A header is needed that the index does not have: fetch it, add it, ask again.

    Arguments:
        below: the lowest header of the branch down to which there is no gap. Its `previous_block_hash` is the first
            that is missing, so a branch can always be fetched one by one with `add`.
        height: of the lowest header that is needed.
        is_alone: only the header at `height` is needed, not those between. A Bitcoin node that has `below` on its best
            chain can give it by its height, for `add_period_start`.
    """

    def __init__(self, *, below: Header, height: int, is_alone: bool) -> None:
        super().__init__(f"the header at height {height} below {below.block_hash[::-1].hex()} is not known")
        self.below = below
        self.height = height
        self.is_alone = is_alone


def decode_header(raw: bytes, height: int) -> Header:
    """Read a header as the network has it, without judging it.

    Arguments:
        raw: 80 bytes.
        height: of its block: the header itself does not say.

    Raises:
        ValueError: it has not 80 bytes.
    """
    if len(raw) != HEADER_BYTES:
        raise ValueError(f"a block header has {HEADER_BYTES} bytes, got {len(raw)}")
    return Header(
        block_hash=sha256d(raw),
        previous_block_hash=bytes(raw[4:36]),
        height=height,
        time=int.from_bytes(raw[68:72], "little"),
        bits=int.from_bytes(raw[72:76], "little"),
    )


def median_time(times: Iterable[int]) -> int:
    """Give the middle one of the times of a block and the ten before it: the next block's must be greater.

    Arguments:
        times: at least one, Unix seconds; eleven, or all if the chain is shorter. Of an even number the upper middle.

    Source: CBlockIndex::GetMedianTimePast in Bitcoin Core's chain.h; BIP113.
    """
    in_order = sorted(times)
    return in_order[len(in_order) // 2]


def period_start(rules: ChainRules, parent: Header) -> int | None:
    """Give the height of the one block, besides `parent`, that the target after `parent` depends on, or None.

    Arguments:
        rules: of the network.
        parent: the block that is built on.
    """
    if rules.no_retarget:
        return None
    is_retarget = (parent.height + 1) % rules.interval == 0
    is_cheap = rules.min_difficulty_after_s is not None and parent.bits == rules.pow_limit_bits
    return parent.height - parent.height % rules.interval if is_retarget or is_cheap else None


def next_work(
    rules: ChainRules, parent: Header, ancestor: Callable[[int], Header]
) -> tuple[int, tuple[int, int] | None]:
    """Give the compact target that Bitcoin demands of a block built on `parent`, and when it becomes another one.

    Arguments:
        rules: of the network.
        parent: a valid header.
        ancestor: gives the header at a height on `parent`'s own branch. Called once, for the height that
            `period_start` gives, or not at all.

    Returns: the compact target, and `HeaderFacts.late`: None, or a Unix time and the compact target of a block whose
        time is greater than that.

    Source: GetNextWorkRequired and CalculateNextWorkRequired in Bitcoin Core's pow.cpp.
    """
    first_height = period_start(rules, parent)
    first = parent if first_height is None else ancestor(first_height)
    if (parent.height + 1) % rules.interval == 0 and not rules.no_retarget:
        return _retarget(rules, first, parent), None
    after_s = rules.min_difficulty_after_s
    if after_s is None or first.bits == rules.pow_limit_bits:
        return first.bits, None
    return first.bits, (parent.time + after_s, rules.pow_limit_bits)


def _retarget(rules: ChainRules, first: Header, last: Header) -> int:
    """The compact target after a whole period: the old one, corrected by the time that the period took.

    Bitcoin multiplies modulo 2^256. That changes nothing: no easiest target is so easy that the product gets there.
    """
    took_s = min(max(last.time - first.time, rules.timespan_s // 4), rules.timespan_s * 4)
    old = bits_to_target((first if rules.bip94 else last).bits)
    return target_to_bits(min(old * took_s // rules.timespan_s, rules.pow_limit))


def check_header(rules: ChainRules, raw: bytes, parent: Header, facts: HeaderFacts, now: float) -> Header:
    """Check all that Bitcoin demands of a header by itself, so that it can be taken from anybody.

    What is in the block is not checked, and on signet that includes the signature that makes a block valid.

    Arguments:
        rules: of the network.
        raw: 80 bytes.
        parent: the header before it.
        facts: of `parent`.
        now: Unix seconds.

    Raises:
        ValueError: it breaks a rule. The message starts with Bitcoin Core's word for it, such as "high-hash".

    Source: CheckBlockHeader and ContextualCheckBlockHeader in Bitcoin Core's validation.cpp.
    """
    header = decode_header(raw, parent.height + 1)
    if header.previous_block_hash != parent.block_hash:
        raise ValueError(f"prev-blk-not-found: it is built on {header.previous_block_hash[::-1].hex()}")
    try:
        target = bits_to_target(header.bits)
    except ValueError as error:
        raise ValueError(f"high-hash: {error}") from None
    if target > rules.pow_limit or int.from_bytes(header.block_hash, "little") > target:
        raise ValueError(f"high-hash: {header.block_hash[::-1].hex()} does not meet {header.bits:#010x}")
    expected = facts.bits_at(header.time)
    if header.bits != expected:
        raise ValueError(f"bad-diffbits: expected {expected:#010x}, got {header.bits:#010x}")
    if header.time <= facts.median_time:
        raise ValueError(f"time-too-old: expected more than {facts.median_time}, got {header.time}")
    if rules.bip94 and header.height % rules.interval == 0 and header.time < parent.time - TIME_WARP_GRACE_S:
        raise ValueError(f"time-timewarp-attack: {header.time} is too long before the parent's {parent.time}")
    if header.time > now + MAX_FUTURE_S:
        raise ValueError(f"time-too-new: {header.time} is too far ahead of {now:.0f}")
    version = int.from_bytes(raw[:4], "little", signed=True)
    least = 1 + sum(header.height >= height for height in rules.version_heights)
    if least > 1 and version < least:
        raise ValueError(f"bad-version: expected at least {least}, got {version}")
    return header


class HeaderIndex:
    """Headers by hash, and what Bitcoin demands after each.

    What is added is believed to be valid, whether a Bitcoin node gave it or `check_header`. At most `limit` headers
    are kept, the last that were added: a header that is fetched because it was missing is there when it is asked for
    again.

    Mutable fields: ``_headers`` (by hash, in the order in which they were added) and ``_starts`` (from the hash of a
    header to that of its period's first one, for some of those in ``_headers``; that one may have been dropped since).
    """

    def __init__(self, rules: ChainRules, limit: int = INDEX_LIMIT) -> None:
        """An empty one.

        Arguments:
            rules: of the network.
            limit: headers that are kept; at least two periods, so that a branch can be fetched one by one.

        Raises:
            ValueError: the limit is lower than that.
        """
        if limit < 2 * rules.interval:
            raise ValueError(f"an index keeps at least {2 * rules.interval} headers, got a limit of {limit}")
        self._rules = rules
        self._limit = limit
        self._headers: dict[bytes, Header] = {}
        self._starts: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        """How many headers it has."""
        return len(self._headers)

    def add(self, header: Header) -> None:
        """Take a valid header; its parent need not be known. One that is known counts as added anew."""
        self._headers.pop(header.block_hash, None)
        self._headers[header.block_hash] = header
        if header.height % self._rules.interval == 0:
            self._starts[header.block_hash] = header.block_hash
        elif (start := self._starts.get(header.previous_block_hash)) is not None:
            self._starts[header.block_hash] = start
        while len(self._headers) > self._limit:
            dropped = next(iter(self._headers))
            del self._headers[dropped]
            self._starts.pop(dropped, None)

    def add_period_start(self, header: Header, descendant: Header) -> None:
        """Take the first header of `descendant`'s retarget period without those between them.

        The caller vouches that `header` is on the branch of `descendant`: a Bitcoin node had both on its best chain,
        at one and the same time.

        Raises:
            ValueError: the height is not that of the period's first block.
        """
        if header.height != descendant.height - descendant.height % self._rules.interval:
            raise ValueError(f"height {header.height} does not start the period of height {descendant.height}")
        self.add(header)
        self.add(descendant)
        self._starts[descendant.block_hash] = header.block_hash

    def get(self, block_hash: bytes) -> Header | None:
        """Give a header that is known, or None.

        Arguments:
            block_hash: 32 bytes, internal order.
        """
        return self._headers.get(block_hash)

    def ancestor(self, header: Header, height: int) -> Header:
        """Give the header at a height on the branch that ends in `header`, or `header` itself.

        As quick as the way is long, but a period's first header is found at once if the way to it is known.

        Raises:
            MissingHeader: a header on the way is not known.
            ValueError: the height is negative or above `header`.
        """
        if not 0 <= height <= header.height:
            raise ValueError(f"expected a height from 0 to {header.height}, got {height}")
        start_height = header.height - header.height % self._rules.interval
        passed = []
        current = header
        while current.height > height:
            passed.append(current.block_hash)
            known = self._headers.get(self._starts.get(current.block_hash, b""))
            if known is None or not height <= known.height < current.height:
                known = self._headers.get(current.previous_block_hash)
            if known is None:
                raise MissingHeader(below=current, height=height, is_alone=height == start_height)
            current = known
        if height == start_height:
            for passed_hash in passed:
                if passed_hash in self._headers:
                    self._starts[passed_hash] = current.block_hash
        return current

    def facts(self, header: Header) -> HeaderFacts:
        """Give what Bitcoin demands of a block built on `header`.

        Raises:
            MissingHeader: fetch what it says, add it and ask again.
        """
        median = header.median_time
        if median is None:
            median = self._median_time(header)
        next_bits, late = next_work(self._rules, header, lambda height: self.ancestor(header, height))
        return HeaderFacts(
            block_hash=header.block_hash,
            height=header.height,
            next_bits=next_bits,
            median_time=median,
            late=late,
        )

    def _median_time(self, header: Header) -> int:
        lowest = max(0, header.height - (MEDIAN_SPAN - 1))
        current, times = header, [header.time]
        while current.height > lowest:
            known = self._headers.get(current.previous_block_hash)
            if known is None:
                raise MissingHeader(below=current, height=lowest, is_alone=False)
            current = known
            times.append(current.time)
        return median_time(times)
