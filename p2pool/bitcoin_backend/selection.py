"""From what a Bitcoin node proposes to what a pool can mine: the template is read, and our coinbase gets its room.

A node fills its template up to the block's weight and leaves room for a coinbase of one or two outputs. A pool's
coinbase pays dozens or hundreds of miners. So the transactions that pay least must go, and whatever spends their
outputs with them. Pure: the JSON-RPC client brings the answer of `getblocktemplate`, as `json` has parsed it.

Theory of operation. The *package* of a transaction is itself and all that depends on it, directly or not: what must
go if it goes. Packages are dropped by fee rate, lowest first, until the rest fits. The last one may be far larger
than what is still too much, and its fees with it; so a package that would do alone is put aside as one way to end,
while smaller ones go on being dropped, and the cheapest end wins. Then whatever still fits comes back.

What keeps this fast: a package that goes has the lowest rate of all, so those that lose all of it rise. What was
known of them bounds them from below until they are at the top of the heap, and only there they are looked at again;
only those that lose a part of it, the other parents of what it shared, are measured at once. Sets are integers, one
bit per transaction. Rates are compared as integers scaled so far up that different fractions are different integers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Final

from p2pool.bitcoin_backend.template import BlockTemplate, TemplateTransaction, build_template, witness_commitment_of
from p2pool.errors import BackendError
from sharechain.difficulty import bits_to_target
from sharechain.errors import show_value
from sharechain.params import MAX_MONEY

__all__ = ["coinbase_reserve", "read_template", "select_transactions"]

#: Weight units. Of a block, where the node does not say. Source: BIP141.
WEIGHT_LIMIT: Final = 4_000_000
#: Cost of a block's signature checks, where the node does not say. Source: BIP141.
SIGOP_LIMIT: Final = 80_000
#: Bytes that the node may want in our coinbase's script, which has 100 at most: height, tag and extranonces stand
#: there too, and whatever else a miner may be given.
MAX_AUX_SIZE: Final = 40
#: Names in `rules` that need nothing of us which we do not do. "!signet" is one on a signet alone.
KNOWN_RULES: Final = frozenset({"csv", "segwit", "taproot", "testdummy"})

#: Weight units of a byte that is no witness.
_BYTE: Final = 4
_HEADER_SIZE: Final = 80
#: Bytes. P2TR and P2WSH: value, length, version, push, 32 bytes. No payout script is longer.
_LARGEST_OUTPUT_SIZE: Final = 8 + 1 + 34
#: Cost. A P2PKH output has one OP_CHECKSIG; no other payout script has any that counts in the output.
_OUTPUT_SIGOPS: Final = 4
#: Bytes. Version, number of inputs, outpoint, script with its length, sequence, lock time.
_COINBASE_SIZE: Final = 4 + 1 + 36 + (1 + 100) + 4 + 4
#: Bytes. The outputs that commit to the witnesses and to the share.
_COMMITMENTS_SIZE: Final = (8 + 1 + 38) + (8 + 1 + 34)
#: Weight units. Marker, flag, one item of 32 bytes.
_COINBASE_WITNESS_WEIGHT: Final = 2 + 1 + 1 + 32
#: Cost. Bitcoin counts a coinbase's script as code. The first byte of our tag reads as a push of 47 bytes: it swallows
#: the tag and the node's bytes, at most 47 together, and leaves 12 of extranonces, each of which may read as
#: OP_CHECKMULTISIG: 20 checks.
_SCRIPT_SIGOPS: Final = 12 * 20 * 4

#: Members from which on a set is summed by its bits.
_SMALL_SET: Final = 24

_BITS: Final = re.compile("[0-9a-fA-F]{1,8}")
_COMMITMENT_SCRIPT: Final = bytes.fromhex("6a24aa21a9ed")


def coinbase_reserve(payout_class: int) -> tuple[int, int]:
    """Give what the largest coinbase of a payout class takes of a block: weight units and signature check cost.

    Both are bounds: no coinbase has payouts that are all of the longest type and all of the type that costs checks.

    Arguments:
        payout_class: how many window payouts there may be; the finder's and the commitments come on top.
    """
    payouts = payout_class + 1
    outputs_size = _compact_size_length(payouts + 2) + payouts * _LARGEST_OUTPUT_SIZE + _COMMITMENTS_SIZE
    weight = _BYTE * (_COINBASE_SIZE + outputs_size) + _COINBASE_WITNESS_WEIGHT
    return weight, _OUTPUT_SIGOPS * payouts + _SCRIPT_SIGOPS


def read_template(
    result: object,
    *,
    network: str,
    reserved_weight: int,
    reserved_sigops: int,
    late: tuple[int, int] | None = None,
) -> BlockTemplate:
    """Make a template with room for our coinbase of what a Bitcoin node answers to `getblocktemplate`.

    What is needed must be there and of its type; nothing else is looked at. The ids of the transactions are taken
    from the node: hashing a whole block again would cost more than everything else together.

    Arguments:
        result: as `json` parses it.
        network: that the node is on.
        reserved_weight, reserved_sigops: for the coinbase, see `coinbase_reserve`.
        late: as in `BlockTemplate`; the node does not say it.

    Raises:
        BackendError: a field is missing or wrong, a rule is not known here, or there is no room for the coinbase.

    Source: BIP9, BIP22, BIP23, BIP145; Bitcoin Core, `getblocktemplate`; btcd, which leaves out `rules`, gives `bits`
        without leading zeros, and the bare commitment in place of the output's script.
    """
    template = _table(result, "")
    _check_rules(template, network)
    proposed = [
        _read_transaction(entry, position) for position, entry in enumerate(_list(template, "transactions", ""))
    ]
    if len({transaction.txid for transaction in proposed}) < len(proposed):
        raise BackendError("getblocktemplate: transactions: one is there twice")
    commitment = _read_commitment(template)
    coinbase_value = _integer(template, "coinbasevalue", "", 0, MAX_MONEY)
    fees = sum(transaction.fee for transaction in proposed)
    if fees > coinbase_value:
        raise _wrong("coinbasevalue", f"at least the fees, {fees} sat, are needed", coinbase_value)

    max_weight = _limit(template, "weightlimit", WEIGHT_LIMIT) - reserved_weight
    max_weight -= _BYTE * (_HEADER_SIZE + _compact_size_length(1 + len(proposed)))
    max_sigops = _limit(template, "sigoplimit", SIGOP_LIMIT) - reserved_sigops
    if max_weight < 0 or max_sigops < 0:
        raise BackendError(
            f"the Bitcoin node's limits leave no room for a coinbase of {reserved_weight} weight units and "
            f"{reserved_sigops} signature checks: they are {-max_weight} and {-max_sigops} more than there are"
        )
    transactions = select_transactions(proposed, max_weight=max_weight, max_sigops=max_sigops)
    min_time = _integer(template, "mintime", "", 0, 2**32 - 1)
    made = build_template(
        version=_integer(template, "version", "", -(2**31), 2**32 - 1) & 0xFFFFFFFF,
        previous_block_hash=_hash(template, "previousblockhash", ""),
        height=_integer(template, "height", "", 1, 2**31 - 1),
        bits=_read_bits(template),
        min_time=min_time,
        time=max(min_time, _integer(template, "curtime", "", 0, 2**32 - 1)),
        coinbase_value=coinbase_value - fees + sum(transaction.fee for transaction in transactions),
        transactions=transactions,
        late=late,
        coinbase_aux=_read_aux(template),
        commits_always=network == "signet",
    )
    if commitment is not None and len(transactions) == len(proposed):
        ours = made.witness_commitment or witness_commitment_of([transaction.wtxid for transaction in transactions])
        if ours != commitment:
            raise BackendError(
                "getblocktemplate: default_witness_commitment: the transactions of the template give "
                f"{ours.hex()}, the Bitcoin node says {commitment.hex()}"
            )
    return made


def select_transactions(
    transactions: Sequence[TemplateTransaction], *, max_weight: int, max_sigops: int
) -> tuple[TemplateTransaction, ...]:
    """Drop the transactions that pay least, until the rest fits; see the module's theory of operation.

    None is kept without all that it depends on, none is dropped that would still fit, the order stays, and `depends`
    of the result are positions in the result. If everything fits, it is given as it is.

    Arguments:
        transactions: in block order; `depends` are positions of earlier ones. `sigops` of None counts as 0.
        max_weight: weight units that they may have together.
        max_sigops: signature check cost that they may have together.

    Raises:
        ValueError: a limit is negative.
    """
    if max_weight < 0 or max_sigops < 0:
        raise ValueError(f"limits are 0 or more, got {max_weight} weight units, {max_sigops} signature checks")
    weights = [transaction.weight for transaction in transactions]
    sigops = [transaction.sigops or 0 for transaction in transactions]
    excess_weight, excess_sigops = sum(weights) - max_weight, sum(sigops) - max_sigops
    if excess_weight <= 0 and excess_sigops <= 0:
        return tuple(transactions)
    block = _Block(
        parents=[transaction.depends for transaction in transactions],
        fees=[transaction.fee for transaction in transactions],
        weights=weights,
        sigops=sigops,
        # What a fee is measured against: what there is too much of; if that is both, each by its share of its limit.
        weight_factor=0 if excess_weight <= 0 else 1 if excess_sigops <= 0 else max(max_sigops, 1),
        sigops_factor=0 if excess_sigops <= 0 else 1 if excess_weight <= 0 else max(max_weight, 1),
    )
    dropped = _drop(block, excess_weight, excess_sigops)
    spare_weight = sum(weights[position] for position in dropped) - excess_weight
    spare_sigops = sum(sigops[position] for position in dropped) - excess_sigops
    dropped = _put_back(block, dropped, spare_weight, spare_sigops)
    kept = [position for position in range(len(transactions)) if position not in dropped]
    moved = {position: place for place, position in enumerate(kept)}
    return tuple(_moved(transactions[position], moved) for position in kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A template's transactions as columns; a transaction is its position."""

    parents: Sequence[tuple[int, ...]]
    fees: Sequence[int]
    weights: Sequence[int]
    sigops: Sequence[int]
    weight_factor: int
    sigops_factor: int
    scale: int = field(init=False)

    def __post_init__(self) -> None:
        # Two fractions whose denominators have at most so many bits together, multiplied by two to the power of that
        # number, differ by one or more if they differ at all.
        total = sum(self.weights) * self.weight_factor + sum(self.sigops) * self.sigops_factor
        object.__setattr__(self, "scale", 2 * total.bit_length())

    def cost(self, weight: int, sigops: int) -> int:
        """What a fee is measured against. 0 for what is not of the kind that there is too much of."""
        return weight * self.weight_factor + sigops * self.sigops_factor

    def rate(self, fee: int, weight: int, sigops: int) -> int | None:
        """A fee rate to compare with others, as exact as the fraction; None if dropping this would not help."""
        cost = weight * self.weight_factor + sigops * self.sigops_factor
        return (fee << self.scale) // cost if cost else None


