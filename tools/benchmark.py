"""Measures how fast the engine is on this machine, against what the machine itself can do and against a peer."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import cli

EXAMPLES = """  python tools/benchmark.py --world gowalla-size
  python tools/benchmark.py --world gowalla-size --members spectral_filter ease --rounds 5 --json
  python tools/benchmark.py scoring
  python tools/benchmark.py scoring --users 5000 --items 9000 -k 10 --json
  python tools/benchmark.py retrieval --items 1000000
  python tools/benchmark.py fast runs/movielens_posters/latest
  python tools/benchmark.py towers --on gowalla-size --epochs 5
  python tools/benchmark.py serving latest --clients 16 --seconds 60
  python tools/benchmark.py pipeline
  python tools/benchmark.py pipeline --cases image image_augmented --rounds 3 --json
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--world", metavar="NAME", help="a made-up data set: gowalla-size or small-size")
    parser.add_argument("--members", nargs="*", metavar="MEMBER", help="members to fit (default: the closed-form ones)")
    parser.add_argument("--factors", type=cli.positive, default=128, help="length of the vectors (default: 128)")
    parser.add_argument("--epochs", type=cli.positive, default=15, help="of the factorisations (default: 15)")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="turns of ours and the peer (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command")
    scoring = commands.add_parser("scoring", help="exact top-k of a catalogue for many users, seen items left out")
    scoring.add_argument("--users", type=cli.positive, default=30_000)
    scoring.add_argument("--items", type=cli.positive, default=41_000)
    scoring.add_argument("--dimensions", type=cli.positive, default=64)
    scoring.add_argument("--seen", type=float, default=27.0, help="items seen per user on average (default: 27)")
    scoring.add_argument("-k", type=cli.positive, default=20)
    scoring.add_argument("--block", type=cli.positive, help="users scored at once")
    scoring.add_argument("--json", action="store_true", help="print JSON")
    nearest = commands.add_parser("retrieval", help="an approximate index: recall against latency, build time, memory")
    nearest.add_argument("--items", type=cli.positive, default=1_000_000)
    nearest.add_argument("--dimensions", type=cli.positive, default=64)
    nearest.add_argument("-k", type=cli.positive, default=100)
    nearest.add_argument("--json", action="store_true", help="print JSON")
    fast = commands.add_parser("fast", help="recommend_fast of an artifact beside the bare product and top-k")
    fast.add_argument("run", type=Path, help="the folder of a run that exported one (export.fast), or the artifact's")
    fast.add_argument("--rounds", type=cli.positive, default=300, help="turns of the three (default: 300)")
    fast.add_argument("--json", action="store_true", help="print JSON")
    towers = commands.add_parser("towers", help="the factorisation trained in Keras beside TFRS's two towers")
    towers.add_argument("--on", metavar="NAME", default="gowalla-size", help="a made-up data set (as for --world)")
    towers.add_argument("--factors", type=cli.positive, default=64)
    towers.add_argument("--batch", type=cli.positive, default=1024)
    towers.add_argument("--epochs", type=cli.positive, default=5)
    towers.add_argument("--json", action="store_true", help="print JSON")
    pipeline = commands.add_parser("pipeline", help="whether the input keeps up: batches alone, steps alone, and both")
    pipeline.add_argument("--cases", nargs="+", metavar="CASE", help="factorisation, text, image, ... (default: all)")
    pipeline.add_argument("--on", metavar="NAME", default="gowalla-size", help="a made-up data set, for the pairs")
    pipeline.add_argument("--rounds", type=cli.positive, default=5, help="turns of the three (default: 5)")
    pipeline.add_argument("--seconds", type=float, default=3.0, help="of a turn (default: 3)")
    pipeline.add_argument("--json", action="store_true", help="print JSON")
    serving = commands.add_parser("serving", help="calls per second of a server, beside a bare echo of its messages")
    serving.add_argument("source", metavar="RUN|ARTIFACT", help="a run's folder, an artifact's folder, or 'latest'")
    serving.add_argument("--clients", type=cli.positive, default=16, help="calls under way at once (default: 16)")
    serving.add_argument("--seconds", type=float, default=60.0, help="of load on each server (default: 60)")
    serving.add_argument("--rounds", type=cli.positive, default=6, help="turns of the two (default: 6)")
    serving.add_argument("--workers", type=cli.positive, default=1, help="processes of our server (default: 1)")
    serving.add_argument("--keep-answers", type=cli.positive, metavar="N", help="of our server (default: none)")
    serving.add_argument("--profile", choices=["best", "fast"], default="best", help="of the answers (default: best)")
    serving.add_argument("-k", type=cli.positive, default=10)
    serving.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if (args.world is None) == (args.command is None):
        parser.error(
            "either --world NAME or a command (scoring, retrieval, fast, towers, serving, pipeline) must be given"
        )

    # Numerical libraries read these when they are loaded: kernels of an old processor measure nothing.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    from recsys import benchmarks

    if args.command == "serving":
        return measure_serving(args)
    if args.command == "scoring":
        result = benchmarks.measure_scoring(args.users, args.items, args.dimensions, args.seen, args.k, args.block)
    elif args.command == "retrieval":
        result = benchmarks.measure_retrieval(args.items, args.dimensions, args.k)
    elif args.command == "fast":
        from recsys.export import artifact_of

        found = args.run if (args.run / "manifest.json").is_file() else artifact_of(args.run)
        result = benchmarks.measure_fast(found, args.rounds)
    elif args.command == "towers":
        from recsys.tower_benchmark import measure_towers

        result = measure_towers(args.on, factors=args.factors, batch=args.batch, epochs=args.epochs)
    elif args.command == "pipeline":
        from recsys.pipeline_benchmark import CASES, measure_pipelines

        result = measure_pipelines(args.cases or tuple(CASES), world=args.on, rounds=args.rounds, seconds=args.seconds)
    else:
        members = benchmarks.FITTED if args.members is None else args.members
        result = benchmarks.measure_world(
            args.world, members, factors=args.factors, epochs=args.epochs, rounds=args.rounds
        )
    print(json.dumps(result) if args.json else benchmarks.as_text(result))
    return 0


def measure_serving(args: argparse.Namespace) -> int:
    from recommend import artifact
    from serving import benchmark

    given = {name: getattr(args, name) for name in ("clients", "seconds", "rounds", "k", "workers", "profile")}
    found = benchmark.measure_serving(artifact(args.source), keep=args.keep_answers, **given)
    print(json.dumps(found) if args.json else benchmark.as_text(found))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
