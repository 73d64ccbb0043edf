"""Compares runs: members and rules by metrics with intervals, paired differences, and quality against cost.

A run is given by its folder. A config is trained, once or several times (--seeds, --over), and its runs count as one
side with mean and deviation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cli

EXAMPLES = """  python tools/compare.py runs/quickstart/latest
  python tools/compare.py runs/lichess/20260301-101500 runs/lichess/latest --against ease --plot pareto.png
  python tools/compare.py configs/quickstart.yaml --seeds 5 --set members.text=null
  python tools/compare.py configs/ml100k.yaml --set data.path=$DATA_DIR/ml100k --over data.fold.test=1,2,3,4,5
  python tools/compare.py --across runs/*/latest        # a line for each run, whatever its data: did fusing pay?
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("what", nargs="+", type=Path, help="folders of runs, or configs to train")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--metrics", metavar="NAME,...", default="", help="columns, the deciding one first")
    shown.add_argument("--against", metavar="SYSTEM", default="", help="whom the others are held against (first side)")
    shown.add_argument("--across", action="store_true", help="a line for each side, which may have other data")
    shown.add_argument("--unpaired", action="store_true", help="no differences, so that splits may differ")
    shown.add_argument("--samples", type=cli.positive, default=1000, help="bootstrap samples (default: 1000)")
    shown.add_argument("--plot", type=Path, metavar="FILE", help="quality against latency, .png or .svg")
    shown.add_argument("--html", type=Path, metavar="FILE", help="the tables and the chart as a page")
    shown.add_argument("--json", action="store_true", help="print everything as JSON")
    training = parser.add_argument_group("configs")
    training.add_argument("--seeds", type=cli.positive, default=1, help="how many seeds, from the config's own upwards")
    training.add_argument(
        "--over", action="append", default=[], metavar="KEY=VALUE,...", help="a run for each value of a key"
    )
    training.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    training.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs and the cache lie")
    training.add_argument("--fresh", action="store_true", help="train anew what is there already")
    training.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()

    from fusion.errors import ConfigError
    from recsys.compare import across, compare, read_side
    from recsys.compare_view import chart_format, text_across, text_of, write_page, write_plot

    configs = [path for path in args.what if path.suffix in (".yaml", ".yml")]
    if not configs and (args.seeds > 1 or args.over or args.set):
        raise ConfigError("--seeds, --over and --set are for a config that is trained; received folders of runs only.")
    if args.across and (args.metrics or args.against or args.plot or args.html):
        raise ConfigError("--across shows each side by its own metric: leave out --metrics, --against, --plot, --html.")
    if args.plot:
        chart_format(args.plot)  # before anything is trained
    sides = []
    for path in args.what:
        if path in configs:
            from recsys.variations import run_variations

            options = {"seeds": args.seeds, "over": args.over, "root": args.run_dir}
            sides.append(run_variations(path, args.set, **options, fresh=args.fresh, quiet=args.quiet))
        else:
            sides.append(read_side(path))
    if args.across:
        rows = across(sides, args.samples)
        print(json.dumps(rows) if args.json else text_across(rows))
        return 0
    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    found = compare(sides, metrics, against=args.against, unpaired=args.unpaired, samples=args.samples)
    if args.plot:
        write_plot(found, args.plot)
    if args.html:
        write_page(found, args.html)
    print(json.dumps(found) if args.json else text_of(found))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
