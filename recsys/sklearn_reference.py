"""scikit-learn's own fusion over the same members, to be listed beside ours: `VotingClassifier`, `StackingClassifier`.

Both are scikit-learn's classes as they are. Their members are ours, already fitted: a row of features is the number of
an example, and a member answers with what it said of that example. Of the rows that the stacking learns from, that is
what it said when it had not seen them, which is what `cross_val_predict` inside `StackingClassifier` makes too; so
`cv="prefit"` learns from the rows and folds that our learned rules learn from, and no member is fitted twice.

Each is given its best form: settings that people turn are tried on validation, where our best rule is chosen as well.
That is six logistic regressions over classes × members features: minutes where there are 150 classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from recsys.metrics import Metric

VOTING, STACKING = "sklearn_voting", "sklearn_stacking"
PENALTIES = (0.1, 1.0, 10.0)
"""Values of C, the inverse strength of the penalty of the final logistic regression; 1 is scikit-learn's own."""
FOLDS = 3
"""Where the rows to learn from are those that decide, a form is judged by cross-validation."""


@dataclass(frozen=True)
class Answers:
    """What the members say, for scikit-learn.

    Attributes:
        logits: by member, float `[N, C]` of every example that is asked about; uniform (zeros) where the member has
            nothing to read, for want of masks in scikit-learn. Of rows in `learned` out of fold.
        labels: int `[N]`.
        learned: numbers of the examples that fusion learns from.
        deciding: numbers of the examples that decide between forms; the same as `learned`, or none of them.
        asked: numbers of the examples whose answers are wanted.
    """

    logits: Mapping[str, np.ndarray]
    labels: np.ndarray
    learned: np.ndarray
    deciding: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class Reference:
    """One of scikit-learn's ensembles: its probabilities of `asked`, `[n, C]`, and the form that was chosen."""

    probabilities: np.ndarray
    form: str


class StoredMember(ClassifierMixin, BaseEstimator):
    """A member that has been asked already: `X` `[n, 1]` holds numbers of examples.

    Args:
        logits: `[N, C]`.
    """

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    @property
    def classes_(self) -> np.ndarray:
        """Class numbers `[C]`."""
        return np.arange(self.logits.shape[1])

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: np.ndarray, y: np.ndarray) -> StoredMember:
        """Nothing is left to fit."""
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Logits `[n, C]`; of two classes what the second has more than the first, `[n]`, as scikit-learn wants it."""
        logits: np.ndarray = self.logits[X[:, 0]]
        return logits if logits.shape[1] > 2 else logits[:, 1] - logits[:, 0]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities `[n, C]`."""
        probabilities: np.ndarray = softmax(self.logits[X[:, 0]].astype(np.float64), axis=1)
        return probabilities

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Class numbers `[n]`."""
        answers: np.ndarray = self.logits[X[:, 0]].argmax(axis=1)
        return answers


def references(answers: Answers, metric: Metric) -> dict[str, Reference]:
    """`sklearn_voting` and `sklearn_stacking`, each in the form that is best by `metric` on the deciding rows."""
    # Their threads wait in busy loops, which costs more than one thread's work on a machine that has others.
    with threadpool_limits(limits=1):
        return {
            VOTING: _best(answers, _votings(answers), metric),
            STACKING: _best(answers, _stackings(answers), metric),
        }


def _members(answers: Answers) -> list[tuple[str, StoredMember]]:
    return [(name, StoredMember(logits)) for name, logits in answers.logits.items()]


def _votings(answers: Answers) -> Iterator[tuple[str, VotingClassifier]]:
    """Soft votes: the mean of the probabilities, of equal weights or each weighed by its accuracy."""
    labels, members = answers.labels[answers.learned], _members(answers)
    right = [float(np.mean(m.predict(answers.learned[:, None]) == labels)) for _, m in members]
    yield "soft, equal weights", VotingClassifier(members, voting="soft")
    if any(right):
        yield "soft, weights by accuracy", VotingClassifier(members, voting="soft", weights=right)


def _stackings(answers: Answers) -> Iterator[tuple[str, StackingClassifier]]:
    """Logistic regression over the members' probabilities as they are, or over their logits, standardised."""
    for c in PENALTIES:
        final = LogisticRegression(C=c, max_iter=5000)
        for method, estimator in (
            ("predict_proba", final),
            ("decision_function", make_pipeline(StandardScaler(), final)),
        ):
            stacking = StackingClassifier(_members(answers), estimator, cv="prefit", stack_method=method)
            yield f"{method}, C {c:g}", stacking


def _best(answers: Answers, forms: Iterator[tuple[str, Any]], metric: Metric) -> Reference:
    """The form with the best mean of the metric on the deciding rows, the first of equals; fitted on `learned`."""
    sign = 1.0 if metric.higher_is_better else -1.0
    rows, labels = answers.learned[:, None], answers.labels[answers.learned]
    chosen, best = None, -np.inf
    for form, model in forms:
        fitted = clone(model).fit(rows, labels)
        if np.array_equal(answers.learned, answers.deciding):
            found = cross_val_predict(model, rows, labels, cv=FOLDS, method="predict_proba")
        else:
            found = fitted.predict_proba(answers.deciding[:, None])
        judged = metric.of_classes(answers.labels[answers.deciding], _placed(found, fitted, answers))
        if sign * float(np.mean(judged)) > best:
            chosen, best = (form, fitted), sign * float(np.mean(judged))
    if chosen is None:
        raise ValueError(f"the metric '{metric.name}' is not defined on the deciding rows.")
    form, fitted = chosen
    return Reference(_placed(fitted.predict_proba(answers.asked[:, None]), fitted, answers), form)


def _placed(probabilities: np.ndarray, fitted: Any, answers: Answers) -> np.ndarray:
    """Probabilities `[n, K]` of the classes that were learned from in the columns of all C; votes have all of them."""
    placed = np.zeros((len(probabilities), next(iter(answers.logits.values())).shape[1]))
    present = fitted.classes_ if probabilities.shape[1] < placed.shape[1] else slice(None)
    placed[:, present] = probabilities
    return placed
