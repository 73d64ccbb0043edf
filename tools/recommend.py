"""Answers from an exported artifact: the best items for a user, for a history or for everybody, or items like an
item, a sentence or a picture."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import cli

EXAMPLES = """  python tools/recommend.py latest --user 42 -k 10
  python tools/recommend.py runs/quickstart/latest --history 318,296,593 --exclude 50
  python tools/recommend.py models/films/3 --all --out recs.parquet
  python tools/recommend.py models/films/3 --all --out recs/ -k 20 --filter language=fr,de --diversity 0.3
  python tools/recommend.py latest --like-text "a robot that falls in love"
  python tools/recommend.py latest --like-image poster.jpg -k 5
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("source", metavar="RUN|ARTIFACT", help="a run's folder, an artifact's folder, or 'latest'")
    parser.add_argument("--user", metavar="ID", help="a user of the training data")
    parser.add_argument("--history", type=ids, default=[], metavar="ID,ID", help="items taken, for somebody unknown")
    parser.add_argument("--exclude", type=ids, default=[], metavar="ID,ID", help="items not to return")
    parser.add_argument("--include", type=ids, default=[], metavar="ID,ID", help="return only items of this list")
    parser.add_argument("-k", type=int, help="how many items (default: 10, or what the artifact allows)")
    parser.add_argument("--like-item", metavar="ID", help="items like this one, instead of recommendations")
    parser.add_argument("--like-text", metavar="TEXT", help="items whose text is nearest to this one")
    parser.add_argument("--like-image", type=Path, metavar="FILE", help="items whose image is nearest to this one")
    parser.add_argument("--member", metavar="NAME", help="whose embeddings --like-text or --like-image search")
    everyone = parser.add_argument_group("for many users", "a folder is written in shards; run again, it is continued")
    everyone.add_argument("--all", action="store_true", help="for every user of the training data; needs --out")
    everyone.add_argument("--out", type=Path, metavar="DIR|FILE.parquet", help="where --all writes")
    everyone.add_argument(
        "--users", type=Path, metavar="FILE", help="only these: one id a line, or Parquet with user_id"
    )
    everyone.add_argument(
        "--filter", type=column_values, action="append", default=[], metavar="COLUMN=V,V", help="items that have one of"
    )
    everyone.add_argument("--diversity", type=float, default=0.0, metavar="0..1", help="spread the lists out")
    everyone.add_argument("--profile", choices=("best", "fast"), default="best", help="all members, or their student")
    everyone.add_argument("--shard-users", type=cli.positive, metavar="N", help="users of one shard (default: 10,000)")
    everyone.add_argument("--engine", choices=("local", "beam"), default="local", help="here, or as a Beam pipeline")
    everyone.add_argument("--beam-option", action="append", default=[], metavar="=--X=Y", help="handed to Apache Beam")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args()
    someone = args.user is not None or bool(args.history)
    like_any = [value is not None for value in (args.like_item, args.like_text, args.like_image)]
    if someone + sum(like_any) + args.all != 1 or args.all != (args.out is not None):
        parser.error("give --user or --history, or one of --like-item, --like-text, --like-image, or --all with --out")
    many = [args.users, args.filter, args.diversity, args.profile == "fast", args.shard_users, args.beam_option]
    if not args.all and (any(many) or args.engine == "beam"):
        parser.error("--users, --filter, --diversity, --profile, --shard-users and --engine go with --all")
    if args.beam_option and args.engine != "beam":
        parser.error("--beam-option goes with --engine beam")
    if any(like_any) and (args.exclude or args.include):
        parser.error("--exclude and --include go with --user, --history or --all")
    if args.member is not None and args.like_text is None and args.like_image is None:
        parser.error("--member goes with --like-text or --like-image")
    if args.all and args.out.suffix == ".parquet" and (args.engine == "beam" or args.shard_users):
        parser.error("--engine beam and --shard-users write a folder; give one to --out, without .parquet")

    import fusion.compat  # noqa: F401  (chooses Keras before TensorFlow is loaded)
    from fusion.errors import ConfigError, GateError, MachineError
    from serving.errors import ArtifactRefused, InvalidRequest, NotPossible, NotWritable, UnknownSignature
    from serving.predictor import Predictor

    try:
        folder = artifact(args.source)
        predictor = Predictor.load(folder)
        args.k = min(10, predictor.limits.k) if args.k is None else args.k
        answer = everybody if args.all else one if someone else like
        return answer(args, predictor, folder)
    except (InvalidRequest, UnknownSignature, NotPossible) as error:
        raise ConfigError(str(error)) from error
    except NotWritable as error:
        raise MachineError(str(error)) from error
    except ArtifactRefused as error:
        raise GateError(str(error)) from error


