"""Recipes: which methods make which member smaller. Some have a name of their own, others stand in a config.

`compress: {small: {steps: [{kind: prune, sparsity: 0.5}, {kind: int8}]}}` names one `small`; `tools/compress.py RUN
--recipe small` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fusion.compression import METHODS
from fusion.config import Part, Settings, parse, part_of
from fusion.errors import ConfigError
from fusion.registry import nearest


class TableSettings(Settings):
    """How the tables of members that no network reads are packed: factors, neighbours, projected embeddings."""

    bits: Literal[4, 8] = 8
    """Of a number; each row has a scale of its own. Weights of neighbours always take 8."""
    mass: float = Field(1.0, gt=0, le=1)
    """Lists of neighbours keep the largest weights that together make up this share of each list."""


def _student(value: Any) -> Any:
    """A member's name as it is, settings checked: these bring TensorFlow, which a list of recipes has no need of."""
    if isinstance(value, str):
        return value
    from recsys.ranking_student import StudentSettings

    return value if isinstance(value, StudentSettings) else parse(StudentSettings, value)


class Recipe(Settings):
    """What is done to the members of a run."""

    steps: tuple[part_of(METHODS), ...] = ()  # type: ignore[valid-type]
    """Methods for the network of each member that has one, one after the other."""
    members: dict[str, tuple[part_of(METHODS), ...]] = Field(default_factory=dict)  # type: ignore[valid-type]
    """Other methods for some members; none leaves the member as it is."""
    student: Annotated[Any, BeforeValidator(_student)] = ""
    """One small model of the whole ensemble, which then answers alone; all members are left out. Classification: the
    member whose `distil` step makes it, and whose inputs it reads. Rankings: settings of its own, as in {factors: 64}.
    """
    tables: TableSettings | None = None
    """Rankings: how tables are packed; left in float32 where it is not there."""
    max_drop: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """The most that what is served may lose of a metric on the validation rows, as in {accuracy: 0.005}; of a metric
    that is one number of all rows, such as auc, what counts is the plain difference."""

    def steps_for(self, member: str) -> tuple[Part, ...]:
        """The methods for the network of one member."""
        steps: tuple[Part, ...] = self.members.get(member, self.steps)
        return steps if self.student in ("", member) else ()

    def check(self, members: Mapping[str, Any], metrics: tuple[str, ...]) -> None:
        """Raises ConfigError where it names what the run does not have, or does nothing."""
        for name in self.members:
            if name not in members:
                raise ConfigError(f"a recipe names the unknown member '{name}': {nearest(name, members)}")
        for metric in self.max_drop:
            if metric not in metrics:
                raise ConfigError(
                    f"max_drop must name metrics of the run; received '{metric}': {nearest(metric, metrics)}"
                )
        for what, training in self._loops():
            if training.precision != "float32":
                raise ConfigError(
                    f"{what}.precision must be float32 in a recipe, which works on the numbers that are "
                    f"served; received {training.precision}. Leave it out."
                )
        if not isinstance(self.student, str):
            if self.steps or self.members:
                raise ConfigError("a ranking's student must stand without steps: no member is left to be made smaller.")
            return
        if self.student and self.student not in members:
            raise ConfigError(
                f"student must name a member; received '{self.student}': {nearest(self.student, members)}"
            )
        if self.student and all(part.kind != "distil" for part in self.steps_for(self.student)):
            raise ConfigError(
                f"the steps of the student '{self.student}' must hold one of kind distil, which makes it; none is."
            )
        if not self.steps and not any(self.members.values()) and self.tables is None:
            raise ConfigError("a recipe must have steps, for all members or for some, or pack tables; received none.")

    def _loops(self) -> list[tuple[str, Any]]:
        """The settings of all training loops, and whose they are."""
        parts = [*self.steps, *(part for steps in self.members.values() for part in steps)]
        found = [(f"{p.kind}: {name}", getattr(p.config, name, None)) for p in parts for name in ("training", "repair")]
        found += [] if isinstance(self.student, str) else [("student: training", self.student.training)]
        return [(what, training) for what, training in found if training is not None]


BUILT_IN: dict[str, dict[str, Any]] = {
    **{kind: {"steps": [{"kind": kind}]} for kind in METHODS if kind != "distil"},  # which must be told its student
    "prune_int8": {"steps": [{"kind": "prune"}, {"kind": "int8"}]},
    "pqat": {"steps": [{"kind": "prune"}, {"kind": "qat"}]},
    "cqat": {"steps": [{"kind": "cluster"}, {"kind": "qat"}]},
    "pcqat": {"steps": [{"kind": "prune"}, {"kind": "cluster"}, {"kind": "qat"}]},
    "packed": {"tables": {"bits": 8}},
    "packed4": {"tables": {"bits": 4, "mass": 0.65}},
    "student": {"student": {}, "tables": {"bits": 8}},
}
"""Recipes that need no config: each method with its own defaults, chains of them that keep zeros and centroids, and
packed tables of rankings, and one small model of all their members."""


SEARCHED = "searched"
"""The name under which a run keeps the mix of recipes that a search under a budget found."""


def recipe_named(name: str, own: Mapping[str, Recipe]) -> Recipe:
    """A recipe of the config, or one that is built in. Raises ConfigError with the nearest name for others."""
    if name in own:
        return own[name]
    if name in BUILT_IN:
        return parse(Recipe, BUILT_IN[name], f"recipe {name}")
    raise ConfigError(f"unknown recipe '{name}': {nearest(name, [*own, *BUILT_IN])}")
