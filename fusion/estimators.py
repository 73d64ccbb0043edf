"""scikit-learn classifiers as parts of a graph: fitted by scikit-learn, kept as arrays, answered by TensorFlow.

An estimator has two functions. `fit` leaves nothing of scikit-learn's behind but named arrays; `logits` writes the same
classifier with layers, so that what is served is what was fitted, without pickles. Estimators that cannot be written so
(kernels such as the radial basis function) are not offered.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np
import pydantic
from sklearn import calibration, ensemble, linear_model, neighbors, svm
from threadpoolctl import threadpool_limits

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import DataError
from fusion.registry import Registry
from fusion.trees import Trees, evaluate, placed, trees_of_boosting, trees_of_forest

ESTIMATORS = Registry(
    "scikit-learn estimator",
    {
        "logistic_regression": "fusion.estimators:LogisticRegression",
        "linear_svm": "fusion.estimators:LinearSvm",
        "knn": "fusion.estimators:Neighbours",
        "random_forest": "fusion.estimators:RandomForest",
        "gradient_boosting": "fusion.estimators:GradientBoosting",
    },
)

ABSENT = -30.0
"""The logit of a class without a training row: e^-30 is nothing beside any other class, and finite."""

Arrays = dict[str, np.ndarray]


class Estimator(abc.ABC):
    """One kind of classifier over vectors."""

    Config: ClassVar[type[Settings]]
    random: ClassVar[bool] = False
    """Whether another seed gives another classifier."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abc.abstractmethod
    def new(self, labels: np.ndarray, seed: int) -> Any:
        """scikit-learn's estimator, not fitted yet, with all that the settings say."""

    @abc.abstractmethod
    def arrays(self, fitted: Any, classes: int) -> Arrays:
        """What the graph needs of a fitted one; class k of `fitted.classes_` is column `classes_[k]` of C."""

    @abc.abstractmethod
    def logits(self, features: Any, arrays: Arrays) -> Any:
        """The classifier as layers, the last one called `logits`: features `[B, D]` -> logits `[B, C]`."""

    def fit(self, features: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> Arrays:
        """Fits on features float32 `[N, D]` and class numbers int `[N]`, of which some class may have no row.

        Raises DataError when there is but one class to tell apart.
        """
        if len(np.unique(labels)) < 2:
            raise DataError(
                f"the training rows must hold at least two classes; these {len(labels)} hold one. "
                "Give the member more rows, or lower out_of_fold.folds."
            )
        # OpenMP's threads wait for each other in busy loops: on a busy machine two took 30 times as long as one.
        with threadpool_limits(limits=1, user_api="openmp"):
            fitted = self.new(labels, seed).fit(features, labels)
        return self.arrays(fitted, classes)


# ---- linear models -------------------------------------------------------------------------------------------


class LogisticRegression(Estimator):
    """Multinomial logistic regression with an L2 penalty."""

    class Config(Settings):
        """Settings of the logistic regression."""

        c: float = pydantic.Field(1.0, gt=0, allow_inf_nan=False)
        """Inverse strength of the penalty. Embeddings of unit length want 10 and more."""

    def new(self, labels: np.ndarray, seed: int) -> Any:
        return linear_model.LogisticRegression(C=self.config.c, max_iter=5000)

    def arrays(self, fitted: Any, classes: int) -> Arrays:
        coefficients, intercept = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:  # one row, for the second class against 0
            coefficients = np.stack([np.zeros_like(coefficients[0]), coefficients[0]])
            intercept = np.array([0.0, intercept[0]])
        return _linear(coefficients, intercept, fitted.classes_, classes)

    def logits(self, features: Any, arrays: Arrays) -> Any:
        return _dense(features, arrays)


class LinearSvm(Estimator):
    """A linear support vector machine, one class against the rest.

    Margins are no logits. They become some by one temperature, fitted on margins of rows that were left out (5 folds
    inside the training rows; fewer where a class is smaller, none where a class has a single row). Guo et al. 2017,
    https://arxiv.org/abs/1706.04599.
    """

    class Config(Settings):
        """Settings of the support vector machine."""

        c: float = pydantic.Field(1.0, gt=0, allow_inf_nan=False)
        """Inverse strength of the penalty."""

    def new(self, labels: np.ndarray, seed: int) -> Any:
        machine = svm.LinearSVC(C=self.config.c, random_state=seed, max_iter=20_000)
        folds = min(5, np.unique(labels, return_counts=True)[1].min())
        if folds < 2:
            return machine
        return calibration.CalibratedClassifierCV(machine, method="temperature", cv=int(folds), ensemble=False)

    def arrays(self, fitted: Any, classes: int) -> Arrays:
        machine, beta = fitted, 1.0
        if isinstance(fitted, calibration.CalibratedClassifierCV):
            (calibrated,) = fitted.calibrated_classifiers_
            machine, beta = calibrated.estimator, float(calibrated.calibrators[0].beta_)
        coefficients, intercept = beta * machine.coef_, beta * machine.intercept_
        if len(machine.classes_) == 2:  # one row, the margin of the second class; the first has its negative
            coefficients = np.concatenate([-coefficients, coefficients])
            intercept = np.concatenate([-intercept, intercept])
        return _linear(coefficients, intercept, machine.classes_, classes)

    def logits(self, features: Any, arrays: Arrays) -> Any:
        return _dense(features, arrays)


def _linear(coefficients: np.ndarray, intercept: np.ndarray, present: np.ndarray, classes: int) -> Arrays:
    """The kernel `[D, C]` and bias `[C]` of coefficients `[K, D]` for the classes `present`."""
    kernel = np.zeros((coefficients.shape[1], classes), np.float32)
    bias = np.full(classes, ABSENT, np.float32)
    kernel[:, present], bias[present] = coefficients.T, intercept
    return {"kernel": kernel, "bias": bias}


def _dense(features: Any, arrays: Arrays, name: str = "logits") -> Any:
    """A stock layer of given weights, which every compression knows."""
    layer = keras.layers.Dense(arrays["kernel"].shape[1], trainable=False, name=name)
    result = layer(features)
    layer.set_weights([arrays["kernel"], arrays["bias"]])
    return result


# ---- neighbours ----------------------------------------------------------------------------------------------


class Neighbours(Estimator):
    """k nearest neighbours in Euclidean distance, each with one vote.

    ``|x - p|² = |x|² - 2 (x·p - |p|²/2)``: the nearest training rows are the greatest entries of a matrix product.
    """

    class Config(Settings):
        """Settings of the nearest neighbours."""

        neighbours: int = pydantic.Field(15, ge=1, le=1000)
        """k; at most the number of training rows."""
        floor: float = pydantic.Field(1e-3, gt=0, lt=0.5)
        """The least probability of a class: no votes are no proof."""

    def new(self, labels: np.ndarray, seed: int) -> Any:
        return neighbors.KNeighborsClassifier(min(self.config.neighbours, len(labels)), algorithm="brute")

    def arrays(self, fitted: Any, classes: int) -> Arrays:
        # The training rows, for which scikit-learn has no public name.
        points, labels = fitted._fit_X, fitted.classes_[fitted._y]
        return {
            "kernel": np.ascontiguousarray(points.T),
            "bias": (-0.5 * np.square(points.astype(np.float64)).sum(axis=1)).astype(np.float32),
            "votes": np.eye(classes, dtype=np.float32)[labels],
        }

    def logits(self, features: Any, arrays: Arrays) -> Any:
        count, classes = arrays["votes"].shape
        layer = Votes(min(self.config.neighbours, count), count, classes, self.config.floor, name="logits")
        result = layer(_dense(features, arrays, "nearness"))
        layer.set_weights([arrays["votes"]])
        return result


@keras.utils.register_keras_serializable("fusion")
class Votes(keras.layers.Layer):
    """The logarithm of the shares of votes among the k nearest: nearness `[B, M]` -> `[B, C]`."""

    def __init__(self, neighbours: int, rows: int, classes: int, floor: float, **kwargs: Any) -> None:
        super().__init__(dtype="float32", trainable=False, **kwargs)
        self.arguments = {"neighbours": neighbours, "rows": rows, "classes": classes, "floor": floor}
        self.votes = self.add_weight(name="votes", shape=(rows, classes), initializer="zeros", trainable=False)

    def call(self, nearness: Any) -> Any:
        nearest = tf.math.top_k(nearness, self.arguments["neighbours"], sorted=False).indices
        return _floored_log(tf.reduce_mean(tf.gather(self.votes, nearest), axis=1), self.arguments["floor"])

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, **self.arguments}


