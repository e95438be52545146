"""A network of peers in virtual time: a ``Transport`` that loses, doubles, delays and cuts, the same way for a seed.

How to test on it::

    def test_something() -> None:
        async def main() -> None:
            net = SimulatedNet(1, loss=0.1)
            one, two = net.transport(1), net.transport(2)
            async with trio.open_nursery() as nursery:
                await nursery.start(one.run, handler_of_one)
                await nursery.start(two.run, handler_of_two)
                await one.connect(two.addresses[0])  # or address_of(2)
                await trio.sleep(10)  # virtual: costs nothing
                nursery.cancel_scope.cancel()

        simulate(main)

``simulate`` works below ``@given`` too, where pytest-trio's ``autojump_clock`` does not. Then trouble: ``net.loss`` and
``net.duplication`` (of gossip, on each hop), ``net.answer_loss`` and ``net.latency_s`` may be set at any time;
``net.partition([one, two], [three])`` until ``net.heal()``; ``net.crash(one)``, after which ``net.transport(1)`` is the
same peer at the same address, started again. What happened to messages is counted in ``net.counts``.

Theory of operation. Each transport has an inbox of (time, callback), which its ``run`` works off; nothing else calls
its handler. Chance is drawn from one generator for each direction of each pair, so that what others do at the same
instant does not move the dice. Opening and closing keep their order within a direction, and nothing overtakes them;
gossip and requests overtake each other.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import bitcoin.base58
import trio
from trio.testing import MockClock

from p2pool.errors import ConfigError, PeerError
from p2pool.p2p import Gossip, Link, Traffic, TransportHandler
from p2pool.p2p.wire import MAX_FRAME, MAX_GOSSIP

#: Seconds for a call to be answered, as with libp2p.
CONNECT_DEADLINE_S = 15.0
#: Where peers listen.
PORT = 9337

T = TypeVar("T")


def simulate(main: Callable[..., Awaitable[T]], *args: Any, schedule: int = 0) -> T:
    """Run a test to its end in virtual time: whenever all tasks wait, the clock jumps.

    Args:
        main: the async test, and its arguments.
        schedule: another number lets tasks of the same instant run in another order.
    """
    # pytest-trio has made trio's scheduler draw from this generator and nothing else; no public name leads to it.
    trio._core._run._r.seed(schedule)
    return trio.run(main, *args, clock=MockClock(autojump_threshold=0))


def peer_id_of(number: int) -> str:
    """The identity of peer ``number``; it has the form of an Ed25519 one."""
    key = hashlib.sha256(b"simulated peer %d" % number).digest()
    return str(bitcoin.base58.encode(bytes.fromhex("002408011220") + key))


def ip_of(number: int) -> str:
    """The address of peer ``number``."""
    return f"10.0.{number >> 8}.{number & 255}"


def address_of(number: int, *, port: int = PORT) -> str:
    """Where peer ``number`` listens, or would."""
    return f"/ip4/{ip_of(number)}/tcp/{port}/p2p/{peer_id_of(number)}"


class SimulatedNet:
    """The wires between the simulated peers, and what goes wrong on them.

    Mutable state: the settings below, which tests may change; ``_listening`` holds the transports that run, by
    (ip, port); ``_groups`` gives each peer id its side of a partition, and is empty without one; ``_dice`` has the
    generator of each (sender, receiver).
    """

    def __init__(
        self,
        seed: int,
        *,
        latency_s: tuple[float, float] = (0.02, 0.2),
        loss: float = 0.0,
        duplication: float = 0.0,
        answer_loss: float = 0.0,
        notice_s: tuple[float, float] = (1.0, 10.0),
    ) -> None:
        """
        Args:
            latency_s: least and most seconds of one message, one way.
            loss: the part of gossip messages that is lost, on each hop.
            duplication: the part that arrives twice.
            answer_loss: the part of answers that is lost: the asking side runs into its timeout.
            notice_s: least and most seconds until an end sees that its connection was cut, or the other side crashed.
        """
        self.seed = seed
        self.latency_s = latency_s
        self.loss = loss
        self.duplication = duplication
        self.answer_loss = answer_loss
        self.notice_s = notice_s
        self.counts: Counter[str] = Counter()
        self._listening: dict[tuple[str, int], SimulatedTransport] = {}
        self._groups: dict[str, int] = {}
        self._dice: dict[tuple[str, str], random.Random] = {}

    def transport(self, number: int, *, ip: str | None = None, port: int = PORT) -> SimulatedTransport:
        """A transport for peer ``number``; another one with the same number is that peer after a restart.

        Args:
            ip: not its own address, to have several peers at one.
        """
        return SimulatedTransport(self, peer_id_of(number), ip or ip_of(number), port)

    def partition(self, *groups: Iterable[SimulatedTransport]) -> None:
        """Cut the net: peers of different groups do not reach each other until ``heal``. All that are in no group are
        one more. Takes the place of an earlier partition.
        """
        self._groups = {peer.peer_id: number for number, group in enumerate(groups, 1) for peer in group}
        for transport in self._listening.values():
            for end in list(transport._ends.values()):
                if self.is_cut(transport, end.other):
                    transport._notice(end)

    def heal(self) -> None:
        """End the partition. Connections that it cut do not come back by themselves."""
        self._groups = {}

    def crash(self, transport: SimulatedTransport) -> None:
        """Stop a transport as if its machine had lost power: it says nothing any more, and its handler is not called.

        Its ``run`` goes on idle until it is cancelled, as the rest of the node should be.
        """
        transport._die()
        for other in list(self._listening.values()):
            end = other._ends.get(transport.peer_id)
            if end is not None and end.other is transport:
                other._notice(end)

    @property
    def is_partitioned(self) -> bool:
        """Whether a partition stands."""
        return bool(self._groups)

    def is_cut(self, one: SimulatedTransport, other: SimulatedTransport) -> bool:
        """Whether a partition stands between two peers."""
        return self._groups.get(one.peer_id, 0) != self._groups.get(other.peer_id, 0)

    def dice(self, sender: str, receiver: str) -> random.Random:
        """The generator of one direction of a pair."""
        key = (sender, receiver)
        if key not in self._dice:
            self._dice[key] = random.Random(f"{self.seed}/{sender}/{receiver}")
        return self._dice[key]


@dataclass(eq=False, slots=True)
class _End:
    """One side of a connection: the link as this side sees it, and who runs at the other."""

    link: Link
    other: SimulatedTransport


@dataclass(eq=False, slots=True)
class _Call:
    """A call that waits for its answer: None as long as there is none, "" if the peer was taken, else the rule."""

    done: trio.Event
    outcome: str | None = None


@dataclass(eq=False, slots=True)
class _Request:
    """A request that waits for its answer; ``error`` if there will be none."""

    peer_id: str
    done: trio.Event
    answer: bytes | None = None
    error: PeerError | None = None


class SimulatedTransport:
    """One peer of a ``SimulatedNet``; see ``p2pool.p2p.Transport`` for what its methods do.

    Mutable state: ``_handler`` is set while it runs, ``_is_dead`` after a crash. ``_ends`` are the connections that
    were taken, by peer id; ``_calls`` and ``_requests`` wait for answers, ``_queues`` are the locks that keep requests
    of one (peer, protocol) in order. ``_inbox`` is a heap of (time, order, callback), and ``_ready`` is set when it
    grew. ``_seen`` are the payloads of gossip that the handler was asked about. ``_last_control`` is, by receiver, when
    the latest opening or closing arrives: what follows may not overtake it.
    """

    def __init__(self, net: SimulatedNet, peer_id: str, ip: str, port: int) -> None:
        self._net = net
        self._peer_id = peer_id
        self.ip = ip
        self.port = port
        self._handler: TransportHandler | None = None
        self._nursery: trio.Nursery | None = None
        self._is_dead = False
        self._ends: dict[str, _End] = {}
        self._calls: dict[str, _Call] = {}
        self._requests: dict[int, _Request] = {}
        self._queues: dict[tuple[str, str], trio.Lock] = {}
        self._inbox: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._ready = trio.Event()
        self._seen: set[bytes] = set()
        self._last_control: dict[str, float] = {}
        self._received = 0
        self._sent = 0

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return () if self._handler is None else (f"/ip4/{self.ip}/tcp/{self.port}/p2p/{self._peer_id}",)

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(end.link for end in self._ends.values())

    @property
    def traffic(self) -> Traffic:
        return Traffic(received=self._received, sent=self._sent)

    async def run(
        self, handler: TransportHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        listening = self._net._listening
        if (self.ip, self.port) in listening:
            raise ConfigError(f"port {self.port} of {self.ip} is in use")
        listening[self.ip, self.port] = self
        self._handler = handler
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._work_off()
        finally:
            for peer_id in list(self._ends):
                self._hang_up(peer_id)
            if listening.get((self.ip, self.port)) is self:
                del listening[self.ip, self.port]
            self._handler = self._nursery = None

    async def connect(self, address: str) -> str:
        ip, port, peer_id = _parse(address)
        if peer_id == self._peer_id:
            raise PeerError("self", "this is our own address")
        if peer_id in self._ends:
            await trio.lowlevel.checkpoint()
            return peer_id
        call = self._calls.get(peer_id)
        if call is None:
            call = self._calls[peer_id] = _Call(trio.Event())
            self._dial(ip, port, peer_id)
        with trio.move_on_after(CONNECT_DEADLINE_S):
            await call.done.wait()
        if call.outcome == "":
            return peer_id
        if self._calls.get(peer_id) is call:
            del self._calls[peer_id]
        rule = call.outcome or "unreachable"
        raise PeerError(rule, f"{address}: {rule}")

    async def disconnect(self, peer_id: str) -> None:
        await trio.lowlevel.checkpoint()
        self._hang_up(peer_id)

    async def request(self, peer_id: str, protocol: str, request: bytes, timeout_s: float) -> bytes:
        async with self._queues.setdefault((peer_id, protocol), trio.Lock()):
            end = self._ends.get(peer_id)
            if end is None:
                raise PeerError("gone", f"{peer_id} is not connected")
            number = next(self._order)
            waiting = self._requests[number] = _Request(peer_id, trio.Event())
            self._sent += len(request)
            self._send(end.other, lambda: end.other._on_request(self, number, protocol, request))
            try:
                with trio.move_on_after(timeout_s):
                    await waiting.done.wait()
            finally:
                del self._requests[number]
            if waiting.error is not None:
                raise waiting.error
            if waiting.answer is None:
                raise PeerError("timeout", f"no answer in {timeout_s:g} s")
            if len(waiting.answer) > MAX_FRAME[protocol][1]:
                raise PeerError("frame", f"an answer has at most {MAX_FRAME[protocol][1]} bytes")
            return waiting.answer

    async def publish(self, payload: bytes) -> None:
        if len(payload) > MAX_GOSSIP:
            raise ValueError(f"a message of the topic has at most {MAX_GOSSIP} bytes, got {len(payload)}")
        await trio.lowlevel.checkpoint()
        self._seen.add(payload)
        self._flood(payload, self._peer_id, but=None)

    # What arrives: called by ``run`` only

    async def _work_off(self) -> None:
        while True:
            while not self._is_dead and self._inbox and self._inbox[0][0] <= trio.current_time():
                heapq.heappop(self._inbox)[2]()
            self._ready = trio.Event()
            due = self._inbox[0][0] if self._inbox and not self._is_dead else float("inf")
            with trio.move_on_at(due):
                await self._ready.wait()

    def _on_call(self, caller: SimulatedTransport, port: int, wanted: str) -> None:
        """Somebody calls our address, from a port of its own."""
        assert self._handler is not None
        end = self._ends.get(caller.peer_id)
        if end is not None and end.other is not caller:
            self._close(caller.peer_id)  # It crashed and came back before we noticed.
            end = None
        if not self._handler.may_enter(caller.ip):
            outcome = "refused"
        elif wanted != self._peer_id:
            outcome = "unreachable"  # The handshake shows somebody else.
        elif end is not None:
            outcome = ""
        else:
            link = Link(peer_id=caller.peer_id, ip=caller.ip, port=port, inbound=True)
            outcome = "" if self._open(link, caller) else "refused"
        self._send(caller, lambda: caller._on_call_answered(self, wanted, outcome), control=True)

    def _on_call_answered(self, called: SimulatedTransport, wanted: str, outcome: str) -> None:
        end = self._ends.get(called.peer_id)
        if end is not None and end.other is not called:
            self._close(called.peer_id)
            end = None
        if outcome == "" and end is None:
            link = Link(peer_id=called.peer_id, ip=called.ip, port=called.port, inbound=False)
            if not self._open(link, called):
                outcome = "refused"
                self._send(called, lambda: called._on_hung_up(self), control=True)
        self._end_call(wanted, outcome)

    def _on_hung_up(self, caller: SimulatedTransport) -> None:
        end = self._ends.get(caller.peer_id)
        if end is not None and end.other is caller:
            self._close(caller.peer_id)

    def _on_gossip(self, bearer: SimulatedTransport, author: str, payload: bytes) -> None:
        if not self._is_linked(bearer):
            return
        assert self._handler is not None
        self._received += len(payload)
        if payload in self._seen:
            self._net.counts["seen"] += 1
            return
        self._seen.add(payload)
        self._net.counts["delivered"] += 1
        if self._handler.gossip(Gossip(bearer=bearer.peer_id, author=author, payload=payload)):
            self._flood(payload, author, but=bearer.peer_id)

    def _on_request(self, asker: SimulatedTransport, number: int, protocol: str, request: bytes) -> None:
        if not self._is_linked(asker):
            return
        assert self._nursery is not None
        self._received += len(request)
        if len(request) > MAX_FRAME[protocol][0]:
            self._blame(asker.peer_id, f"a request of {len(request)} bytes")
            self._answer(asker, number, None)
            return
        self._nursery.start_soon(self._serve, asker, number, protocol, request)

    async def _serve(self, asker: SimulatedTransport, number: int, protocol: str, request: bytes) -> None:
        assert self._handler is not None
        answer = None
        with suppress(PeerError):
            answer = await self._handler.serve(asker.peer_id, protocol, request)
        if answer is not None and self._net.dice(self._peer_id, asker.peer_id).random() < self._net.answer_loss:
            self._net.counts["lost answers"] += 1
            return
        self._answer(asker, number, answer)

    def _on_answer(self, answering: SimulatedTransport, number: int, answer: bytes | None) -> None:
        waiting = self._requests.get(number)
        if waiting is None or not self._is_linked(answering):
            return
        self._received += len(answer or b"")
        if answer is None:
            waiting.error = PeerError("gone", "the stream was reset")
        waiting.answer = answer
        waiting.done.set()

    # Connections

    def _dial(self, ip: str, port: int, peer_id: str) -> None:
        target = self._net._listening.get((ip, port))
        if target is None:
            dice = self._net.dice(self._peer_id, peer_id)
            self._later(2 * dice.uniform(*self._net.latency_s), lambda: self._end_call(peer_id, "unreachable"))
        else:
            own_port = self._net.dice(self._peer_id, peer_id).randrange(32768, 61000)
            self._send(target, lambda: target._on_call(self, own_port, peer_id), control=True)

    def _end_call(self, peer_id: str, outcome: str) -> None:
        call = self._calls.pop(peer_id, None)
        if call is not None:
            call.outcome = outcome
            call.done.set()

    def _open(self, link: Link, other: SimulatedTransport) -> bool:
        assert self._handler is not None
        if not self._handler.opened(link):
            return False
        self._ends[link.peer_id] = _End(link, other)
        self._end_call(link.peer_id, "")  # The peer may have called while we did.
        return True

    def _close(self, peer_id: str) -> None:
        """Forget a connection, and tell the handler."""
        del self._ends[peer_id]
        for waiting in self._requests.values():
            if waiting.peer_id == peer_id and waiting.answer is None:
                waiting.error = PeerError("gone", "the connection was closed")
                waiting.done.set()
        if self._handler is not None and not self._is_dead:
            self._handler.closed(peer_id)

    def _hang_up(self, peer_id: str) -> None:
        end = self._ends.get(peer_id)
        if end is not None:
            self._send(end.other, lambda: end.other._on_hung_up(self), control=True)
            self._close(peer_id)

    def _notice(self, end: _End) -> None:
        """See after a while that a connection no longer works, if it is still there then."""
        peer_id = end.link.peer_id
        delay = self._net.dice(self._peer_id, peer_id).uniform(*self._net.notice_s)
        self._later(delay, lambda: self._hang_up(peer_id) if self._ends.get(peer_id) is end else None)

    def _die(self) -> None:
        self._is_dead = True
        self._net._listening.pop((self.ip, self.port), None)
        for peer_id in list(self._ends):
            self._close(peer_id)
        for peer_id in list(self._calls):
            self._end_call(peer_id, "unreachable")

    # Sending

    def _flood(self, payload: bytes, author: str, *, but: str | None) -> None:
        for peer_id, end in list(self._ends.items()):
            if peer_id in (but, author):
                continue
            dice = self._net.dice(self._peer_id, peer_id)
            self._sent += len(payload)
            if dice.random() < self._net.loss:
                self._net.counts["lost"] += 1
                continue
            other = end.other
            for _ in range(2 if dice.random() < self._net.duplication else 1):
                self._send(other, partial(other._on_gossip, self, author, payload))

    def _answer(self, asker: SimulatedTransport, number: int, answer: bytes | None) -> None:
        self._sent += len(answer or b"")
        self._send(asker, lambda: asker._on_answer(self, number, answer))

    def _send(self, other: SimulatedTransport, arrive: Callable[[], None], *, control: bool = False) -> None:
        """Let something happen at another peer, unless the net is cut when it leaves or when it should arrive."""
        if self._is_dead or self._net.is_cut(self, other):
            return
        now = trio.current_time()
        delay = self._net.dice(self._peer_id, other.peer_id).uniform(*self._net.latency_s)
        at = max(now + delay, self._last_control.get(other.peer_id, 0.0))
        if control:
            self._last_control[other.peer_id] = at
        other._later(at - now, lambda: None if self._net.is_cut(self, other) else arrive())

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        if self._handler is not None and not self._is_dead:
            heapq.heappush(self._inbox, (trio.current_time() + delay_s, next(self._order), what))
            self._ready.set()

    def _is_linked(self, other: SimulatedTransport) -> bool:
        end = self._ends.get(other.peer_id)
        return end is not None and end.other is other

    def _blame(self, peer_id: str, detail: str) -> None:
        assert self._handler is not None
        self._handler.blame(peer_id=peer_id, ip=None, rule="frame", detail=detail)


def _parse(address: str) -> tuple[str, int, str]:
    parts = address.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p" or not parts[4].isdecimal():
        raise PeerError("unreachable", f"not the address of a peer: {address}")
    return parts[2], int(parts[4]), parts[6]
