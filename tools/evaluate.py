"""Evaluates a run again: ranks its test part and writes its report anew, with the members that it has.

With --corrupt it writes nothing and says what the chosen rule loses when one member's scores go wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cli

EXAMPLES = """  python tools/evaluate.py runs/quickstart/latest
  python tools/evaluate.py runs/quickstart/latest --json
  python tools/evaluate.py runs/quickstart/latest --corrupt ease --how noise
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("run", type=Path, help="the folder of a run, as train.py printed it")
    parser.add_argument("--corrupt", metavar="MEMBER", help="the member whose scores are spoilt")
    how = "noise (its own scores, dealt anew), nan, or missing (default: noise)"
    parser.add_argument("--how", choices=["noise", "nan", "missing"], default="noise", help=how)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()

    from recsys.pipeline import rerun
    from recsys.run import Run
    from recsys.summary import summary

    run = Run.open(args.run, quiet=args.quiet)
    if args.corrupt is not None:
        from recsys.corruption import corrupt_run, told

        found = corrupt_run(run, args.corrupt, args.how)
        print(json.dumps(found) if args.json else told(found))
        return 0
    rerun(run, ["evaluate"])
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    print(json.dumps(report) if args.json else summary(report, run.folder))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