def _floored_log(shares: Any, floor: float) -> Any:
    return tf.math.log(tf.maximum(shares, floor))


# ---- trees ---------------------------------------------------------------------------------------------------


class RandomForest(Estimator):
    """A random forest: the mean of the class shares in the leaves of trees on resampled rows."""

    random = True

    class Config(Settings):
        """Settings of the forest."""

        trees: int = pydantic.Field(200, ge=1, le=5000)
        """How many trees."""
        max_leaves: int = pydantic.Field(512, ge=2, le=65_536)
        """Leaves of a tree; each holds a number a class, which is what bounds the size of the artifact."""
        min_samples_leaf: int = pydantic.Field(1, ge=1)
        """Training rows in a leaf."""
        floor: float = pydantic.Field(1e-3, gt=0, lt=0.5)
        """The least probability of a class: a class in none of the leaves is not impossible."""

    def new(self, labels: np.ndarray, seed: int) -> Any:
        return ensemble.RandomForestClassifier(
            self.config.trees,
            max_leaf_nodes=self.config.max_leaves,
            min_samples_leaf=self.config.min_samples_leaf,
            random_state=seed,
        )

    def arrays(self, fitted: Any, classes: int) -> Arrays:
        return placed(trees_of_forest(fitted), fitted.classes_, classes).state()

    def logits(self, features: Any, arrays: Arrays) -> Any:
        return _sum_of_trees(features, arrays, self.config.floor)


