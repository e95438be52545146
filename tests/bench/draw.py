"""Is the draw fair? Many seeds, 2,000 miners with Zipf hash rates: who is paid what on average, as chi-square.

    python tests/bench/draw.py --seeds 100000 --class 12

The last line is a JSON object. For each miner below the threshold the number of lots won is compared with what its
entitlement says; the sum of the squared deviations, each over its variance, has about one degree of freedom less than
there are miners. Every draw is also checked for its exact sum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter

from sharechain.hasher import WeightTable
from sharechain.params import NETWORKS
from sharechain.payout import build_payouts, decode_outputs, finder_bonus

VALUE = 312_500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--miners", type=int, default=2_000)
    parser.add_argument("--class", dest="payout_class", type=int, default=12)
    arguments = parser.parse_args()
    params = NETWORKS["mainnet"]
    table = WeightTable()
    scripts = [b"\x00\x14" + hashlib.sha256(b"%d" % number).digest()[:20] for number in range(arguments.miners)]
    for rank, script in enumerate(scripts, 1):
        table.add(script, 10**15 // rank)
    shared = VALUE - finder_bonus(params, VALUE)
    entitled = {script: shared * weight // table.total for script, weight in table.items()}
    won: Counter[bytes] = Counter()
    received: Counter[bytes] = Counter()
    wrong_sums = exact_wrong = 0
    threshold = 0
    for seed in range(arguments.seeds):
        parent = hashlib.sha256(b"parent %d" % seed).digest()
        payouts = build_payouts(params, table, value=VALUE, parent=parent, payout_class=arguments.payout_class)
        outputs = decode_outputs(payouts.outputs)
        threshold = payouts.threshold
        wrong_sums += sum(amount for _, amount in outputs) + payouts.finder_amount != VALUE
        for script, amount in outputs:
            received[script] += amount
            if entitled[script] >= threshold:
                exact_wrong += amount != entitled[script]
            else:
                won[script] += 1
        if seed % 1000 == 999:
            print(f"\r{seed + 1} seeds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    small = {script: amount for script, amount in entitled.items() if amount < threshold}
    pool = sum(small.values())
    lots = max(1, pool // threshold)
    chi_square = 0.0
    worst = 0.0
    for script, amount in small.items():
        chance = lots * amount / pool
        expected = arguments.seeds * chance
        deviation = (won[script] - expected) / math.sqrt(expected * (1 - chance))
        chi_square += deviation**2
        worst = max(worst, abs(deviation))
    freedom = len(small) - 1
    result = {
        "seeds": arguments.seeds,
        "miners": arguments.miners,
        "class": arguments.payout_class,
        "threshold": threshold,
        "paid_exactly": len(entitled) - len(small),
        "drawn_among": len(small),
        "lots": lots,
        "chi_square": round(chi_square, 1),
        "degrees_of_freedom": freedom,
        "sigma": round((chi_square - freedom) / math.sqrt(2 * freedom), 2),
        "worst_miner_sigma": round(worst, 2),
        "mean_over_entitlement_all_small": round(sum(received[script] for script in small) / arguments.seeds / pool, 8),
        "wrong_sums": wrong_sums,
        "exact_payments_wrong": exact_wrong,
    }
    print(json.dumps(result))
    sound = wrong_sums == exact_wrong == 0 and abs(result["sigma"]) < 4
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