def _drop(block: _Block, excess_weight: int, excess_sigops: int) -> set[int]:
    """Give what must go. It holds with each transaction all that depends on it."""
    packages = _Packages(block)
    kept = everything = (1 << len(block.fees)) - 1
    lost, best_kept = 0, 0
    best_loss: int | None = None
    # Exact or too low, None for packages that are no choice. Entries of the heap that differ from it are out of date.
    rates = [packages.rate(position) for position in range(len(block.fees))]
    # Of two packages with the same rate, the later one is first: it may be part of the earlier one.
    heap = [(rate, -position) for position, rate in enumerate(rates) if rate is not None]
    heapify(heap)

    def measure(position: int) -> tuple[int, int] | None:
        packages.shrink(position, packages.sets[position] & kept >> position)
        rate = rates[position] = packages.rate(position)
        return None if rate is None else (rate, -position)

    while heap:
        rate, place = heappop(heap)
        position = -place
        if rate != rates[position] or not kept >> position & 1:
            continue
        if packages.sets[position] & ~(kept >> position):
            entry = measure(position)
            if entry is None:
                continue
            if heap and entry > heap[0]:
                heappush(heap, entry)
                continue
        package = packages.sets[position]
        fee, weight, checks = (column[position] for column in packages.columns)
        # If all that is still too much went at this rate, the lowest, would that cost what the best end costs? (Where
        # families have common descendants it could cost less; then a somewhat cheaper end may be missed.)
        excess = block.cost(max(excess_weight, 0), max(excess_sigops, 0))
        if best_loss is not None and fee * excess >= (best_loss - lost) * block.cost(weight, checks):
            break
        if weight >= excess_weight and checks >= excess_sigops:
            rates[position] = None
            if best_loss is None or lost + fee < best_loss:
                best_loss, best_kept = lost + fee, kept ^ package << position
        else:
            kept ^= package << position
            lost += fee
            excess_weight -= weight
            excess_sigops -= checks
            for other in packages.overlapping(position, kept):
                if rates[other] is not None and (entry := measure(other)) is not None:
                    heappush(heap, entry)
    return set(_members(everything ^ best_kept, 0))


