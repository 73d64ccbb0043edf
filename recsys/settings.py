"""The whole experiment as settings: what a config file may say, and all that can be checked before data is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fusion.config import Part, Settings, content_hash, parse, part_of
from fusion.errors import ConfigError
from fusion.registry import nearest
from fusion.rules import RULES
from fusion.training.joint import JointClassifierTraining
from fusion.training.joint import check_joint as check_joint_classifiers
from fusion.training.member import CLASSIFIERS
from fusion.training.strategy import StrategySettings, check_batch, check_strategy, check_training
from fusion.types import Over
from recsys.cleaning import CleaningSettings
from recsys.collaborative import MEMBERS
from recsys.copies import SoupSettings, check_soups, expand_copies
from recsys.core import CONTEXT
from recsys.datasets import READERS
from recsys.joint import JointTraining, check_joint, check_joint_loop
from recsys.metrics import parse_metric
from recsys.presets import with_preset
from recsys.ranking_student import StudentSettings
from recsys.recipes import SEARCHED, Recipe, recipe_named
from recsys.shared import expand_encoders
from recsys.splits import SplitSettings
from recsys.tuning import Grid, check_grid

NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]{0,40}$")
RANKING_METRICS = (
    "recall@10", "recall@20", "precision@10", "ndcg@10", "ndcg@20", "map@10", "mrr@10", "hit_rate@10", "auc",
    "coverage@10", "novelty@10", "diversity@10", "gini@10", "average_popularity@10",
)  # fmt: skip
CLASS_METRICS = ("accuracy", "log_loss", "auc", "rmse", "ece")


class OutOfFoldSettings(Settings):
    """How the scores are made that learned rules are fitted on: the split is applied again inside the training rows."""

    folds: int = Field(2, ge=1, le=20)
    """How often members are fitted without the rows that they then score. Classes: 1 fits no member again; rules are
    then fitted on the validation rows, and their own validation figures are cross-fitted."""
    shortlist: int = Field(50, ge=1, le=1000)
    """How many of each member's best unseen items stand against a user's positives."""
    negatives: int = Field(100, ge=1, le=10_000)
    """Further unseen candidates drawn for each user, which stand for all the others."""
    max_users: int = Field(20_000, ge=1)
    """Users of a fold that are used; the rest is left out at random."""


class EvaluationSettings(Settings):
    """What is measured and what decides."""

    metrics: tuple[str, ...] = ()
    """Names such as ndcg@10; empty means the task's own list."""
    primary: str = ""
    """The metric that chooses the best member and the best rule on validation; empty: ndcg@10 or accuracy."""
    candidates: Literal["auto", "all", "held_out"] = "auto"
    """all: every unseen item; held_out: only items without training rows; auto: held_out for item_holdout."""
    max_validation_users: int = Field(10_000, ge=1)
    """Validation users that are ranked; of more, as many drawn at random. The test part is always ranked whole."""
    refit: bool = False
    """Rankings: True fits the members once more, on training and validation rows, before the test part is ranked."""
    sklearn: bool = False
    """Classification: lists scikit-learn's VotingClassifier and StackingClassifier over the same members beside the
    rules, each in its best form by validation."""
    never_worse: bool = True
    """Where the best rule does not beat the best member on validation, say so and export the member alone."""
    samples: int = Field(1000, ge=100, le=100_000)
    """Bootstrap samples behind every interval."""
    short_history: int = Field(10, ge=1)
    """Users with at most so many known positives form the segment short_history."""
    examples: int = Field(4, ge=0, le=50)
    """Users whose recommendations are shown in the report."""


class ExportSettings(Settings):
    """What is written for servers and phones."""

    enabled: bool = True
    """False leaves the export out."""
    rule: str = "best"
    """Name of the rule to export, or best: what validation chose, which may be a member alone (never_worse)."""
    refit: Literal["none", "all"] = "all"
    """all: the recipe is trained once more on every row before it is exported."""
    k_max: int = Field(100, ge=1, le=10_000)
    """Longest list that the exported graph returns."""
    attributes: tuple[str, ...] | None = None
    """Rankings: columns of the items by which requests may be filtered; not given: all without long texts. Cells such
    as Comedy|Drama hold several values."""
    pictures: int = Field(0, ge=0, le=512)
    """Rankings: longest side, in pixels, of the small pictures of items that the server's page shows; 0 writes none."""
    search: bool = True
    """Rankings: keep what searching items by an example needs also of members that are left out of the artifact."""
    spare_items: int = Field(0, ge=0, le=10_000)
    """Rankings: how many new items a server may add by their text and image, without training, to one version."""
    tflite: bool = True
    """Also write the core as a .tflite."""
    recipe: str = ""
    """Recipe that makes the .tflite files smaller, of `compress` or built in; it is applied first where it has not
    been. Empty: they stay in float32. The SavedModel always does."""
    fast: str = ""
    """Rankings: recipe with a student, of `compress` or built in, that answers as the profile fast; it is applied first
    where it has not been. Empty: the profile is left out."""
    tflite_history: int = Field(128, ge=1, le=10_000)
    """Length of the history that the .tflite takes; of longer ones give the latest."""


