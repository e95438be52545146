"""A Stratum session without sockets, line by line as real miners speak it.

`ToyDesk` is a node in miniature that builds and hashes real headers; the tests of the server and the miner use it too.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pool.errors import StratumError
from p2pool.stratum.login import UserOptions, parse_user, payout_class_for
from p2pool.stratum.protocol import (
    MAX_JOBS_REMEMBERED,
    MAX_LINE_BYTES,
    MAX_SUBMISSIONS_REMEMBERED,
    MAX_WORKERS,
    Session,
)
from p2pool.stratum.values import Notify, Submission, SubmissionOutcome, Verdict, Worker
from p2pool.stratum.vardiff import VardiffSettings, target_of_difficulty, target_of_exponent

CLASSES = (12, 47, 146, 367)
USER = "bcrt1qminer.rig1"
SESSION_ID = "a1b2c3d4e5f60718"
EXTRANONCE1 = bytes.fromhex("0badcafe")
VARDIFF = VardiffSettings(start_difficulty=2.0**-28)
"""A submission is 16 hashes; a share of `ToyDesk` 256, a block 4,096."""

Message = dict[str, Any]


def sha256d(data: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


class ToyDesk:
    """Hands out jobs and hashes what comes back. `judged` holds each submission with its verdict, in order."""

    def __init__(self) -> None:
        #: Whether the sharechain takes shares on the Bitcoin block before, as ours does.
        self.takes_late_shares = False
        self.share_target = target_of_exponent(-24)
        self.block_target = target_of_exponent(-20)
        self.previous = bytes(range(32))
        self.template: int | None = 0
        self.padding = b""
        self.jobs: dict[str, Notify] = {}
        self.judged: list[tuple[Submission, Verdict]] = []
        self.authorized: list[tuple[str, str, str]] = []
        self.noted: list[tuple[Worker, SubmissionOutcome]] = []

    def new_template(self) -> None:
        self.template = (self.template or 0) + 1

    def new_tip(self) -> None:
        self.previous = sha256d(self.previous)
        self.new_template()

    def authorize(self, *, user: str, password: str, user_agent: str) -> Worker:
        self.authorized.append((user, password, user_agent))
        options = parse_user(user, password)
        if not options.address.startswith("bcrt1"):
            raise StratumError(24, f"not an address of regtest: {options.address}")
        return Worker(
            user=user,
            name=options.worker_name,
            address=options.address,
            payout_script=options.address.encode(),
            payout_class=payout_class_for(user_agent, CLASSES),
            session_difficulty=options.session_difficulty,
            share_difficulty=options.share_difficulty,
        )

    def notify_for(self, worker: Worker) -> Notify | None:
        if self.template is None:
            return None
        job_id = sha256d(worker.payout_script + self.previous + bytes([worker.payout_class % 256, self.template])).hex()
        if job_id not in self.jobs:
            self.jobs[job_id] = Notify(
                job_id=job_id,
                previous_block_hash=self.previous,
                coinb1=b"\x01\x02coinbase" + bytes([self.template]),
                coinb2=worker.payout_script * 3 + self.padding,
                branch=(sha256d(b"left"), sha256d(b"right")),
                version=0x30000000,
                bits=0x207FFFFF,
                time=1_700_000_000,
                share_target=self.share_target,
                block_target=self.block_target,
            )
        return self.jobs[job_id]

    def note(self, worker: Worker, outcome: SubmissionOutcome) -> None:
        self.noted.append((worker, outcome))

    def judge(self, worker: Worker, submission: Submission) -> Verdict:
        job = self.jobs.get(submission.job_id)
        if job is None:
            raise StratumError(21, "job not found")
        root = sha256d(job.coinb1 + submission.extranonce1 + submission.extranonce2 + job.coinb2)
        for node in job.branch:
            root = sha256d(root + node)
        header = struct.pack("<I", submission.header_version(job.version)) + job.previous_block_hash + root
        header += struct.pack("<III", submission.time, job.bits, submission.nonce)
        value = int.from_bytes(sha256d(header), "little")
        stale = job.previous_block_hash != self.previous
        verdict = Verdict(
            hash_value=value,
            stale=stale,
            is_share=value <= job.share_target and (self.takes_late_shares or not stale),
            is_block=value <= job.block_target,
        )
        self.judged.append((submission, verdict))
        return verdict


def find_nonce(
    notify: list[Any],
    extranonce1: str,
    *,
    extranonce2: str = "00" * 8,
    above: int = -1,
    at_most: int,
    version_bits: int = 0,
    start: int = 0,
) -> int:
    """Mine as a miner does, from the words of `mining.notify` alone: a hash in (above, at_most]."""
    _, previous, coinb1, coinb2, branch, version, bits, time, _ = notify
    root = sha256d(bytes.fromhex(coinb1 + extranonce1 + extranonce2 + coinb2))
    for node in branch:
        root = sha256d(root + bytes.fromhex(node))
    words = b"".join(bytes.fromhex(previous[i : i + 8])[::-1] for i in range(0, 64, 8))
    header = struct.pack("<I", int(version, 16) | version_bits) + words + root
    header += bytes.fromhex(time)[::-1] + bytes.fromhex(bits)[::-1]
    for nonce in range(start, 1 << 32):
        if above < int.from_bytes(sha256d(header + struct.pack("<I", nonce)), "little") <= at_most:
            return nonce
    raise AssertionError("no nonce")


SHARE = target_of_exponent(-24)
BLOCK = target_of_exponent(-20)
SUBMISSION = target_of_exponent(-28)


class Talk:
    """A session and the miner's side of the conversation with it."""

    def __init__(self, desk: ToyDesk | None = None, **options: Any) -> None:
        self.desk = desk or ToyDesk()
        self.now = 1000.0
        options.setdefault("session_id", SESSION_ID)
        options.setdefault("extranonce1", EXTRANONCE1)
        options.setdefault("vardiff", VARDIFF)
        self.session = Session(desk=self.desk, now=self.now, **options)
        self.notify: list[Any] = []
        self.difficulty: float | None = None

    def hear(self, data: bytes) -> list[Message]:
        """Decode what the session sent, remember the work as a miner does."""
        assert data == b"" or data.endswith(b"\n")
        messages: list[Message] = [json.loads(line) for line in data.splitlines()]
        for message in messages:
            if message.get("method") == "mining.notify":
                self.notify = message["params"]
            elif message.get("method") == "mining.set_difficulty":
                self.difficulty = message["params"][0]
        return messages

    def raw(self, data: bytes) -> list[Message]:
        return self.hear(self.session.receive(data, self.now))

    def say(self, method: str, *params: object, id: object = 7) -> list[Message]:
        return self.raw(json.dumps({"id": id, "method": method, "params": params}).encode() + b"\n")

    def ask(self, method: str, *params: object) -> Message:
        """Say something and return the answer, which is the first line."""
        answer = self.say(method, *params)[0]
        assert set(answer) == {"id", "result", "error"}
        return answer

    def start(self, agent: str = "cpuminer/2.5.1", user: str = USER) -> Talk:
        self.say("mining.subscribe", agent, id=1)
        self.say("mining.authorize", user, "x", id=2)
        assert self.notify
        return self

    def submit(self, nonce: int, *, notify: list[Any] | None = None, user: str = USER, **other: Any) -> Message:
        notify = notify or self.notify
        words = {"extranonce2": "00" * 8, "time": notify[7]} | other
        params = [user, notify[0], words["extranonce2"], words["time"], f"{nonce:08x}"]
        if "version_bits" in words:
            params.append(words["version_bits"])
        return self.ask("mining.submit", *params)

    def mine(self, *, above: int = BLOCK, at_most: int = SHARE, start: int = 0) -> int:
        return find_nonce(self.notify, EXTRANONCE1.hex(), above=above, at_most=at_most, start=start)


