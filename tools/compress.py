"""Makes what a run serves smaller: applies recipes, and measures bytes, speed and quality before and after.

A recipe that loses more than --max-drop allows ends with exit code 4, and what is served stays as it is; what it made
lies in compressed/NAME.refused of the run. Of several recipes each is applied, whatever becomes of the others.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import cli

EXAMPLES = """  python tools/compress.py runs/digits/latest --recipe int8
  python tools/compress.py runs/digits/latest --recipe prune --recipe qat --max-drop 0.01
  python tools/compress.py runs/digits/latest --budget 200kB --max-drop 0.01
  python tools/compress.py runs/digits/latest --all > recipes.md
"""


def main() -> int:
    from fusion.compression import METHODS  # tables of names: what stands behind them is imported when it is used
    from recsys.recipes import BUILT_IN, recipe_named

    known = f"{EXAMPLES}\nmethods of a recipe:\n{_listed(METHODS)}\nbuilt-in recipes:\n{_listed(BUILT_IN)}"
    parser = cli.parser(__doc__ or "", known)
    parser.add_argument("run", type=Path, help="the folder of a run, as train.py printed it")
    parser.add_argument("--recipe", action="append", default=[], help="built in, or of the config; repeatable")
    parser.add_argument("--all", action="store_true", help="every recipe, side by side in one table of Markdown")
    parser.add_argument("--budget", type=cli.size, help="search the best mix of recipes within so much, as in 5MB")
    parser.add_argument(
        "--max-drop", type=cli.from_zero, help="the most that may be lost of the deciding metric (validation)"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()
    if (bool(args.recipe) or args.budget is not None) == args.all:
        parser.error("--recipe NAME, --budget SIZE or --all must be given")
    if args.budget is not None and args.max_drop is None:
        parser.error("--budget needs --max-drop, the most that may be lost")
    if args.all and args.max_drop is not None:
        parser.error("--max-drop goes with --recipe or --budget; with --all each recipe's own promise counts")

    from fusion.errors import GateError
    from recsys.compression import compress_all, compress_run
    from recsys.compression_search import search_run
    from recsys.compression_summary import overview, pareto_table, summary
    from recsys.run import Run

    run = Run.open(args.run, quiet=args.quiet)
    own = run.experiment.compress
    recipes = {name: recipe_named(name, own) for name in ([*own, *BUILT_IN] if args.all else args.recipe)}
    if args.all:
        found, refused = compress_all(run, recipes)
        print(json.dumps({"reports": found, "refused": refused}) if args.json else overview(found, refused))
        return 0
    if args.budget is None and len(recipes) > 1:
        found, refused = compress_all(run, recipes, args.max_drop)
        print(json.dumps(found) if args.json else summary(found))
        if refused:
            sentences = "; ".join(f"{name}: {sentence}" for name, sentence in refused.items())
            raise GateError(f"{len(refused)} of {len(recipes)} recipes were refused. {sentences}")
        return 0
    if args.budget is None:
        reports = {name: compress_run(run, name, recipe, args.max_drop) for name, recipe in recipes.items()}
        print(json.dumps(reports) if args.json else summary(reports))
        return 0
    report, mixes = search_run(run, recipes, args.budget, args.max_drop)
    facts = {"report": report, "pareto": [mix._asdict() for mix in mixes]}
    print(json.dumps(facts) if args.json else f"{pareto_table(mixes)}\n\n{summary({report['recipe']: report})}")
    return 0


def _listed(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 110, initial_indent="  ", subsequent_indent="  ")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