def _put_back(block: _Block, dropped: set[int], spare_weight: int, spare_sigops: int) -> set[int]:
    """Give what stays dropped after all that fits has come back, highest fee rate first, parents before children."""
    missing = {position: dropped.intersection(block.parents[position]) for position in dropped}
    children: dict[int, list[int]] = {position: [] for position in dropped}
    for position, parents in missing.items():
        for parent in parents:
            children[parent].append(position)
    free = (sum(block.fees) + 1) << block.scale  # above all rates: what costs nothing comes back first

    def entry_of(position: int) -> tuple[int, int]:
        rate = block.rate(block.fees[position], block.weights[position], block.sigops[position])
        return -(free if rate is None else rate), position

    heap = [entry_of(position) for position in dropped if not missing[position]]
    heapify(heap)
    remaining = set(dropped)
    while heap:
        _, position = heappop(heap)
        weight, checks = block.weights[position], block.sigops[position]
        if weight > spare_weight or checks > spare_sigops:
            continue
        spare_weight -= weight
        spare_sigops -= checks
        remaining.discard(position)
        for child in children[position]:
            missing[child].discard(position)
            if not missing[child]:
                heappush(heap, entry_of(child))
    return remaining


class _Packages:
    """The package of each transaction, with the sums of its fees, weights and checks.

    Bit k of a package stands for the transaction k places behind: so most are small integers.

    Mutable fields: ``sets`` and ``columns`` (fees, weights, checks; each by position): a package and its sums change
    together. ``_planes`` is made when the first large set is summed: of each column of the block it holds, lowest bit
    first, the set of the positions whose number has the bit; so large sets are summed by counting bits.
    """

    def __init__(self, block: _Block) -> None:
        self._block = block
        self._planes: list[list[int]] = []
        count = len(block.fees)
        self.sets = [1] * count
        self.columns = [list(column) for column in (block.fees, block.weights, block.sigops)]
        fees, weights, sigops = self.columns
        overlapping: set[int] = set()
        for position in range(count - 1, -1, -1):
            package = self.sets[position]
            if position in overlapping:
                fees[position], weights[position], sigops[position] = self._sums(package, position)
            for parent in block.parents[position]:
                theirs = package << position - parent
                if self.sets[parent] & theirs:
                    overlapping.add(parent)  # two of its children have a descendant in common
                self.sets[parent] |= theirs
                fees[parent] += fees[position]
                weights[parent] += weights[position]
                sigops[parent] += sigops[position]

    def rate(self, position: int) -> int | None:
        """The fee rate of a package."""
        fees, weights, sigops = self.columns
        return self._block.rate(fees[position], weights[position], sigops[position])

    def shrink(self, position: int, package: int) -> None:
        """Leave of a package what is given."""
        gone = self._sums(self.sets[position] ^ package, position)
        self.sets[position] = package
        for column, amount in zip(self.columns, gone, strict=True):
            column[position] -= amount

    def overlapping(self, position: int, kept: int) -> set[int]:
        """Give the transactions in ``kept`` whose packages held a part of this one's but not all of it."""
        parents = self._block.parents
        found: set[int] = set()
        above = [parent for member in _members(self.sets[position] ^ 1, position) for parent in parents[member]]
        while above:
            other = above.pop()
            if other in found or not kept >> other & 1:
                continue
            if other < position and self.sets[other] >> position - other & 1:
                continue  # held it all, and so did all that this one depends on
            found.add(other)
            above += parents[other]
        return found

    def _sums(self, package: int, first: int) -> list[int]:
        columns = self._block.fees, self._block.weights, self._block.sigops
        if package.bit_count() <= _SMALL_SET:
            members = _members(package, first)
            return [sum([column[member] for member in members]) for column in columns]
        if not self._planes:
            self._planes = [_planes(column) for column in columns]
        package <<= first
        return [
            sum([(plane & package).bit_count() << bit for bit, plane in enumerate(planes)]) for planes in self._planes
        ]


