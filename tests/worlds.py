"""The planted world as the parts of `recsys` take it, cleaned and split: a helper of several test files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from fusion.config import Part, parse_part
from fusion.types import RunOptions
from recsys.cleaning import CleaningSettings, clean
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import Member, TrainingData
from recsys.core import MemberScores
from recsys.datasets.planted import Planted
from recsys.evaluation import Question, Ranker, question, validator
from recsys.joint import JointTraining, train_jointly
from recsys.metrics import RankedLists, parse_metric
from recsys.schema import TEST, TRAIN, VALIDATION, Interactions
from recsys.splits import SplitSettings, split


@dataclass(frozen=True)
class World:
    """A cleaned planted world and its split."""

    data: Interactions
    parts: np.ndarray

    @classmethod
    def planted(cls, strategy: str = "temporal_global", **settings: Any) -> World:
        sizes = {"users": 150, "items": 80, "noise": 0.2, "interactions_per_user": 15, **settings}
        data, _ = clean(Planted.read(Planted.Config(**sizes)), CleaningSettings())
        return cls(data, split(data, SplitSettings(strategy=strategy)))

    @property
    def counts(self) -> np.ndarray:
        """How often each item stands in training, `[I]`."""
        return np.bincount(self.data.items[(self.parts == TRAIN) & self.data.positive], minlength=self.data.shape[1])

    @property
    def warm(self) -> np.ndarray:
        """Numbers of the items in training."""
        return np.flatnonzero(self.counts)

    def training(self, cache: Path, *, validate: bool = False) -> TrainingData:
        return training_data(self.data, self.parts, cache, validate=validate)

    def asked(self, part: int = TEST, among: np.ndarray | None = None) -> Question:
        """What a part asks; `among` (bool `[I]`) narrows relevant items and candidates."""
        asked = question(self.data, self.parts, part)
        if among is None:
            return asked
        relevant = (asked.relevant @ sparse.diags(among.astype(np.float32))).tocsr()
        relevant.eliminate_zeros()
        return replace(asked, relevant=relevant, candidates=asked.candidates & among)


def training_data(data: Interactions, parts: np.ndarray, cache: Path, *, validate: bool = False) -> TrainingData:
    matrix = data.matrix((parts == TRAIN) & data.positive)
    measure = validator(question(data, parts, VALIDATION), "ndcg@10") if validate else None
    return TrainingData(matrix, data.catalogue, cache, measure)


def fitted(settings: dict[str, Any], data: TrainingData, folder: Path, seed: int = 3) -> Member:
    """A member of the given settings, fitted."""
    member = member_part(settings).make(seed)
    member.fit(data, RunOptions(seed, folder, quiet=True))
    return member


def joint_members(folder: Path, strategy: Any = None) -> dict[str, Any]:
    """What two members learned together, by plain gradient steps without dropout, and how their gradients agreed."""
    training = {"optimizer": "sgd", "learning_rate": 0.5}
    encoder = {"kind": "text_tfidf", "dimensions": 8}
    settings: dict[str, dict[str, Any]] = {
        "factorization": {"kind": "matrix_factorization", "factors": 4},
        "words": {"kind": "content", "encoder": encoder, "columns": ["text"], "dimensions": 8},
    }
    members = {n: member_part({**part, "dropout": 0.0, "training": training}).make(3) for n, part in settings.items()}
    data = replace(World.planted(users=80, items=40).training(folder / "cache"), validate=lambda _: {"ndcg@10": 0.0})
    joint = JointTraining(mode="joint", epochs=2, batch_size=64, member_dropout=0.0, weights="learned")
    history, _ = train_jointly(members, joint, data, RunOptions(5, folder / "run", strategy, quiet=True))
    learned = [member.state()[name].ravel() for member in members.values() for name in ("history_table", "item_table")]
    conflict = {name: value for name, value in history.epochs[0].items() if name.startswith("conflict/")}
    losses = [row["train_loss"] for row in history.epochs]
    return {"learned": np.concatenate(learned).tolist(), "losses": losses, "conflict": conflict}


def member_part(settings: dict[str, Any]) -> Part:
    return parse_part(MEMBERS, settings, "member")


def ndcg(member: Member, asked: Question) -> float:
    """NDCG@10 of one member over the users of a question."""
    lists = Ranker(MemberScores({"member": member}), {}, 10)(asked).lists["member"]
    return float(np.nanmean(parse_metric("ndcg@10", "candidates").of_lists(lists)))


def random_ndcg(asked: Question, seed: int) -> float:
    """NDCG@10 of one random order of the candidates for each user: chance."""
    relevant = asked.relevant[asked.users]
    scores = np.random.default_rng(seed).random(relevant.shape)
    open_to = asked.candidates & (asked.seen[asked.users].toarray() == 0)
    lists = RankedLists.from_scores(scores, open_to, relevant.indptr, relevant.indices, 10)
    return float(np.nanmean(parse_metric("ndcg@10", "candidates").of_lists(lists)))