def methods(messages: list[Message]) -> list[str]:
    return [message.get("method", "reply") for message in messages]


def code_of(message: Message) -> int | None:
    assert (message["error"] is None) == (message["result"] is not None)
    if message["error"] is None:
        return None
    code, text, traceback = message["error"]
    assert isinstance(text, str)
    assert text
    assert traceback is None
    return int(code)


# Framing and ids


def test_lines_may_end_in_carriage_return_and_newline_and_blank_lines_are_nothing() -> None:
    talk = Talk()
    answers = talk.raw(b'{"id":1,"method":"mining.ping","params":[]}\r\n\r\n\n{"id":2,"method":"mining.ping"}\n')
    assert [answer["id"] for answer in answers] == [1, 2]


def test_a_line_may_come_in_pieces() -> None:
    talk = Talk()
    assert talk.raw(b'{"id":1,"method":"mini') == []
    assert talk.session.line_since == 1000.0
    assert talk.raw(b'ng.ping"}\n')[0]["result"] == "pong"
    assert talk.session.line_since is None


def test_several_lines_may_come_in_one_packet_and_are_answered_in_order() -> None:
    talk = Talk()
    lines = b"".join(b'{"id":%d,"method":"mining.ping"}\n' % i for i in range(20))
    assert [answer["id"] for answer in talk.raw(lines)] == list(range(20))


def test_a_line_begun_long_ago_shows_since_when() -> None:
    talk = Talk()
    talk.raw(b"{")
    talk.now += 50
    talk.raw(b" ")
    assert talk.session.line_since == 1000.0
    talk.raw(b'"id":1,"method":"mining.ping"}\n{')
    assert talk.session.line_since == 1050.0


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_a_line_above_8_kib_ends_the_session(ending: bytes) -> None:
    talk = Talk()
    assert talk.raw(b'{"id":1,"method":"mining.ping"}\n' + b" " * (MAX_LINE_BYTES + 1) + ending) != []
    assert talk.session.closing
    assert talk.raw(b'{"id":1,"method":"mining.ping"}\n') == []


def test_a_line_of_8_kib_is_read() -> None:
    talk = Talk()
    line = b'{"id":1,"method":"mining.ping"}'
    assert talk.raw(line + b" " * (MAX_LINE_BYTES - len(line)) + b"\n")[0]["result"] == "pong"


def test_a_tls_client_hello_is_closed_at_once_without_an_answer() -> None:
    talk = Talk()
    assert talk.session.receive(bytes.fromhex("16030100c8010000c40303"), 0.0) == b""
    assert talk.session.closing == "TLS on a plain port"


def test_an_http_request_is_answered_400_and_closed() -> None:
    talk = Talk()
    answer = talk.session.receive(b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n", 0.0)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert talk.session.closing


@pytest.mark.parametrize(
    "line",
    [b"hello", b"[]", b"5", b'"text"', b"null", b"{", b'{"id":NaN}', b"[" * 8000, b'{"id":' + b"9" * 5000 + b"}"],
)
def test_what_is_no_json_object_ends_the_session_without_an_answer(line: bytes) -> None:
    talk = Talk()
    assert talk.raw(line + b"\n") == []
    assert talk.session.closing == "not a JSON object"


def test_invalid_utf_8_in_a_user_name_is_an_answer_not_an_end() -> None:
    talk = Talk()
    answer = talk.raw(b'{"id":1,"method":"mining.authorize","params":["\xe9\xff","x"]}\n')[0]
    assert code_of(answer) == 24
    assert talk.session.closing is None


def test_a_lone_surrogate_in_a_user_name_cannot_break_a_log() -> None:
    talk = Talk()
    talk.raw(rb'{"id":1,"method":"mining.authorize","params":["bcrt1\ud800","x"]}' + b"\n")
    assert talk.desk.authorized[0][0].encode() == b"bcrt1?"


@pytest.mark.parametrize("identity", [0, 1, -5, 4294967296, "auth", "", "\u00e9", 1.5, True])
def test_the_id_comes_back_verbatim_with_its_type(identity: object) -> None:
    answer = Talk().say("mining.ping", id=identity)[0]
    assert answer["id"] == identity
    assert type(answer["id"]) is type(identity)


def test_ids_need_not_be_unique() -> None:
    talk = Talk().start()
    nonce = talk.mine()
    for _ in range(2):
        params = [USER, talk.notify[0], "00" * 8, talk.notify[7], f"{nonce:08x}"]
        assert talk.say("mining.submit", *params, id=4)[0]["id"] == 4


def test_a_null_id_is_never_answered() -> None:
    talk = Talk()
    assert talk.say("mining.capabilities", {"notify": []}, id=None) == []
    assert talk.raw(b'{"method":"mining.ping","params":[]}\n') == []
    assert talk.raw(b'{"id":[1],"method":"mining.ping","params":[]}\n') == []
    assert talk.raw(b'{"id":1e999,"method":"mining.ping","params":[]}\n') == []
    assert talk.session.closing is None


def test_a_null_id_still_has_its_effect() -> None:
    talk = Talk()
    talk.say("mining.subscribe", "x")
    assert methods(talk.say("mining.authorize", USER, "x", id=None)) == ["mining.set_difficulty", "mining.notify"]


def test_a_message_without_method_is_the_miners_answer_and_never_answered() -> None:
    assert Talk().raw(b'{"id":1,"result":"cgminer/4.11.1","error":null}\n') == []


@pytest.mark.parametrize("method", ["mining.nonsense", "", "eth_submitLogin", "mining.capabilities"])
def test_an_unknown_method_is_error_20_and_no_disconnect(method: str) -> None:
    talk = Talk()
    assert code_of(talk.ask(method)) == 20
    assert talk.session.closing is None


@pytest.mark.parametrize("method", [5, None, [], {}])
def test_a_method_that_is_no_string_is_error_20(method: object) -> None:
    talk = Talk()
    assert code_of(talk.raw(json.dumps({"id": 1, "method": method}).encode() + b"\n")[0]) == 20


@pytest.mark.parametrize(
    "method",
    ["mining.subscribe", "mining.authorize", "mining.submit", "mining.configure", "mining.suggest_difficulty"],
)
@pytest.mark.parametrize("params", [None, {}, {"user": 1}, 5, "x", [], [None], [[]], [{}], [None] * 7, [[[[]]]] * 6])
def test_missing_or_odd_parameters_are_answered(method: str, params: object) -> None:
    for talk in (Talk(), Talk().start()):
        answers = talk.raw(json.dumps({"id": 3, "method": method, "params": params}).encode() + b"\n")
        assert answers[0]["id"] == 3
        assert talk.session.closing is None


# Order


def test_the_opening_is_subscribe_reply_authorize_reply_difficulty_clean_job() -> None:
    talk = Talk()
    assert methods(talk.say("mining.subscribe", "cpuminer/2.5.1")) == ["reply"]
    opening = talk.say("mining.authorize", USER, "x")
    assert methods(opening) == ["reply", "mining.set_difficulty", "mining.notify"]
    assert opening[0]["result"] is True
    assert opening[2]["params"][8] is True


def test_nothing_is_sent_before_the_subscribe_reply_or_between_it_and_the_authorize_reply() -> None:
    talk = Talk()
    assert talk.session.on_new_work(True, talk.now) == b""
    assert talk.session.on_tick(talk.now) == b""
    talk.say("mining.subscribe", "x")
    assert talk.session.on_new_work(True, talk.now) == b""
    assert talk.session.on_tick(talk.now) == b""


def test_a_bitaxe_pipelines_configure_subscribe_and_authorize() -> None:
    talk = Talk()
    answers = talk.raw(
        b'{"id": 1, "method": "mining.configure", "params": [["version-rolling"], '
        b'{"version-rolling.mask": "ffffffff"}]}\n'
        b'{"id": 2, "method": "mining.subscribe", "params": ["bitaxe/BM1366/v2.4.0"]}\n'
        b'{"id": 3, "method": "mining.authorize", "params": ["bcrt1qbitaxe", "x"]}\n'
        b'{"id": 4, "method": "mining.suggest_difficulty", "params": [1000]}\n'
    )
    assert methods(answers)[:5] == ["reply", "reply", "reply", "mining.set_difficulty", "mining.notify"]
    assert [answer["id"] for answer in answers if "method" not in answer] == [1, 2, 3, 4]
    assert talk.desk.authorized[-1] == ("bcrt1qbitaxe", "x", "bitaxe/BM1366/v2.4.0")


def test_an_authorize_before_the_subscribe_is_answered_and_the_work_follows_the_subscribe_reply() -> None:
    talk = Talk()
    assert methods(talk.say("mining.authorize", USER, "pw")) == ["reply"]
    assert methods(talk.say("mining.subscribe", "bitaxe/x")) == ["reply", "mining.set_difficulty", "mining.notify"]
    assert talk.desk.authorized == [(USER, "pw", ""), (USER, "pw", "bitaxe/x")], "the user agent counts for the class"


def test_an_agent_that_cannot_mine_here_is_refused_at_subscribe_if_it_authorized_before() -> None:
    talk = Talk()
    talk.say("mining.authorize", USER, "x")
    assert code_of(talk.ask("mining.subscribe", "NiceHash/1.0.0")) == 24
    assert not talk.session.is_authorized


def test_a_second_subscribe_gets_the_same_answer_and_no_second_job() -> None:
    talk = Talk()
    first = talk.ask("mining.subscribe", "x")
    talk.say("mining.authorize", USER, "x")
    again = talk.say("mining.subscribe", "y", "other")
    assert again == [first]


def test_a_foreign_session_id_is_ignored() -> None:
    talk = Talk(resume=lambda session_id: None)
    assert talk.ask("mining.subscribe", "cgminer/4.11.1", "deadbeef")["result"][1] == EXTRANONCE1.hex()


def test_work_that_comes_after_the_authorize_is_sent_as_clean() -> None:
    desk = ToyDesk()
    desk.template = None
    talk = Talk(desk)
    talk.say("mining.subscribe", "x")
    assert methods(talk.say("mining.authorize", USER, "x")) == ["reply"]
    assert talk.session.on_new_work(True, talk.now) == b""
    desk.new_template()
    assert methods(talk.hear(talk.session.on_new_work(False, talk.now))) == ["mining.set_difficulty", "mining.notify"]
    assert talk.notify[8] is True


# mining.configure


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"version-rolling.mask": "ffffffff"}, {"version-rolling": True, "version-rolling.mask": "1fffe000"}),
        ({"version-rolling.mask": "00c00000"}, {"version-rolling": True, "version-rolling.mask": "00c00000"}),
        ({"version-rolling.mask": "ffff"}, {"version-rolling": True, "version-rolling.mask": "0000e000"}),
        ({"version-rolling.mask": "e0000000"}, {"version-rolling": False}),
        ({"version-rolling.mask": "x"}, {"version-rolling": False}),
        ({"version-rolling.mask": 5}, {"version-rolling": False}),
        ({}, {"version-rolling": True, "version-rolling.mask": "1fffe000"}),
    ],
)
def test_the_masks_of_pool_and_miner_are_anded(asked: Mapping[str, object], answer: Mapping[str, object]) -> None:
    assert Talk().ask("mining.configure", ["version-rolling"], asked)["result"] == answer


