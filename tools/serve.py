"""Serves a run, a folder of models or an artifact: TensorFlow Serving's gRPC and REST, and recommendations."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import cli

EXAMPLES = """  python tools/serve.py latest
  python tools/serve.py runs/quickstart/latest --port 9000 --rest-port 9001
  python tools/serve.py models/films --workers 2 --canary 0.05
  python tools/serve.py models                                   (every model below it)
  python tools/serve.py --model-config models.config             (as tensorflow_model_server has it)
  python tools/serve.py models/films --host 0.0.0.0 --tls-cert c.pem --tls-key k.pem --token-file tokens
  python tools/serve.py models/films --host-name films.example.org     (behind a proxy that passes this name on)
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "source", nargs="?", metavar="RUN|MODELS|ARTIFACT", help="a run, a folder of versions or models, or 'latest'"
    )
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="models.config, instead of a folder")
    parser.add_argument("--name", default="", help="what requests call the one model of a folder (default: its own)")
    parser.add_argument("--host", default="127.0.0.1", help="address of all doors (default: this machine only)")
    parser.add_argument(
        "--host-name",
        type=host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="name that the REST doors are asked by, besides localhost and addresses; may be repeated; no other one is "
        "answered (default: any, but none over loopback without tokens)",
    )
    parser.add_argument("--port", type=port, default=8500, help="of gRPC; 0 takes a free one (default: 8500)")
    parser.add_argument("--rest-port", type=port, default=8501, help="of REST; 0 takes a free one (default: 8501)")
    parser.add_argument("--workers", type=cli.positive, default=1, help="processes that share the ports (default: 1)")
    parser.add_argument("--threads", type=cli.positive, default=1, help="calls of a graph at once (default: 1)")
    parser.add_argument(
        "--cores", type=cli.positive, help="that a graph keeps busy (default: a process's share but one, for the doors)"
    )
    parser.add_argument("--max-batch", type=cli.positive, default=64, help="rows of one call of a graph (default: 64)")
    parser.add_argument("--queue", type=cli.positive, default=256, help="requests that may wait (default: 256)")
    parser.add_argument(
        "--keep-answers", type=cli.positive, metavar="N", help="for who asks the same again (default: none are kept)"
    )
    parser.add_argument(
        "--canary",
        type=share,
        default=0.0,
        help="share of requests for the newest version until the label 'stable' names it, or for the one labelled "
        "'canary'",
    )
    parser.add_argument(
        "--latest",
        type=cli.positive,
        metavar="N",
        help="versions kept loaded, so that a rollback loads nothing (default: 1, with a canary 2)",
    )
    parser.add_argument(
        "--drain", type=cli.from_zero, default=20.0, metavar="SECONDS", help="time to finish when stopped"
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate of the server, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="who signs clients' certificates (mutual TLS)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="who may ask: lines of name and SHA-256")
    parser.add_argument("--admin-port", type=port, metavar="PORT", help="of administration; off without it")
    parser.add_argument("--admin-token-file", type=Path, metavar="FILE", help="who may administer")
    watched = parser.add_mutually_exclusive_group()
    watched.add_argument("--monitor", type=Path, metavar="FILE", help="what alarms lead to (default: they are logged)")
    watched.add_argument("--no-monitor", action="store_true", help="do not compare calls with the training data")
    parser.add_argument("--feedback", type=Path, metavar="FOLDER", help="log of what /v1/feedback is told; off without")
    parser.add_argument(
        "--items-journal", type=Path, metavar="FOLDER", help="of new and withdrawn items; off without it"
    )
    parser.add_argument("--json", action="store_true", help="print the ports as JSON once everything answers")
    args = parser.parse_args()
    if (args.source is None) == (args.model_config is None):
        parser.error("give a run, a folder or an artifact, or --model-config")
    if args.name and args.model_config is not None:
        parser.error("--name goes with a folder; the models of --model-config have names of their own")
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_ca is not None and args.tls_cert is None):
        parser.error("--tls-cert and --tls-key go together, and --tls-ca needs them")
    if (args.admin_port is None) != (args.admin_token_file is None):
        parser.error("--admin-port and --admin-token-file go together: nobody administers without a token")

    # What reads new items belongs to training, whose Keras this is; TensorFlow also starts faster with it.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from fusion.errors import ConfigError, GateError
    from serving.errors import ArtifactRefused, ServingError
    from serving.server import configure_logging, serve

    configure_logging()
    try:
        serve(settings(args), lambda facts: announce(args, facts))
    except ArtifactRefused as error:
        raise GateError(str(error)) from error
    except ServingError as error:
        raise ConfigError(str(error)) from error
    return 0