def _planes(column: Sequence[int]) -> list[int]:
    width = max(column).bit_length() or 1
    digits = zip(*[f"{number:0{width}b}" for number in reversed(column)], strict=True)
    return [int("".join(plane), 2) for plane in digits][::-1]


def _members(package: int, first: int) -> list[int]:
    """Give the positions in a set whose bit 0 stands for `first`, last first."""
    members = []
    while package:
        place = package.bit_length() - 1
        members.append(first + place)
        package ^= 1 << place
    return members


def _moved(transaction: TemplateTransaction, places: dict[int, int]) -> TemplateTransaction:
    depends = tuple([places[parent] for parent in transaction.depends])
    if depends == transaction.depends:
        return transaction
    return TemplateTransaction(  # `replace` takes three times as long
        raw=transaction.raw,
        txid=transaction.txid,
        wtxid=transaction.wtxid,
        fee=transaction.fee,
        weight=transaction.weight,
        depends=depends,
        sigops=transaction.sigops,
    )


def _read_transaction(entry: object, position: int) -> TemplateTransaction:
    """Read what is as it should be in one stretch: there are thousands. All else is looked at closely."""
    if not isinstance(entry, dict):
        return _read_closely(entry, position)
    try:
        data, shown_txid, shown_wtxid = entry["data"], entry["txid"], entry["hash"]
        fee, weight, sigops, depends = entry["fee"], entry["weight"], entry["sigops"], entry["depends"]
        raw, txid, wtxid = bytes.fromhex(data), bytes.fromhex(shown_txid), bytes.fromhex(shown_wtxid)
    except (KeyError, TypeError, ValueError):
        return _read_closely(entry, position)
    size = len(raw)
    if not (
        len(data) == 2 * size
        and len(shown_txid) == len(shown_wtxid) == 64
        and len(txid) == len(wtxid) == 32
        and type(fee) is type(weight) is type(sigops) is int
        and 0 <= fee <= MAX_MONEY
        and 0 <= sigops < 2**32
        and (size < weight < 4 * size if txid != wtxid else 0 < weight == 4 * size)
        and type(depends) is list
        and (not depends or all(type(parent) is int and 0 < parent <= position for parent in depends))
    ):
        return _read_closely(entry, position)
    return TemplateTransaction(
        raw=raw,
        txid=txid[::-1],
        wtxid=wtxid[::-1],
        fee=fee,
        weight=weight,
        depends=tuple(sorted({parent - 1 for parent in depends})) if depends else (),
        sigops=sigops,
    )


