"""Exact top-k: the two-stage selection against TensorFlow's own, and block-wise scoring against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fusion.compat import tf
from recsys.retrieval import GROUP, exclude, score_blocks, top_k


@tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32)])
def dynamic_top_5(scores):
    return top_k(scores, 5, group=4)


@tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([], tf.int32)])
def asked_top(scores, k):
    return top_k(scores, k, group=4)


def scores_with_ties(rows: int, items: int, levels: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, (rows, items)).astype(np.float32)
    scores[random.random((rows, items)) < 0.2] = -np.inf
    return scores


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(5, 200), st.integers(1, 6), st.integers(0, 10**6))
def test_equals_tensorflow_including_ties(rows, items, levels, seed):
    scores = scores_with_ties(rows, items, levels, seed)
    expected = tf.math.top_k(scores, 5)
    for values, numbers in (dynamic_top_5(scores), top_k(tf.constant(scores), 5, group=4), asked_top(scores, 5)):
        np.testing.assert_array_equal(values, expected.values)
        np.testing.assert_array_equal(numbers, expected.indices)


@pytest.mark.parametrize("items", [2561, 2560 + GROUP, 3000])
def test_equals_tensorflow_with_the_default_group(items):
    """O1: the selection that is exported gives what a plain sort gives, at sizes around the change-over."""
    scores = scores_with_ties(7, items, 50, items)
    values, numbers = top_k(scores, 20)
    expected = tf.math.top_k(scores, 20)
    np.testing.assert_array_equal(values, expected.values)
    np.testing.assert_array_equal(numbers, expected.indices)


def test_padding_columns_never_win():
    values, numbers = top_k(tf.fill([2, 2561], -np.inf), 20)
    assert np.isneginf(values).all() and (numbers.numpy() < 2561).all()
    scores = np.full((1, 2561), -5.0, np.float32)
    values, numbers = top_k(scores, 20)
    np.testing.assert_array_equal(numbers[0], np.arange(20))


def test_fewer_items_than_k_fills_up_with_minus_infinity():
    values, numbers = dynamic_top_5(np.array([[1.0, 3.0, 2.0]], np.float32))
    np.testing.assert_array_equal(values, [[3, 2, 1, -np.inf, -np.inf]])
    np.testing.assert_array_equal(numbers, [[1, 2, 0, 0, 0]])
    assert numbers.dtype == tf.int32


def test_batch_equals_single_rows():
    scores = scores_with_ties(6, 100, 5, 0)
    together = dynamic_top_5(scores)
    for row in range(6):
        np.testing.assert_array_equal(together[1][row], dynamic_top_5(scores[row : row + 1])[1][0])


def test_exclude_writes_only_its_pairs():
    scores = exclude(tf.zeros([2, 3]), tf.constant([[0, 2], [1, 0]]))
    np.testing.assert_array_equal(scores, [[0, 0, -np.inf], [-np.inf, 0, 0]])
    np.testing.assert_array_equal(exclude(tf.zeros([1, 2]), tf.zeros([0, 2], tf.int32)), [[0, 0]])


@pytest.mark.parametrize("items", [30, 3001])
def test_score_blocks_equals_numpy(items):
    random = np.random.default_rng(items)
    # Small whole numbers: float32 products are exact and ties are common.
    users, table = random.integers(-2, 3, (23, 8)).astype(np.float32), random.integers(-2, 3, (items, 8))
    seen = sparse.random(23, items, 0.1, "csr", random_state=1)
    values, numbers = score_blocks(users, table.astype(np.float32), seen, k=20, block=10)
    expected = users @ table.T.astype(np.float32)
    expected[seen.nonzero()] = -np.inf
    order = np.argsort(-expected, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(values, np.take_along_axis(expected, order, 1))
    np.testing.assert_array_equal(numbers, order)
    assert not seen[np.arange(23)[:, None], numbers].toarray().any()


def test_score_blocks_with_everything_seen_gives_no_item():
    seen = sparse.csr_matrix(np.ones((2, 4)))
    values, _ = score_blocks(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), seen, k=6)
    assert np.isneginf(values).all() and values.shape == (2, 6)