def settings(args: argparse.Namespace) -> Any:
    """The server's settings out of the command line. Raises ConfigError."""
    from serving.actions import Watch
    from serving.batching import BatchSettings
    from serving.rest_guard import RestSettings
    from serving.security import Tls
    from serving.settings import GrpcSettings, ServerSettings

    tls = None if args.tls_cert is None else Tls(args.tls_cert, args.tls_key, args.tls_ca)
    return ServerSettings(
        models=tuple(models(args)),
        host=args.host,
        grpc_port=args.port,
        rest_port=args.rest_port,
        admin_port=args.admin_port,
        workers=args.workers,
        drain_s=args.drain,
        tokens=args.token_file,
        admin_tokens=args.admin_token_file,
        tls=tls,
        watch=None if args.no_monitor else Watch() if args.monitor is None else Watch.read(args.monitor),
        feedback=args.feedback,
        items_journal=args.items_journal,
        item_reader=item_reader,
        batching=BatchSettings(args.max_batch, args.queue, args.threads, args.cores, args.keep_answers),
        grpc=GrpcSettings(queue=args.queue),
        rest=RestSettings(hosts=frozenset(args.host_name)),
    )


def item_reader(artifact: Path) -> Any:
    """Reads new items as the encoders of an artifact do; training's tokenisers are imported with the first."""
    from recsys.examples import ItemReader

    return ItemReader(artifact)


def models(args: argparse.Namespace) -> list[Any]:
    """The models that are meant. Raises ConfigError when there is none, and for options that would do nothing."""
    from fusion.errors import ConfigError

    found = found_models(args)
    if args.name and args.name not in {config.name for config in found}:
        raise ConfigError(
            f"--name must be left out where there are several models, each with a name of its own; {args.source} has "
            f"{', '.join(config.name for config in found)}."
        )
    fixed = [config.name for config in found if config.versions is not None]
    if args.latest is not None and fixed:
        raise ConfigError(
            f"--latest must be left out where the versions are named one by one, as those of {', '.join(fixed)} are; "
            f"received {args.latest}."
        )
    return found


def found_models(args: argparse.Namespace) -> list[Any]:
    """What the folder or the file holds. Raises ConfigError when that is nothing."""
    from fusion.errors import ConfigError
    from serving.model_config import named_models, read_model_config

    if args.model_config is not None:
        try:
            configs = read_model_config(args.model_config)
        except OSError as error:
            raise ConfigError(f"{args.model_config} must be a readable file; {error.strerror}.") from error
        latest = args.latest or (2 if args.canary else 1)
        return [dataclasses.replace(c, canary=args.canary, latest=max(c.latest, latest)) for c in configs]
    folder = Path(args.source)
    if args.source == "latest" and not folder.exists():
        runs = [link.resolve() for link in Path("runs").glob("*/latest")]
        if not runs:
            raise ConfigError("'latest' needs a run below runs/; there is none. Run tools/train.py first.")
        folder = max(runs, key=lambda path: path.name)
    found = named_models(folder, args.name, args.canary, args.latest)
    if not found:
        raise ConfigError(
            f"{folder} must be an artifact, a folder of versions or models, or a run with an export; it is none. Run "
            "tools/export.py on the run."
        )
    return found


def announce(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Says where the server listens, on stdout; anybody who waits for this line may call."""
    if args.json:
        print(json.dumps(facts), flush=True)
        return
    where = ", ".join(f"{door} {args.host}:{number}" for door, number in facts["ports"].items())
    print(f"serving {', '.join(facts['models'])} at {where}; Ctrl-C stops", flush=True)


def port(text: str) -> int:
    """The type of an option that is a port."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"must be between 0 and 65535; received {text}")
    return number


def host_name(text: str) -> str:
    """The type of an option that is the name of a host, without scheme and port."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,253}", text):
        raise argparse.ArgumentTypeError(f"must be a name such as films.example.org, without port; received {text}")
    return text.lower()


def share(text: str) -> float:
    """The type of an option that is a share."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1; received {text}")
    return number


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main, resume="the server has stopped")
