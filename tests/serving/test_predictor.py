"""The predictor over a toy artifact: answers, refusals of bad requests, and refusal of a damaged artifact."""

import shutil

import numpy as np
import pytest

from fusion.export.manifest import TensorSpec
from serving import errors
from serving.inputs import check_inputs, pad_strings, recommend_inputs, text_row
from serving.limits import Limits
from serving.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(artifact):
    return Predictor.load(artifact)


def valid_request(**changes):
    request = {
        "user_id": np.array(["u1"]),
        "history": np.array([["i3", ""]]),
        "k": np.array([2], np.int32),
        "exclude": np.array([[""]]),
        "include": np.array([[""]]),
    }
    return {**request, **changes}


def test_recommends_for_users_and_for_histories(predictor):
    """O4 A7: answers by user id and by history, with contributions that sum to the score."""
    answer = predictor.recommend(user_ids=["u1", "", "nobody"], histories=[[], ["i4"], []], k=3)
    assert answer["item_ids"].tolist() == [[b"i2", b"i0", b"i3"], ["ä ö".encode(), b"i0", b"i1"], [b"i0", b"i1", b"i2"]]
    assert answer["known_user"].tolist() == [True, False, False]
    assert answer["contributions"].shape == (3, 2, 3)
    np.testing.assert_allclose(answer["contributions"].sum(1), answer["scores"])


def test_exclude_include_and_too_few_items(predictor):
    answer = predictor.recommend(histories=[[], []], k=4, exclude=[["i0", "i1"], []], include=[[], ["i5", "i2"]])
    assert answer["item_ids"].tolist() == [[b"i2", b"i3", b"i4", "ä ö".encode()], [b"i2", b"", b"", b""]]
    assert np.isneginf(answer["scores"][1, 1:]).all()


def test_batch_equals_single_rows(predictor):
    histories = [["i0"], ["i1", "i2", "i3"], []]
    together = predictor.recommend(histories=histories, k=3)
    for row, history in enumerate(histories):
        alone = predictor.recommend(histories=[history], k=3)
        for name, value in alone.items():
            np.testing.assert_array_equal(value[0], together[name][row])


def test_serving_default_takes_candidates(predictor):
    answer = predictor.predict("serving_default", {"history": [["i0"]], "candidates": [["i1", "i0", "unknown"]]})
    np.testing.assert_array_equal(answer["scores"], [[9.0, 0.0, -np.inf]])


def test_padding_of_a_list_stops_at_its_limit():
    """R8: or a list within the limit would be refused for what was added to it."""
    assert [text_row([b"a"] * n, 10).shape[1] for n in (0, 1, 3, 5, 9, 10)] == [1, 1, 4, 8, 10, 10]
    assert text_row([b"x", b"y", b"z"], 10).tolist() == [[b"x", b"y", b"z", b""]]


def test_text_may_be_bytes_str_or_lists_and_numbers_of_any_width(predictor):
    expected = predictor.predict("recommend", valid_request())["item_ids"].tolist()
    for changes in (
        {"user_id": ["u1"]},
        {"user_id": np.array([b"u1"])},
        {"user_id": np.array(["u1"], object)},
        {"k": [2]},
        {"k": np.array([2], np.uint8)},
    ):
        assert predictor.predict("recommend", valid_request(**changes))["item_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"user": np.array(["u1"])}, errors.InvalidRequest, "unknown ['user']"),
        ({"k": np.array([2.0])}, errors.InvalidRequest, "'k' must be int32; received float64"),
        ({"k": np.array([2**40])}, errors.InvalidRequest, "'k' must fit int32"),
        ({"k": np.array([0])}, errors.LimitExceeded, "'k' must be between 1 and 4; received 0 to 0"),
        ({"k": np.array([5])}, errors.LimitExceeded, "'k' must be between 1 and 4"),
        ({"k": np.array([[2]])}, errors.InvalidRequest, "'k' must have the shape [any]"),
        ({"k": np.array([2, 2])}, errors.InvalidRequest, "same number of rows"),
        ({"user_id": np.array([1])}, errors.InvalidRequest, "'user_id' must hold text; received a int"),
        ({"user_id": np.array(["\ud800"])}, errors.InvalidRequest, "'user_id' must hold valid Unicode"),
        ({"user_id": np.array(["ä" * 513])}, errors.LimitExceeded, "at most 1024 bytes"),
        ({"user_id": np.array([], object)}, errors.InvalidRequest, "at least one row"),
        ({"history": [["a"], ["b", "c"]]}, errors.InvalidRequest, "'history' must"),
        ({"history": np.array([["a"] * 4097])}, errors.LimitExceeded, "'history' must have at most 4096"),
        ({"exclude": np.array([["a"] * 10_001])}, errors.LimitExceeded, "'exclude' must have at most 10000"),
        ({"user_id": np.array(["a"] * 4097)}, errors.LimitExceeded, "at most 4096 rows"),
    ],
)
def test_bad_requests_are_refused_by_name(predictor, changes, error, sentence):
    with pytest.raises(error) as caught:
        predictor.predict("recommend", valid_request(**changes))
    assert type(caught.value) is error and sentence in str(caught.value)