def test_only_requested_extensions_are_answered_unknown_ones_false_and_never_min_bit_count() -> None:
    answer = Talk().ask(
        "mining.configure",
        ["version-rolling", "minimum-difficulty", "info", "subscribe-extranonce", 5],
        {"version-rolling.mask": "1fffe000", "version-rolling.min-bit-count": 2, "minimum-difficulty.value": 2048},
    )
    assert answer["result"] == {
        "version-rolling": True,
        "version-rolling.mask": "1fffe000",
        "minimum-difficulty": False,
        "info": False,
        "subscribe-extranonce": True,
    }


@pytest.mark.parametrize("params", [[], [[]], [[], {}], [None, None]])
def test_an_empty_configure_still_gets_a_reply(params: list[object]) -> None:
    assert Talk().ask("mining.configure", *params)["result"] == {}


def test_the_negotiated_bits_are_cleared_in_the_version_of_each_job() -> None:
    talk = Talk().start()
    assert talk.notify[5] == "30000000"
    configured = talk.say("mining.configure", ["version-rolling"], {"version-rolling.mask": "ffffffff"})
    assert methods(configured) == ["reply", "mining.notify"], "a job under the new mask follows at once"
    assert talk.notify[5] == "20000000"
    assert talk.notify[8] is False


@pytest.mark.parametrize("rolled", [0, 0x00002000, 0x10000000, 0x1FFFE000])
def test_version_bits_that_replace_are_ored_or_are_xored_are_the_same_header(rolled: int) -> None:
    talk = Talk()
    talk.say("mining.configure", ["version-rolling"], {"version-rolling.mask": "ffffffff"})
    talk.start()
    job_version = int(talk.notify[5], 16)
    assert job_version & 0x1FFFE000 == 0
    assert job_version | rolled == job_version ^ rolled == (job_version & ~0x1FFFE000) | rolled
    nonce = find_nonce(talk.notify, EXTRANONCE1.hex(), at_most=SHARE, version_bits=rolled)
    assert talk.submit(nonce, version_bits=f"{rolled:x}")["result"] is True


def test_a_submission_is_judged_by_the_mask_that_its_job_was_sent_with() -> None:
    talk = Talk().start()
    old = talk.notify
    nonce = talk.mine()
    talk.say("mining.configure", ["version-rolling"], {"version-rolling.mask": "ffffffff"})
    assert talk.submit(nonce, notify=old)["result"] is True
    assert talk.desk.judged[-1][0].version_mask == 0


def test_version_bits_outside_the_mask_do_not_count() -> None:
    submission = Submission(
        worker="",
        job_id="",
        extranonce1=b"",
        extranonce2=b"",
        time=0,
        nonce=0,
        version_bits=0x20002000,
        version_mask=0x1FFFE000,
    )
    assert submission.header_version(0x30000000) == 0x20002000
    assert replace(submission, version_mask=0).header_version(0x30000000) == 0x30000000
    assert replace(submission, version_bits=None).header_version(0x20000000) == 0x20000000


# mining.subscribe


def test_the_subscribe_reply_has_both_subscriptions_extranonce1_of_4_bytes_and_size_8() -> None:
    result = Talk().ask("mining.subscribe", "cgminer/4.11.1")["result"]
    assert result == [[["mining.set_difficulty", SESSION_ID], ["mining.notify", SESSION_ID]], "0badcafe", 8]


@pytest.mark.parametrize("params", [[], [None], [None, None], ["x", None], [5, 5]])
def test_a_subscribe_needs_no_parameters(params: list[object]) -> None:
    assert Talk().ask("mining.subscribe", *params)["result"][2] == 8


