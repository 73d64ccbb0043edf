"""What a run would do, without doing it: rows, parameters, estimated time and memory.

The estimates are sums of rough rates of a two-core machine, there to tell a minute from an hour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fusion.config import Part
from fusion.training.local_cluster import threads_of
from recsys.cleaning import clean, clean_examples
from recsys.schema import LABEL, PART_NAMES, SPLIT
from recsys.splits import split, split_examples

STEPS_PER_SECOND = 15.0
"""Training steps of towers and heads."""
GFLOPS = 60e9
"""Floating-point operations a second of encoders, and of dense linear algebra."""
ENCODER_FLOPS = {
    "text_bert": 5.7e8,
    "image_efficientnet": 1.6e4,
    "image_cnn": 2e3,
    "image_backbone": 1.6e5,
    "text_tfidf": 1e5,
}
"""For one text of 24 tokens, or for one pixel."""
PARAMETERS = {"text_bert": 22_700_000, "image_efficientnet": 3_400_000}
BASE_BYTES = 1_100_000_000
"""TensorFlow, pandas and the program itself."""
WORKER_BYTES = 700_000_000
"""The same of a process that fits members (`recsys.workers`) and does nothing else."""


def plan(experiment: Any, root: Path) -> dict[str, Any]:
    """Reads, cleans and splits the data (nothing is written), and estimates the rest of the run."""
    tables = experiment.data.registry[experiment.data.kind].read(experiment.data.config)
    if experiment.task == "recommendation":
        data, dropped = clean(tables, experiment.cleaning, experiment.positive)
        parts = split(data, experiment.split)
        users, items = data.shape
        facts: dict[str, Any] = {"users": users, "items": items, "interactions": len(data.users)}
        positives, values = int(data.positive.sum()), items
    else:
        table, dropped = clean_examples(tables, experiment.cleaning)
        given = list(table[SPLIT]) if SPLIT in table else None
        parts = split_examples(table[LABEL].to_numpy(), given, experiment.split)
        facts = {"examples": len(table), "classes": table[LABEL].nunique()}
        users, items, positives, values = 0, 0, len(table), len(table)
    fits = 1 + experiment.fits_out_of_fold + experiment.evaluation.refit + (experiment.export.refit == "all")
    grids = getattr(experiment, "tuning", {})
    tried = {name: sum(len(values) for values in grids.get(name, {}).values()) for name in experiment.members}
    members = {name: estimate(part, users, items, positives, values) for name, part in experiment.members.items()}
    for name, soup in experiment.soups.items():
        members[name]["fit_s"] = round(soup.copies * members[name]["fit_s"], 1)
    processes = min(experiment.training.processes, len(members))
    seconds = [(fits + tried[name]) * member["fit_s"] + member["embed_s"] for name, member in members.items()]
    # Nothing is faster than the slowest member, nor than all processors at work.
    elapsed = max(*seconds, sum(seconds) / min(processes, threads_of(1))) if processes > 1 else sum(seconds)
    largest = sorted((member["bytes"] for member in members.values()), reverse=True)[:processes]
    needed = BASE_BYTES + sum(largest) + 256 * 4 * items * (len(members) + 8)
    needed += processes * WORKER_BYTES if processes > 1 else 0
    return {
        "name": experiment.name,
        "task": experiment.task,
        "folder": str(root / experiment.name),
        "data": facts,
        "dropped": {rule.rule: rule.rows for rule in dropped},
        "rows": {name: int((parts == number).sum()) for number, name in enumerate(PART_NAMES)},
        "fits_per_member": fits,
        "tuning_fits": tried,
        "members": members,
        "rules": list(experiment.rules),
        "processes": processes,
        "estimated_s": round(20 + elapsed),
        "estimated_bytes": int(needed),
        "machine_bytes": psutil.virtual_memory().total,
    }


def estimate(part: Part, users: int, items: int, positives: int, values: int) -> dict[str, Any]:
    """Parameters, bytes while fitting, and seconds of one member."""
    config = part.config
    width = getattr(config, "factors", getattr(config, "dimensions", 0))
    parameters = 2 * items * width if part.kind == "matrix_factorization" else items * max(width, 1)
    embed_s, fit_s, needed = 0.0, 0.0, 8 * parameters
    if hasattr(config, "neighbours"):
        parameters = items * min(config.neighbours, items)
        needed = 12 * parameters
    if hasattr(part.registry[part.kind], "fit_cost"):
        flops, more = part.registry[part.kind].fit_cost(config, users, items, positives)
        fit_s += flops / GFLOPS
        needed += more
    if hasattr(config, "encoder"):
        encoder = config.encoder
        pixels = getattr(encoder.config, "image_size", 1) ** 2
        embed_s = values * ENCODER_FLOPS.get(encoder.kind, 1e6) * pixels / GFLOPS
        parameters += PARAMETERS.get(encoder.kind, 0)
        needed += 4 * PARAMETERS.get(encoder.kind, 0) + 3 * pixels * values * (pixels > 1) + 4 * 1280 * values
        if encoder.config.model_dump().get("fine_tune"):
            fit_s += 3.0 * embed_s * getattr(getattr(config, "training", None), "epochs", 1)
    if hasattr(config, "training"):
        steps = config.training.epochs * int(np.ceil(positives / config.training.batch_size))
        fit_s += steps / STEPS_PER_SECOND
    return {
        "kind": part.kind,
        "parameters": int(parameters),
        "bytes": int(needed),
        "embed_s": round(embed_s, 1),
        "fit_s": round(fit_s, 1),
    }


def describe(facts: dict[str, Any]) -> str:
    """A plan in words."""
    rows = ", ".join(f"{count:,} {name}" for name, count in facts["rows"].items() if count)
    lines = [
        f"{facts['name']} ({facts['task']}): " + ", ".join(f"{v:,} {k}" for k, v in facts["data"].items()),
        f"rows: {rows}; dropped by cleaning: {sum(facts['dropped'].values()):,}",
        f"members, each fitted {facts['fits_per_member']} times (training, folds, refits), beside "
        f"{sum(facts['tuning_fits'].values())} fits of tuning, {facts['processes']} at a time:",
    ]
    for name, member in facts["members"].items():
        lines.append(
            f"  {name:<16} {member['kind']:<22} {member['parameters']:>12,} parameters  "
            f"about {member['embed_s'] + member['fit_s']:,.0f} s a fit"
        )
    lines += [
        f"rules: {', '.join(facts['rules'])}",
        f"estimated time {facts['estimated_s'] / 60:.0f} min, memory {facts['estimated_bytes'] / 1e9:.1f} GB "
        f"of {facts['machine_bytes'] / 1e9:.1f} GB; would run in {facts['folder']}",
    ]
    if facts["estimated_bytes"] > facts["machine_bytes"]:
        lines.append("WARNING: the estimate exceeds this machine's memory.")
    return "\n".join(lines)
