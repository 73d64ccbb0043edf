"""Compression of a recommender: the encoders of content members, and the tables that all members score by.

The encoders are not asked when a list is made: what they made of the catalogue lies in tables. So both are reported,
the encoders by member, the scoring model as a whole. A student of all members takes the place of both.
"""

from __future__ import annotations

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
from recsys.core import MemberScores, RankingCore
from recsys.evaluation import Ranker, question
from recsys.metrics import parse_metric
from recsys.ranking_student import Student, StudentCore, StudentSettings, check_smaller, distil
from recsys.results import values_of
from recsys.run import code_version
from recsys.schema import TRAIN

REPRESENTATIVE, JUDGED = 200, 300
"""Training items from which ranges are read, and other items by which an encoder is judged."""

HISTORY = 32
"""Items in the history of the user who is waited for."""

_BLOCK = 64
"""Items that are embedded between two marks of progress."""

STUDENT, STUDENT_FILE = "student", "student.npz"
"""Of a recipe: the folder of the student's cell, and its tables."""

SCORES = "scores"
"""Under this name the ranker knows what is served."""


class RankingCompression(Compression):
    """One recipe over the members of a ranking, before and after, as they were fitted on training rows.

    Where `evaluation.refit` adds the validation rows before the test, what was refitted is left alone: validation would
    have nothing to say of it. The figures on test are then of the members without these rows.
    """

    OVER = "candidates"

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
        if self.recipe.tables is None:
            self.check_useful(facts)
        return facts

    def report(self) -> dict[str, Any]:
        """As `Compression.report`; `student` says what teaching one took and how far it agrees."""
        found = super().report()
        return {**found, "student": self._taught} if self.recipe.student else found

    # ---- a student of all members

    def _distilled(self) -> dict[str, Any]:
        """Teaches the student what is served, on histories of the training rows; what `distil` says of it."""
        settings, task = self.recipe.student, self.task
        if not isinstance(settings, StudentSettings):
            raise ConfigError(
                f"a ranking's student is a model of its own, and must be settings such as {{factors: 64}}; received "
                f"'{settings}'."
            )
        check_smaller(settings, task.interactions.shape[1], [task.fitted[name].member for name in self.rule.members])
        histories = task.interactions.matrix((task.parts == TRAIN) & task.interactions.positive)

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
        return content_hash([STUDENT, settings, self._teacher(), code_version(), self.task.manifest.sha256])

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
        """Items of the training rows to compress with; what is learned is to say what the encoder says now."""
        task, member = self.task, self.task.fitted[name].member
        encoder, table = member.encoder, member.table
        random = np.random.default_rng(options.seed)
        counts = task.interactions.matrix(task.parts == TRAIN).getnnz(axis=0)
        train = random.permutation(np.flatnonzero(member.speaks & (counts > 0)))
        others = random.permutation(np.flatnonzero(member.speaks & (counts == 0)))
        judged = others[:JUDGED] if len(others) else train[-JUDGED:]  # of a small catalogue some of both

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
                f"nothing of recipe {self.name} was of use: it packs tables, and the members that are served "
                f"({', '.join(self.rule.members)}) score by none."
            )
        return RankingCore(scores, self.rule)

    def _before(self) -> dict[str, Any]:
        return {name: self.task.fitted[name].member for name in self.rule.members}

    @functools.cache  # noqa: B019  (one recipe lives as long as its report)
    def _lists(self, after: bool) -> dict[str, Values]:
        """By part every metric of the lists."""
        experiment, core = self.task.experiment, self.core(after=after)
        metrics = [parse_metric(name, self.OVER) for name in experiment.metrics]
        ranker = Ranker(core.members, {SCORES: core.rule}, max(metric.k or 10 for metric in metrics))
        found = {}
        for part, number in PARTS.items():
            asked = question(self.task.interactions, self.task.parts, number, held_out=experiment.held_out_candidates)
            with progress(f"rank {part}", len(asked.users), "users", quiet=self.task.run.quiet) as bar:
                lists = {SCORES: ranker(asked, bar.advance).lists[SCORES]}
            found[part] = values_of(lists, metrics, self.task.catalogue())[SCORES]
        return found

    def values(self, part: str, *, after: bool) -> Values:
        """As `Compression.values`."""
        return self._lists(after)[part]

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
