"""Exports a run: writes a new version of its artifact, checks it, and can publish it where servers look."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cli

EXAMPLES = """  python tools/export.py runs/quickstart/latest
  python tools/export.py runs/quickstart/latest --rule average --refit none
  python tools/export.py runs/quickstart/latest --publish --models models
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("run", type=Path, help="the folder of a run, as train.py printed it")
    parser.add_argument("--rule", help="the rule to export (default: the one of the config)")
    parser.add_argument("--refit", choices=["none", "all"], help="train once more on every row first, or not")
    parser.add_argument("--publish", action="store_true", help="copy the newest version to MODELS/<name>/<version>/")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where servers look (default: models)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()

    from fusion.export.manifest import publish
    from recsys.export import artifact_of
    from recsys.pipeline import rerun
    from recsys.run import Run

    changes = {"enabled": True, "rule": args.rule, "refit": args.refit}
    run = Run.open(args.run, quiet=args.quiet, export={k: v for k, v in changes.items() if v is not None})
    rerun(run, ["export"])
    written = {"artifact": str(artifact_of(run.folder))}
    if args.publish:
        written["published"] = str(publish(written["artifact"], args.models, run.experiment.name))
    print(json.dumps(written) if args.json else "\n".join(f"{what}: {where}" for what, where in written.items()))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