class GradientBoosting(Estimator):
    """Gradient boosting over histograms: one small tree a class and turn, each fitted to what is still wrong."""

    class Config(Settings):
        """Settings of the boosting."""

        turns: int = pydantic.Field(100, ge=1, le=5000)
        """How many trees a class."""
        learning_rate: float = pydantic.Field(0.1, gt=0, le=1)
        """What a tree counts."""
        max_leaves: int = pydantic.Field(15, ge=2, le=1024)
        """Leaves of a tree."""
        max_depth: int = pydantic.Field(6, ge=1, le=20)
        """Splits on the way to a leaf; each is a step of the graph."""
        min_samples_leaf: int = pydantic.Field(10, ge=1)
        """Training rows in a leaf."""
        l2: float = pydantic.Field(1.0, ge=0, allow_inf_nan=False)
        """Pull of the leaves to zero."""

    def new(self, labels: np.ndarray, seed: int) -> Any:
        return ensemble.HistGradientBoostingClassifier(
            max_iter=self.config.turns,
            learning_rate=self.config.learning_rate,
            max_leaf_nodes=self.config.max_leaves,
            max_depth=self.config.max_depth,
            min_samples_leaf=self.config.min_samples_leaf,
            l2_regularization=self.config.l2,
            early_stopping=False,  # it would hold out rows that nobody sees
            random_state=seed,
        )

    def arrays(self, fitted: Any, classes: int) -> Arrays:
        # Of two classes the trees speak about the second alone, against 0.
        columns = fitted.classes_[1:] if len(fitted.classes_) == 2 else fitted.classes_
        trees = placed(trees_of_boosting(fitted), columns, classes, ABSENT)
        trees.bias[np.setdiff1d(fitted.classes_, columns)] = 0.0
        return trees.state()

    def logits(self, features: Any, arrays: Arrays) -> Any:
        return _sum_of_trees(features, arrays)


def _sum_of_trees(features: Any, arrays: Arrays, floor: float = 0.0) -> Any:
    trees = Trees.of_state(arrays)
    layer = SumOfTrees(trees.roots.tolist(), int(trees.depth), trees.value.shape, len(trees.bias), floor, name="logits")
    result = layer(features)
    layer.set_weights([getattr(trees, name) for name in SumOfTrees.WEIGHTS])
    return result


@keras.utils.register_keras_serializable("fusion")
class SumOfTrees(keras.layers.Layer):
    """`fusion.trees.evaluate` over arrays that are weights of the layer; with a floor, the logarithm of the sum."""

    WEIGHTS: ClassVar[tuple[str, ...]] = ("feature", "threshold", "child", "value", "bias")

    def __init__(
        self, roots: list[int], depth: int, shape: tuple[int, int], outputs: int, floor: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(dtype="float32", trainable=False, **kwargs)
        self.arguments = {"roots": roots, "depth": depth, "shape": shape, "outputs": outputs, "floor": floor}
        self.floor = floor
        integer, real = (np.broadcast_to(np.zeros((), kind), shape[0]) for kind in (np.int32, np.float32))
        value, bias = np.broadcast_to(np.float32(0), shape), np.zeros(outputs, np.float32)
        self.trees = Trees(integer, real, integer, value, np.array(roots, np.int32), bias, np.array(depth, np.int32))
        self.numbers = {
            name: self.add_weight(name, array.shape, array.dtype, "zeros", trainable=False)
            for name, array in ((name, getattr(self.trees, name)) for name in self.WEIGHTS)
        }

    def call(self, features: Any) -> Any:
        total = evaluate(features, self.trees, self.numbers)
        return _floored_log(total, self.floor) if self.floor else total

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, **self.arguments}
