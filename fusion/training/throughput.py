"""Whether the input keeps up: rows a second of the batches alone, of the steps alone, and of both together.

What is timed is the training loop of a member, driven in parts (`RunOptions.drive`): its feed, its compiled steps, and
the two as training joins them. The weights of the member move while it is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Generator

from fusion.training.batches import Block, Feed
from fusion.training.trainer import Loop

LOOKED_AT = 15
"""Blocks among which the one is chosen that the model alone trains on; batches are shuffled, so any are like all."""

Part = Callable[[Feed], Generator[Block]]
"""Does something with the blocks of a feed, and gives each when it is done."""


def measure_throughput(loop: Loop, rounds: int, seconds: float) -> dict[str, float]:
    """Samples a second of a training loop and of its parts, in turns of `seconds` or of one call, if that is longer.

    Args:
        loop: as `fusion.training.trainer.fit` has made it, on one device or mirrored over those of this process.
        rounds: how often each part has its turn.
        seconds: of a turn.

    Returns:
        `pipeline`, batches up to tensors; `model`, steps on one block, of median size, again and again; and `both`, as
        in training: medians over rounds. `ratio` is how many times as fast as the model the pipeline is, the median of
        the ratios within a round, so that a machine that is busy for a while is busy for both. `input_wait` is the
        share of the time of `both` without a batch.
    """

    def both(feed: Feed) -> Generator[Block]:
        return (block for block, _ in loop.trained(feed))

    _turn(loop, both, seconds)  # makes the graph, and finds how many steps a call takes
    block = _typical(loop)
    parts: dict[str, Part] = {"pipeline": loop.blocks, "model": lambda _: _repeated(loop, block), "both": both}
    turns = [{name: _turn(loop, part, seconds) for name, part in parts.items()} for _ in range(rounds)]
    rates = {name: [turn[name][0] for turn in turns] for name in parts}
    ratios = [pipeline / model for pipeline, model in zip(rates["pipeline"], rates["model"], strict=True)]
    return {
        **{name: statistics.median(found) for name, found in rates.items()},
        "ratio": statistics.median(ratios),
        "input_wait": statistics.median(turn["both"][1] for turn in turns),
    }


def _turn(loop: Loop, part: Part, seconds: float) -> tuple[float, float]:
    """Samples a second, and the share of the time in which a batch was waited for."""
    samples, waited, spent = 0, 0.0, 0.0
    for epoch in itertools.count():
        began = time.perf_counter()  # to draw the order of an epoch is a part of it
        with loop.full_batches(epoch) as feed, contextlib.closing(part(feed)) as blocks:
            for block in blocks:
                samples += block.samples
                if spent + time.perf_counter() - began >= seconds:
                    break
            spent += time.perf_counter() - began
            waited += feed.waited
        if spent >= seconds:
            break
    return samples / spent, waited / spent


def _repeated(loop: Loop, block: Block) -> Generator[Block]:
    while True:
        loop.step(block)
        yield block


def _typical(loop: Loop) -> Block:
    """Of some blocks the one whose batches are of median size: texts are padded to different lengths."""
    with loop.full_batches(0) as feed:
        some = list(itertools.islice(loop.blocks(feed), LOOKED_AT))
    return sorted(some, key=lambda block: block.bytes / block.samples)[len(some) // 2]