def test_missing_inputs_unknown_signatures_and_faults_of_the_graph(predictor):
    request = valid_request()
    del request["history"]
    with pytest.raises(errors.InvalidRequest, match=r"missing \['history'\]"):
        predictor.predict("recommend", request)
    with pytest.raises(errors.UnknownSignature, match="fail, recommend, serving_default; received 'train'"):
        predictor.predict("train", {})
    with pytest.raises(errors.InvalidRequest, match="cannot answer these inputs"):
        predictor.predict("fail", {"x": [-1]})
    with pytest.raises(errors.InvalidRequest, match="needs user ids or histories"):
        predictor.recommend()
    with pytest.raises(errors.InvalidRequest, match="one entry per user"):
        predictor.recommend(user_ids=["u1"], histories=[[], []])


def test_total_size_is_limited(artifact):
    small = Predictor.load(artifact, Limits(total_bytes=100))
    with pytest.raises(errors.LimitExceeded, match="at most 100 bytes"):
        small.recommend(user_ids=["u1"] * 20, k=1)
    with pytest.raises(ValueError, match="'rows' must be above 0"):
        Limits(rows=0)


def test_a_damaged_artifact_is_refused(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "1")
    with open(tmp_path / "1" / "saved_model.pb", "ab") as handle:
        handle.write(b"\0")
    for folder in (tmp_path / "1", tmp_path / "missing"):
        with pytest.raises(errors.ArtifactRefused, match=r"is refused"):
            Predictor.load(folder)


def test_padding_reaches_the_next_power_of_two():
    assert [pad_strings([["a"] * n], 99).shape[1] for n in (0, 1, 2, 3, 4, 5, 9)] == [1, 1, 2, 4, 4, 8, 16]
    assert pad_strings([["ä"], []], 99).tolist() == [["ä".encode()], [b""]]


def test_lists_within_their_limits_are_not_padded_beyond_them():
    limits = Limits(history=10, exclude=6, include=3)
    asked = recommend_inputs(["u"], [["a"] * 9], 5, [["b"] * 5], [["c"] * 4], limits)
    assert [asked[name].shape[1] for name in ("history", "exclude", "include")] == [10, 6, 4]


def test_every_error_has_a_grpc_code_and_an_http_status():
    import grpc

    tree = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert errors.ServingError in tree and len(tree) >= 18
    for error in tree:
        assert error.grpc_code in grpc.StatusCode.__members__ and 400 <= error.http_status < 600
        assert f"{error.__name__} " in errors.__doc__ and f"{error.grpc_code} " in errors.__doc__


def test_numbers_beyond_the_type_are_refused():
    """R8: not answered as infinity."""
    specs = {"x": TensorSpec("float32", (None,))}
    with pytest.raises(errors.InvalidRequest, match="'x' must fit float32; received 1e"):
        check_inputs(specs, {"x": np.array([1.0, -1e300])}, Limits())
