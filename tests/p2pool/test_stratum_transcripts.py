"""Whole sessions in the style of the miners that exist, byte for byte.

Each file in ``transcripts/`` is one: ``> `` what the miner sends, ``< `` what the node answers, each line without its
line end. Miner's lines that stand together come in one packet. ``| `` is what happens in between:

    new tip, new template    of Bitcoin; every miner is told
    wait 30                  so many seconds pass, one at a time, with the server's ticks
    lost                     the connection breaks, and the next lines come over a new one
    hex 1603                 bytes that the miner sends
    closed REASON            the session is to be closed, for that reason

The node is ``ToyDesk`` at easy targets, so that the nonces are real.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from p2pool.stratum.protocol import Session
from tests.p2pool.test_stratum_protocol import VARDIFF, ToyDesk

FOLDER = Path(__file__).parent / "transcripts"
FILES = sorted(FOLDER.glob("*.txt"))


class Replay:
    """The node's side of a transcript. Mutable: the live session, the closed ones, the time."""

    def __init__(self) -> None:
        self.desk = ToyDesk()
        self.now = 1000.0
        self.numbers = itertools.count(1)
        self.closed: dict[str, Session] = {}
        self.session = self.connect()

    def connect(self) -> Session:
        number = next(self.numbers)
        return Session(
            session_id=f"{number:016x}",
            extranonce1=bytes([0xE0, 0, 0, number]),
            desk=self.desk,
            now=self.now,
            vardiff=VARDIFF,
            resume=lambda session_id: self.closed.pop(session_id, None),
        )

    def event(self, words: str) -> bytes:
        """What the session says of an event."""
        match words.split(" ", 1):
            case ["new", "tip"]:
                self.desk.new_tip()
                for session in self.closed.values():
                    session.on_clean()
                return self.session.on_new_work(True, self.now)
            case ["new", "template"]:
                self.desk.new_template()
                return self.session.on_new_work(False, self.now)
            case ["wait", seconds]:
                said = b""
                for _ in range(int(seconds)):
                    self.now += 1
                    said += self.session.on_tick(self.now)
                return said
            case ["lost"]:
                self.session.on_close()
                self.closed[self.session.session_id] = self.session
                self.session = self.connect()
                return b""
            case ["hex", digits]:
                return self.session.receive(bytes.fromhex(digits), self.now)
            case ["closed", reason]:
                assert self.session.closing == reason
                return b""
        raise AssertionError(f"no such event: {words}")

    def say(self, lines: list[str]) -> bytes:
        """What the session answers to lines in one packet."""
        return self.session.receive(b"".join(line.encode() + b"\n" for line in lines), self.now)


def test_there_are_transcripts() -> None:
    assert len(FILES) >= 14


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_session_of_each_kind_of_miner_is_answered_byte_for_byte(file: Path) -> None:
    replay = Replay()
    said = b""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for kind, group in itertools.groupby(lines, key=lambda line: line[:2]):
        texts = [line[2:] for line in group]
        if kind == "< ":
            expected = "".join(text + "\n" for text in texts).encode()
            assert said == expected
            said = b""
            continue
        assert said == b"", "the node said more than the transcript has"
        if kind == "> ":
            said = replay.say(texts)
        else:
            assert kind == "| ", kind
            for text in texts:
                assert said == b""
                said = replay.event(text)
    assert said == b""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_line_of_the_node_keeps_to_the_form(file: Path) -> None:
    """An answer has id, result and error; a job comes after a difficulty; a difficulty never without a job."""
    said = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("< ")]
    messages = [json.loads(line) for line in said if line.startswith("{")]
    for message, following in itertools.zip_longest(messages, messages[1:]):
        if "method" not in message:
            assert list(message) == ["id", "result", "error"]
            assert (message["result"] is None) == (message["error"] is not None)
        elif message["method"] == "mining.set_difficulty":
            assert following["method"] == "mining.notify"
    ids = [message["params"][0] for message in messages if message.get("method") == "mining.notify"]
    assert len(set(ids)) == len(ids)