def test_an_extranonce1_of_another_size_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="expected 4 bytes, got 0"):
        Talk(extranonce1=b"")


# mining.authorize


@pytest.mark.parametrize(
    ("user", "password", "expected"),
    [
        ("addr", "x", ("addr", "", None, None)),
        ("addr.rig", "", ("addr", "rig", None, None)),
        ("addr.rig.2", "", ("addr", "rig.2", None, None)),
        ("addr+1024", "", ("addr", "", 1024.0, None)),
        ("addr/32", "", ("addr", "", None, 32.0)),
        ("addr+1024/32", "", ("addr", "", 1024.0, 32.0)),
        ("addr/32+1024", "", ("addr", "", 1024.0, 32.0)),
        ("addr.rig+0.5", "", ("addr", "rig", 0.5, None)),
        ("addr+1024.rig", "", ("addr", "rig", 1024.0, None)),
        ("addr+1024.5rig", "", ("addr", "5rig", 1024.0, None)),
        ("addr+4.6e-10", "", ("addr", "", 4.6e-10, None)),
        ("addr%2B512%2F8", "", ("addr", "", 512.0, 8.0)),
        ("addr%2b512%2f8.w", "", ("addr", "w", 512.0, 8.0)),
        ("addr", "d=2048", ("addr", "", 2048.0, None)),
        ("addr", "x,diff=2048", ("addr", "", 2048.0, None)),
        ("addr", "c=BTC;d=16;stats", ("addr", "", 16.0, None)),
        ("addr+4", "d=2048", ("addr", "", 4.0, None)),
        ("addr", "d=0", ("addr", "", None, None)),
        ("addr", "d=-5", ("addr", "", None, None)),
        ("addr", "d=1e999", ("addr", "", None, None)),
        ("addr", "id=5", ("addr", "", None, None)),
        ("addr", "d=1-1", ("addr", "", None, None)),
        ("addr+0", "", ("addr", "", None, None)),
        ("addr.a/b", "", ("addr", "a/b", None, None)),
        (" addr ", "", ("addr", "", None, None)),
        ("addr.\x1b[2J\n", "", ("addr", "?[2J?", None, None)),
        ("rig1", "x", ("rig1", "", None, None)),
        ("", "", ("", "", None, None)),
    ],
)
def test_what_is_written_in_user_names_and_passwords(
    user: str, password: str, expected: tuple[str, str, float | None, float | None]
) -> None:
    options = parse_user(user, password)
    assert options == UserOptions(
        address=expected[0], worker_name=expected[1], session_difficulty=expected[2], share_difficulty=expected[3]
    )


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_user_and_password_parse(user: str, password: str) -> None:
    options = parse_user(user, password)
    assert options.session_difficulty is None or options.session_difficulty > 0


@pytest.mark.parametrize("user", ["1BitcoinEaterAddressDontSendf59kuE", "bc1qmainnet", "rig1", "x" * 4000])
def test_a_refused_address_is_error_24_with_the_desks_text(user: str) -> None:
    talk = Talk()
    talk.say("mining.subscribe", "x")
    answers = talk.say("mining.authorize", user, "x")
    assert code_of(answers[0]) == 24
    assert "not an address" in answers[0]["error"][1]
    assert methods(answers) == ["reply"], "no work for nobody"


def test_an_authorize_without_a_user_is_error_24() -> None:
    assert code_of(Talk().ask("mining.authorize")) == 24


def test_several_authorizes_are_each_answered_and_one_refusal_hurts_nobody_else() -> None:
    talk = Talk().start()
    other = "bcrt1qminer.rig2"
    assert methods(talk.say("mining.authorize", other, "x")) == ["reply"]
    assert code_of(talk.ask("mining.authorize", "elsewhere", "x")) == 24
    assert talk.ask("mining.authorize", USER, "x")["result"] is True
    assert talk.submit(talk.mine(), user=other)["result"] is True
    assert code_of(talk.submit(talk.mine(start=100_000), user="elsewhere")) == 24


def test_a_user_with_another_address_is_refused_as_its_work_would_be_paid_to_the_first() -> None:
    talk = Talk().start()
    answer = talk.ask("mining.authorize", "bcrt1qother.rig", "x")
    assert code_of(answer) == 24
    assert answer["error"][1] == "this connection mines for bcrt1qminer: open another one for bcrt1qother"
    assert code_of(talk.submit(talk.mine(), user="bcrt1qother.rig")) == 24
    assert talk.ask("mining.authorize", USER, "again")["result"] is True


def test_there_is_an_end_to_user_names_on_one_connection() -> None:
    talk = Talk()
    codes = [code_of(talk.ask("mining.authorize", f"bcrt1qminer.{i}", "x")) for i in range(MAX_WORKERS + 1)]
    assert codes == [None] * MAX_WORKERS + [24]


def test_a_user_refused_after_all_gets_no_more_work() -> None:
    talk = Talk().start()
    talk.desk.authorize = refuse  # type: ignore[method-assign]
    assert code_of(talk.ask("mining.authorize", USER, "x")) == 24
    assert talk.session.on_new_work(False, talk.now) == b""


def refuse(*, user: str, password: str, user_agent: str) -> Worker:
    raise StratumError(24, f"no more {user}")


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("", 12),
        ("cgminer/4.11.1", 12),
        ("bmminer/2.0.0/Antminer S19/2022", 12),
        ("Antminer S19 Pro/Mon", 12),
        ("Antminer S21/Tue Nov 28 2023", 47),
        ("Antminer S21 Pro/Tue Nov 28 2023", 12),
        ("Antminer S21+/Tue", 12),
        ("bosminer-plus-tuner 0.9.0", 47),
        ("whatsminer/v1.0", 146),
        ("bitaxe/BM1370/v2.9.0", 146),
        ("PowerPlay-BM/1.0", 367),
        ("xminer-1.2.7", 367),
        ("cpuminer/2.5.1", 367),
        ("cpuminer-opt-26.1-x64L", 367),
        ("p2pool-cpuminer/0.1.0", 367),
    ],
)
def test_the_payout_class_follows_the_coinbase_that_the_firmware_takes(agent: str, expected: int) -> None:
    assert payout_class_for(agent, CLASSES) == expected


def test_the_payout_class_is_one_of_those_that_the_chain_has() -> None:
    assert payout_class_for("bitaxe", (12, 100)) == 100
    assert payout_class_for("p2pool-cpuminer/1", (12, 1000, 47)) == 1000
    assert payout_class_for("cpuminer/2.5.1", (12, 1000, 47)) == 47


def test_the_operator_knows_better_than_the_table() -> None:
    overrides = (("My Rig", 47), ("nerdminer", 12))
    assert payout_class_for("my rig/2", CLASSES, overrides) == 47
    assert payout_class_for("NerdMinerV2/1.6.1", CLASSES, overrides) == 12
    assert payout_class_for("bitaxe/1", CLASSES, overrides) == 146
    assert payout_class_for("bitaxe/1", CLASSES, (("", 367),)) == 367


@pytest.mark.parametrize(
    ("agent", "text"),
    [
        (
            "NiceHash/1.0.0",
            "NiceHash cannot mine here: it takes a coinbase of 500 bytes, and ours pays every miner in at least 716: "
            "a larger one, or one that is long before the extranonce, is refused",
        ),
        (
            "NerdMinerV2/1.6.1",
            "NerdMiner cannot mine here: it takes a coinbase of 255 bytes, and ours pays every miner in at least 716: "
            "a larger one is cut, which makes every share wrong",
        ),
    ],
)
def test_what_fits_no_class_is_refused_with_a_text_that_says_so(agent: str, text: str) -> None:
    with pytest.raises(StratumError) as caught:
        payout_class_for(agent, CLASSES)
    assert (caught.value.code, caught.value.message) == (24, text)
    with pytest.raises(StratumError, match="this firmware cannot mine here: it takes a coinbase of 755 bytes"):
        payout_class_for("anything", (47, 146))
    talk = Talk()
    talk.say("mining.subscribe", agent)
    assert code_of(talk.ask("mining.authorize", USER, "x")) == 24


