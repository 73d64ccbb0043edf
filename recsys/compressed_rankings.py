"""Compression of a recommender: the encoders of content members, and the tables that all members score by.

The encoders are not asked when a list is made: what they made of the catalogue lies in tables. So both are reported,
the encoders by member, the scoring model as a whole. A student of all members takes the place of both.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from fusion.compat import keras, tf
from fusion.compression.base import Answer, CompressionData
from fusion.compression.flops import count_flops
from fusion.compression.measure import latency, litert_answer
from fusion.compression.recipe import compress, untouched
from fusion.config import Part, content_hash
from fusion.embeddings import take
from fusion.errors import ConfigError, GateError
from fusion.export.litert import Runner
from fusion.export.tflite import convert
from fusion.files import load_arrays, save_arrays, write_atomically
from fusion.progress import progress
from fusion.training.batches import Rows
from fusion.types import Features, RunOptions
from recsys.collaborative.base import PADDING
from recsys.collaborative.content import Content, read_items, unit_table
from recsys.collaborative.tables import pack
from recsys.compression import PARTS, Compression, Values
from recsys.compression_page import FOLDER
from recsys.core import MemberScores, RankingCore
from recsys.evaluation import Ranker, question
from recsys.metrics import Metric, parse_metric
from recsys.ranking_student import Student, StudentCore, StudentSettings, check_smaller, distil
from recsys.results import values_of
from recsys.run import code_version
from recsys.schema import TRAIN, VALIDATION

REPRESENTATIVE, JUDGED = 200, 300
"""Training items from which ranges are read, and other items by which an encoder is judged."""

MOST_JUDGED = 1 / 3
"""The largest share of the training items that is judged by, and then not learned from, where there are few others."""

HISTORY = 32
"""Items in the history of the user who is waited for."""

_TESTED = ".tested"
"""Folder of what recipes made of members that were refitted before the test, below `compressed`."""

_BLOCK = 64
"""Items that are embedded between two marks of progress."""

STUDENT, STUDENT_FILE = "student", "student.npz"
"""Of a recipe: the folder of the student's cell, and its tables."""

SCORES = "scores"
"""Under this name the ranker knows what is served."""


