"""What an artifact tells of its items: attributes to filter by, vectors to spread lists by."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import sparse

from fusion.errors import ConfigError
from recsys.collaborative.content import Contents
from recsys.item_tables import attributes, check_attributes, item_vectors, write_item_tables
from recsys.settings import ExportSettings

CATALOGUE = pd.DataFrame({
    "title": ["One|Two", "Three", "Four"],
    "genres": ["Comedy|Drama", "", "War | Comedy"],
    "language": ["de", "fr", ""],
    "year": ["1995", "1995", "2001"],
    "plot": ["short", "long " * 100, ""],
    "nothing": ["", "", ""],
    "image": ["a.jpg", "", "b.jpg"],
})  # fmt: skip


def read_by(name: str, table: np.ndarray) -> Contents:
    """The table of an encoder of that name, its rows scaled to unit length."""
    known = table.any(axis=1)
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return Contents(SimpleNamespace(fingerprint=lambda: name), (name,), unit.astype(np.float32), known)


class TestAttributes:
    def test_short_columns_to_filter_by(self):
        """Not what people read (title, long texts), nor paths, nor columns without a value."""
        found = attributes(CATALOGUE, None)
        assert list(found) == ["genres", "language", "year"]
        assert found["genres"].tolist() == [["Comedy", "Drama"], None, ["War", "Comedy"]]
        assert found["language"].tolist() == ["de", "fr", None]

    def test_those_that_are_asked_for(self):
        """`export.attributes`, in that order, long ones too; none at all is possible."""
        assert list(attributes(CATALOGUE, ("plot", "year"))) == ["plot", "year"]
        assert attributes(CATALOGUE, ()).shape == (3, 0)

    @pytest.mark.parametrize("name", ["genre", "image", "title"])
    def test_what_is_no_attribute_is_refused(self, name):
        with pytest.raises(ConfigError, match=f"export.attributes must name columns .* received '{name}'"):
            check_attributes((name,), CATALOGUE)
        check_attributes(None, CATALOGUE)
        check_attributes(ExportSettings(attributes=("genres",)).attributes, CATALOGUE)


class TestVectors:
    def test_cosines_come_near_to_those_of_the_contents(self):
        """Of two contents side by side; an item without any has zeros."""
        random = np.random.default_rng(0)
        factors = random.normal(size=(300, 20))
        factors[7] = 0
        contents = {
            name: read_by(name, factors @ random.normal(size=(20, width))) for name, width in (("a", 90), ("b", 40))
        }
        vectors, made_of, projections = item_vectors(contents, sparse.csr_matrix((1, 300)))
        assert vectors.shape == (300, 64) and vectors.dtype == np.float16 and made_of == "a, b"
        assert not vectors[7].any()
        lengths = np.linalg.norm(vectors.astype(float), axis=1)
        np.testing.assert_allclose(np.delete(lengths, 7), 1.0, atol=2e-3)
        both = np.hstack([content.table for content in contents.values()]) / np.sqrt(2)
        np.testing.assert_allclose(vectors.astype(float) @ vectors.astype(float).T, both @ both.T, atol=0.01)
        np.testing.assert_array_equal(item_vectors(contents, sparse.csr_matrix((1, 300)))[0], vectors)
        assert [(name, part.shape) for name, part in projections.items()] == [("a", (90, 64)), ("b", (40, 64))]
        again = sum(content.table @ projections[name] for name, content in contents.items())
        lengths = np.maximum(np.linalg.norm(again, axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(again / lengths, vectors, atol=2e-3, err_msg="what new items are given")

    def test_contents_that_are_read_alike_count_once(self):
        table = np.eye(5)[[0, 1, 2, 3, 0]]
        one, two = ({name: read_by("same", table) for name in names} for names in (("a",), ("a", "b")))
        np.testing.assert_array_equal(*(item_vectors(c, sparse.csr_matrix((1, 5)))[0] for c in (one, two)))

    def test_without_content_by_who_took_what(self):
        """Items 0 and 1 have the same audience, item 2 another, item 3 none."""
        taken = sparse.csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], np.float32))
        vectors, made_of, projections = item_vectors({}, taken)
        assert not projections
        cosines = vectors.astype(float) @ vectors.astype(float).T
        assert made_of == "who took what"
        np.testing.assert_allclose(cosines[:3, :3], [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=2e-3)
        assert not vectors[3].any()


def test_the_files_and_what_the_manifest_says(tmp_path):
    """Rows in the order of numbers; cells with several values are lists in the file."""
    data = SimpleNamespace(catalogue=CATALOGUE, item_ids=np.array(["x", "y", "z"], object))
    said = write_item_tables(tmp_path, data, ExportSettings(), {}, sparse.csr_matrix(np.eye(3, dtype=np.float32)))
    table = pq.read_table(tmp_path / "items.parquet")
    assert table.column_names == ["item_id", "title", "genres", "language", "year"]
    assert table.column("item_id").to_pylist() == ["x", "y", "z"]
    assert table.column("genres").to_pylist() == [["Comedy", "Drama"], None, ["War", "Comedy"]]
    assert said["attributes"] == {"genres": "list", "language": "text", "year": "text"}
    assert np.load(tmp_path / said["vectors"]["file"], allow_pickle=False).shape == tuple(said["vectors"]["shape"])
    assert "projections" not in said["vectors"]


def test_what_makes_vectors_of_new_items(tmp_path):
    """Where some may join, and vectors are made of contents."""
    data = SimpleNamespace(catalogue=CATALOGUE, item_ids=np.array(["x", "y", "z"], object))
    contents = {"plot": read_by("plot", np.eye(3)[:, :2])}
    said = write_item_tables(tmp_path, data, ExportSettings(spare_items=1), contents, sparse.csr_matrix((1, 3)))
    with np.load(tmp_path / said["vectors"]["projections"], allow_pickle=False) as projections:
        assert projections["plot"].shape == (2, 2)
    said = write_item_tables(tmp_path, data, ExportSettings(), contents, sparse.csr_matrix((1, 3)))
    assert "projections" not in said["vectors"]


def test_pictures_of_items(tmp_path):
    """A7: small files that the table names; a picture that is missing or broken is none."""
    Image.new("RGB", (40, 80), (200, 30, 30)).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(b"not a picture")
    images = [str(tmp_path / "one.png"), str(tmp_path / "two.png"), ""]
    data = SimpleNamespace(catalogue=CATALOGUE.assign(image=images), item_ids=np.array(["x", "y", "z"], object))
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_item_tables(folder, data, ExportSettings(pictures=20), {}, sparse.csr_matrix(np.eye(3, dtype=np.float32)))
    assert pq.read_table(folder / "items.parquet").column("image").to_pylist() == ["pictures/0000000.jpg", None, None]
    assert [path.name for path in (folder / "pictures").iterdir()] == ["0000000.jpg"]
    with Image.open(folder / "pictures/0000000.jpg") as picture:
        assert picture.size == (10, 20)
