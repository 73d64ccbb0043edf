"""`copies: 5`: homogeneous members by one line of a config (A2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.errors import ConfigError
from fusion.types import derive_seed
from recsys.fitting import fit_member
from recsys.settings import parse_experiment
from worlds import World

RULES = {"mean": {"kind": "average"}}


def ranking(members: dict[str, Any], **keys: Any) -> Any:
    return parse_experiment({"name": "copied", "data": {"kind": "planted"}, "members": members, "rules": RULES, **keys})


def classes(members: dict[str, Any]) -> Any:
    data = {"kind": "planted_classes"}
    return parse_experiment(
        {"name": "copied", "task": "classification", "data": data, "members": members, "rules": RULES}
    )


def test_copies_stand_in_the_place_of_their_member() -> None:
    """A2: equal settings, names with numbers, the order of the config."""
    experiment = ranking(
        {
            "ease": {"kind": "ease"},
            "mf": {"kind": "matrix_factorization", "factors": 8, "copies": 3},
            "als": {"kind": "ials"},
        }
    )
    assert list(experiment.members) == ["ease", "mf_1", "mf_2", "mf_3", "als"]
    dumped = [experiment.members[name].dump() for name in ("mf_1", "mf_2", "mf_3")]
    assert dumped[0] == dumped[1] == dumped[2] and dumped[0]["factors"] == 8
    # What a run keeps is the config written out, which means the same.
    assert parse_experiment(experiment.model_dump(mode="json", exclude_none=True)).hash() == experiment.hash()


def test_classifiers_are_copied_too() -> None:
    experiment = classes({"bert": {"encoder": {"kind": "text_tfidf"}, "columns": ["text"], "copies": 2}})
    assert list(experiment.members) == ["bert_1", "bert_2"]
    forest = {"kind": "sklearn", "encoder": {"kind": "text_tfidf"}, "columns": ["text"], "copies": 2}
    assert len(classes({"f": {**forest, "estimator": {"kind": "random_forest"}}}).members) == 2


def test_a_weight_of_the_member_is_shared_by_its_copies() -> None:
    rules = {"mean": {"kind": "average", "weights": {"mf": 3.0, "ease": 1.0}}}
    members = {"mf": {"kind": "matrix_factorization", "copies": 2}, "ease": {"kind": "ease"}}
    assert ranking(members, rules=rules).rules["mean"].config.weights == {"mf_1": 1.5, "mf_2": 1.5, "ease": 1.0}


@pytest.mark.parametrize("kind", ["popularity", "ease", "item_knn", "pure_svd", "slim"])
def test_copies_of_a_closed_form_are_refused(kind: str) -> None:
    """A2: they would all be the same member."""
    with pytest.raises(ConfigError, match=rf"members.m.copies: .*this {kind} does not depend on one.*Leave copies out"):
        ranking({"m": {"kind": kind, "copies": 5}})


@pytest.mark.parametrize("kind", ["logistic_regression", "linear_svm", "knn", "gradient_boosting"])
def test_copies_of_an_estimator_without_chance_are_refused(kind: str) -> None:
    member = {"kind": "sklearn", "encoder": {"kind": "text_tfidf"}, "columns": ["text"], "estimator": {"kind": kind}}
    with pytest.raises(ConfigError, match="this sklearn does not depend on one"):
        classes({"m": {**member, "copies": 5}})


def test_copies_of_content_follow_its_settings() -> None:
    content = {"kind": "content", "encoder": {"kind": "text_tfidf"}, "columns": ["text"], "copies": 2}
    assert len(ranking({"text": content}).members) == 2
    with pytest.raises(ConfigError, match="this content does not depend on one"):
        ranking({"text": {**content, "scorer": "cosine"}})


@pytest.mark.parametrize("number", [0, 1, 51, 2.5, "5", True])
def test_a_number_that_is_none(number: object) -> None:
    with pytest.raises(ConfigError, match=r"members.mf.copies: must be a whole number from 2 to 50; received"):
        ranking({"mf": {"kind": "matrix_factorization", "copies": number}})


def test_a_name_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="called mf_1 to mf_3, and the config has another member 'mf_2'"):
        ranking({"mf": {"kind": "matrix_factorization", "copies": 3}, "mf_2": {"kind": "ease"}})


def test_faults_of_a_copied_member_are_told_under_its_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'members.mf.factor': did you mean 'factors'"):
        ranking({"mf": {"kind": "matrix_factorization", "factor": 8, "copies": 2}})


def test_copies_are_fitted_apart(tmp_path: Path) -> None:
    """A2: its own seed and its own place in the cache for each, and more copies leave those that there are."""
    two, three = (
        ranking({"als": {"kind": "ials", "factors": 4, "epochs": 2, "copies": copies}}).members for copies in (2, 3)
    )
    data = World.planted(users=60, items=30).training(tmp_path)
    fitted = {name: fit_member(name, part, data, seed=7, quiet=True) for name, part in two.items()}
    first, second = fitted["als_1"], fitted["als_2"]
    assert first.folder != second.folder
    assert first.member.seed == derive_seed(7, "member", "als_1") != second.member.seed
    states = first.member.state(), second.member.state()
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])
    again = fit_member("als_2", three["als_2"], data, seed=7, quiet=True)
    assert again.folder == second.folder
