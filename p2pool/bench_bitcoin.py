"""An imaginary Bitcoin node for benchmarks: it answers JSON-RPC from bytes that it has prepared.

Nothing of a block is looked at but its template, so hashes are made up, and so are the transactions, in sizes, fees and
dependencies as a full block has them. Two sets of them take turns, so that nothing that was kept of the last template
helps with the next, which is worse than real life.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any, Final

import trio

from p2pool.bench import BLOCK_BITS
from p2pool.bitcoin_backend.headers import CHAIN_RULES
from p2pool.bitcoin_backend.template import block_subsidy
from sharechain.hasher import sha256d

__all__ = ["FIRST_HEIGHT", "ImaginaryBitcoin", "made_transactions", "tip_hash"]

#: Weight units that Bitcoin Core puts into a template: the limit without what it keeps for the coinbase.
FILLED_WEIGHT: Final = 3_992_000
#: Transactions that fill a block.
FULL_COUNT: Final = 4_000
#: Bytes of a transaction, and how much of it is witness where there is any.
SIZES: Final = (150, 2_000)
WITNESS: Final = 0.45
#: Transactions that hang together at most, and how many such families grow at a time.
FAMILY_SIZE: Final = 25
FAMILIES: Final = 50
#: Height of the first tip: the subsidy of regtest is then what it is on mainnet in 2026, 3.125 BTC.
FIRST_HEIGHT: Final = 600

_NOT_FOUND: Final = b'{"code":-5,"message":"Block not found"}'
_NO_METHOD: Final = b'{"code":-32601,"message":"Method not found"}'


def tip_hash(number: int) -> bytes:
    """The made-up hash of a tip, internal order."""
    return sha256d(b"tip %d" % number)


def made_transactions(count: int, seed: int) -> list[dict[str, Any]]:
    """Transactions as ``getblocktemplate`` has them: best paying first, parents before children, in chains.

    Nothing but sizes, weights, fees and dependencies is as in real life; 4,000 of them fill a block. Fewer pay as much
    together, so that they are worth new work to a node whatever it has given its miners before.

    Args:
        count: of transactions.
        seed: others for another seed.
    """
    chance = random.Random(seed)
    wished = [chance.expovariate(1.0) for _ in range(count)]
    is_segwit = [chance.random() < 0.95 for _ in range(count)]
    limit = min(FILLED_WEIGHT, FILLED_WEIGHT * count // FULL_COUNT)
    least, most = SIZES
    mean = 300.0
    while True:
        sizes = [min(most, int(least + mean * wish)) for wish in wished]
        weights = [
            4 * size - 3 * int(WITNESS * size) if segwit else 4 * size
            for size, segwit in zip(sizes, is_segwit, strict=True)
        ]
        if sum(weights) <= limit or mean < 1.0:
            break
        mean *= 0.99
    entries: list[dict[str, Any]] = []
    families: list[list[int]] = []  # positions, from 1, of transactions whose outputs may be spent
    for position, (size, weight) in enumerate(zip(sizes, weights, strict=True), 1):
        depends: list[int] = []
        family = chance.choice(families[-FAMILIES:]) if families else []
        if family and chance.random() < 0.3:
            depends = sorted({chance.choice(family) for _ in range(chance.choice((1, 1, 1, 2, 3)))})
            family.append(position)
            if len(family) == FAMILY_SIZE:
                families.remove(family)
        elif chance.random() < 0.2:
            families.append([position])
        data = chance.randbytes(size)
        rate = 40.0 * (1 - position / (count + 1)) ** 2 + 1.0 + chance.random()
        entries.append(
            {
                "data": data.hex(),
                "txid": sha256d(data[:-1])[::-1].hex(),
                "hash": sha256d(data if is_segwit[position - 1] else data[:-1])[::-1].hex(),
                "depends": depends,
                "fee": int(rate * weight / 4 * max(1.0, FULL_COUNT / count)),
                "sigops": chance.choice((1, 1, 2, 4, 8)),
                "weight": weight,
            }
        )
    return entries


class ImaginaryBitcoin:
    """A Bitcoin node that answers what an `RpcBackend` asks, from prepared bytes.

    Mutable fields: ``_tip`` (its number) with ``_height``, ``_is_full`` (whether templates have transactions),
    ``_changed`` (set at the next tip, and replaced), ``waiting`` (questions that wait for it), ``marks`` (when
    something happened first since the tip changed).
    """

    def __init__(self, transactions: int) -> None:
        """Make the templates."""
        self._sets = []
        for seed in (1, 2):
            entries = made_transactions(transactions, seed)
            fees = sum(entry["fee"] for entry in entries)
            self._sets.append((json.dumps(entries, separators=(",", ":")).encode(), fees))
        self._numbers: dict[str, int] = {}
        self._changed = trio.Event()
        self._is_full = True
        self.marks: dict[str, float] = {}
        self.waiting = 0
        self._tip = 0
        self._numbers[tip_hash(0)[::-1].hex()] = 0

    def move_to(self, number: int, *, full: bool) -> None:
        """Have another tip."""
        self._tip, self._is_full = number, full
        self._numbers[self._shown(number)] = number
        self.marks = {}
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer the questions on one connection."""
        buffer = bytearray()
        try:
            while (body := await _read_request(stream, buffer)) is not None:
                requested = time.perf_counter()
                question = json.loads(body)
                method = question["method"]
                result, fault, status = await self._answer(method, question["params"]), b"null", b"200 OK"
                if result is None:
                    status = b"500 Internal Server Error"
                    result, fault = b"null", _NOT_FOUND if method == "getblockheader" else _NO_METHOD
                content = b'{"result":%b,"error":%b,"id":%d}\n' % (result, fault, question["id"])
                head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                raw = head % (status, len(content)) + content
                if method == "getblocktemplate":
                    self.marks.setdefault("requested", requested)
                    self.marks.setdefault("answered", time.perf_counter())
                elif method == "waitfornewblock":
                    self.marks.setdefault("announced", time.perf_counter())
                await stream.send_all(raw)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _answer(self, method: str, params: list[Any]) -> bytes | None:
        """The result as JSON, or None for a method or a block that there is not."""
        if method == "getblocktemplate":
            return self._template()
        if method == "waitfornewblock":
            if len(params) < 2 or params[1] == self._shown(self._tip):
                self.waiting += 1
                with trio.move_on_after(params[0] / 1000):
                    await self._changed.wait()
                self.waiting -= 1
            return self._encode({"hash": self._shown(self._tip), "height": FIRST_HEIGHT + self._tip})
        if method == "getbestblockhash":
            return self._encode(self._shown(self._tip))
        if method == "getblockhash":
            genesis = CHAIN_RULES["regtest"].genesis_hash[::-1].hex()
            return self._encode(genesis if params[0] == 0 else self._shown(params[0] - FIRST_HEIGHT))
        if method == "getnetworkinfo":
            return self._encode({"version": 310000, "subversion": "/Satoshi:31.0.0/"})
        if method == "getblockchaininfo":
            height = FIRST_HEIGHT + self._tip
            return self._encode(
                {
                    "chain": "regtest",
                    "blocks": height,
                    "headers": height,
                    "bestblockhash": self._shown(self._tip),
                    "time": int(time.time()),
                    "initialblockdownload": False,
                }
            )
        if method == "getblockheader" and params[0] in self._numbers:
            number = self._numbers[params[0]]
            return self._encode(
                {
                    "hash": params[0],
                    "height": FIRST_HEIGHT + number,
                    "time": int(time.time()) - 60,
                    "mediantime": int(time.time()) - 3_600,
                    "bits": f"{BLOCK_BITS:08x}",
                    "previousblockhash": self._shown(number - 1),
                }
            )
        return None

    def _template(self) -> bytes:
        transactions, fees = self._sets[self._tip % 2] if self._is_full else (b"[]", 0)
        height = FIRST_HEIGHT + self._tip + 1
        now = int(time.time())
        fields = {
            "rules": ["csv", "!segwit", "taproot"],
            "version": 0x20000000,
            "previousblockhash": self._shown(self._tip),
            "coinbaseaux": {},
            "coinbasevalue": block_subsidy(height, CHAIN_RULES["regtest"].halving_interval) + fees,
            "mintime": now - 3_600,
            "curtime": now,
            "bits": f"{BLOCK_BITS:08x}",
            "height": height,
            "sigoplimit": 80_000,
            "sizelimit": 4_000_000,
            "weightlimit": 4_000_000,
        }
        return self._encode(fields)[:-1] + b',"transactions":' + transactions + b"}"

    @staticmethod
    def _shown(number: int) -> str:
        return tip_hash(number)[::-1].hex()

    @staticmethod
    def _encode(value: object) -> bytes:
        return json.dumps(value).encode()


async def _read_request(stream: trio.SocketStream, buffer: bytearray) -> bytes | None:
    """The body of the next request, or None if there is none. What was read beyond it stays in the buffer."""
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        data = await stream.receive_some()
        if not data:
            return None
        buffer += data
    lines = bytes(buffer[:end]).lower().split(b"\r\n")
    length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
    del buffer[: end + 4]
    while len(buffer) < length:
        data = await stream.receive_some()
        if not data:
            return None
        buffer += data
    body = bytes(buffer[:length])
    del buffer[:length]
    return body
