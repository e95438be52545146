"""Kill -9 at random instants: a node with miners is killed again and again, and nothing but the last instant is lost.

    python tests/bench/kill9.py --minutes 10 --kills 20

Each cycle starts ``p2pool run`` on one data directory, mines on it with two ``p2pool mine`` processes, reads the shares
with ``p2pool export`` while it runs, kills the node with SIGKILL some random time later, and then asks ``p2pool
verify``. Every share that an export had seen must be there after every later kill. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMS = """
network = "regtest"
stratum_port = 0
vardiff_interval = 1

[params]
name = "kill9"
share_period_ms = 500
half_life_s = 20
max_target = "{max_target:x}"
block_target_divisor = 10
window_max_shares = 500
"""
ADDRESSES = ("bcrt1q3467skzz9faljvpw57qsqval3220uq88kh4h5v", "mqx6K9f4PpnaLFTb6yN9F771dbufNi3czB")


def p2pool(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from p2pool.cli import main; main()", *arguments]


def exported(directory: Path) -> dict[str, dict[str, object]]:
    done = subprocess.run(p2pool("export", "--data-dir", str(directory)), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"export failed: {done.stderr}")
    return {row["hash"]: row for row in map(json.loads, done.stdout.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    mean = arguments.minutes * 60 / arguments.kills
    scratch = Path(tempfile.mkdtemp(prefix="p2pool-kill9-"))
    directory, config = scratch / "data", scratch / "p2pool.toml"
    config.write_text(PARAMS.format(max_target=2**256 // 1_000_000))
    seen: set[str] = set()
    lost = unverified = 0
    started = time.monotonic()
    for kill in range(1, arguments.kills + 1):
        log = (scratch / f"node{kill}.log").open("w+")
        node = subprocess.Popen(
            p2pool("run", "--config", str(config), "--data-dir", str(directory)), stderr=log, stdout=log
        )
        port = wait_for_port(node, Path(log.name))
        miners = [
            subprocess.Popen(
                p2pool("mine", f"127.0.0.1:{port}", "--user", address),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for address in ADDRESSES
        ]
        time.sleep(max(0.3, dice.uniform(0.2, 1.8) * mean - 3))
        seen |= exported(directory).keys()
        time.sleep(dice.uniform(0, 0.3))
        node.send_signal(signal.SIGKILL)
        node.wait()
        for miner in miners:
            miner.terminate()
            miner.wait()
        verified = subprocess.run(
            p2pool("verify", "--json", "--data-dir", str(directory)), capture_output=True, text=True
        )
        rows = exported(directory)
        lost += len(seen - rows.keys())
        seen |= rows.keys()
        if verified.returncode != 0:
            unverified += 1
            print(verified.stderr, file=sys.stderr)
        print(
            f"kill {kill:2}: {len(rows)} shares, {sum(bool(row['is_block']) for row in rows.values())} blocks, "
            f"lost {len(seen - rows.keys())}, verify {'clean' if verified.returncode == 0 else 'FAILED'}",
            file=sys.stderr,
            flush=True,
        )
    rows = exported(directory)
    outcomes = [row["block_outcome"] for row in rows.values() if row["is_block"]]
    result = {
        "kills": arguments.kills,
        "seconds": round(time.monotonic() - started),
        "shares": len(rows),
        "lost": lost,
        "verify_failures": unverified,
        "blocks": len(outcomes),
        "blocks_accepted": outcomes.count(""),
        "directory": str(directory),
    }
    print(json.dumps(result))
    sys.exit(0 if lost == unverified == 0 else 1)


def wait_for_port(node: subprocess.Popen[bytes], log: Path) -> int:
    for _ in range(600):
        text = log.read_text()
        if "stratum+tcp://" in text:
            return int(text.split("stratum+tcp://")[1].split(",")[0].rpartition(":")[2])
        if node.poll() is not None:
            raise SystemExit(f"the node did not start:\n{text}")
        time.sleep(0.1)
    raise SystemExit(f"the node did not listen within a minute:\n{log.read_text()}")


if __name__ == "__main__":
    main()