# mining.set_difficulty and vardiff


def test_difficulty_below_1_is_a_json_number_that_cpuminer_reads() -> None:
    desk = ToyDesk()
    desk.share_target = 2**255 - 1
    talk = Talk(desk).start()
    assert talk.difficulty == 4.656612873077393e-10


def test_difficulty_from_1_on_is_an_integer_power_of_two() -> None:
    desk = ToyDesk()
    desk.share_target, desk.block_target = target_of_difficulty(5000.0), 1
    talk = Talk(desk, vardiff=VardiffSettings(start_difficulty=1e9)).start()
    assert talk.difficulty == 4096
    assert isinstance(talk.difficulty, int)


@pytest.mark.parametrize(("share", "block"), [(-24, -20), (-20, -24)])
def test_the_session_target_is_never_below_share_or_block_target(share: int, block: int) -> None:
    desk = ToyDesk()
    desk.share_target, desk.block_target = target_of_exponent(share), target_of_exponent(block)
    talk = Talk(desk, vardiff=VardiffSettings(start_difficulty=1e6)).start()
    assert talk.difficulty == 2.0**-24


def test_difficulty_is_sent_only_when_it_changed_and_only_immediately_before_a_job() -> None:
    talk = Talk(vardiff=VardiffSettings(start_difficulty=2.0**-31)).start()
    sent: list[str] = []
    nonce = -1
    for _ in range(300):
        talk.now += 0.05
        nonce = talk.mine(above=-1, at_most=target_of_difficulty(talk.difficulty or 1.0), start=nonce + 1)
        notify = talk.notify
        params = [USER, notify[0], "00" * 8, notify[7], f"{nonce:08x}"]
        answers = talk.say("mining.submit", *params)
        assert answers[0]["result"] is True
        sent += methods(answers[1:])
        if talk.now % 1 < 0.05:
            sent += methods(talk.hear(talk.session.on_new_work(False, talk.now)))
    assert sent.count("mining.set_difficulty") >= 2
    assert sent.count("mining.notify") > sent.count("mining.set_difficulty")
    pairs = "".join("D" if method == "mining.set_difficulty" else "N" for method in sent)
    assert "DD" not in pairs
    assert not pairs.endswith("D")


def test_a_silent_miner_is_eased_with_a_fresh_job() -> None:
    talk = Talk(vardiff=VardiffSettings(start_difficulty=2.0**-25)).start()
    first = talk.notify[0]
    talk.now += 25.0
    assert methods(talk.hear(talk.session.on_tick(talk.now))) == ["mining.set_difficulty", "mining.notify"]
    assert talk.difficulty == 2.0**-27
    assert talk.notify[0] != first
    assert talk.notify[8] is False


def test_a_user_may_fix_the_difficulty() -> None:
    talk = Talk().start(user=f"{USER}+{2.0**-27}")
    assert talk.difficulty == 2.0**-27
    talk.now += 1000
    assert methods(talk.hear(talk.session.on_tick(talk.now))) == ["mining.notify"]


@pytest.mark.parametrize("value", [2.0**-26, f"{2.0**-26}", 2.0**-25 * 0.99])
def test_a_suggested_difficulty_is_taken_up_at_any_time(value: object) -> None:
    early = Talk()
    assert early.ask("mining.suggest_difficulty", value)["result"] is True
    early.start()
    assert early.difficulty == 2.0**-26
    late = Talk().start()
    late.now += 2
    assert methods(late.say("mining.suggest_difficulty", value)) == ["reply", "mining.set_difficulty", "mining.notify"]
    assert late.difficulty == 2.0**-26


def test_a_suggestion_right_after_a_job_waits_for_the_tick() -> None:
    talk = Talk().start()
    assert methods(talk.say("mining.suggest_difficulty", 2.0**-26)) == ["reply"]
    talk.now += 1
    assert methods(talk.hear(talk.session.on_tick(talk.now))) == ["mining.set_difficulty", "mining.notify"]


def test_a_suggested_difficulty_cannot_exceed_what_the_targets_allow() -> None:
    talk = Talk()
    assert talk.ask("mining.suggest_difficulty", 1000)["result"] is True
    assert talk.start().difficulty == 2.0**-24


@pytest.mark.parametrize("value", [0, -1, "x", None, [], True, 1e400])
def test_a_senseless_suggestion_is_error_20(value: object) -> None:
    line = json.dumps({"id": 1, "method": "mining.suggest_difficulty", "params": [value]}).replace("Infinity", "1e400")
    assert code_of(Talk().raw(line.encode() + b"\n")[0]) == 20


def test_a_suggested_target_is_taken_up() -> None:
    talk = Talk()
    assert talk.ask("mining.suggest_target", f"{target_of_exponent(-26):064x}")["result"] is True
    assert talk.start().difficulty == 2.0**-26
    for value in ("", "0", "xyz", "f" * 65, None):
        assert code_of(talk.ask("mining.suggest_target", value)) == 20


# mining.notify


def test_the_words_of_a_job() -> None:
    notify = Notify(
        job_id="desk",
        previous_block_hash=bytes.fromhex("0001020304050607" + "aabbccdd" * 6),
        coinb1=b"\x01\xff",
        coinb2=b"\x02",
        branch=(b"\x11" * 32, b"\x22" * 32),
        version=0x20000004,
        bits=0x170AB1CD,
        time=0x65000001,
        share_target=1,
        block_target=2,
    )
    line = notify.encode(job_id="1f", version_mask=0, clean=True)
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "id": None,
        "method": "mining.notify",
        "params": [
            "1f",
            "0302010007060504" + "ddccbbaa" * 6,
            "01ff",
            "02",
            ["11" * 32, "22" * 32],
            "20000004",
            "170ab1cd",
            "65000001",
            True,
        ],
    }
    assert notify.limit == 2
    assert json.loads(replace(notify, branch=()).encode(job_id="1", version_mask=0, clean=False))["params"][4] == []


@pytest.mark.parametrize(
    "broken", [{"previous_block_hash": b""}, {"branch": (b"x",)}, {"version": 2**32}, {"time": -1}, {"bits": 2**40}]
)
def test_a_job_of_the_wrong_shape_is_our_mistake(broken: dict[str, Any]) -> None:
    desk = ToyDesk()
    notify = desk.notify_for(desk.authorize(user=USER, password="", user_agent=""))
    assert notify is not None
    with pytest.raises(ValueError, match="expected"):
        replace(notify, **broken)


def test_every_job_has_a_fresh_short_hexadecimal_id() -> None:
    talk = Talk().start()
    ids = [talk.notify[0]]
    for i in range(40):
        if i % 2:
            talk.desk.new_template()
        talk.hear(talk.session.on_new_work(False, talk.now))
        ids.append(talk.notify[0])
    assert len(set(ids)) == 41
    assert all(0 < len(job_id) <= 8 and int(job_id, 16) for job_id in ids)


def test_clean_is_told_exactly_when_the_tip_of_bitcoin_moved() -> None:
    talk = Talk().start()
    seen = []
    for clean in (False, True, False, False, True):
        talk.hear(talk.session.on_new_work(clean, talk.now))
        seen.append(talk.notify[8])
    assert seen == [False, True, False, False, True]