def _read_closely(entry: object, position: int) -> TemplateTransaction:
    """Read a transaction and say what is wrong with it. Raises: BackendError."""
    where = f"transactions[{position}]"
    fields = _table(entry, where)
    where += "."
    raw = _bytes(fields, "data", where)
    txid = _hash(fields, "txid", where)
    wtxid = _hash(fields, "hash", where)
    weight = _integer(fields, "weight", where, 1, 2**32 - 1)
    # A witness is there or not, and these three say so alike. It counts a quarter.
    size = len(raw)
    if not (size < weight < 4 * size if txid != wtxid else weight == 4 * size):
        raise _wrong(f"{where}weight", f"what {size} bytes weigh is needed", weight)
    depends: set[int] = set()  # Bitcoin Core names a parent once for each of its outputs
    for parent in _list(fields, "depends", where):
        if type(parent) is not int or not 0 < parent <= position:
            raise _wrong(f"{where}depends", f"positions of earlier transactions, 1 to {position}, are needed", parent)
        depends.add(parent - 1)
    return TemplateTransaction(
        raw=raw,
        txid=txid,
        wtxid=wtxid,
        fee=_integer(fields, "fee", where, 0, MAX_MONEY),
        weight=weight,
        depends=tuple(sorted(depends)),
        sigops=_integer(fields, "sigops", where, 0, 2**32 - 1),
    )


