"""Announcements on a real ZMQ socket: what counts as a block, a publisher that goes and comes, and wrong addresses."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

import p2pool.bitcoin_backend.hashblock
from p2pool.bitcoin_backend.hashblock import check_zmq, follow_blocks
from p2pool.bitcoin_backend.kernel import KernelBackend
from p2pool.bitcoin_backend.rpc import connect_bitcoin
from p2pool.errors import ConfigError
from tests.p2pool.fakecore import open_fake_core
from tests.p2pool.test_kernel import mine

PATIENCE_S = 20.0


class Publisher:
    """The ZMQ socket of a Bitcoin Core: publishes topic, content and a number that counts.

    Mutable fields: the socket, the number, ``port`` (found at the first start, then it stays).
    """

    def __init__(self) -> None:
        self.port = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._number = 0

    async def start(self) -> None:
        assert self._socket is None
        self._socket = self._context.socket(zmq.XPUB)  # as PUB, and tells who listens
        self._socket.linger = 0
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    self._socket.bind(f"tcp://127.0.0.1:{self.port or '*'}")
                except zmq.ZMQError:  # a thread of ZMQ has not let go of the port of the last time yet
                    await trio.sleep(0.002)
                else:
                    break
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    async def followed(self) -> bytes:
        """Wait for somebody who listens; give the topic."""
        assert self._socket is not None
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    message = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    await trio.sleep(0.002)  # another thread's work, which tells nothing
                else:
                    if message[:1] == b"\x01":
                        return message[1:]

    def publish(self, topic: bytes, content: bytes = bytes(32)) -> None:
        assert self._socket is not None
        self._socket.send_multipart([topic, content, self._number.to_bytes(4, "little")])
        self._number += 1

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self.stop()
        self._context.term()


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    made = Publisher()
    await made.start()
    yield made
    made.close()


@asynccontextmanager
async def following(address: str) -> AsyncIterator[list[float]]:
    """When blocks were heard of."""
    heard: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_blocks, address, lambda: heard.append(trio.current_time()))
        yield heard
        nursery.cancel_scope.cancel()


async def until(reached: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not reached():  # noqa: ASYNC110 - what moves is no task of ours
            await trio.sleep(0.002)


async def test_each_block_is_heard_of(publisher: Publisher, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "p2pool.bitcoin")
    async with following(publisher.address) as heard:
        assert await publisher.followed() == b"hashblock"
        for number in range(3):
            publisher.publish(b"hashblock")
            await until(lambda number=number: len(heard) == number + 1)  # type: ignore[misc]
        for _ in range(50):
            publisher.publish(b"hashblock")
        await until(lambda: len(heard) == 53)
    assert caplog.messages == [f"{publisher.address} announces blocks"]


async def test_what_is_no_block_is_not_heard_of(publisher: Publisher) -> None:
    async with following(publisher.address) as heard:
        await publisher.followed()
        for topic in (b"hashtx", b"rawblock", b"rawtx", b"sequence", b"hash", b"", b"Hashblock"):
            publisher.publish(topic)
        publisher.publish(b"hashblock")  # comes after all others
        await until(lambda: bool(heard))
        publisher.publish(b"hashtx")
        publisher.publish(b"hashblock")
        await until(lambda: len(heard) == 2)
    assert len(heard) == 2


async def test_a_publisher_that_starts_again_is_heard_of_again(publisher: Publisher) -> None:
    async with following(publisher.address) as heard:
        for number in (1, 2, 3):
            await publisher.followed()
            publisher.publish(b"hashblock")
            await until(lambda number=number: len(heard) == number)  # type: ignore[misc]
            publisher.stop()
            await publisher.start()


async def test_a_publisher_that_is_not_there_yet_is_waited_for(publisher: Publisher) -> None:
    publisher.stop()
    async with following(publisher.address) as heard:
        await trio.testing.wait_all_tasks_blocked()
        await publisher.start()
        await publisher.followed()
        publisher.publish(b"hashblock")
        await until(lambda: bool(heard))


async def test_what_came_before_it_was_looked_for_is_found(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket's descriptor tells of changes only: who looks at it too late sees none."""
    monkeypatch.setattr(p2pool.bitcoin_backend.hashblock, "LOOK_INTERVAL_S", 0.01)

    async def never(_: int) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", never)
    async with following(publisher.address) as heard:
        await publisher.followed()
        publisher.publish(b"hashblock")
        await until(lambda: bool(heard))


async def test_a_backend_that_hears_of_a_block_asks_for_the_tip(publisher: Publisher, tmp_path: Path) -> None:
    kernel = KernelBackend.open(tmp_path)
    try:
        async with (
            open_fake_core(kernel) as core,
            connect_bitcoin(
                [core.endpoint],
                network="regtest",
                reserved_weight=20_000,
                reserved_sigops=400,
                zmq=[publisher.address],
            ) as backend,
        ):
            core.delay_s["waitfornewblock"] = 1_000
            tip = await backend.tip()
            seen: list[bytes] = []

            async def wait() -> None:
                seen.append(await backend.wait_for_tip(tip.block_hash))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await until(lambda: core.calls["waitfornewblock"] == 1)
                await publisher.followed()
                publisher.publish(b"hashblock")  # of a block that the node does not have
                await until(lambda: core.calls["waitfornewblock"] == 2)
                assert not seen
                block_hash = mine(kernel)
                publisher.publish(b"hashblock", block_hash[::-1])
                await until(lambda: bool(seen))
            assert seen == [block_hash]
    finally:
        kernel.close()


def test_good_addresses_can_be_listened_to() -> None:
    for address in ("tcp://127.0.0.1:28332", "tcp://[::1]:28332", "ipc:///tmp/no-such-socket"):
        check_zmq(address)


@pytest.mark.parametrize("address", ["", "127.0.0.1:28332", "nonsense://x", "tcp://", "tcp://127.0.0.1", "tcp://h:x"])
def test_what_is_no_address_is_the_operators_mistake(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^--zmq: .*an address as in tcp://127\.0\.0\.1:28332 is needed$"):
        check_zmq(address)


def test_without_pyzmq_the_operator_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"^--zmq: needs pyzmq: pip install 'p2pool\[zmq\]'$"):
        check_zmq("tcp://127.0.0.1:28332")