# mining.submit


def test_a_good_submission_is_accepted_and_judged_with_all_its_words() -> None:
    talk = Talk().start()
    nonce = talk.mine()
    assert talk.submit(nonce)["result"] is True
    [(submission, verdict)] = talk.desk.judged
    assert verdict.is_share
    assert submission.job_id in talk.desk.jobs
    assert (submission.worker, submission.nonce, submission.time) == (USER, nonce, 1_700_000_000)
    assert (submission.extranonce1, submission.extranonce2) == (EXTRANONCE1, bytes(8))
    assert (submission.version_bits, submission.version_mask) == (None, 0)


def test_a_submission_that_is_no_share_is_accepted_at_the_session_difficulty() -> None:
    talk = Talk().start()
    assert talk.submit(talk.mine(above=SHARE, at_most=SUBMISSION))["result"] is True


def test_words_may_lack_leading_zeros() -> None:
    talk = Talk().start()
    nonce = find_nonce(talk.notify, EXTRANONCE1.hex(), at_most=SUBMISSION)
    answer = talk.ask("mining.submit", USER, talk.notify[0], "00" * 8, talk.notify[7], f"{nonce:x}")
    assert len(f"{nonce:x}") < 8
    assert answer["result"] is True


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (2, "00" * 7),
        (2, "00" * 9),
        (2, "0x" + "00" * 7),
        (2, 0),
        (2, " " * 16),
        (3, "123456789"),
        (3, ""),
        (3, "-1"),
        (3, "+1"),
        (3, "1_0"),
        (3, "\u0661"),
        (3, 5),
        (4, "xyz"),
        (4, None),
        (5, "zz"),
        (5, 7),
        (5, [1]),
    ],
)
def test_malformed_words_are_error_20_and_never_judged(position: int, value: object) -> None:
    talk = Talk().start()
    params: list[object] = [USER, talk.notify[0], "00" * 8, talk.notify[7], "00000000", "00000000"]
    params[position] = value
    assert code_of(talk.ask("mining.submit", *params)) == 20
    assert talk.desk.judged == []


def test_fewer_than_five_parameters_are_error_20() -> None:
    talk = Talk().start()
    assert code_of(talk.ask("mining.submit", USER, talk.notify[0], "00" * 8, talk.notify[7])) == 20


def test_a_sixth_parameter_of_null_is_none() -> None:
    talk = Talk().start()
    assert talk.submit(talk.mine(), version_bits=None)["result"] is True


def test_a_submit_before_subscribe_is_error_25_and_before_authorize_24() -> None:
    talk = Talk()
    params = [USER, "1", "00" * 8, "00000000", "00000000"]
    assert code_of(talk.ask("mining.submit", *params)) == 25
    talk.say("mining.subscribe", "x")
    assert code_of(talk.ask("mining.submit", *params)) == 24


def test_an_unknown_job_is_error_21() -> None:
    talk = Talk().start()
    for job_id in ("ffff", "", 5, None):
        assert code_of(talk.ask("mining.submit", USER, job_id, "00" * 8, talk.notify[7], "00000000")) == 21


def test_a_job_that_the_desk_has_forgotten_is_error_21() -> None:
    talk = Talk().start()
    talk.desk.jobs.clear()
    assert code_of(talk.submit(0)) == 21
    assert talk.session.statistics(talk.now).rejected == {"stale": 1}


def test_a_duplicate_is_error_22_whatever_its_spelling_or_job_id() -> None:
    talk = Talk().start()
    nonce = talk.mine()
    first = talk.notify
    assert talk.submit(nonce)["result"] is True
    assert code_of(talk.submit(nonce)) == 22
    assert code_of(talk.ask("mining.submit", USER, first[0], "00" * 8, first[7], f"{nonce:X}")) == 22
    talk.hear(talk.session.on_new_work(False, talk.now))  # The same job of the desk under another id.
    assert talk.notify[0] != first[0]
    assert code_of(talk.submit(nonce)) == 22
    assert len(talk.desk.judged) == 4, "judged all the same"


@pytest.mark.parametrize("change", [{"extranonce2": "00" * 7 + "01"}, {"time": "6553f101"}])
def test_another_extranonce2_or_time_is_no_duplicate(change: dict[str, Any]) -> None:
    talk = Talk().start()
    assert talk.submit(talk.mine(above=-1))["result"] is True
    notify = list(talk.notify)
    notify[7] = change.get("time", notify[7])
    extranonce2 = change.get("extranonce2", "00" * 8)
    nonce = find_nonce(notify, EXTRANONCE1.hex(), extranonce2=extranonce2, at_most=SHARE)
    assert talk.submit(nonce, **change)["result"] is True


def test_the_memory_for_duplicates_is_bounded() -> None:
    desk = ToyDesk()
    desk.share_target = 2**256 - 1
    talk = Talk(desk).start()
    for nonce in range(MAX_SUBMISSIONS_REMEMBERED + 1):
        assert talk.submit(nonce)["result"] is True
        assert talk.notify[0] == "1"
    assert code_of(talk.submit(1)) == 22
    assert talk.submit(0)["result"] is True, "forgotten"


def test_a_hash_above_the_session_target_is_error_23_each_time() -> None:
    talk = Talk().start()
    nonce = talk.mine(above=2 ** (224 + 28), at_most=2**256)
    assert [code_of(talk.submit(nonce)) for _ in range(3)] == [23, 23, 23]


def test_a_share_between_the_two_meanings_of_difficulty_1_is_accepted() -> None:
    desk = ToyDesk()
    talk = Talk(desk).start()
    verdict = Verdict(hash_value=target_of_exponent(-28) + 1, stale=False, is_share=False, is_block=False)
    desk.judge = lambda worker, submission: verdict  # type: ignore[method-assign]
    assert talk.submit(1)["result"] is True
    desk.judge = lambda worker, submission: replace(verdict, hash_value=2**252)  # type: ignore[method-assign]
    assert code_of(talk.submit(2)) == 23


def test_a_submission_is_judged_by_the_difficulty_of_its_own_job() -> None:
    talk = Talk().start()
    easy = talk.notify
    nonce = talk.mine(above=target_of_exponent(-26), at_most=SUBMISSION)
    talk.now += 2
    talk.say("mining.suggest_difficulty", 2.0**-26)
    assert talk.notify[0] != easy[0]
    assert code_of(talk.submit(nonce)) == 23
    assert talk.submit(nonce, notify=easy)["result"] is True


def test_work_in_flight_is_good_until_the_tip_of_bitcoin_moves_and_stale_after() -> None:
    talk = Talk().start()
    old, nonce = talk.notify, talk.mine()
    later = talk.mine(start=nonce + 1)
    talk.desk.new_template()
    talk.hear(talk.session.on_new_work(False, talk.now))
    assert talk.submit(nonce, notify=old)["result"] is True
    talk.desk.new_tip()
    talk.hear(talk.session.on_new_work(True, talk.now))
    assert code_of(talk.submit(later, notify=old)) == 21
    assert talk.desk.judged[-1][1].stale, "judged before it was refused"


def test_a_late_share_that_is_paid_is_not_called_stale() -> None:
    """The sharechain takes a share on the Bitcoin block before: whoever is credited must not read a reject."""
    talk = Talk().start()
    talk.desk.takes_late_shares = True
    old, nonce = talk.notify, talk.mine()
    talk.desk.new_tip()
    talk.hear(talk.session.on_new_work(True, talk.now))
    assert talk.submit(nonce, notify=old)["result"] is True


