"""`make chaos`: minutes of mixed load while things break; a report, and 1 when anything was lost.

SIGINT ends the load early; what was so far is reported.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.processes import DidNotStart
from tests.chaos.report import markdown
from tests.chaos.run import Plan, run, say


def main() -> int:
    """The exit code: 0 when nothing happened that must not, 1 when something did, 2 when it could
    not begin."""
    arguments = _parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        done = run(Plan(arguments.minutes * 60, arguments.seed), folder)
    except (DidNotStart, ValueError) as wrong:
        print(f"chaos: {wrong}; logs are in {folder}", file=sys.stderr)
        return 2
    text = markdown(done)
    print(text, end="")
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")
    if done.ledger.well:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    say(f"logs and journals are in {folder}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of load [5]")
    parser.add_argument("--seed", type=int, default=1, help="decides what is asked and broken [1]")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report here too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
