"""Scores every training row by a model that did not see it, which is all that a stacker may learn from.

A member's scores on rows that it was fitted on are better than they will ever be again; a stacker that learns
from them trusts the member that memorises best (Wolpert 1992, Stacked Generalization).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusion.errors import ConfigError
from fusion.progress import progress

TrainAndScore = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(fold, rows to train on int64 [M], rows to score int64 [H]) -> scores [H, C]."""


def out_of_fold(n: int, folds: int, seed: int, strata: np.ndarray | None = None) -> np.ndarray:
    """Deals n rows into folds -> fold number of each row, int32 [n].

    Sizes of folds differ by at most one, and so do the counts of a stratum (such as a class) in each fold.

    Args:
        n: number of rows.
        folds: number of folds, 2 <= folds <= n.
        seed: decides which row goes where.
        strata: a value per row [n]; None treats all rows alike.
    """
    if not 2 <= folds <= n:
        raise ConfigError(f"folds must be from 2 to the number of rows, {n}; received {folds}.")
    shuffled = np.random.default_rng(seed).permutation(n)
    if strata is not None:
        # Rows of a stratum side by side, in random order; dealt like cards, they spread evenly.
        shuffled = shuffled[np.argsort(np.asarray(strata)[shuffled], kind="stable")]
    fold_of = np.empty(n, np.int32)
    fold_of[shuffled] = np.arange(n) % folds
    return fold_of


def out_of_fold_logits(
    train_and_score: TrainAndScore, fold_of: np.ndarray, description: str = "out of fold", quiet: bool = False
) -> np.ndarray:
    """Trains once per fold without the fold and scores the fold -> float32 [n, C].

    Args:
        train_and_score: fits a new model on some rows and scores others. It must start from nothing each time;
            a model that goes on from the fold before has seen the rows it is asked about.
        fold_of: fold number of each row [n], as from `out_of_fold`.
        description: what progress calls it.
        quiet: no progress.
    """
    scores: np.ndarray | None = None
    folds = np.unique(fold_of)
    with progress(description, total=len(folds), unit="folds", quiet=quiet) as bar:
        for fold in folds:
            held = np.flatnonzero(fold_of == fold)
            answer = np.asarray(train_and_score(int(fold), np.flatnonzero(fold_of != fold), held), np.float32)
            if answer.ndim != 2 or len(answer) != len(held):
                raise ValueError(f"a fold's scores must be [{len(held)}, C]; received {list(answer.shape)}.")
            if scores is None:
                scores = np.empty((len(fold_of), answer.shape[1]), np.float32)
            scores[held] = answer
            bar.advance(1)
    assert scores is not None  # there are at least two folds
    return scores
