"""What the log says of things that fail again and again."""

from __future__ import annotations

from p2pool.outage import MAX_REASONS, REMINDER_S, Outage


def test_a_failure_is_told_once_and_its_end_with_how_long_it_lasted() -> None:
    outage = Outage()
    assert outage.ended(5.0) is None
    assert outage.failed("refused", 10.0) == "refused"
    assert [outage.failed("refused", 10.0 + second) for second in range(1, 100)] == [None] * 99
    assert outage.ended(110.0) == "after 100.0 s and 100 failed tries"
    assert outage.since is None
    assert outage.ended(111.0) is None
    assert outage.failed("refused", 112.0) == "refused"
    assert outage.ended(112.5) == "after 0.5 s and 1 failed try"


def test_another_reason_is_news_and_what_lasts_is_told_now_and_then() -> None:
    outage = Outage()
    outage.failed("refused", 0.0)
    assert outage.failed("warming up", 1.0) == "warming up"
    assert outage.failed("warming up", REMINDER_S) is None
    assert outage.failed("warming up", REMINDER_S + 1) == "warming up (for 10 min now, 4 tries)"
    assert outage.failed("warming up", REMINDER_S + 2) is None
    assert outage.ended(9000.0) == "after 2.5 h and 5 failed tries"


def test_reasons_in_turns_or_without_end_do_not_fill_the_log() -> None:
    outage = Outage()
    said = [outage.failed(f"reason {number % 2}", float(number)) for number in range(100)]
    assert [text for text in said if text] == ["reason 0", "reason 1"]
    assert outage.ended(100.0) is not None
    said = [outage.failed(f"reason {number}", 200.0) for number in range(100)]
    assert len([text for text in said if text]) == MAX_REASONS
