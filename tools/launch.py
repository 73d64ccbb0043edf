"""Runs an experiment over several processes of this machine: copies that train in step, or parameter servers."""

from __future__ import annotations

import sys
from pathlib import Path

import cli

EXAMPLES = """  python tools/launch.py configs/smoke.yaml --workers 2
  python tools/launch.py configs/smoke.yaml --workers 2 --ps 1
  python tools/launch.py configs/digits.yaml --workers 2 --set seed=1 --run-dir runs

Worker 0, or with --ps the chief, writes the run, and its output is shown; the others write to RUN_DIR/.workers.
On several machines start tools/train.py on each, with its place in TF_CONFIG and --set strategy.kind=multi_worker.
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("config", help="the experiment, a YAML file")
    parser.add_argument("--workers", type=cli.positive, default=2, help="processes that train (default: 2)")
    parser.add_argument("--ps", type=int, default=0, help="parameter servers; 0 trains copies in step (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument("--fresh", action="store_true", help="start anew even if an unfinished run exists")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()
    if args.ps < 0:
        parser.error("argument --ps: must not be negative")

    from fusion.training.local_cluster import run_cluster

    kind = "parameter_server" if args.ps else "multi_worker"
    command = [sys.executable, str(Path(__file__).with_name("train.py")), args.config, "--run-dir", str(args.run_dir)]
    command += [part for override in (*args.set, f"strategy.kind={kind}") for part in ("--set", override)]
    command += [f"--{name}" for name in ("fresh", "json", "quiet") if getattr(args, name)]
    return run_cluster(command, args.workers, args.ps, args.run_dir / ".workers" / "logs")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
