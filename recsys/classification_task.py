"""The stages of a classification experiment: data, train, fuse, evaluate, export. Each reads the run's folder."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd

from fusion.config import Part
from fusion.ensemble import Ensemble
from fusion.errors import DataError
from fusion.files import save_arrays
from fusion.images import load_images
from fusion.progress import progress
from fusion.registry import nearest
from fusion.training.member import ClassifierMember, LabelledData
from fusion.training.out_of_fold import out_of_fold, out_of_fold_logits
from fusion.training.separate import Examples
from fusion.training.strategy import make_strategy
from fusion.types import derive_seed
from recsys.cleaning import clean_examples
from recsys.collaborative.content import join_columns
from recsys.decoding import decoder_of
from recsys.fitting import Fitted, fit_member, keep_copy
from recsys.schema import IMAGE, LABEL, SPLIT, TEST, TRAIN, VALIDATION
from recsys.splits import SplitManifest, split_examples
from recsys.stages import Stages
from recsys.storage import arrays_hash, load_table, save_table, table_hash


class ClassificationTask(Stages):
    """A classification experiment in the folder of one run."""

    OVER = "classes"

    # ---- data -------------------------------------------------------------------------------------------

    def data(self) -> None:
        """Reads, cleans, splits, and leaves the table, the split and what was dropped in `data/`."""
        experiment = self.experiment
        tables = experiment.data.registry[experiment.data.kind].read(experiment.data.config)
        decode = decoder_of(experiment, self.run.cache, quiet=self.run.quiet)
        table, dropped = clean_examples(tables, experiment.cleaning, decode)
        given = list(table[SPLIT]) if SPLIT in table else None
        parts = split_examples(table[LABEL].to_numpy(), given, experiment.split)
        folder = self.run.path("data")
        folder.mkdir(exist_ok=True)
        save_table(folder, "examples", table)
        SplitManifest.of_examples(table, parts, experiment.split).save(folder)
        self._keep_facts(tables.name, tables.notes, dropped)
        self.run.set(data_hash=table_hash(table))

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The cleaned examples."""
        return load_table(self.run.path("data"), "examples")

    @functools.cached_property
    def manifest(self) -> SplitManifest:
        """The split that all members share; GateError when the data are not those that were split."""
        manifest = SplitManifest.load(self.run.path("data"))
        manifest.verify(self.table)
        return manifest

    def rows(self, part: int) -> np.ndarray:
        """Row numbers of a part."""
        return np.flatnonzero(self.manifest.parts == part)

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the classes in training, sorted; every label of the other parts must be one of them."""
        names = sorted(set(self.table[LABEL].iloc[self.rows(TRAIN)]))
        strange = set(self.table[LABEL]) - set(names)
        if strange:
            raise DataError(
                f"every class must have a training example; '{min(strange)}' has none. "
                "Take split.strategy stratified, or leave the class out with data.where."
            )
        return names

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Class numbers, int64 `[N]`."""
        return np.searchsorted(np.array(self.classes, object), self.table[LABEL].to_numpy(object))

    # ---- train ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Fits every member on the training part and leaves it in `submodels/<name>/`."""
        for name, part in self._with_progress("members"):
            data = self._labelled(name, self.rows(TRAIN), self.rows(VALIDATION))
            fitted = self._fit(name, part, data)
            keep_copy(fitted.folder, self.run.path("submodels", name))

    def _with_progress(self, what: str) -> Any:
        with progress(what, total=len(self.experiment.members), unit="members", quiet=self.run.quiet) as bar:
            for name, part in self.experiment.members.items():
                yield name, part
                bar.advance(1)

    def _fit(self, name: str, part: Part, data: LabelledData) -> Fitted:
        strategy = make_strategy(self.experiment.strategy)
        return fit_member(name, part, data, self.experiment.seed, strategy=strategy, quiet=self.run.quiet)

    def _labelled(self, name: str, train: np.ndarray, validation: np.ndarray | None) -> LabelledData:
        """The rows as the member reads them. Training rows without its text or image teach it nothing."""
        train = train[self.available(name)[train]]
        held = None if validation is None else validation[self.available(name)[validation]]
        key = arrays_hash(train, np.zeros(0) if held is None else held, self.labels)
        return LabelledData(
            train=Examples(self.values(name, train), self.labels[train]),
            validation=None if held is None else Examples(self.values(name, held), self.labels[held]),
            classes=len(self.classes),
            cache=self.run.cache,
            hash=f"{self.run.state['data_hash']} {key}",
        )

    def values(self, name: str, rows: np.ndarray) -> Any:
        """What a member reads of some rows: texts, or images uint8 `[N, H, W, 3]`."""
        values = self._content(name)[0]
        return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]

    def context(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What rules may read of some rows, float32 `[n, 1]` by name; NaN where it is not a number."""
        table = self.table.iloc[rows]
        columns = [c for member in self.experiment.members.values() for c in member.config.columns]
        texts = join_columns(table, list(dict.fromkeys(columns))) if columns else [""] * len(table)
        found = {"words": np.log1p([len(text.split()) for text in texts])}
        for name in self.experiment.context:
            if name not in table:
                raise DataError(
                    f"context names the column '{name}', which is not there: {nearest(name, table.columns)}"
                )
            found[name] = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
        return {name: np.asarray(values, np.float32)[:, None] for name, values in found.items()}

    def available(self, name: str) -> np.ndarray:
        """bool `[N]`: the rows that have the member's text or image."""
        return self._content(name)[1]

    @functools.cache  # noqa: B019  (one task lives as long as its run)
    def _content(self, name: str) -> tuple[Any, np.ndarray]:
        config = self.experiment.members[name].config
        encoder = config.encoder.registry[config.encoder.kind]
        if encoder.modality == "image":
            size = config.encoder.config.image_size
            pixels, known, _ = load_images(list(self.table[IMAGE]), size, self.run.cache / "images")
            return pixels, known
        texts = join_columns(self.table, config.columns)
        return texts, np.array([bool(text) for text in texts])

    # ---- fuse -------------------------------------------------------------------------------------------

    def fuse(self) -> None:
        """Fits the rules on out-of-fold logits of the training rows and writes them to `rules/<name>/`."""
        rules = self._new_rules()
        learned = [name for name, rule in rules.items() if rule.learned]
        reports = {}
        if learned:
            logits, mask = self._out_of_fold_logits()
            save_arrays(self.run.path("out_of_fold", "logits.npz"), {"logits": logits, "mask": mask})
            labels, context = self.labels[self.rows(TRAIN)], self.context(self.rows(TRAIN))
        for name in learned:
            seed = derive_seed(self.experiment.seed, "rule", name)
            reports[name] = rules[name].fit(logits, mask, labels, context=context, seed=seed)
        self._keep_rules(rules, reports)

    def _out_of_fold_logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[N, S, C]` of the training rows by members that did not see them, and who could read, `[N, S]`."""
        train, seed = self.rows(TRAIN), self.experiment.seed
        folds = max(2, self.experiment.out_of_fold.folds)
        fold_of = out_of_fold(len(train), folds, derive_seed(seed, "folds"), self.labels[train])
        logits = np.zeros((len(train), len(self.experiment.members), len(self.classes)), np.float32)
        for position, (name, _) in enumerate(self._with_progress("members out of fold")):
            recipe = self.fitted[name].recipe

            def score(
                _: int, rows: np.ndarray, held: np.ndarray, name: str = name, recipe: Part = recipe
            ) -> np.ndarray:
                member = self._fit(name, recipe, self._labelled(name, train[rows], None)).member
                return self._logits(member, name, train[held])

            logits[:, position] = out_of_fold_logits(score, fold_of, f"{name} out of fold", self.run.quiet)
        mask = np.stack([self.available(name)[train] for name in self.experiment.members], axis=1)
        return logits, mask

    def _logits(self, member: ClassifierMember, name: str, rows: np.ndarray) -> np.ndarray:
        """Logits `[n, C]`; zero where the member has nothing to read (the mask says so)."""
        result = np.zeros((len(rows), len(self.classes)), np.float32)
        known = self.available(name)[rows]
        result[known] = member.logits(self.values(name, rows[known]))
        return result

    # ---- evaluate ---------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Classifies validation and test, chooses on validation, and writes the report."""
        from recsys.classification_report import write_classification_report

        write_classification_report(self)

    def part_logits(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[N, S, C]` of a part by all members, and who could read, bool `[N, S]`."""
        rows = self.rows(part)
        logits = np.stack([self._logits(f.member, name, rows) for name, f in self.fitted.items()], axis=1)
        mask = np.stack([self.available(name)[rows] for name in self.fitted], axis=1)
        return logits, mask

    # ---- export -----------------------------------------------------------------------------------------

    def export(self) -> None:
        """Writes the artifact into `export/<model>/<version>/`, after training once more where asked for."""
        if self.experiment.export.enabled:
            from recsys.export import export_classifier

            export_classifier(self)

    def ensemble(self, rule: str) -> Ensemble:
        """The members as they are exported, and a rule."""
        members = {name: fitted.member for name, fitted in self.fitted.items()}
        if self.experiment.export.refit == "all":
            everything = np.arange(len(self.table))
            for name, _ in self._with_progress("members on every row"):
                everyone = self._labelled(name, everything, None)
                members[name] = self._fit(name, self.fitted[name].recipe, everyone).member
        return Ensemble(members, self.rules[rule])

    def part_counts(self) -> dict[str, int]:
        """Rows by name of part."""
        names = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        return {name: len(self.rows(part)) for name, part in names.items()}
