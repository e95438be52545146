"""A peer that is not written in Python: js-libp2p joins a real node's topic, and speaks one round of the sync protocol.

    python tests/bench/interop.py

Needs Node 20 or later with npm, and installs what tests/interop/package.json names into a temporary directory. Exit
code 0 only if shares arrived by gossip and the node answered status, locate and shares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent / "interop"
ADDRESS = "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080"
PORTS = ("--p2p-host", "127.0.0.1", "--p2p-port", "0", "--stratum-port", "0")
NETWORK = """network = "regtest"
[params]
name = "interop"
share_period_ms = 1000
max_target = "00001fffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
"""


def main() -> int:
    """Run it; the result goes to standard output as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="how long the peer listens")
    seconds: int = parser.parse_args().seconds
    if shutil.which("node") is None or shutil.which("npm") is None:
        print("Node.js with npm is needed: Debian's packages nodejs and npm, or the like", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="p2pool-interop-") as scratch:
        peer = Path(scratch) / "peer"
        shutil.copytree(HERE, peer)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=peer, check=True)
        config = Path(scratch) / "network.toml"
        config.write_text(NETWORK)
        result = _run(config, Path(scratch), peer, seconds)
    print(json.dumps(result))
    sound = result["messages"] > 0 and result["status"] and result["hashes"] > 0 and result["shares"] > 100
    return 0 if sound and not result["errors"] else 1


def _run(config: Path, scratch: Path, peer: Path, seconds: int) -> dict[str, Any]:
    run = [sys.executable, "-c", "from p2pool.cli import main; main()"]
    node = subprocess.Popen(
        [*run, "run", "--config", str(config), "--data-dir", str(scratch / "data"), *PORTS],
        stderr=(scratch / "node.log").open("w"),
    )
    miner = None
    try:
        words = _wait_for(scratch / "node.log", ("nodes connect to ", "stratum+tcp://", "network interop ("))
        stratum = words["stratum+tcp://"].split(",")[0]
        miner = subprocess.Popen(
            [*run, "mine", stratum, "--user", ADDRESS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(5)  # for some shares to be there
        network_id = words["network interop ("].split(")")[0]
        arguments = ["node", "peer.mjs", words["nodes connect to "].strip(), network_id, str(seconds)]
        done = subprocess.run(arguments, cwd=peer, capture_output=True, text=True, timeout=seconds + 60, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    finally:
        for process in (miner, node):
            if process is not None:
                process.terminate()
                process.wait()


def _wait_for(log: Path, marks: tuple[str, ...]) -> dict[str, str]:
    """What follows each mark in a log, as soon as all are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = log.read_text()
        if all(mark in text for mark in marks):
            return {mark: text.split(mark, 1)[1].split("\n")[0] for mark in marks}
        time.sleep(0.2)
    raise SystemExit(f"the node did not start:\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main())
