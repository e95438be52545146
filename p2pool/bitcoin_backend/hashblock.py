"""Hears of new blocks on the ZMQ socket of Bitcoin Core (``zmqpubhashblock``): some tenths of a millisecond sooner.

A hint and nothing more: messages may be lost, and none comes when a block leaves the chain. The tip is followed over
RPC whatever is heard here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from p2pool.errors import ConfigError

__all__ = ["check_zmq", "follow_blocks"]

logger = logging.getLogger("p2pool.bitcoin")

#: Seconds between two looks at the socket without a sign of life: its descriptor tells of changes only.
LOOK_INTERVAL_S: Final = 1.0
#: Messages that may wait; a block's arrival is told once in ten minutes.
HIGH_WATER: Final = 100


def check_zmq(address: str) -> None:
    """Whether an address can be listened to.

    Raises:
        ConfigError: pyzmq is not installed, or the address is none.
    """
    try:
        import zmq
    except ImportError:
        raise ConfigError("--zmq: needs pyzmq: pip install 'p2pool[zmq]'") from None
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"--zmq: {address}: {error}: an address as in tcp://127.0.0.1:28332 is needed") from None


async def follow_blocks(address: str, on_block: Callable[[], None]) -> None:
    """Call `on_block` for each block that is announced, until cancelled. Connects again by itself.

    Arguments:
        address: as in Bitcoin Core's ``zmqpubhashblock``.
        on_block: takes no time.
    """
    import zmq

    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.rcvhwm = HIGH_WATER
        socket.connect(address)
        socket.subscribe(b"hashblock")
        descriptor = int(socket.getsockopt(zmq.FD))
        heard = False
        while True:
            try:
                while True:
                    socket.recv_multipart(zmq.NOBLOCK)
                    if not heard:
                        heard = True
                        logger.info("%s announces blocks", address)
                    on_block()
            except zmq.Again:
                pass
            with trio.move_on_after(LOOK_INTERVAL_S):
                await trio.lowlevel.wait_readable(descriptor)