def _check_rules(template: dict[str, object], network: str) -> None:
    """Raise if there is a rule that says "who does not know me must not mine", and we do not know it."""
    if template.get("rules") is None:
        return
    for rule in _list(template, "rules", ""):
        if type(rule) is not str:
            raise _wrong("rules", "names are needed", rule)
        name = rule.removeprefix("!")
        if name != rule and name not in KNOWN_RULES and (name != "signet" or network != "signet"):
            raise BackendError(
                f"getblocktemplate: rules: {rule[:80]!r} is in force, which p2pool does not know on {network}: "
                "blocks made without it may be invalid. Is there a newer p2pool?"
            )


def _read_bits(template: dict[str, object]) -> int:
    text = template.get("bits")
    if type(text) is not str or not _BITS.fullmatch(text):
        raise _wrong("bits", "a compact target, up to eight hex digits, is needed", text)
    bits = int(text, 16)
    try:
        bits_to_target(bits)
    except ValueError as error:
        raise _wrong("bits", str(error), text) from None
    return bits


def _read_commitment(template: dict[str, object]) -> bytes | None:
    """Give the witness commitment that the node would make, or None if it says none."""
    if template.get("default_witness_commitment") is None:
        return None
    script = _bytes(template, "default_witness_commitment", "")
    commitment = script.removeprefix(_COMMITMENT_SCRIPT) if len(script) == 38 else script
    if len(commitment) != 32:
        raise _wrong(
            "default_witness_commitment",
            f"{_COMMITMENT_SCRIPT.hex()} and 32 bytes, or these alone, are needed",
            template["default_witness_commitment"],
        )
    return commitment


def _read_aux(template: dict[str, object]) -> bytes:
    if template.get("coinbaseaux") is None:
        return b""
    parts = _table(template["coinbaseaux"], "coinbaseaux")
    aux = b"".join(_bytes(parts, name, "coinbaseaux.") for name in parts)
    if len(aux) > MAX_AUX_SIZE:
        raise _wrong("coinbaseaux", f"at most {MAX_AUX_SIZE} bytes fit a coinbase's script", aux)
    return aux


def _limit(template: dict[str, object], key: str, default: int) -> int:
    return default if template.get(key) is None else _integer(template, key, "", 1, 2**32 - 1)


def _table(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object is needed", value)
    return value


def _list(table: dict[str, object], key: str, where: str) -> list[object]:
    value = table.get(key)
    if not isinstance(value, list):
        raise _wrong(where + key, "a list is needed", value)
    return value


def _integer(table: dict[str, object], key: str, where: str, least: int, most: int) -> int:
    value = table.get(key)
    if type(value) is not int or not least <= value <= most:  # True is no number here
        raise _wrong(where + key, f"an integer from {least} to {most} is needed", value)
    return value


def _bytes(table: dict[str, object], key: str, where: str) -> bytes:
    text = table.get(key)
    if type(text) is not str:
        raise _wrong(where + key, "hex digits are needed", text)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if 2 * len(value) != len(text):  # `fromhex` takes blanks
        raise _wrong(where + key, "hex digits are needed", text)
    return value


def _hash(table: dict[str, object], key: str, where: str) -> bytes:
    """A hash as people see it; given in internal order."""
    value = _bytes(table, key, where)
    if len(value) != 32:
        raise _wrong(where + key, "64 hex digits are needed", table[key])
    return value[::-1]


def _wrong(field_name: str, needed: str, value: object) -> BackendError:
    got = "nothing" if value is None else show_value(value)
    name = f" {field_name}:" if field_name else ""
    return BackendError(f"getblocktemplate:{name} {needed}, got {got}")


def _compact_size_length(number: int) -> int:
    return 1 if number < 0xFD else 3 if number <= 0xFFFF else 5