class RankingCompression(Compression):
    """One recipe over the members of a ranking, before and after, as they were fitted on training rows.

    Where `evaluation.refit` adds the validation rows before the test, validation has nothing to say of the refitted
    members, but the run's figures on test are theirs. The recipe is then applied to these as well, for the test alone:
    encoders that changed are compressed, and a student is taught, once more.

    Attributes:
        parts: of the split, whose rows the members know; a student learns from histories of these.
    """

    OVER = "candidates"
    parts: tuple[int, ...] = (TRAIN,)

    def members(self) -> dict[str, dict[str, Any]]:
        """As `Compression.members`: content members, whose encoders the recipe has steps for."""
        if self.recipe.student:
            self._taught = self._distilled()
            return {}
        self._after = self._before()
        facts = {}
        for name, member in self._after.items():
            steps = self.steps_for(name, network=isinstance(member, Content))
            if steps:
                facts[name] = self._encoder(name, member, steps)
                table = load_arrays(self.folder / name / "table.npz")["table"]
                self._after = {**self._after, name: member.with_table(table)}
        asked = self.recipe.steps or any(self.recipe.members.values())
        if asked or self.recipe.tables is None:  # packed tables do not make up for steps without effect
            self.check_useful(facts)
        return facts

    def report(self) -> dict[str, Any]:
        """As `Compression.report`; `student` says what teaching one took and how far it agrees."""
        found = super().report()
        return {**found, "student": self._taught} if self.recipe.student else found

    # ---- a student of all members

    def _distilled(self) -> dict[str, Any]:
        """Teaches the student what is served, on histories of the rows that the members know; what `distil` says of it.

        Raises:
            ConfigError: what the recipe says of it does not fit a ranking's student.
            DataError: there are no histories.
        """
        settings, task = self.recipe.student, self.task
        if not isinstance(settings, StudentSettings):
            raise ConfigError(
                f"a ranking's student is a model of its own, and must be settings such as {{factors: 64}}; received "
                f"'{settings}'."
            )
        if self.recipe.tables is not None and self.recipe.tables.mass < 1.0:
            raise ConfigError(
                f"tables.mass must be left out of recipe {self.name}: it cuts lists of neighbours, and a student has "
                f"none; received {self.recipe.tables.mass:g}."
            )
        check_smaller(settings, task.interactions.shape[1], [task.fitted[name].member for name in self.rule.members])
        histories = task.interactions.matrix(np.isin(task.parts, self.parts) & task.interactions.positive)

        def make(folder: Path, options: RunOptions) -> dict[str, Any]:
            student, facts = distil(self.core(after=False), histories, settings, options)
            student.save(folder / STUDENT_FILE)
            return {**facts, "skipped": ""}

        facts = self.cell(STUDENT, (), make)
        return {name: fact for name, fact in facts.items() if name != "skipped"}

    def _key(self, member: str, steps: tuple[Part, ...]) -> str:
        if not self.recipe.student:
            return super()._key(member, steps)
        settings = self.recipe.student.model_dump(mode="json")
        key = [STUDENT, settings, self._teacher(), self.parts, code_version(), self.task.manifest.sha256]
        return content_hash(key)

    # ---- the encoders

    def _encoder(self, name: str, member: Content, steps: tuple[Part, ...]) -> dict[str, Any]:
        """Compresses one encoder, and embeds the whole catalogue with what ships of it."""
        encoder, data = member.encoder, self.task.interactions
        values, available = read_items(encoder, member.config.columns, data.catalogue, self.task.run.cache / "images")

        def make(folder: Path, options: RunOptions) -> dict[str, Any]:
            whole, given = encoder.encoder(), self._data(name, values, options)
            model = keras.Model(whole.inputs, whole.output, name="encoder")
            outcome, skipped = self.tried(lambda: compress(model, steps, given))
            if outcome is None:
                outcome = untouched(model, given)
            write_atomically(folder / "encoder.tflite", outcome.tflite)
            answer, rows = litert_answer(outcome.tflite), np.flatnonzero(available)
            vectors = []
            with progress(f"embed {name}", len(rows), "items", quiet=self.task.run.quiet) as bar:
                for block in np.split(rows, range(_BLOCK, len(rows), _BLOCK)):
                    vectors.append(answer(encoder.prepare(take(values, block), fixed_length=True)))
                    bar.advance(len(block))
            save_arrays(folder / "table.npz", {"table": unit_table(np.concatenate(vectors), available)})
            return {**outcome.dump(), "skipped": skipped}

        return self.cell(name, steps, make)

    def _fitted(self, member: str) -> str:
        """Of the encoder alone: what else the member learned, a recipe leaves as it is."""
        return str(self.task.fitted[member].member.encoder.fingerprint())

    def _data(self, name: str, values: Any, options: RunOptions) -> CompressionData:
        """Items to compress with and others to judge by; what is learned is to say what the encoder says now."""
        task, member = self.task, self.task.fitted[name].member
        encoder, table = member.encoder, member.table
        random = np.random.default_rng(options.seed)
        counts = task.interactions.matrix(task.parts == TRAIN).getnnz(axis=0)
        train, judged = dealt(member.speaks, counts, random)

        def gather(numbers: np.ndarray) -> Features:
            items = train[numbers]
            return {**encoder.prepare(take(values, items)), "target": table[items]}

        def judge(answer: Answer) -> np.ndarray:
            found = answer(encoder.prepare(take(values, judged), fixed_length=True))
            length = np.maximum(np.linalg.norm(found, axis=1), 1e-12)
            cosines: np.ndarray = (found * table[judged]).sum(axis=1) / length
            return cosines

        return CompressionData(
            rows=Rows(len(train), gather),
            loss=lambda said, batch: 1.0 - tf.reduce_sum(tf.math.l2_normalize(said, axis=-1) * batch["target"], axis=1),
            representative=encoder.prepare(take(values, np.sort(train[:REPRESENTATIVE])), fixed_length=True),
            judge=judge,
            metric="cosine",
            higher_is_better=True,
            options=options,
        )

    # ---- the scoring model

    def core(self, *, after: bool) -> RankingCore | StudentCore:
        """What makes the scores: as it was, or with the compressed encoders' tables, packed as the recipe says; or the
        student."""
        if after and self.recipe.student:
            scorer, tables = Student.load(self.folder / STUDENT / STUDENT_FILE).scorer(), self.recipe.tables
            if tables is not None:
                pack(scorer, tables.bits)
            return StudentCore(scorer, self.task.interactions.shape[1])
        scores = MemberScores(self._after if after else self._before(), self.task.member_scores.counts)
        tables = self.recipe.tables
        if after and tables is not None and not sum(pack(s, tables.bits, tables.mass) for s in scores.scorers):
            raise GateError(
                f"the tables of recipe {self.name} were of no use: it packs tables, and the members that are served "
                f"({', '.join(self.rule.members)}) score by none."
            )
        return RankingCore(scores, self.rule)

    def _before(self) -> dict[str, Any]:
        return {name: self.task.fitted[name].member for name in self.rule.members}

    @functools.cached_property
    def _tested(self) -> RankingCompression:
        """The recipe over the members that the run asks about the test part."""
        task = self.task
        if not task.experiment.evaluation.refit:
            return self
        again = copy.copy(task)
        again.fitted = {n: dataclasses.replace(f, member=task.test_members[n]) for n, f in task.fitted.items()}
        again.member_scores = task.test_scores
        other = type(self)(again, self.name, self.recipe)
        other.parts, other.folder = (TRAIN, VALIDATION), task.run.path(FOLDER, _TESTED, self.name)
        other.members()
        return other

    @functools.cache  # noqa: B019  (one recipe lives as long as its report)
    def values(self, part: str, *, after: bool) -> Values:
        """As `Compression.values`."""
        asked = self if part == "validation" else self._tested
        return asked._measured(part, asked._ranker(after))

    @functools.cache  # noqa: B019  (as above)
    def _ranker(self, after: bool) -> Ranker:
        core = self.core(after=after)
        return Ranker(core.members, {SCORES: core.rule}, max(metric.k or 10 for metric in self._metrics()))

    def _metrics(self) -> list[Metric]:
        return [parse_metric(name, self.OVER) for name in self.task.experiment.metrics]

    def _measured(self, part: str, ranker: Ranker) -> Values:
        """Every metric of the lists that a ranker makes for a part."""
        task = self.task
        asked = question(task.interactions, task.parts, PARTS[part], held_out=task.experiment.held_out_candidates)
        with progress(f"rank {part}", len(asked.users), "users", quiet=task.run.quiet) as bar:
            lists = {SCORES: ranker(asked, bar.advance).lists[SCORES]}
        return values_of(lists, self._metrics(), task.catalogue())[SCORES]

    def cost(self, *, after: bool) -> dict[str, Any]:
        """As `Compression.cost`: of the scoring model in one file, without the encoders."""
        core = self.core(after=after)
        function = tf.function(
            lambda history: {SCORES: core(history)}, input_signature=[tf.TensorSpec([1, HISTORY], tf.int32, "history")]
        ).get_concrete_function()
        tflite = convert({"serving_default": function}, core)
        if after:
            write_atomically(self.folder / "core.tflite", tflite)
        history = np.random.default_rng(0).permutation(core.members.items)[:HISTORY].astype(np.int32)
        padded = np.full((1, HISTORY), PADDING, np.int32)
        padded[0, : len(history)] = history
        runner = Runner(tflite)
        timed = latency(functools.partial(runner, {"history": padded}))
        return {"bytes": len(tflite), "flops": count_flops(function), **timed}


def dealt(speaks: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the items that an encoder is compressed with, and of those by which it is judged.

    The second are items that nobody took in training; where these are fewer than `JUDGED`, training items that are
    then left out of the first. Only of one or two items both are the same.

    Args:
        speaks: bool `[I]`, the items that the encoder reads something of.
        counts: `[I]`, how often each stands in the training rows.
        random: decides which.
    """
    train = random.permutation(np.flatnonzero(speaks & (counts > 0)))
    others = random.permutation(np.flatnonzero(speaks & (counts == 0)))[:JUDGED]
    moved = min(JUDGED - len(others), int(MOST_JUDGED * len(train)))
    judged = np.concatenate([others, train[:moved]])
    return train[moved:], judged if len(judged) else train
