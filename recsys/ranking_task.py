"""The stages of a recommendation experiment: data, train, fuse, evaluate, export. Each reads the run's folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from fusion.config import Part
from fusion.files import save_arrays, write_atomically
from fusion.progress import progress
from fusion.rules.average import Average
from fusion.rules.base import Rule
from fusion.training.strategy import make_strategy
from fusion.types import History, RunOptions, derive_seed
from recsys.cleaning import clean
from recsys.collaborative.base import Member, TrainingData
from recsys.controls import ROWS, FitRows, list_quality, shuffled_labels
from recsys.core import MemberScores, RankingCore
from recsys.decoding import decoder_of
from recsys.evaluation import Ranker, question, validator
from recsys.fitting import Fitted, fit_group, fit_member, keep_copy, without_validation
from recsys.joint import together, train_jointly
from recsys.leaks import leaks, tell
from recsys.metrics import Catalogue, parse_metric
from recsys.out_of_fold import Fold, FoldScores, make_folds, sampled_scores
from recsys.schema import HISTORY, PART_NAMES, TEST, TRAIN, VALIDATION, Interactions
from recsys.splits import SplitManifest, split
from recsys.stages import Stages
from recsys.storage import arrays_hash, load_interactions, save_interactions, table_hash
from recsys.tuning import tune

TUNING_USERS = 5000
"""Validation users on which settings are chosen; of more a fixed random part."""


PLAIN = "members alone"
"""Under this name, which no rule can have, the members' standardised scores are taken out of fold as well."""

EVERY_PART = (TRAIN, VALIDATION, TEST, HISTORY)


