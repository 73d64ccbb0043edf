"""Experiments from Python: what the tools do, as one object that fits, evaluates, recommends, exports and loads.

What unusual questions get from `Recommender`, and from the exported signatures, which any TensorFlow server runs. Here
"no row" is no row of the table for that user, and "empty" is the id '' with score and contributions 0 in every place.

| question                                     | `Recommender`                      | signature                       |
|----------------------------------------------|------------------------------------|---------------------------------|
| user not known, no history                   | DataError names the user           | as no history; not `known_user` |
| no history, or only items that are not known | members that are not personal answer (popularity); without any: | |
|                                              | no row                             | empty                           |
| all seen, excluded or not in `include`       | no row                             | empty                           |
| unknown ids beside known ones                | have no effect; an `include` of unknown ids alone leaves nothing ||
| an item twice in a history                   | counts once, where it stands last  | the same                        |
| k above what is left                         | as many rows as are left           | empty beyond the last           |
| k above `export.k_max`                       | ConfigError                        | cut to `k_max`                  |
| k = 0 or below                               | ConfigError                        | empty                           |
| a history longer than the catalogue          | answered                           | answered                        |
| a catalogue of one item                      | no row: who scores all items alike is taken for silent | empty       |
| `similar_items` of an unknown item           | DataError names the item           | empty                           |
| `search` by an empty text, a broken image    | DataError                          | (its callers read text, files)  |

`serving.predictor.Predictor` answers as the signature does, but refuses a k that is not between 1 and `k_max`, and a
history of more than 4,096 items, with LimitExceeded. `tools/recommend.py` asks the predictor: what it refuses ends with
exit code 2; a user, a history or an item that is not known with 3; what is left of unknown ids is named in a note.

Training data: a pair that stands twice counts once (`cleaning.duplicates` says which row stays); with `positive: any` a
negative rating is an interaction like any other, and `positive: rating >= 4` or `cleaning.min_rating` keep it from
teaching; weights of rules below zero are a ConfigError. Users without interactions teach nothing, items without any are
spoken of by content alone, and one user or one item is enough to fit every member, or it says in one sentence why not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from fusion.compat import tf
from fusion.config import read_config
from fusion.errors import ConfigError, DataError
from fusion.export.manifest import publish, verify_manifest
from fusion.export.savedmodel import load as load_savedmodel
from recsys.examples import Examples
from recsys.export import artifact_of, served
from recsys.pipeline import rerun, run_experiment
from recsys.ranking_task import RankingTask
from recsys.reasons import Explainer
from recsys.report_content import Reasons
from recsys.run import Run
from recsys.schema import ITEM_ID, USER_ID
from recsys.settings import parse_experiment
from recsys.vocabulary import UNKNOWN, Vocabulary


class Recommender:
    """A fitted, evaluated and exported recommendation experiment.

    >>> films = Recommender.fit("configs/quickstart.yaml", quiet=True)        # doctest: +SKIP
    >>> films.evaluate()["best_rule"]                                         # doctest: +SKIP
    'stacker'
    >>> films.recommend(histories=[["318", "296"]], k=3)                      # doctest: +SKIP
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._loaded: Any = None
        self._explainer: tuple[Explainer, sparse.csr_matrix] | None = None

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
        column for each member's contribution. Raises DataError for an unknown user, and ConfigError for a `k` that is
        not between 1 and the `export.k_max` of the run; this module's docstring has a table of all other cases.
        """
        if (user_ids is None) == (histories is None):
            raise DataError("give either user_ids or histories; received both or neither.")
        count = len(user_ids if user_ids is not None else histories or ())
        found = self._call(
            "recommend",
            k,
            count,
            user_id=tf.constant(list(user_ids or [""] * count), tf.string),
            history=_padded(histories or [[]] * count),
            exclude=_padded([list(exclude)] * count),
            include=_padded([list(include)] * count),
        )
        unknown = [user for user, known in zip(user_ids or (), found["known_user"], strict=False) if not known]
        if unknown:
            raise DataError(f"the user '{unknown[0]}' is not known; give items that they liked as histories.")
        table = self._table(found)
        table.insert(1, USER_ID, [user_ids[row] if user_ids is not None else "" for row in table["row"]])
        return table

    def similar_items(self, item_ids: Sequence[str], k: int = 10) -> pd.DataFrame:
        """The k items most like each of the given ones: what the personal members, fused, give to somebody who has
        taken just this item. A cold item is answered by the members that read content. No item is like itself.

        Returns one row for each item: `row` (which of `item_ids`), `rank`, `item_id`, `score`, and a column for each
        member's contribution. Raises DataError for an unknown item, ConfigError for a wrong `k`.
        """
        found = self._call("similar_items", k, len(item_ids), item_id=tf.constant(list(item_ids), tf.string))
        known = set(pd.read_parquet(artifact_of(self.run.folder) / "items.parquet", columns=[ITEM_ID])[ITEM_ID])
        unknown = [item for item in item_ids if item not in known]
        if unknown:
            raise DataError(f"the item '{unknown[0]}' is not in the catalogue; it can be like nothing there.")
        return self._table(found)

    def search(
        self,
        text: str | None = None,
        image: str | Path | np.ndarray | None = None,
        k: int = 10,
        member: str | None = None,
    ) -> pd.DataFrame:
        """The k items whose text, or image, is nearest to an example by the cosine of their embeddings.

        Args:
            text: a sentence or a few words.
            image: the path of a JPEG, PNG or WebP, or pixels `[H, W, 3]`; give either a text or an image.
            k: how many items.
            member: whose embeddings are searched; without it the first member that reads texts, or images.

        Returns one row for each item: `rank`, `item_id`, `score` (the cosine, -1 to 1). Raises DataError for an example
        that cannot be used, ConfigError when no member reads such content and for a wrong `k`.
        """
        if (text is None) == (image is None):
            raise DataError("a search needs either a text or an image; received both or neither.")
        examples = Examples(artifact_of(self.run.folder))
        name = examples.choose("text" if image is None else "image", member)
        inputs = examples.inputs(name, text if image is None else image)  # type: ignore[arg-type]
        found = self._call(f"search_{name}", k, 1, **{n: tf.constant(array) for n, array in inputs.items()})
        return self._table(found).drop(columns="row")

    def explain(self, item_id: str, user_id: str | None = None, history: Sequence[str] | None = None) -> Reasons:
        """Why `recommend` gives an item the score that it gives it, for a known user or for who has taken `history`.

        Returns each member's share, the liked items that speak most for it, the words of its text and the regions of
        its picture (`recsys.report_content.Reasons`; `plain()` makes JSON of it).

        This asks the members and not the artifact, which has no gradients. Where `export.refit` fitted them on every
        row they are in the run's cache; what is gone from it is fitted again. Raises DataError for an unknown user or
        item, and for an item about which no member says anything to this user.
        """
        if (user_id is None) == (history is None):
            raise DataError("give either a user_id or a history; received both or neither.")
        explainer, histories = self._explaining()
        number = int(Vocabulary(explainer.data.item_ids).numbers([item_id])[0])
        if number == UNKNOWN:
            raise DataError(f"the item '{item_id}' is not in the catalogue; nothing can be said about it.")
        if history is not None:
            distinct = list(dict.fromkeys(reversed(history)))[::-1]  # an item counts where it stands last
            given = Vocabulary(explainer.data.item_ids).numbers(distinct)
            taken = given[given != UNKNOWN]
        else:
            user = int(Vocabulary(explainer.data.user_ids).numbers([str(user_id)])[0])
            if user == UNKNOWN:
                raise DataError(f"the user '{user_id}' is not known; give items that they liked as a history.")
            taken = histories[user].indices
        (reasons,) = explainer(taken, np.array([number], np.int32))
        if not np.isfinite(reasons.score):
            raise DataError(f"no member says anything about the item '{item_id}' to this user: it has no score.")
        return reasons

    def _explaining(self) -> tuple[Explainer, sparse.csr_matrix]:
        """What explains the exported members and rule, and the liked items of all users `[U, I]`."""
        if self._explainer is None:
            task = RankingTask(self.run)
            self._explainer = Explainer(*task.exported(served(task)), task.interactions), task.known()[0]
        return self._explainer

    def _table(self, found: dict[str, np.ndarray]) -> pd.DataFrame:
        """One row for each returned item."""
        rows, places = np.nonzero(found["item_ids"] != b"")
        table = pd.DataFrame(
            {
                "row": rows,
                "rank": places + 1,
                ITEM_ID: [item.decode("utf-8") for item in found["item_ids"][rows, places]],
                "score": found["scores"][rows, places],
            }
        )
        if "contributions" in found:
            for position, member in enumerate(verify_manifest(artifact_of(self.run.folder)).members):
                table[member] = found["contributions"][rows, position, places]
        return table

    def _call(self, signature: str, k: int, count: int, **inputs: tf.Tensor) -> dict[str, np.ndarray]:
        most = self.run.experiment.export.k_max
        if not 1 <= k <= most:
            raise ConfigError(f"k must be between 1 and {most} (export.k_max); received {k}.")
        if self._loaded is None:
            self._loaded = load_savedmodel(artifact_of(self.run.folder))
        answer = self._loaded.signatures[signature](**inputs, k=tf.fill([count], k))
        return {name: tensor.numpy() for name, tensor in answer.items()}

    def export(self, models: str | Path | None = None) -> Path:
        """Writes a new version of the artifact, and publishes it below `models` where that is given."""
        rerun(self.run, ["export"])
        self._loaded = self._explainer = None
        artifact = artifact_of(self.run.folder)
        return publish(artifact, models, self.run.experiment.name) if models else artifact


def _padded(lists: Sequence[Sequence[str]]) -> tf.Tensor:
    """Ids as a string tensor `[B, L]`, padded with '' to the longest list (at least one)."""
    width = max(1, *(len(ids) for ids in lists)) if lists else 1
    return tf.constant([[*ids, *[""] * (width - len(ids))] for ids in lists], tf.string)