class Experiment(Settings):
    """One experiment: from raw tables to an exported artifact. `members` depends on the task."""

    name: str
    """Name of the experiment: the folder of its runs and the name of the exported model."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The one seed; every part derives its own."""
    data: part_of(READERS)  # type: ignore[valid-type]
    """The reader and what it needs."""
    positive: str = "any"
    """Which interactions count as positive: any, or a comparison such as rating >= 4."""
    cleaning: CleaningSettings = CleaningSettings()
    """What is dropped before anything else."""
    split: SplitSettings = SplitSettings()
    """Which rows are for training, validation and test."""
    soups: dict[str, SoupSettings] = Field(default_factory=dict)
    """Members whose weights are the mean of several copies; `copies: 5` with `aggregate` in a member says the same."""
    rules: dict[str, part_of(RULES)] = Field(min_length=1)  # type: ignore[valid-type]
    """The fusion rules to compare, by name."""
    out_of_fold: OutOfFoldSettings = OutOfFoldSettings()
    """How scores for learned rules are made."""
    strategy: StrategySettings = StrategySettings()
    """Devices."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured."""
    export: ExportSettings = ExportSettings()
    """What is written for servers and phones."""
    compress: dict[str, Recipe] = Field(default_factory=dict)
    """Recipes by name that are applied to what is served, after it has been exported; see `recsys.recipes`."""

    @property
    def fits_out_of_fold(self) -> int:
        """How often each member is fitted again for the scores that learned rules are fitted on."""
        return self.out_of_fold.folds

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of this run, the primary one among them."""
        names = self.evaluation.metrics or self._task_metrics()
        return names if self.primary in names else (self.primary, *names)

    @property
    def primary(self) -> str:
        """The metric that decides."""
        return self.evaluation.primary or self._task_primary()

    def hash(self) -> str:
        """SHA-256 of the settings with all defaults filled in."""
        return content_hash(self.model_dump(mode="json"))

    _over: ClassVar[Over] = "candidates"

    @property
    def readable(self) -> tuple[str, ...]:
        """Names of the context that rules may read."""
        return CONTEXT

    def _task_metrics(self) -> tuple[str, ...]:
        raise ConfigError("an experiment must say its task: recommendation or classification.")

    def _task_primary(self) -> str:
        raise ConfigError("an experiment must say its task: recommendation or classification.")

    def check(self) -> None:
        """Raises ConfigError for everything that is wrong whatever the data holds."""
        named = (("member", self.members), ("rule", self.rules), ("recipe", self.compress))  # type: ignore[attr-defined]
        for what, names in (("run", [self.name]), *named):
            for name in names:
                if not NAME.match(name):
                    raise ConfigError(
                        f"the name of a {what} must be a letter and then letters, digits or '_', 41 at most (it names "
                        f"folders and signatures); received {name[:100]!r}."
                    )
        both = set(self.members) & set(self.rules)  # type: ignore[attr-defined]
        if both:
            raise ConfigError(f"members and rules must have different names; both have '{both.pop()}'.")
        for name in self.metrics:
            parse_metric(name, self._over)
        primary = parse_metric(self.primary, self._over)
        if primary.kind == "list" or primary.needs:
            raise ConfigError(
                f"evaluation.primary must judge each user's list by what is relevant, as {self._task_primary()} does; "
                f"received '{self.primary}', which looks at the catalogue."
            )
        for name, rule in self.rules.items():
            try:
                RULES[rule.kind].check(rule.config, list(self.members))  # type: ignore[attr-defined]
                for read in RULES[rule.kind].reads(rule.config):
                    if read not in self.readable:
                        raise ConfigError(f"nothing is known of '{read}' here: {nearest(read, self.readable)}")
            except ConfigError as error:
                raise ConfigError(f"rules.{name}: {error}") from None
        if self.export.rule != "best" and self.export.rule not in self.rules:
            raise ConfigError(f"export.rule: no rule '{self.export.rule}': {nearest(self.export.rule, self.rules)}")
        self._check_export_recipe()
        self._check_fast()
        for name, member in self.members.items():  # type: ignore[attr-defined]
            try:
                member.registry[member.kind].check(member.config)
                for training in _loops_of(member.config):
                    check_batch(training.batch_size, self.strategy, training.accumulate)
                    check_training(training, member.registry[member.kind].accelerations, self.strategy)
            except ConfigError as error:
                raise ConfigError(f"members.{name}: {error}") from None
        for name, recipe in self.compress.items():
            try:
                recipe.check(self.members, self.metrics)  # type: ignore[attr-defined]
            except ConfigError as error:
                raise ConfigError(f"compress.{name}: {error}") from None
        check_soups(self.soups, self.members, self.training.mode)  # type: ignore[attr-defined]
        _check_processes(self.training, self.strategy)  # type: ignore[attr-defined]
        _check_placement(self.members, self.training, self.strategy)  # type: ignore[attr-defined]
        check_strategy(self.strategy)  # last: it asks the machine, all others ask the config alone

    def _check_export_recipe(self) -> None:
        """Raises ConfigError where `export.recipe` is not known, or there is no `.tflite` to make smaller."""
        name, given = self.export.recipe, self.compress
        if not name:
            return
        if not self.export.tflite:
            raise ConfigError(
                f"export.recipe makes .tflite files smaller, and export.tflite is false; received '{name}'. Leave one "
                "of the two out."
            )
        try:
            if name != SEARCHED:
                recipe_named(name, given).check(self.members, self.metrics)  # type: ignore[attr-defined]
        except ConfigError as error:
            raise ConfigError(f"export.recipe: {error}") from None

    def _check_fast(self) -> None:
        """Raises ConfigError where `export.fast` names no recipe with a student of rankings, or `export.recipe` does,
        whose files hold the members."""
        for key, name in (("fast", self.export.fast), ("recipe", self.export.recipe)):
            if not name or name == SEARCHED:
                continue
            taught = isinstance(recipe_named(name, self.compress).student, StudentSettings)
            if key == "fast" and (self._over != "candidates" or not taught):
                raise ConfigError(
                    f"export.fast must name a ranking's recipe with settings of a student; received '{name}'. Add "
                    "such a recipe to compress, or leave the key out."
                )
            if key == "recipe" and taught:
                raise ConfigError(
                    f"export.recipe must make the members smaller; '{name}' replaces them by a student. Name it in "
                    "export.fast."
                )

    def _check_joint_loop(self) -> None:
        """Raises ConfigError where the strategy cannot train members together as `training` says."""
        training: Any = self.training  # type: ignore[attr-defined]
        if training.mode == "separate":
            return
        if self.strategy.kind == "parameter_server":
            raise ConfigError(
                "training.mode joint must go with a strategy whose devices step together (default, mirrored, "
                "multi_worker); received strategy.kind parameter_server. Take one of these, or mode separate."
            )
        check_batch(training.batch_size, self.strategy)
        self._check_joint_keys(training)

    def _check_joint_keys(self, training: Any) -> None:
        """Raises ConfigError for keys of the loop that members cannot be trained together with."""
        check_training(training, (), self.strategy)


def _loops_of(config: Any) -> list[Any]:
    """The settings of all training loops of a member: its own, and those of an encoder or of a first stage."""
    parts = (config, *(getattr(config, name, None) for name in ("fine_tuning", "towers")))
    return [part.training for part in parts if hasattr(part, "training")]


_ONE_PROCESS = {
    "multi_worker": "whose processes train every member together",
    "parameter_server": "whose processes train every member together",
    "tpu": "because a TPU belongs to one process",
}
"""Why a strategy goes with one process that fits members."""


def _check_processes(training: Any, strategy: StrategySettings) -> None:
    """Raises ConfigError where members cannot be fitted by several processes at a time."""
    if training.processes == 1:
        return
    if training.mode == "joint":
        raise ConfigError(
            "training.processes must be 1 with training.mode joint, where one graph holds the members; received "
            f"{training.processes}. Leave it out, or take mode separate."
        )
    if strategy.kind in _ONE_PROCESS:
        raise ConfigError(
            f"training.processes must be 1 with strategy.kind {strategy.kind}, {_ONE_PROCESS[strategy.kind]}; received "
            f"{training.processes}. Leave it out, or take strategy.kind default."
        )


def _check_placement(members: Mapping[str, Part], training: Any, strategy: StrategySettings) -> None:
    """Raises ConfigError where `strategy.placement` names what cannot be placed."""
    if strategy.placement and training.mode == "joint":
        raise ConfigError(
            "strategy.placement must be left out with training.mode joint, where one graph holds the members; received "
            f"{', '.join(strategy.placement)}. Take mode separate."
        )
    for name in strategy.placement:
        if name not in members:
            raise ConfigError(f"strategy.placement names the unknown member '{name}': {nearest(name, members)}")
        if not hasattr(members[name].config, "training"):
            raise ConfigError(
                f"strategy.placement must name members that are trained in steps; '{name}' ({members[name].kind}) is "
                "reckoned on the CPU. Leave it out."
            )


class RecommendationExperiment(Experiment):
    """An experiment that ranks items for users."""

    task: Literal["recommendation"] = "recommendation"
    """What the ensemble does."""
    members: dict[str, part_of(MEMBERS)] = Field(min_length=1)  # type: ignore[valid-type]
    """The members by name, in the order of the axis S; `copies: 5` in one stands for five (`recsys.copies`)."""
    training: JointTraining = JointTraining()
    """Whether members are trained each by itself, or those with a gradient together; see `recsys.joint`."""
    tuning: dict[str, Grid] = Field(default_factory=dict)
    """Values to try on validation by member and key, as in `{ease: {l2: [100, 300]}}`; one key after the other."""
    feedback: tuple[str, ...] = ()
    """Logs of what users did since, files or folders as `serving.feedback` writes them; read after the data set."""
    collaborative: str | None = None
    """The preset whose members, rules and tuning stand below those of the config; see `recsys.presets`."""

    def check(self) -> None:
        """As `Experiment.check`; what is tuned must be there and take the values."""
        super().check()
        if self.evaluation.sklearn:
            raise ConfigError(
                "evaluation.sklearn compares with ensembles of classifiers, and this experiment ranks items. "
                "Leave it out."
            )
        check_joint(self.members, self.training)
        self._check_joint_loop()
        self._check_precision()
        for name, grid in self.tuning.items():
            if name not in self.members:
                raise ConfigError(f"tuning names the unknown member '{name}': {nearest(name, self.members)}")
            check_grid(name, self.members[name], grid)

    def _check_joint_keys(self, training: Any) -> None:
        check_joint_loop(self.members, training, self.strategy)

    def _check_precision(self) -> None:
        """Raises ConfigError for mixed precision with servers: what is kept is made by a float32 copy of a model, which
        has its tables whole."""
        for name, member in self.members.items():
            found = {training.precision for training in _loops_of(member.config)} - {"float32"}
            if found and self.strategy.kind == "parameter_server":
                raise ConfigError(
                    f"members.{name}: training.precision must be float32 with strategy.kind parameter_server where "
                    f"items are ranked; received {found.pop()}. Leave it out, or take another strategy."
                )

    def _task_metrics(self) -> tuple[str, ...]:
        return RANKING_METRICS

    def _task_primary(self) -> str:
        return "ndcg@10"

    @property
    def held_out_candidates(self) -> bool:
        """Whether only items without training rows are ranked."""
        choice = self.evaluation.candidates
        return choice == "held_out" or (choice == "auto" and self.split.strategy == "item_holdout")


class ClassificationExperiment(Experiment):
    """An experiment that assigns classes to examples."""

    task: Literal["classification"]
    """What the ensemble does."""
    members: dict[str, part_of(CLASSIFIERS, default="neural")] = Field(min_length=1)  # type: ignore[valid-type]
    """The members by name, in the order of the axis S; `copies: 5` in one stands for five (`recsys.copies`)."""
    context: tuple[str, ...] = ()
    """Numeric columns of the examples that rules may read, beside `words`, the logarithm of 1 + words of the text."""
    training: JointClassifierTraining = JointClassifierTraining()
    """Whether members are trained each by itself, or those with a gradient together; see `fusion.training.joint`."""
    _over: ClassVar[Over] = "classes"

    @property
    def readable(self) -> tuple[str, ...]:
        """Names of the context that rules may read."""
        return ("words", *self.context)

    @property
    def fits_out_of_fold(self) -> int:
        """As `Experiment.fits_out_of_fold`; 0 where learned rules are fitted on the validation rows."""
        return 0 if self.out_of_fold.folds == 1 else self.out_of_fold.folds

    def check(self) -> None:
        """As `Experiment.check`; joint training must have members and a rule to train through."""
        super().check()
        check_joint_classifiers(self.members, self.rules, self.training)
        self._check_joint_loop()

    def _task_metrics(self) -> tuple[str, ...]:
        return CLASS_METRICS

    def _task_primary(self) -> str:
        return "accuracy"


TASKS: dict[str, type[Experiment]] = {
    "recommendation": RecommendationExperiment,
    "classification": ClassificationExperiment,
}


def parse_experiment(config: dict[str, Any]) -> Any:
    """Turns the mapping of a config file into checked settings.

    Raises ConfigError with one sentence: what must hold, what was received, and the nearest known name.
    """
    task = config.get("task", "recommendation")
    if task not in TASKS:
        raise ConfigError(f"task: unknown task '{task}': {nearest(str(task), TASKS)}")
    members, default = (MEMBERS, None) if task == "recommendation" else (CLASSIFIERS, "neural")
    config = with_preset(config)
    config = expand_copies(expand_encoders(config, members, default), members, default)
    experiment = parse(TASKS[task], config)
    experiment.check()
    return experiment


__all__ = ["ClassificationExperiment", "Experiment", "RecommendationExperiment", "parse_experiment"]