class RankingTask(Stages):
    """A recommendation experiment in the folder of one run."""

    OVER = "candidates"

    # ---- data -------------------------------------------------------------------------------------------

    def data(self) -> None:
        """Reads, cleans, splits, and leaves tables, the split and what was dropped in `data/`."""
        experiment = self.experiment
        tables = experiment.data.registry[experiment.data.kind].read(experiment.data.config)
        decode = decoder_of(experiment, self.run.cache, quiet=self.run.quiet)
        data, dropped = clean(tables, experiment.cleaning, experiment.positive, decode)
        parts = split(data, experiment.split)
        folder = self.run.path("data")
        found = leaks(data, parts, experiment.split.strategy)
        tell(found, folder, strict=experiment.cleaning.strict, quiet=self.run.quiet)
        save_interactions(folder, data)
        SplitManifest.of(data, parts, experiment.split).save(folder)
        self._keep_facts(data.name, list(data.notes), dropped)
        self.run.set(data_hash=data_hash(data))

    @functools.cached_property
    def interactions(self) -> Interactions:
        """The cleaned data set."""
        return load_interactions(self.run.path("data"), self.facts["name"], self.experiment.positive)

    @functools.cached_property
    def manifest(self) -> SplitManifest:
        """The split that all members share; GateError when the data are not those that were split."""
        manifest = SplitManifest.load(self.run.path("data"))
        manifest.verify(self.interactions)
        return manifest

    @property
    def parts(self) -> np.ndarray:
        """int8 `[N]`, the part of each interaction."""
        return self.manifest.parts

    # ---- train ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Fits every member on the training part, tuned where asked for, and leaves it in `submodels/<name>/`."""
        data = self._training_data()
        for name, fitted in self._fit_all(data, self._tuned(data)).items():
            keep_copy(fitted.folder, self.run.path("submodels", name))

    def _tuned(self, data: TrainingData) -> dict[str, Part]:
        """The members' settings, after those named in `tuning` have been chosen on validation."""
        members, grids = dict(self.experiment.members), self.experiment.tuning
        metric = parse_metric(self.experiment.primary, "candidates")
        asked = question(self.interactions, self.parts, VALIDATION, held_out=self.experiment.held_out_candidates)
        validate = validator(asked, metric.name, TUNING_USERS)
        trials = {}
        for name, grid in grids.items():
            with progress(f"tune {name}", sum(map(len, grid.values())), "fits", quiet=self.run.quiet) as bar:

                def measure(part: Part, name: str = name, bar: Any = bar) -> float:
                    value = validate(self._fit(name, part, data).member.scorer())[metric.name]
                    bar.advance(1)
                    return value

                members[name], tried = tune(name, members[name], grid, measure, metric.higher_is_better)
            trials[name] = [vars(trial) for trial in tried]
        write_atomically(self.run.path("submodels", "tuning.json"), json.dumps(trials, indent=2))
        return members

    @property
    def trials(self) -> dict[str, list[dict[str, Any]]]:
        """What tuning tried: by member a list of key, value and metric on validation."""
        return json.loads(self.run.path("submodels", "tuning.json").read_text(encoding="utf-8"))

    def _training_data(self) -> TrainingData:
        data, parts = self.interactions, self.parts
        asked = question(data, parts, VALIDATION, held_out=self.experiment.held_out_candidates)
        return TrainingData(
            matrix=data.matrix((parts == TRAIN) & data.positive),
            catalogue=data.catalogue,
            cache=self.run.cache,
            validate=validator(asked, self.experiment.primary),
            validation_hash=arrays_hash(asked.relevant.indptr, asked.relevant.indices, asked.history.indices),
            monitor=self.experiment.primary,
        )

    def _fit_all(
        self, data: TrainingData, members: Mapping[str, Part], names: Collection[str] | None = None
    ) -> dict[str, Fitted]:
        """The members, all or some, fitted on the same rows: one by one, or together where the config says so."""
        asked = [name for name in members if names is None or name in names]
        group = together(members, self.experiment.training)
        fitted = {}
        with progress("members", total=len(asked), unit="members", quiet=self.run.quiet) as bar:
            if not group.keys().isdisjoint(asked):
                fitted = self._fit_together(group, data)
                bar.advance(len(group.keys() & asked))
            for name in asked:
                if name not in fitted:
                    fitted[name] = self._fit(name, members[name], data)
                    bar.advance(1)
        return {name: fitted[name] for name in asked}

    def _fit_together(self, group: Mapping[str, Part], data: TrainingData) -> dict[str, Fitted]:
        """Members trained in one graph; where nothing may be validated, for the epochs that were best in training."""
        recipe = self.experiment.training
        if data.validate is None:
            recipe = without_validation(recipe, self.fitted[next(iter(group))].history or History())
        strategy, seed, quiet = make_strategy(self.experiment.strategy), self.experiment.seed, self.run.quiet

        def train(members: dict[str, Any], options: RunOptions) -> tuple[History, dict[str, Any]]:
            history, weights = train_jointly(members, recipe, data, options)
            return history, {"joint_weights": weights}

        return fit_group(group, recipe, train, data, seed, strategy=strategy, quiet=quiet)

    def _fit(self, name: str, part: Part, data: TrainingData) -> Fitted:
        strategy = make_strategy(self.experiment.strategy)
        return fit_member(name, part, data, self.experiment.seed, strategy=strategy, quiet=self.run.quiet)

    def _fit_again(self, parts: tuple[int, ...], names: Collection[str] | None = None) -> dict[str, Member]:
        """The members by the recipes that validation left, fitted on the positive rows of `parts`."""
        data = self.interactions
        rows = np.isin(self.parts, parts) & data.positive
        again = TrainingData(matrix=data.matrix(rows), catalogue=data.catalogue, cache=self.run.cache)
        return {name: fitted.member for name, fitted in self._fit_all(again, self.recipes, names).items()}

    @property
    def recipes(self) -> dict[str, Part]:
        """By member the settings with which it is fitted on other rows than those of training."""
        return {name: fitted.recipe for name, fitted in self.fitted.items()}

    @functools.cached_property
    def member_scores(self) -> MemberScores:
        """The scorers of the members as they were trained, side by side."""
        return MemberScores({name: fitted.member for name, fitted in self.fitted.items()}, self._counts((TRAIN,)))

    @functools.cached_property
    def test_scores(self) -> MemberScores:
        """The scorers of `test_members`, side by side."""
        return MemberScores(self.test_members, self._counts(self._known_to_test))

    @functools.cached_property
    def test_members(self) -> dict[str, Member]:
        """The members that are asked about the test part: fitted on training rows, or with validation added."""
        if self.experiment.evaluation.refit:
            return self._fit_again(self._known_to_test)
        return {name: fitted.member for name, fitted in self.fitted.items()}

    # ---- fuse -------------------------------------------------------------------------------------------

    def fuse(self) -> None:
        """Fits the learned rules on out-of-fold scores and writes every rule to `rules/<name>/`."""
        rules = self._new_rules()
        learned = {name: rule for name, rule in rules.items() if rule.learned}
        plain = {PLAIN: Average(Average.Config(), list(self.experiment.members), self.OVER)}
        scores = self._out_of_fold_scores(learned | plain) if learned else {}
        reports = {}
        for name in learned:
            joined = FoldScores.join(scores[name])
            seed = derive_seed(self.experiment.seed, "rule", name)
            reports[name] = rules[name].fit(*vars(joined).values(), seed=seed)
            if type(rules[name]).learned:
                new_rule = functools.partial(self._new_rule, name)
                found = shuffled_labels(new_rule, FitRows(**vars(joined)), self.experiment.seed)
                reports[name]["shuffled_labels"] = found
        if learned:
            self._keep_quality(FoldScores.join(scores[PLAIN]))
        self._keep_rules(rules, reports)

    def _keep_quality(self, scores: FoldScores) -> None:
        """Leaves how good each member was on some of the lists that it scored out of fold, for `recsys.controls`."""
        random = np.random.default_rng(derive_seed(self.experiment.seed, "quality"))
        rows = random.permutation(len(scores.labels))[:ROWS]
        given = (scores.features[rows], scores.mask[rows], scores.labels[rows], scores.weights[rows])
        found = dict(zip(self.experiment.members, list_quality(*given).T, strict=True))
        save_arrays(self.run.path("out_of_fold", "quality.npz"), found)

    def _out_of_fold_scores(self, rules: dict[str, Rule]) -> dict[str, list[FoldScores]]:
        settings, seed = self.experiment.out_of_fold, self.experiment.seed
        folds = make_folds(self.interactions, self.parts, self.experiment.split, settings.folds, seed)
        result: dict[str, list[FoldScores]] = {name: [] for name in rules}
        for number, fold in enumerate(folds):
            members = {n: f.member for n, f in self._fit_all(self._fold_data(fold), self.recipes).items()}
            asked = fold.question(held_out=self.experiment.held_out_candidates)
            counts = fold.data.matrix(fold.training_rows).getnnz(axis=0)
            sampled = sampled_scores(MemberScores(members, counts), rules, asked, settings, derive_seed(seed, number))
            for name, parts in sampled.items():
                result[name].extend(parts)
        return result

    def _fold_data(self, fold: Fold) -> TrainingData:
        return TrainingData(
            matrix=fold.data.matrix(fold.training_rows), catalogue=fold.data.catalogue, cache=self.run.cache
        )

    # ---- evaluate ---------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Ranks all unseen items for validation and test, chooses on validation, and writes the report."""
        from recsys.ranking_report import write_ranking_report

        write_ranking_report(self)

    def ranker(self, rules: Mapping[str, Callable[..., Any]], part: int = TEST) -> Ranker:
        """Ranks a part by all members and the given rules, lists as long as the longest metric needs."""
        longest = max((parse_metric(name, "candidates").k or 10) for name in self.experiment.metrics)
        members = self.test_scores if part == TEST else self.member_scores
        return Ranker(members, rules, longest)

    def catalogue(self) -> Catalogue:
        """Facts about items for the metrics beyond accuracy: counts in the rows that the members of the test part
        have seen, and content vectors."""
        tables = [f.member.table for f in self.fitted.values() if hasattr(f.member, "table")]
        counts = self._counts(self._known_to_test)
        return Catalogue(len(counts), popularity=counts, vectors=tables[0] if tables else None)

    @property
    def _known_to_test(self) -> tuple[int, ...]:
        """The parts that the members are fitted on which are asked about the test part."""
        return (TRAIN, VALIDATION) if self.experiment.evaluation.refit else (TRAIN,)

    def _counts(self, parts: tuple[int, ...]) -> np.ndarray:
        """How many users took each item in the positive rows of `parts`, int64 `[I]`."""
        data = self.interactions
        return data.matrix(np.isin(self.parts, parts) & data.positive).getnnz(axis=0).astype(np.int64)

    # ---- export -----------------------------------------------------------------------------------------

    def export(self) -> None:
        """Writes the artifact into `export/<model>/<version>/`, after training once more where asked for."""
        if self.experiment.export.enabled:
            from recsys.export import export_recommender

            export_recommender(self)

    def refitted(self, names: Collection[str] | None = None) -> dict[str, Member]:
        """The members, all or some, as they are exported: fitted on every positive row, or as they were evaluated."""
        chosen = [name for name in self.experiment.members if names is None or name in names]
        if self.experiment.export.refit == "none":
            return {name: self.fitted[name].member for name in chosen}
        return self._fit_again(EVERY_PART, chosen)

    @property
    def everybody(self) -> list[str]:
        """The members that are not personal, the smallest first."""
        fitted = {name: fitted.member for name, fitted in self.fitted.items() if not fitted.member.personal}
        return sorted(fitted, key=lambda name: sum(array.nbytes for array in fitted[name].state().values()))

    def exported(self, name: str) -> tuple[RankingCore, dict[str, Member]]:
        """What is exported of a rule, or of a member alone: the rule over the members that it needs, and these."""
        rule = self.rule_to_serve(name)
        parts, refitted = (
            (TRAIN,) if self.experiment.export.refit == "none" else EVERY_PART,
            self.refitted(rule.members),
        )
        members = {member: refitted[member] for member in rule.members}  # in the order of the rule's axis S
        return RankingCore(MemberScores(members, self._counts(parts)), rule), members

    def searchable(self, members: Mapping[str, Member]) -> dict[str, Member]:
        """The exported members, and those that are left out, as they were trained: searching by an example needs their
        encoders, and what these make of an item does not depend on the rows."""
        found = dict(members)
        if self.experiment.export.search:
            found |= {name: fitted.member for name, fitted in self.fitted.items() if name not in members}
        return {name: found[name] for name in self.experiment.members if name in found}

    def known(self) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """`[U, I]` positives and everything seen, as the exported artifact knows them: every row, refitted or not.

        A history is not what members are fitted on but what they are asked with, and nobody wants back what they took.
        """
        data = self.interactions
        return data.matrix(data.positive), data.matrix(np.ones(len(data.users), bool))

    def part_counts(self) -> dict[str, int]:
        """Rows by name of part."""
        return {PART_NAMES[part]: int((self.parts == part).sum()) for part in (TRAIN, VALIDATION, TEST, HISTORY)}


def data_hash(data: Interactions) -> str:
    """Names the cleaned data: its ids, interactions and content."""
    arrays = [data.users, data.items, data.positive]
    arrays += [a for a in (data.timestamps, data.ratings) if a is not None]
    return arrays_hash(*arrays) + "-" + table_hash(data.catalogue)[:16]
