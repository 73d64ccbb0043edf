"""Checkpoints of a training run: everything that the next step depends on, in one restorable unit.

One checkpoint holds the weights that can change, the optimizer, the best weights so far, the random state of
the layers, and the loop's own counters (`TrainingState`). TensorFlow writes the index of a checkpoint last, so
a process that is killed at any moment leaves the earlier one usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from fusion.compat import keras, tf
from fusion.errors import ConfigError, MachineError
from fusion.progress import note
from fusion.training.cluster import exchange
from fusion.types import History

_KEEP = 2
"""Checkpoints kept, so that there is one to fall back to."""

# What TensorFlow raises for a damaged checkpoint depends on where the damage is.
_UNREADABLE = (tf.errors.OpError, ValueError, LookupError, AssertionError, RuntimeError)


@dataclasses.dataclass
class TrainingState:
    """Where a training run is.

    Attributes:
        fingerprint: hash of what the run was started with; another one cannot be continued from here.
        epoch: epochs completed.
        position: batches done in the running epoch.
        step: optimizer steps done in all.
        loss_sum: sum of the losses of the running epoch's rows.
        best_metric: best value of the monitored metric; None before the first validation.
        waited: validations since the best one.
        finished: training is over and the weights are the best ones.
        history: rows of the completed epochs.
    """

    fingerprint: str
    epoch: int = 0
    position: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_metric: float | None = None
    waited: int = 0
    finished: bool = False
    history: History = dataclasses.field(default_factory=History)

    def to_json(self) -> str:
        # Python writes the shortest text that reads back to the same float, so nothing is rounded here.
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainingState:
        values = json.loads(text)
        return cls(**{**values, "history": History(**values["history"])})


class _StateHolder(tf.train.experimental.PythonState):
    """Lets `tf.train.Checkpoint` carry a TrainingState beside the variables."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state

    def serialize(self) -> str:
        return self.state.to_json()

    def deserialize(self, string_value: str | bytes) -> None:
        text = string_value.decode() if isinstance(string_value, bytes) else string_value
        self.state = TrainingState.from_json(text)


def changing_variables(model: keras.Model) -> list[tf.Variable]:
    """The variables that training can change: those of frozen layers are left out, moving statistics are in."""
    frozen = _frozen_ids(model)
    return [variable for variable in model.variables if id(variable) not in frozen]


def frozen_digest(model: keras.Model) -> str:
    """A hash (hex) of the weights that training cannot change."""
    frozen = _frozen_ids(model)
    digest = hashlib.blake2b(digest_size=16)
    for variable in model.variables:
        if id(variable) in frozen:
            digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def _frozen_ids(model: keras.Model) -> set[int]:
    layers = [part for part in model.submodules if isinstance(part, keras.layers.Layer)]
    return {id(variable) for layer in layers if not layer.trainable for variable in layer.variables}


def random_generators(model: keras.Model) -> list[tf.random.Generator]:
    """The random states of the dropout layers.

    Keras keeps them out of weights and checkpoints on purpose, so they are collected here.
    Raises ValueError for a layer whose random state is hidden in an operation, where no checkpoint can reach it.
    """
    layers = [part for part in model.submodules if isinstance(part, keras.__internal__.layers.BaseRandomLayer)]
    generators = []
    for layer in layers:
        generator = getattr(layer._random_generator, "_generator", None)
        if generator is not None:
            generators.append(generator)
        elif getattr(layer, "rate", 1.0) > 0 and layer._random_generator._rng_type == "legacy_stateful":
            raise ValueError(
                "a random layer must keep its state in a variable, or training cannot be resumed exactly; received "
                f"layer '{layer.name}' without one. Build it with force_generator=True."
            )
    return generators