def test_the_desk_may_know_of_a_new_tip_before_the_miner() -> None:
    talk = Talk().start()
    talk.desk.new_tip()
    assert code_of(talk.submit(talk.mine())) == 21


def test_a_block_counts_even_on_a_stale_job() -> None:
    talk = Talk().start()
    old, nonce = talk.notify, talk.mine(above=-1, at_most=BLOCK)
    talk.desk.new_tip()
    talk.hear(talk.session.on_new_work(True, talk.now))
    assert talk.submit(nonce, notify=old)["result"] is True
    assert code_of(talk.submit(nonce, notify=old)) == 22
    assert [verdict.is_block for _, verdict in talk.desk.judged] == [True, True]


def test_a_block_is_judged_even_for_a_user_that_is_not_authorized_here() -> None:
    talk = Talk().start()
    assert code_of(talk.submit(talk.mine(above=-1, at_most=BLOCK), user="somebody")) == 24
    assert talk.desk.judged[-1][1].is_block


def test_jobs_are_remembered_for_long_and_then_forgotten() -> None:
    talk = Talk().start()
    first, nonce = talk.notify, talk.mine()
    for _ in range(MAX_JOBS_REMEMBERED - 1):
        talk.desk.new_template()
        talk.session.on_new_work(False, talk.now)
    assert talk.submit(nonce, notify=first)["result"] is True
    talk.session.on_new_work(False, talk.now)
    assert code_of(talk.submit(nonce, notify=first)) == 21


def test_a_submission_between_coming_back_and_authorizing_is_judged_and_then_refused() -> None:
    desk = ToyDesk()
    lost = Talk(desk).start()
    old, nonce = lost.notify, lost.mine(above=-1, at_most=BLOCK)
    lost.session.on_close()
    back = Talk(desk, session_id="new", extranonce1=b"news", resume={SESSION_ID: lost.session}.get)
    back.say("mining.subscribe", "cgminer/4.11.1", SESSION_ID)
    assert code_of(back.submit(nonce, notify=old)) == 24
    assert desk.judged[-1][1].is_block


# The other methods


def test_a_silent_pool_sends_the_job_in_hand_again_under_a_fresh_id() -> None:
    talk = Talk().start(user=f"{USER}+{2.0**-28}")
    heard = [(talk.now, talk.notify[0])]
    for _ in range(120):
        talk.now += 1.0
        assert methods(talk.say("mining.ping")) == ["reply"]
        if data := talk.session.on_tick(talk.now):
            assert methods(talk.hear(data)) == ["mining.notify"]
            heard.append((talk.now, talk.notify[0]))
            assert talk.notify[8] is False
    assert len({job_id for _, job_id in heard}) == len(heard) == 5
    assert max(later - earlier for (earlier, _), (later, _) in pairwise(heard)) <= 30


def test_a_miner_that_says_what_it_is_is_not_asked() -> None:
    assert "client.get_version" not in methods(Talk().say("mining.subscribe", "x") + Talk().start().say("mining.ping"))


def test_a_miner_that_does_not_say_what_it_is_is_asked_once_behind_its_first_job() -> None:
    talk = Talk()
    talk.say("mining.subscribe")
    opening = talk.say("mining.authorize", USER, "x")
    assert methods(opening) == ["reply", "mining.set_difficulty", "mining.notify", "client.get_version"]
    assert opening[3] == {"id": "p2pool-version", "method": "client.get_version", "params": []}
    assert methods(talk.say("mining.ping")) == ["reply"]
    answer = b'{"id":"p2pool-version","result":"cgminer/4.11.1","error":null}\n'
    assert methods(talk.raw(answer)) == ["mining.notify"]
    assert talk.desk.authorized[-1] == (USER, "x", "cgminer/4.11.1")
    assert talk.raw(answer) == []


@pytest.mark.parametrize(
    "answer", [b'{"id":"p2pool-version","result":null,"error":[20,"no",null]}', b'{"id":9,"result":"x"}']
)
def test_a_miner_that_will_not_say_stays_unknown(answer: bytes) -> None:
    talk = Talk()
    talk.say("mining.subscribe")
    talk.say("mining.authorize", USER, "x")
    assert talk.raw(answer + b"\n") == []
    assert talk.session.closing is None


def test_a_miner_that_turns_out_not_to_fit_is_closed() -> None:
    talk = Talk()
    talk.say("mining.subscribe")
    talk.say("mining.authorize", USER, "x")
    assert talk.raw(b'{"id":"p2pool-version","result":"NiceHash/1.0","error":null}\n') == []
    assert "NiceHash cannot mine here" in (talk.session.closing or "")


def test_the_small_methods() -> None:
    talk = Talk()
    assert talk.ask("mining.ping")["result"] == "pong"
    assert talk.ask("mining.extranonce.subscribe")["result"] is True
    assert talk.ask("mining.get_transactions", "1")["result"] == []


# Coming back


def test_a_miner_that_comes_back_gets_its_extranonce1_and_its_jobs() -> None:
    desk = ToyDesk()
    lost = Talk(desk).start()
    old, nonce = lost.notify, lost.mine()
    assert lost.session.is_worth_resuming
    lost.session.on_new_work(False, lost.now)
    lost.session.on_close()
    assert lost.session.receive(b'{"id":1,"method":"mining.ping"}\n', lost.now) == b""
    assert lost.session.on_new_work(False, lost.now) == b""
    back = Talk(desk, session_id="new", extranonce1=b"news", resume={SESSION_ID: lost.session}.get)
    assert back.ask("mining.subscribe", "cgminer/4.11.1", SESSION_ID)["result"][0][1][1] == SESSION_ID
    assert back.session.extranonce1 == EXTRANONCE1
    assert back.session.session_id == SESSION_ID
    back.say("mining.authorize", USER, "x")
    assert back.notify[0] not in ("1", "2"), "ids go on"
    assert back.notify[8] is False, "its queue is still good"
    assert back.submit(nonce, notify=old)["result"] is True
    assert code_of(back.submit(nonce, notify=old)) == 22


def test_a_miner_that_comes_back_after_a_new_tip_hears_so() -> None:
    desk = ToyDesk()
    lost = Talk(desk).start()
    old, nonce = lost.notify, lost.mine()
    desk.new_tip()
    lost.session.on_clean()
    back = Talk(desk, session_id="new", extranonce1=b"news", resume={SESSION_ID: lost.session}.get)
    back.say("mining.subscribe", "x", SESSION_ID)
    back.say("mining.authorize", USER, "x")
    assert back.notify[8] is True
    assert code_of(back.submit(nonce, notify=old)) == 21


def test_a_session_that_had_no_job_is_not_worth_coming_back_to() -> None:
    talk = Talk()
    talk.say("mining.subscribe", "x")
    assert not talk.session.is_worth_resuming


# Statistics


def test_each_outcome_is_noted_for_the_worker_that_the_miner_named() -> None:
    talk = Talk().start()
    talk.ask("mining.authorize", "bcrt1qminer.rig2", "x")
    share = talk.mine()
    talk.submit(share, user="bcrt1qminer.rig2")
    talk.submit(share)
    talk.submit(share, user="unheard-of")
    [accepted, duplicate, unknown] = talk.desk.noted
    assert (accepted[0].name, accepted[0].address) == ("rig2", "bcrt1qminer")
    assert (accepted[1].reason, accepted[1].difficulty, accepted[1].is_share) == (None, 2.0**-28, True)
    assert 2.0**-24 <= accepted[1].best < 2.0**-20
    assert (duplicate[0].name, duplicate[1]) == ("rig1", SubmissionOutcome(reason="duplicate"))
    assert (unknown[0].name, unknown[1]) == ("rig1", SubmissionOutcome(reason="duplicate"))


