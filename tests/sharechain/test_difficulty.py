"""Compact targets, work, and the integer arithmetic of ASERT against the reference vectors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharechain.difficulty import (
    MAX_U256,
    bits_to_target,
    difficulty_of,
    is_canonical_bits,
    scale_target,
    target_to_bits,
    work_of,
)

#: Bitcoin Cash: the easiest target, seconds of the half life, seconds of a block.
BCH_LIMIT = 0xFFFF << 208
BCH_HALF_LIFE_S = 2 * 24 * 3600
BCH_BLOCK_S = 600

targets = st.one_of(st.integers(1, MAX_U256), st.integers(0, 255).map(lambda n: 1 << n), st.integers(1, 2**25))


# -- compact targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "target"),
    [
        (0x1D00FFFF, 0xFFFF << 208),
        (0x207FFFFF, 0x7FFFFF << 232),
        (0x1B0404CB, 0x0404CB << 192),
        (0x01010000, 0x01),
        (0x017F0000, 0x7F),
        (0x02008000, 0x80),
        (0x027FFF00, 0x7FFF),
        (0x03008000, 0x8000),
        (0x037FFFFF, 0x7FFFFF),
        (0x04008000, 0x800000),
        (0x04123456, 0x12345600),
        (0x05009234, 0x92340000),
        (0x2100FFFF, 0xFFFF << 240),
    ],
)
def test_canonical_compact_targets_are_read_and_written(bits: int, target: int) -> None:
    assert bits_to_target(bits) == target
    assert target_to_bits(target) == bits
    assert is_canonical_bits(bits)


@pytest.mark.parametrize(
    ("bits", "why"),
    [
        (0x1D80FFFF, "negative"),
        (0x04923456, "negative"),
        (0x01FEDCBA, "negative"),
        (0x00000000, "zero"),
        (0x00123456, "zero"),
        (0x01003456, "zero"),
        (0x02000056, "zero"),
        (0x03000000, "zero"),
        (0x1D000000, "zero"),
        (0x2101FFFF, "above"),
        (0x22000100, "above"),
        (0xFF123456, "above"),
        (0x23000001, "above"),
        (-1, "32 bits"),
        (2**32, "32 bits"),
    ],
)
def test_compact_targets_that_are_none_are_refused(bits: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        bits_to_target(bits)
    assert not is_canonical_bits(bits)


@pytest.mark.parametrize("bits", [0x1E0000FF, 0x01123456, 0x02123456, 0x20000FFF, 0x03000080, 0x220000FF, 0x02000100])
def test_another_form_of_a_target_is_not_canonical(bits: int) -> None:
    assert bits_to_target(bits) > 0
    assert not is_canonical_bits(bits)
    assert is_canonical_bits(target_to_bits(bits_to_target(bits)))


@given(st.integers(0, 2**32 - 1))
def test_each_target_has_one_canonical_form(bits: int) -> None:
    if is_canonical_bits(bits):
        assert target_to_bits(bits_to_target(bits)) == bits


@given(targets)
def test_a_target_is_rounded_down_by_less_than_one_in_32768(target: int) -> None:
    bits = target_to_bits(target)
    assert is_canonical_bits(bits)
    rounded = bits_to_target(bits)
    assert rounded <= target
    assert (target - rounded) * 32_768 < target
    assert target_to_bits(rounded) == bits


@given(left=targets, right=targets)
def test_compact_targets_keep_the_order(left: int, right: int) -> None:
    if left <= right:
        assert bits_to_target(target_to_bits(left)) <= bits_to_target(target_to_bits(right))


@pytest.mark.parametrize("target", [0, -1, 2**256])
def test_what_is_no_target_has_no_compact_form(target: int) -> None:
    with pytest.raises(ValueError, match="not a positive 256-bit number"):
        target_to_bits(target)


# -- work ------------------------------------------------------------------------------------------------------


def test_work_is_bitcoins() -> None:
    assert work_of(0xFFFF << 208) == 0x100010001
    assert work_of(0x7FFFFF << 232) == 2
    assert work_of(MAX_U256) == 1
    assert work_of(1) == 2**255
    assert work_of(2**246 - 1) == 1024


@given(left=targets, right=targets)
def test_a_harder_target_is_no_less_work(left: int, right: int) -> None:
    if left <= right:
        assert work_of(left) >= work_of(right) >= 1


def test_difficulty_one_is_bitcoins() -> None:
    assert difficulty_of(0xFFFF << 208) == 1.0
    assert difficulty_of(bits_to_target(0x1B0404CB)) == pytest.approx(16307.420938523983, rel=1e-12)


# -- ASERT -----------------------------------------------------------------------------------------------------


def asert(anchor_bits: int, anchor_height: int, parent_time: int, height: int, time: int) -> int:
    late_s = time - parent_time - BCH_BLOCK_S * (height - anchor_height + 1)
    return target_to_bits(scale_target(bits_to_target(anchor_bits), late_s, BCH_HALF_LIFE_S, BCH_LIMIT))


#: (run, line, anchor height, time of the anchor's parent, anchor bits, height, time, bits): reference vectors of
#: aserti3-2d, by the authors of the specification, from the Bitcoin Cash Node quality assurance assets.
VECTORS = [
    ("run01", 1, 1, 0, 0x1D00FFFF, 2, 1200, 0x1D00FFFF),
    ("run01", 10, 1, 0, 0x1D00FFFF, 11, 6600, 0x1D00FFFF),
    ("run03", 1, 1, 0, 0x01010000, 2, 1200, 0x01010000),
    ("run04", 1, 1, 0, 0x01010000, 2, 174000, 0x01020000),
    ("run04", 2, 1, 0, 0x01010000, 3, 347400, 0x01040000),
    ("run04", 113, 1, 0, 0x01010000, 114, 19594800, 0x0F020000),
    ("run04", 225, 1, 0, 0x01010000, 226, 39015600, 0x1D00FFFF),
    ("run05", 1, 1, 0, 0x1D00FFFF, 2, 0, 0x1D00FEC5),
    ("run05", 2, 1, 0, 0x1D00FFFF, 290, 0, 0x1C7F62C0),
    ("run05", 112, 1, 0, 0x1D00FFFF, 31970, 0, 0x0F01FD8B),
    ("run05", 225, 1, 0, 0x1D00FFFF, 64514, 0, 0x01010000),
    ("run06", 2, 1, 0, 0x1802AEE8, 3, 1310, 0x1802AD91),
    ("run06", 500, 1, 0, 0x1802AEE8, 501, 300620, 0x1802AEF5),
    ("run06", 1000, 1, 0, 0x1802AEE8, 1001, 589738, 0x180291AD),
    ("run07", 500, 1, 0, 0x1802AEE8, 501, 29563, 0x1800E793),
    ("run07", 1000, 1, 0, 0x1802AEE8, 1001, 33365, 0x17469789),
    ("run08", 250, 1, 0, 0x1802AEE8, 251, 2114311, 0x191BA03B),
    ("run08", 500, 1, 0, 0x1802AEE8, 501, 7462933, 0x1D00FFFF),
    ("run09", 1, 2147483642, 1234567290, 0x1802AEE8, 2147483643, 1234568190, 0x1802AE16),
    ("run09", 10, 2147483642, 1234567290, 0x1802AEE8, 2147483652, 1234570890, 0x1802A6B7),
    ("run10", 1, 9223372036854775802, 2147483047, 0x1802AEE8, 9223372036854775803, 2147484547, 0x1802AFBB),
    ("run10", 5, 9223372036854775802, 2147483047, 0x1802AEE8, 9223372036854775807, 2147488147, 0x1802B30E),
    ("run10", 10, 9223372036854775802, 2147483047, 0x1802AEE8, 9223372036854775812, 2147492647, 0x1802B73D),
    ("run11", 3, 1, 0, 0x1802AEE8, 4, 1398, 0x1802AC28),
    ("run11", 1000, 1, 0, 0x1802AEE8, 1001, 293713, 0x1800C896),
    ("run12", 2, 1, 10000, 0x1802AEE8, 3, 11199, 0x1802AD44),
    ("run12", 5000, 1, 10000, 0x1802AEE8, 5001, 6201, 0x160106B7),
    ("run12", 10000, 1, 10000, 0x1802AEE8, 10001, 1201, 0x13643F64),
]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector[0]}-{vector[1]}")
def test_r7_asert_gives_the_reference_vectors(vector: tuple[str, int, int, int, int, int, int, int]) -> None:
    _, _, anchor_height, parent_time, anchor_bits, height, time, bits = vector
    assert asert(anchor_bits, anchor_height, parent_time, height, time) == bits


def _vector_files() -> Iterator[Path]:
    directory = os.environ.get("P2POOL_ASERT_VECTORS")
    return iter(sorted(Path(directory).glob("run*")) if directory else ())


if files := list(_vector_files()):  # the whole set has 14,000 lines and is not ours to copy

    @pytest.mark.slow
    @pytest.mark.parametrize("path", files, ids=lambda path: path.name)
    def test_r7_asert_gives_every_reference_vector(path: Path) -> None:
        head: dict[str, str] = {}
        checked = 0
        for line in path.read_text().splitlines():
            if named := re.match(r"##\s+(.*?): (.*)", line):
                head[named[1]] = named[2]
            elif line.strip() and not line.startswith("#"):
                _, height, time, bits = line.split()
                parent_time = head.get("anchor ancestor time", head.get("anchor parent time", ""))
                got = asert(
                    int(head["anchor nBits"], 16), int(head["anchor height"]), int(parent_time), int(height), int(time)
                )
                assert got == int(bits, 16), line
                checked += 1
        assert checked == int(head["iterations"])


exponents = st.one_of(st.integers(-(2**70), 2**70), st.integers(-400_000, 400_000))
half_lives = st.sampled_from((1, 20, 60, 1_200, 1_200_000, 172_800))


@given(target=targets, late=exponents, half_life=half_lives, limit=targets)
def test_a_scaled_target_is_always_a_target_up_to_the_limit(target: int, late: int, half_life: int, limit: int) -> None:
    assert 1 <= scale_target(target, late, half_life, limit) <= limit


@pytest.mark.slow
@given(target=targets, left=exponents, right=exponents, half_life=half_lives)
def test_later_is_never_harder(target: int, left: int, right: int, half_life: int) -> None:
    low, high = sorted((left, right))
    assert scale_target(target, low, half_life, MAX_U256) <= scale_target(target, high, half_life, MAX_U256)


@pytest.mark.slow
@given(left=targets, right=targets, late=exponents, half_life=half_lives)
def test_an_easier_target_stays_easier(left: int, right: int, late: int, half_life: int) -> None:
    low, high = sorted((left, right))
    assert scale_target(low, late, half_life, MAX_U256) <= scale_target(high, late, half_life, MAX_U256)


@pytest.mark.parametrize("target", [1, 2**32, BCH_LIMIT, MAX_U256])
@pytest.mark.parametrize("elapsed_s", [2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64, 2**200])
def test_schedules_far_off_clamp_and_never_wrap(target: int, elapsed_s: int) -> None:
    """A time of now + 2^32 once overflowed a difficulty to the minimum elsewhere."""
    for half_life in (20, 1_200, 172_800):
        eased = scale_target(target, elapsed_s, half_life, BCH_LIMIT)
        hardened = scale_target(target, -elapsed_s, half_life, BCH_LIMIT)
        assert eased == BCH_LIMIT
        assert hardened == 1


@given(target=st.integers(2**40, 2**200), doublings=st.integers(-30, 40))
def test_a_whole_half_life_is_exactly_a_factor_of_two(target: int, doublings: int) -> None:
    expected = target << doublings if doublings >= 0 else target >> -doublings
    assert scale_target(target, 1_200 * doublings, 1_200, MAX_U256) == expected


@given(late=st.integers(-5_000, 5_000))
def test_between_half_lives_the_error_is_below_a_fiftieth_of_a_percent(late: int) -> None:
    scaled = scale_target(2**128, late, 1_200, MAX_U256) / 2**128
    assert scaled == pytest.approx(2 ** (late / 1_200), rel=2e-4)


def test_on_schedule_nothing_changes() -> None:
    for target in (1, 2, 12_345, BCH_LIMIT):
        assert scale_target(target, 0, 1_200, BCH_LIMIT) == target
    assert scale_target(MAX_U256, 0, 1_200, BCH_LIMIT) == BCH_LIMIT