class Checkpoints:
    """Saves and restores one training run below `directory`.

    Attributes:
        state: counters of the loop; saved and restored with the variables.
    """

    def __init__(
        self,
        directory: Path,
        model: keras.Model,
        optimizer: tf.Module | keras.optimizers.Optimizer,
        state: TrainingState,
        average: tf.Module | None = None,
    ) -> None:
        self._directory = directory / "checkpoints"
        self._weights = changing_variables(model)
        self._best = [tf.Variable(v.numpy(), trainable=False) for v in self._weights]
        self._holder = _StateHolder(state)
        self._checkpoint = tf.train.Checkpoint(
            weights=self._weights,
            best=self._best,
            optimizer=optimizer,
            random=random_generators(model),
            state=self._holder,
            **({} if average is None else {"average": average}),
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(self._directory), max_to_keep=_KEEP)

    @property
    def state(self) -> TrainingState:
        return self._holder.state

    def save(self) -> None:
        """Writes a checkpoint of this moment. Raises MachineError when the disk does not take it."""
        try:
            self._manager.save()
            write_history(self._directory.parent / "history.json", self.state.history)
        except (tf.errors.OpError, OSError) as error:
            raise MachineError(
                f"checkpoints must be writable; {self._directory} is not: {_first_line(error)}. "
                "Free some space or choose another folder, then run again to continue from the last checkpoint."
            ) from error

    def keep_best(self) -> None:
        """Remembers the present weights as the best ones."""
        for kept, variable in zip(self._best, self._weights, strict=True):
            kept.assign(variable.numpy())

    def restore_best(self) -> None:
        """Puts the best weights back into the model."""
        for kept, variable in zip(self._best, self._weights, strict=True):
            variable.assign(kept)

    def restore(self, quiet: bool, strategy: Any = None) -> bool:
        """Continues from the newest checkpoint that can be read; False when there is none at all.

        Processes that train in step each have checkpoints of their own, because some of their states differ, and
        continue from the newest one that all of them have.

        Raises ConfigError when the folder holds another run, MachineError when checkpoints are there but none of
        them can be read, or processes would continue from different ones.
        """
        restored = self._restore_own(quiet, strategy)
        steps = exchange(strategy, "restored step", [self.state.step])
        if (steps != steps[0]).any():
            raise MachineError(
                f"all processes must continue from one step; theirs are {', '.join(map(str, steps[:, 0]))}, because a "
                f"checkpoint cannot be read. Remove {self._directory} in each of them to train from the start."
            )
        return restored

    def _restore_own(self, quiet: bool, strategy: Any) -> bool:
        found = self._found()
        newest = int(exchange(strategy, "newest checkpoint", [_number(found[0]) if found else 0]).min())
        found = [path for path in found if _number(path) <= newest]
        for path in found:
            try:
                self._check_same_run(path)
                self._checkpoint.restore(str(path)).assert_consumed()
                return True
            except _UNREADABLE as error:
                note(f"checkpoint {path} cannot be read ({_first_line(error)}); trying the one before", quiet=quiet)
        if found:
            raise MachineError(
                f"one checkpoint in {self._directory} must be readable to continue; all {len(found)} are damaged. "
                "Remove the folder to train from the start."
            )
        return False

    def _found(self) -> list[Path]:
        """All complete checkpoints, newest first, whatever TensorFlow's own list of them says."""
        numbered = {
            int(match[1]): path.with_suffix("")
            for path in self._directory.glob("ckpt-*.index")
            if (match := re.fullmatch(r"ckpt-(\d+)\.index", path.name))
        }
        return [numbered[number] for number in sorted(numbered, reverse=True)]

    def _check_same_run(self, path: Path) -> None:
        """Reads the counters alone first, so that a checkpoint of another run touches no variable."""
        reader = tf.train.load_checkpoint(str(path))
        saved = TrainingState.from_json(reader.get_tensor("state/.ATTRIBUTES/py_state").decode())
        if saved.fingerprint != self.state.fingerprint:
            raise ConfigError(
                "training can be continued only with the settings, seed and rows that it was begun with; "
                f"{self._directory} was begun with others. Train into another folder, or start anew with --fresh."
            )


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def write_history(path: Path, history: History) -> None:
    """Writes the history as JSON, by rename, so that a reader never meets half a file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(history), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_history(path: Path) -> History:
    """Reads what `write_history` wrote."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return History(**values)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
