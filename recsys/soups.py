"""A member whose weights are the mean of several copies: trained as often, served as one, at the price of one answer.

Averaging weights wants runs that stayed in one valley of the loss. Copies therefore start from the same weights, of
encoder and head, drawn or loaded: those that the member by itself starts from (it is the first copy). What differs is
the order of the rows, and with it the batches, the augmentation, and the rows that dropout and negative sampling fall
on; and what `vary` names. Wortsman et al. 2022, arXiv:2203.05482, call the mean a soup; `greedy` is their recipe 1. A
pretrained encoder stays in its valley; whether a network that is trained from scratch does, validation tells.
BatchNormalization has no statistics of the mean: they are estimated anew from training rows.

Where nothing may be validated (folds, a last fit on every row), the recipe is the one that validation left: the copies
with a weight, each for as many epochs as were best for it, averaged with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion.config import Part, content_hash
from fusion.errors import DataError
from fusion.progress import note
from fusion.training.aggregate import check_same, greedy_soup, mean_state, validation_weights
from fusion.types import History, derive_seed
from recsys.copies import SoupSettings, varied
from recsys.fitting import FitData, Fitted, fit_member, folder_of, keep_fitted, load_fitted, make_once
from recsys.report_words import number

Copies = Mapping[str, Mapping[str, Any]]
"""By name of the copy: `value` on validation, `weight` in the mean (they sum to 1), `epochs` that were best."""


@dataclass(frozen=True)
class Judge:
    """What copies and means are compared by on the validation rows."""

    metric: str
    higher_is_better: bool
    measure: Callable[[Any], float]
    """A fitted member -> its metric."""


@dataclass(frozen=True)
class Recipe:
    """A soup before it is made.

    Attributes:
        name: of the member.
        part: its settings.
        soup: how many copies, and how they are averaged.
        judge: None where nothing may be validated.
        known: what the fit on training rows found out about the copies; needed where nothing may be validated.
    """

    name: str
    part: Part
    soup: SoupSettings
    judge: Judge | None
    known: Copies | None = None

    def parts(self) -> dict[int, Part]:
        """By number, from 0, the settings of the copies that are to be fitted."""
        parts = {n: varied(self.part, self.soup, n, f"members.{self.name}.vary") for n in range(self.soup.copies)}
        if self.judge is not None:
            return parts
        known = {n: (self.known or {})[self.copy_name(n)] for n in parts}
        return {n: _for_epochs(part, known[n]["epochs"]) for n, part in parts.items() if known[n]["weight"] > 0}

    def copy_name(self, number: int) -> str:
        """What a copy is called; a number from 1."""
        return f"{self.name}_{number + 1}"

    def folder(self, data: FitData, seed: int) -> Path:
        """Where the soup lies in the cache once it is made; its name is the key."""
        copies = [folder_of(self.name, part, data, seed, n).name for n, part in self.parts().items()]
        weights = None if self.judge else self.known
        return data.cache / "members" / content_hash(["soup", self.name, copies, self.soup.model_dump(), weights])


def _for_epochs(part: Part, epochs: int) -> Part:
    training = part.config.training.model_copy(update={"epochs": epochs, "patience": 0, "target": None})
    return replace(part, config=part.config.model_copy(update={"training": training}))


def fit_soup(recipe: Recipe, data: FitData, seed: int, *, strategy: Any = None, quiet: bool = False) -> Fitted:
    """The mean of the copies of a member fitted on `data`; copies and mean come from the cache where they lie there.

    `Fitted.history` is that of the best copy (without validation, of the one that weighs most), and `Fitted.soup` holds
    `aggregate`, `metric`, `value` (of the mean) and `copies`; `metric` and `value` are None without validation.

    Raises:
        DataError: copies differ in shape, because `vary` names a key that shapes depend on; both are named.
    """
    folder = recipe.folder(data, seed)
    work = data.cache / "work" / folder.name / recipe.name

    def make() -> None:
        copies = {recipe.copy_name(n): fitted for n, fitted in _fit_copies(recipe, data, seed, strategy, quiet)}
        soup = _Soup(recipe, copies, data, seed)
        found = soup.facts()
        took = {
            "seconds": sum(fitted.seconds for fitted in copies.values()),
            "peak_bytes": max((fitted.peak_bytes or 0 for fitted in copies.values()), default=0),
            "start": copies[soup.best].start,
            "soup": found,
        }
        note(sentence(recipe.name, found), quiet=quiet)
        keep_fitted(folder, work, recipe.part, soup.member, soup.history, took)

    make_once([folder], work, make, strategy)
    return load_fitted(folder, recipe.name, recipe.part.registry, seed)


def _fit_copies(recipe: Recipe, data: FitData, seed: int, strategy: Any, quiet: bool) -> Iterator[tuple[int, Fitted]]:
    """The copies one by one; DataError as soon as one has another shape than the first."""
    first: tuple[str, dict[str, np.ndarray]] | None = None
    for n, part in recipe.parts().items():
        fitted = fit_member(recipe.name, part, data, seed, strategy=strategy, quiet=quiet, copy=n)
        own = recipe.copy_name(n), fitted.member.state()
        first = first or own
        try:
            check_same(*first, *own)
        except DataError as error:
            raise DataError(f"members.{recipe.name}.vary: {error}") from None
        yield n, fitted


class _Soup:
    """Makes the mean of fitted copies, and knows what became of each."""

    def __init__(self, recipe: Recipe, copies: Mapping[str, Fitted], data: FitData, seed: int) -> None:
        self._recipe, self._copies, self._data, self._seed = recipe, copies, data, seed
        self._states = {name: fitted.member.state() for name, fitted in copies.items()}
        judge = recipe.judge
        self._values = {name: judge.measure(fitted.member) for name, fitted in copies.items()} if judge else {}
        self._sign = -1.0 if judge and not judge.higher_is_better else 1.0
        self._weights = self._chosen_weights()
        self.best = max(copies, key=lambda name: self._sign * self._values[name] if judge else self._weights[name])
        alone = self._weights[self.best] == 1.0
        self.member = copies[self.best].member if alone else self._member(mean_state(self._states, self._weights))

    @property
    def history(self) -> History | None:
        return self._copies[self.best].history

    def facts(self) -> dict[str, Any]:
        """What `member.json` keeps under `soup`."""
        judge = self._recipe.judge
        return {
            "aggregate": self._recipe.soup.aggregate,
            "metric": judge.metric if judge else None,
            "higher_is_better": judge.higher_is_better if judge else None,
            "value": judge.measure(self.member) if judge else None,
            "copies": {
                name: {
                    "value": self._values.get(name),
                    "weight": self._weights[name],
                    "epochs": max(fitted.history.best_epoch, 0) + 1 if fitted.history else 1,
                }
                for name, fitted in self._copies.items()
            },
        }

    def _chosen_weights(self) -> dict[str, float]:
        """What each copy counts; they sum to 1."""
        recipe = self._recipe
        if recipe.judge is None:
            weights = {name: (recipe.known or {})[name]["weight"] for name in self._copies}
        elif recipe.soup.aggregate == "by_validation":
            weights = validation_weights(self._values, recipe.judge.higher_is_better)
        elif recipe.soup.aggregate == "greedy":
            signed = {name: self._sign * value for name, value in self._values.items()}
            chosen = greedy_soup(self._states, signed, self._signed_value).chosen
            weights = {name: float(name in chosen) for name in self._copies}
        else:
            weights = dict.fromkeys(self._copies, 1.0)
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def _signed_value(self, state: dict[str, np.ndarray]) -> float:
        judge = self._recipe.judge
        assert judge is not None
        return self._sign * judge.measure(self._member(state))

    def _member(self, state: dict[str, np.ndarray]) -> Any:
        member = self._recipe.part.make(derive_seed(self._seed, "member", self._recipe.name))
        member.load_state(state)
        member.renew_statistics(self._data)
        return member


def sentence(name: str, soup: Mapping[str, Any]) -> str:
    """What became of the copies, and whether their mean is better than the best of them."""
    copies = soup["copies"]
    used = sum(copy["weight"] > 0 for copy in copies.values())
    said = f"{name} is the mean of {used} of {len(copies)} copies ({soup['aggregate']})"
    if soup["value"] is None:
        return said
    best = best_copy(soup)
    value, others = soup["value"], copies[best]["value"]
    compared = "as good as" if value == others else "worse than" if is_worse(soup) else "better than"
    metric = f"{soup['metric']} {number(value)} on validation"
    return f"{said}: {metric}, {compared} the best copy {best} with {number(others)}."


def best_copy(soup: Mapping[str, Any]) -> str:
    """Name of the copy that is best on validation."""
    sign = 1.0 if soup["higher_is_better"] else -1.0
    copies = soup["copies"]
    return max(copies, key=lambda name: float(sign * copies[name]["value"]))


def is_worse(soup: Mapping[str, Any]) -> bool:
    """Whether the mean is worse on validation than its best copy."""
    best = soup["copies"][best_copy(soup)]["value"]
    return bool(soup["value"] < best if soup["higher_is_better"] else soup["value"] > best)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each soup of `report.json`."""
    return [sentence(name, soup) for name, soup in report.get("soups", {}).items()]


def warnings(report: Mapping[str, Any]) -> list[str]:
    """The sentences that a reader must not miss: averaging has cost quality."""
    return [
        f"{sentence(name, soup)} Averaging did not pay: take aggregate greedy, or leave it out."
        for name, soup in report.get("soups", {}).items()
        if is_worse(soup)
    ]
