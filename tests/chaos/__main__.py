"""Kill random ranks, hosts and agents at random moments, twenty times, and compare the end.

    python -m tests.chaos [--seed N] [--result FILE]

Needs root: the hosts are network namespaces. Invariant: the exit code is 0 only if everything came
out as in the undisturbed runs; an attempt that ends by itself leaves no report.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import ROOT, write_result
from tests.chaos.report import table
from tests.chaos.twenty import twenty_kills
from tests.cluster import hosts

RESULT = ROOT / "benchmarks" / "results" / "chaos.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=6, help="of what is hit and when (6)")
    parser.add_argument("--result", type=Path, default=RESULT, help="a .json; a .txt beside it")
    parser.add_argument("--work_dir", type=Path, help="kept; none: a temporary folder")
    arguments = parser.parse_args(argv)
    if reason := hosts.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        result = twenty_kills(arguments.work_dir or Path(temporary), arguments.seed)
    write_result(arguments.result, result)
    text = table(result)
    arguments.result.with_suffix(".txt").write_text(text)
    print(text)
    return 1 if result["totals"]["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
