"""Experiments from Python: what the tools do, as one object that fits, evaluates, recommends, exports and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion.compat import tf
from fusion.config import read_config
from fusion.errors import DataError
from fusion.export.manifest import publish
from fusion.export.savedmodel import load as load_savedmodel
from recsys.export import artifact_of
from recsys.pipeline import rerun, run_experiment
from recsys.run import Run
from recsys.schema import ITEM_ID, USER_ID
from recsys.settings import parse_experiment


class Recommender:
    """A fitted, evaluated and exported recommendation experiment.

    >>> films = Recommender.fit("configs/quickstart.yaml", quiet=True)        # doctest: +SKIP
    >>> films.evaluate()["best_rule"]                                         # doctest: +SKIP
    'stacker'
    >>> films.recommend(histories=[["318", "296"]], k=3)                      # doctest: +SKIP
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._answer: Any = None

    @classmethod
    def fit(
        cls,
        config: str | Path | Mapping[str, Any],
        root: str | Path = "runs",
        *,
        overrides: Sequence[str] = (),
        fresh: bool = False,
        quiet: bool = False,
    ) -> Recommender:
        """Runs a config (a file, or the mapping that it would hold) from raw tables to the artifact.

        Raises ConfigError, DataError, GateError or MachineError, each with one sentence.
        """
        settings = read_config(config, overrides) if isinstance(config, (str, Path)) else dict(config)
        return cls(run_experiment(parse_experiment(settings), root, fresh=fresh, quiet=quiet))

    @classmethod
    def load(cls, folder: str | Path) -> Recommender:
        """The experiment of a run's folder. Raises ConfigError when it is none."""
        return cls(Run.open(Path(folder)))

    def evaluate(self) -> dict[str, Any]:
        """The content of `report.json`: figures of members and rules with intervals."""
        return json.loads((self.run.folder / "report.json").read_text(encoding="utf-8"))

    def recommend(
        self,
        user_ids: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
    ) -> pd.DataFrame:
        """The k best unseen items of known users, or of people known by what they have taken.

        Returns one row for each item: `row` (which user or history), `user_id`, `rank`, `item_id`, `score`, and a
        column for each member's contribution. Raises DataError for an unknown user.
        """
        if (user_ids is None) == (histories is None):
            raise DataError("give either user_ids or histories; received both or neither.")
        count = len(user_ids if user_ids is not None else histories or ())
        answer = self._recommend(
            user_id=tf.constant(list(user_ids or [""] * count), tf.string),
            history=_padded(histories or [[]] * count),
            k=tf.fill([count], k),
            exclude=_padded([list(exclude)] * count),
            include=_padded([list(include)] * count),
        )
        found = {name: tensor.numpy() for name, tensor in answer.items()}
        unknown = [user for user, known in zip(user_ids or (), found["known_user"], strict=False) if not known]
        if unknown:
            raise DataError(f"the user '{unknown[0]}' is not known; give items that they liked as histories.")
        rows, places = np.nonzero(found["item_ids"] != b"")
        table = pd.DataFrame(
            {
                "row": rows,
                USER_ID: [user_ids[int(row)] if user_ids is not None else "" for row in rows],
                "rank": places + 1,
                ITEM_ID: [item.decode("utf-8") for item in found["item_ids"][rows, places]],
                "score": found["scores"][rows, places],
            }
        )
        for position, member in enumerate(self.run.experiment.members):
            table[member] = found["contributions"][rows, position, places]
        return table

    @property
    def _recommend(self) -> Any:
        if self._answer is None:
            self._loaded = load_savedmodel(artifact_of(self.run.folder))
            self._answer = self._loaded.signatures["recommend"]
        return self._answer

    def export(self, models: str | Path | None = None) -> Path:
        """Writes a new version of the artifact, and publishes it below `models` where that is given."""
        rerun(self.run, ["export"])
        self._answer = None
        artifact = artifact_of(self.run.folder)
        return publish(artifact, models, self.run.experiment.name) if models else artifact


def _padded(lists: Sequence[Sequence[str]]) -> tf.Tensor:
    """Ids as a string tensor `[B, L]`, padded with '' to the longest list (at least one)."""
    width = max(1, *(len(ids) for ids in lists)) if lists else 1
    return tf.constant([[*ids, *[""] * (width - len(ids))] for ids in lists], tf.string)
