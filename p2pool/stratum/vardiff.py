"""Variable difficulty: how hard a session's submissions are, so that a miner of any size speaks every few seconds.

Theory of operation. A session's difficulty is a power of two and is held as its exponent, an integer: targets are exact
shifts, and a miner's firmware prints a round number. Every accepted submission is worth 2 ** exponent of *its own job*,
so the estimated hash rate stays true across changes of difficulty. The estimate is an exponentially weighted mean over
`window_s`, corrected for the short time in which a new session has been seen.

The exponent moves only when a bound on the estimate has left a band round it (`HYSTERESIS`): upwards by the bound
without the newest submission, downwards by the bound as if one more submission arrived just now. Both bounds are loose
when little has been seen and close in as evidence grows: the quick ramp and the calm afterwards come from one rule.
A silent miner is eased by 2, 4, 8, ... powers of two until it is heard.

Floats live here and nowhere near consensus: a session's difficulty decides only how often a miner reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from sharechain.difficulty import DIFFICULTY_1_TARGET

HASHES_PER_DIFFICULTY = 2**256 / DIFFICULTY_1_TARGET
"""Expected hashes for one submission at difficulty 1, about 2 ** 32."""

EASIEST_EXPONENT = -31
"""4.66e-10. At 2 ** -32 the target no longer fits the 64-bit arithmetic of cpuminer-opt."""

HARDEST_EXPONENT = 160
"""2 ** 192 hashes a submission: beyond anything, and still a target with digits in it."""

HYSTERESIS = 1.25
"""In powers of two: a session in its band is at most 2 ** 1.25 = 2.4 times too fast or too slow."""

MIN_SUBMISSIONS_TO_RAISE = 4
"""Three gaps between submissions are the least that says something about a rate."""

QUIET_INTERVALS_TO_EASE = 4.0
"""A miner of the right size is silent for four mean intervals once in e ** 4 = 55 times."""


def target_of_exponent(exponent: int) -> int:
    """The target of difficulty 2 ** exponent: a hash at or below it meets the difficulty."""
    return DIFFICULTY_1_TARGET >> exponent if exponent >= 0 else DIFFICULTY_1_TARGET << -exponent


def tolerant_target_of_exponent(exponent: int) -> int:
    """The target of the same difficulty for miners that take 2 ** 224 - 1 as the target of difficulty 1.

    Such a miner (cpuminer-opt) submits one hash in 65,536 that is a little above `target_of_exponent`: it has done its
    work by its own lights and must not read "low difficulty". Only the session check is so kind.
    """
    return (1 << (224 - exponent)) - 1


def hardest_exponent_for(limit: int) -> int:
    """The highest exponent whose target is not below `limit` (256 bits), within what miners can represent."""
    exponent = 224 - limit.bit_length()
    if exponent > EASIEST_EXPONENT and target_of_exponent(exponent) < limit:
        exponent -= 1
    return _clamp(exponent)


def exponent_of_difficulty(difficulty: float) -> int:
    """The power of two at or below a difficulty that a miner named; `difficulty` is finite and above 0."""
    return _clamp(math.frexp(difficulty)[1] - 1)


def difficulty_of_exponent(exponent: int) -> int | float:
    """The difficulty as a JSON number: an integer from 1 on (some firmware reads digits only), a fraction below."""
    return 1 << exponent if exponent >= 0 else math.ldexp(1.0, exponent)


def target_of_difficulty(difficulty: float) -> int:
    """The target of any difficulty above 0, as a miner computes it from `mining.set_difficulty`."""
    return min(int(DIFFICULTY_1_TARGET / Fraction(difficulty)), 2**256 - 1)


def _clamp(exponent: int) -> int:
    return max(EASIEST_EXPONENT, min(HARDEST_EXPONENT, exponent))


@dataclass(frozen=True, slots=True, kw_only=True)
class VardiffSettings:
    """What the operator may choose: how often a miner speaks, over what time it is measured, where it starts."""

    target_interval_s: float = 5.0
    """Mean seconds between two submissions of one session."""
    window_s: float = 75.0
    """Time constant of the mean: 15 submissions at the default interval, a standard error of 26 %."""
    start_difficulty: float = 512.0
    """What a session hears first. 1 TH/s wants 1,200 and 200 TH/s 230,000: both are there after a few submissions."""

    def __post_init__(self) -> None:
        for name in ("target_interval_s", "window_s", "start_difficulty"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")


class Vardiff:
    """One session's hash rate, and the difficulty that suits it.

    Mutable state: `_work` is the decayed sum of difficulties as of `_updated_at`; `_started_at` is when measuring
    began; `_heard_at` is the time of the last submission (of the start, before the first); `_count` and `_changed_at`
    tell how many submissions, and since when, the present exponent has seen; `_quiet_step` is how far the next silence
    will ease. Times are seconds on any clock that does not run backwards.
    """

    def __init__(self, settings: VardiffSettings, now: float) -> None:
        self._settings = settings
        self._exponent = exponent_of_difficulty(settings.start_difficulty)
        self._fixed: int | None = None
        self._work = 0.0
        self._started_at = self._updated_at = self._changed_at = self._heard_at = now
        self._count = 0
        self._quiet_step = 2

    def start(self, now: float) -> None:
        """Begin to measure: the miner has its first job. The time before that says nothing about its speed."""
        self._started_at = self._updated_at = self._changed_at = self._heard_at = now
        self._work = 0.0
        self._count = 0

    def fix(self, exponent: int | None) -> None:
        """Hold the difficulty where the miner's owner asked for it (`address+difficulty`), or, with None, let it go."""
        self._fixed = None if exponent is None else _clamp(exponent)

    def suggest(self, exponent: int, now: float) -> None:
        """Go to the difficulty that the miner proposes (`mining.suggest_difficulty`); measuring goes on from there."""
        self._move(_clamp(exponent), now)

    def exponent_for(self, limit: int) -> int:
        """The exponent for a job: never one with a target below `limit`, the easier of share and block target."""
        exponent = self._exponent if self._fixed is None else self._fixed
        return min(exponent, hardest_exponent_for(limit))

    def on_submission(self, exponent: int, now: float) -> None:
        """Count an accepted submission of a job whose difficulty was 2 ** exponent."""
        if now - self._heard_at > self._settings.window_s:  # What was measured before a long silence says little.
            self._started_at = self._updated_at = now
            self._work = 0.0
        self._heard_at = now
        self._decay(now)
        lower_bound = self._wanted(self._work, now)
        self._work += math.ldexp(1.0, exponent)
        self._count += 1
        self._quiet_step = 2
        if self._count >= MIN_SUBMISSIONS_TO_RAISE and lower_bound - self._exponent > HYSTERESIS:
            self._move(_clamp(round(lower_bound)), now)

    def on_tick(self, now: float) -> None:
        """Ease the difficulty if a miner has become slow or silent. To be called every few seconds."""
        if now - self._changed_at < QUIET_INTERVALS_TO_EASE * self._settings.target_interval_s:
            return
        self._decay(now)
        upper_bound = self._wanted(self._work + math.ldexp(1.0, self._exponent), now)
        if upper_bound - self._exponent >= -HYSTERESIS:
            return
        wanted = self._wanted(self._work, now)
        lowest = self._exponent - self._quiet_step
        exponent = _clamp(max(lowest, round(wanted) if math.isfinite(wanted) else lowest))
        self._quiet_step = min(self._quiet_step * 2, 16)
        self._move(exponent, now)

    def hash_rate(self, now: float) -> float:
        """The estimated hash rate in hashes per second, 0 for a miner not yet heard."""
        self._decay(now)
        return self._work / self._weight_s(now) * HASHES_PER_DIFFICULTY

    def _move(self, exponent: int, now: float) -> None:
        self._exponent = exponent
        self._changed_at = now
        self._count = 0

    def _decay(self, now: float) -> None:
        self._work *= math.exp(-max(0.0, now - self._updated_at) / self._settings.window_s)
        self._updated_at = max(self._updated_at, now)

    def _weight_s(self, now: float) -> float:
        """The seconds that the decayed sum stands for: the time seen so far at first, `window_s` in the end.

        At least one interval, lest a burst of queued submissions looks like a huge miner.
        """
        window_s = self._settings.window_s
        seen_s = max(now - self._started_at, self._settings.target_interval_s)
        return -window_s * math.expm1(-seen_s / window_s)

    def _wanted(self, work: float, now: float) -> float:
        """The exponent, not rounded, at which a miner of that much decayed work would speak once an interval."""
        if work <= 0.0:
            return -math.inf
        return math.log2(work / self._weight_s(now) * self._settings.target_interval_s)