def ids(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def column_values(text: str) -> tuple[str, list[str]]:
    """The type of an option such as language=fr,de."""
    column, _, values = text.partition("=")
    if not column or not ids(values):
        raise argparse.ArgumentTypeError(f"must be a column and its values, as in language=fr,de; received {text}")
    return column, ids(values)


def artifact(source: str) -> Path:
    """The artifact's folder: itself, or the newest one of a run, or of the newest run."""
    from fusion.errors import ConfigError
    from fusion.export.manifest import FILE_NAME

    folder = Path(source)
    if source == "latest" and not folder.exists():
        runs = [link.resolve() for link in Path("runs").glob("*/latest")]
        if not runs:
            raise ConfigError("'latest' needs a run below runs/; there is none. Run tools/train.py first.")
        folder = max(runs, key=lambda path: path.name)
    if (folder / FILE_NAME).is_file():
        return folder
    from recsys.export import artifact_of

    return artifact_of(folder)


def one(args: argparse.Namespace, predictor: Any, folder: Path) -> int:
    """Prints the list of one user or one history."""
    from fusion.errors import DataError

    titles = read_titles(folder)
    unknown = [item for item in (*args.history, *args.exclude, *args.include) if item not in titles]
    if unknown:
        print(f"note: not in the catalogue, so without effect: {', '.join(unknown)}", file=sys.stderr)
    given = {"histories": args.history, "exclude": args.exclude, "include": args.include}
    answer = predictor.recommend([args.user or ""], k=args.k, **{name: [value] for name, value in given.items()})
    known = bool(answer["known_user"][0])
    if not known and not any(item in titles for item in args.history):
        who = f"the user '{args.user}' is not" if args.user else "none of the items of --history are"
        raise DataError(f"{who} known to {folder}; give items that they liked with --history ID,ID.")
    if args.user and not known:
        print(f"note: the user '{args.user}' is not known; answered from --history alone", file=sys.stderr)
    rows = listed(answer, titles, predictor.members)
    show(args, rows, predictor.members, artifact=str(folder), user=args.user, known_user=known)
    return 0


def like(args: argparse.Namespace, predictor: Any, folder: Path) -> int:
    """Prints the items like an item, or nearest to an example."""
    from fusion.errors import DataError
    from recsys.examples import Examples

    titles = read_titles(folder)
    if args.like_item is not None:
        if args.like_item not in titles:
            raise DataError(f"the item '{args.like_item}' is not in the catalogue of {folder}.")
        rows = listed(predictor.similar_items([args.like_item], args.k), titles, predictor.members)
        show(args, rows, predictor.members, artifact=str(folder), item=args.like_item)
        return 0
    examples = Examples(folder)
    name = examples.choose("image" if args.like_image else "text", args.member)
    inputs = examples.inputs(name, args.like_image or args.like_text)
    rows = listed(predictor.search(name, inputs, args.k), titles, ())
    show(args, rows, (), artifact=str(folder), searched=name)
    return 0


def listed(answer: dict[str, Any], titles: dict[str, str], members: tuple[str, ...]) -> list[dict[str, Any]]:
    """The items of the first row of an answer; contributions where `members` are given."""
    rows = []
    for place, item in enumerate(answer["item_ids"][0]):
        if item:
            name = item.decode()
            score = float(answer["scores"][0, place])
            row = {"rank": place + 1, "item_id": name, "title": titles.get(name, ""), "score": score}
            if members:
                shares = answer["contributions"][0, :, place].tolist()
                row["contributions"] = dict(zip(members, shares, strict=True))
            rows.append(row)
    return rows


def show(args: argparse.Namespace, rows: list[dict[str, Any]], members: tuple[str, ...], **facts: Any) -> None:
    """Prints items as a table, or as JSON with the facts of the question."""
    if args.json:
        print(json.dumps({**facts, "items": rows}, ensure_ascii=False))
    else:
        print_table(rows, members)


def print_table(rows: list[dict[str, Any]], members: tuple[str, ...]) -> None:
    """An aligned table; the contributions say how much each member added to the score."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False, caption=None if rows else "no item is left: all are seen or excluded")
    for name in ("rank", "item_id", "title", "score", *members):
        table.add_column(name, justify="left" if name in ("item_id", "title") else "right", no_wrap=True)
    for row in rows:
        shares = [f"{row['contributions'][member]:+.3f}" for member in members]
        cells = [str(row["rank"]), row["item_id"], row["title"], f"{row['score']:.3f}", *shares]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def everybody(args: argparse.Namespace, predictor: Any, folder: Path) -> int:
    """Writes the lists of all users to a Parquet file, or to a folder of shards."""
    from fusion.progress import progress
    from serving.batch import SHARD_USERS, Job, Lists, recommend_all
    from serving.messages import RecommendRequest

    users = read_users(args.users, folder)
    filters: dict[str, tuple[str, ...]] = {}
    for column, values in args.filter:
        filters[column] = (*filters.get(column, ()), *values)
    request = RecommendRequest(
        k=args.k,
        exclude=tuple(args.exclude),
        include=tuple(args.include),
        filters=filters,
        diversity=args.diversity,
        profile=args.profile,
    )
    lists = Lists(predictor, folder, request)
    with contextlib.ExitStack() as stack:
        job = None
        if args.out.suffix != ".parquet":
            job = stack.enter_context(Job(args.out, folder, users, request, args.shard_users or SHARD_USERS))
        done = [job.done() if job else 0]
        if args.engine == "beam" and job:
            summary = job.run_on_beam(args.beam_option)
        else:
            bar = stack.enter_context(progress("recommend", len(users), "users", quiet=args.quiet, done=done[0]))

            def advance(now: int, _: int) -> None:
                bar.advance(now - done[0])
                done[0] = now

            summary = job.run(lists, advance) if job else recommend_all(lists, users, args.out, advance)
    if summary.unknown_users:
        some = ", ".join(summary.unknown_users[:5])
        print(
            f"note: {len(summary.unknown_users):,} users are not known, so without a list: {some} ...", file=sys.stderr
        )
    facts = {"file": str(args.out), "rows": summary.rows, "users": summary.users, "seconds": round(summary.seconds, 2)}
    text = f"{summary.rows:,} rows for {summary.users:,} of {len(users):,} users in {summary.seconds:.1f} s: {args.out}"
    print(json.dumps({**facts, "unknown_users": len(summary.unknown_users)}) if args.json else text)
    return 0


def read_users(listed: Path | None, folder: Path) -> list[str]:
    """The ids of the file that was given, or of all users that the artifact knows."""
    from fusion.errors import ConfigError

    path = listed or folder / "users.parquet"
    if not path.is_file():
        what = "the file of --users" if listed else "--all needs the artifact's list of users, which"
        raise ConfigError(f"{what} must be there; {path} is not. Name another file, or export the run again.")
    try:
        if path.suffix == ".parquet":
            users = read_column(path, "user_id")
            if None in users:
                raise ValueError("a row has no user_id")
            return [str(user) for user in users]
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as error:  # of pyarrow and of Unicode
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise ConfigError(
            f"users must be ids, one a line, or Parquet with user_id; {path} is not: {reason}."
        ) from error


def read_column(path: Path, column: str) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=[column]).column(column).to_pylist()


def read_titles(folder: Path) -> dict[str, str]:
    """Titles by item id; an artifact of a catalogue without titles has '' for all."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "items.parquet")
    items = table.column("item_id").to_pylist()
    names = table.column("title").to_pylist() if "title" in table.column_names else [""] * len(items)
    return {item: name or "" for item, name in zip(items, names, strict=True)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