def test_statistics_count_every_outcome_by_its_name() -> None:
    talk = Talk()
    assert talk.session.statistics(talk.now).user == ""
    talk.ask("mining.submit")
    talk.start()
    share = talk.mine()
    talk.submit(share)
    talk.submit(share)
    talk.submit(talk.mine(above=-1, at_most=BLOCK))
    talk.submit(talk.mine(above=2**253, at_most=2**256))
    talk.submit(share, user="x")
    talk.ask("mining.submit", USER, "none", "00" * 8, "0", "0")
    talk.ask("mining.submit", USER)
    talk.now += 10
    statistics = talk.session.statistics(talk.now)
    assert (statistics.accepted, statistics.shares, statistics.blocks) == (2, 2, 1)
    assert statistics.rejected == {"not subscribed": 1, "duplicate": 2, "low difficulty": 1, "stale": 1, "malformed": 1}
    assert (statistics.user, statistics.user_agent) == (USER, "cpuminer/2.5.1")
    assert statistics.difficulty == 2.0**-28
    assert statistics.hash_rate > 0
    assert (statistics.connected_at, statistics.heard_at) == (1000.0, 1000.0)


# As real miners say it


def test_the_opening_of_minerd() -> None:
    talk = Talk()
    first = talk.raw(b'{"id": 1, "method": "mining.subscribe", "params": ["cpuminer/2.5.1"]}\n')
    assert first[0]["result"][1:] == ["0badcafe", 8]
    opening = talk.raw(b'{"id": 2, "method": "mining.authorize", "params": ["bcrt1qminer.rig1", "x"]}\n')
    assert methods(opening) == ["reply", "mining.set_difficulty", "mining.notify"]
    nonce = talk.mine()
    submit = (
        '{"method": "mining.submit", "params": ["bcrt1qminer.rig1", "%s", "0000000000000000", "%s", "%08x"], "id":4}\n'
    )
    answer = talk.raw((submit % (talk.notify[0], talk.notify[7], nonce)).encode())
    assert answer == [{"id": 4, "result": True, "error": None}]


def test_the_opening_of_cgminer_with_ids_from_0() -> None:
    talk = Talk()
    answers = talk.raw(
        b'{"id": 0, "method": "mining.configure", "params": [["version-rolling"], '
        b'{"version-rolling.mask": "ffffffff"}]}\n'
    )
    assert answers[0]["id"] == 0
    answers = talk.raw(b'{"id": 1, "method": "mining.subscribe", "params": ["cgminer/4.11.1", "deadbeef"]}\n')
    assert answers[0]["error"] is None
    answers = talk.raw(b'{"id": 2, "method": "mining.authorize", "params": ["bcrt1qminer", "x"]}\n')
    assert methods(answers) == ["reply", "mining.set_difficulty", "mining.notify"]
    assert methods(talk.raw(b'{"id": 3, "method": "mining.extranonce.subscribe", "params": []}\n')) == ["reply"]


def test_the_opening_of_bfgminer_with_ids_of_strings_and_null() -> None:
    talk = Talk()
    answers = talk.raw(b'{"id": 0, "method": "mining.subscribe", "params": ["bfgminer/5.5.0"]}\n')
    assert answers[0]["id"] == 0
    assert talk.raw(b'{"id": null, "method": "mining.capabilities", "params": [{"set_difficulty": {}}]}\n') == []
    assert talk.raw(b'{"id": "xnsub", "method": "mining.extranonce.subscribe", "params": []}\n')[0]["id"] == "xnsub"
    answers = talk.raw(b'{"id": "auth", "method": "mining.authorize", "params": ["bcrt1qminer", ""]}\n')
    assert answers[0] == {"id": "auth", "result": True, "error": None}
    assert methods(answers) == ["reply", "mining.set_difficulty", "mining.notify"]
    assert talk.raw(b'{"id": "txlist1", "method": "mining.get_transactions", "params": ["1"]}\n')[0]["id"] == "txlist1"


# Properties

OPENING = (
    b'{"id":1,"method":"mining.configure","params":[["version-rolling"],{"version-rolling.mask":"ffffffff"}]}\n'
    b'{"id":2,"method":"mining.subscribe","params":["cgminer/4.11.1","deadbeef"]}\r\n'
    b'{"id":3,"method":"mining.authorize","params":["bcrt1qminer.rig1","d=0.5"]}\n'
    b'{"id":4,"method":"mining.submit","params":["bcrt1qminer.rig1","1","0000000000000000","6553f100","00000001"]}\n'
)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, len(OPENING) - 1), st.binary(max_size=3)), max_size=4),
    st.lists(st.integers(0, len(OPENING)), max_size=6),
)
def test_a_damaged_opening_split_anywhere_is_answered_or_closed(
    damage: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = bytearray(OPENING)
    for place, junk in damage:
        data[place : place + len(junk)] = junk
    whole, split = Talk(), Talk()
    answer = whole.session.receive(bytes(data), 2000.0)
    edges = [0, *sorted(cuts), len(data)]
    pieces = [bytes(data[a:b]) for a, b in pairwise(edges)]
    assert answer == b"".join(split.session.receive(piece, 2000.0) for piece in pieces)
    assert answer or whole.session.closing
    for step in (whole.session.on_tick(2100.0), whole.session.on_new_work(True, 2100.0)):
        assert all(isinstance(json.loads(line), dict) for line in step.splitlines())


@pytest.mark.slow
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_arbitrary_bytes_split_anywhere_give_a_reply_or_a_close(data: bytes, cuts: list[int]) -> None:
    whole, split = Talk(), Talk()
    answer = whole.session.receive(data, 2000.0)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert answer == b"".join(split.session.receive(piece, 2000.0) for piece in pieces)
    assert whole.session.closing == split.session.closing


lines = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda method, params, identity: json.dumps({"id": identity, "method": method, "params": params}).encode(),
        st.sampled_from(
            [
                "mining.subscribe",
                "mining.authorize",
                "mining.configure",
                "mining.submit",
                "mining.suggest_difficulty",
                "mining.suggest_target",
                "mining.ping",
            ]
        ),
        st.lists(
            st.recursive(
                st.one_of(
                    st.none(),
                    st.booleans(),
                    st.integers(),
                    st.floats(),
                    st.text(max_size=10),
                    st.sampled_from([USER, "1", "2", "00" * 8, "0000000a", "version-rolling", "ffffffff"]),
                ),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=6,
            ),
            max_size=7,
        ),
        st.one_of(st.none(), st.integers(), st.text(max_size=5)),
    ),
)


@pytest.mark.slow
@given(st.lists(lines, max_size=12), st.booleans(), st.sampled_from([b"\n", b"\r\n"]))
def test_any_bytes_whole_or_byte_by_byte_give_the_same_answer_and_never_an_exception(
    parts: list[bytes], opened: bool, ending: bytes
) -> None:
    data = b"".join(part + ending for part in parts)
    whole, bytewise = (Talk().start() if opened else Talk() for _ in range(2))
    answer = whole.session.receive(data, 2000.0)
    assert answer == b"".join(bytewise.session.receive(bytes([byte]), 2000.0) for byte in data)
    assert whole.session.closing == bytewise.session.closing
    assert whole.session.statistics(2000.0) == bytewise.session.statistics(2000.0)
    if not answer.startswith(b"HTTP") and b"HTTP/1.1 400" not in answer:
        for line in answer.splitlines():
            assert isinstance(json.loads(line), dict)
