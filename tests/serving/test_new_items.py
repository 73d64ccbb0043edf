"""New items by an administrator's call: in a journal, and in every process and every later version (O6, O11)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import serving.items_journal
import serving.new_items
from fusion.errors import DataError
from fusion.export.manifest import verify_manifest, write_manifest
from loopback import Door, listening
from new_item_shops import K_MAX, NEW, Shop, raw, two_shops
from recsys.examples import ItemReader
from serving.batching import BatchSettings
from serving.errors import (
    ArtifactRefused,
    ConfigurationRefused,
    Forbidden,
    InvalidRequest,
    ItemExists,
    LimitExceeded,
    NotPossible,
    NotWritable,
    Overloaded,
    ServingError,
    UnknownItem,
    UnknownModel,
)
from serving.feedback import append_whole
from serving.items_journal import ADD, FILE, LOCK, RESTORE, WITHDRAW, Entry, ItemsJournal
from serving.limits import Limits
from serving.messages import RecommendRequest
from serving.model_store import ModelConfig, ModelStore
from serving.new_items import CALLS, LARGEST_IMAGE, LONGEST_TEXT, MOST, MOST_IDS, NewItems
from serving.predictor import Predictor
from serving.recommending import Recommending
from serving.rest_guard import RestSettings, uvicorn_config
from serving.rest_server import admin_app, app
from serving.security import Tokens
from serving.settings import ServerSettings
from serving.worker import Worker

ROOT = Path(__file__).parents[2]
SPARE = 4
KEY = "s3cret"
CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class World:
    """The shops, and artifacts of them: without the last items, and with all of them."""

    whole: Shop
    lacking: Shop
    artifact: Path
    later: Path

    @property
    def items(self) -> list[dict[str, Any]]:
        """The last items as they are brought."""
        return [raw(self.whole, row) for row in range(self.whole.items - NEW, self.whole.items)]

    @property
    def old(self) -> str:
        return str(self.whole.item_ids[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("new_items")
    whole, lacking = two_shops(folder)
    return World(whole, lacking, lacking.write(folder / "lacking", SPARE), whole.write(folder / "whole"))


@dataclass(frozen=True)
class Server:
    """One process of a server, but for its doors."""

    store: ModelStore
    recommending: Recommending
    new: NewItems

    def ids(self, k: int = K_MAX, **request: Any) -> list[str]:
        return [item.item_id for item in self.recommending.recommend(RecommendRequest(k=k, **request)).items]

    @property
    def known(self) -> list[str]:
        """The ids of the newest version."""
        with self.store.lease() as servable:
            return self.recommending.catalogue(servable).item_ids


@contextmanager
def server(
    models: Path, journal: Path, limits: Limits | None = None, batching: BatchSettings | None = None
) -> Iterator[Server]:
    prepare: Any = lambda servable: new.prepare(servable)  # noqa: E731
    store = ModelStore([ModelConfig("films", models)], limits, batching, prepare=prepare)
    recommending = Recommending(store, timeout_ms=60_000)
    new = NewItems(store, recommending, ItemsJournal(journal), ItemReader)
    try:
        store.poll()
        yield Server(store, recommending, new)
    finally:
        new.close()
        store.close()


@pytest.fixture
def models(world: World, tmp_path: Path) -> Path:
    """A folder with one version."""
    shutil.copytree(world.artifact, tmp_path / "films" / "1")
    return tmp_path / "films"


@pytest.fixture(scope="module")
def shared(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for calls that change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(world.artifact, folder / "films" / "1")
    with server(folder / "films", folder / "journal") as found:
        yield found


def test_added_by_the_door_and_answered_as_if_there_from_the_start(world: World, models: Path, tmp_path: Path) -> None:
    """O6, O11: recommended, filtered, likened, shown; with the scores of an artifact that has them as cold items."""
    (tmp_path / "tokens").write_text(f"ops {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    bounds, key = RestSettings(seconds=60.0), {"authorization": f"Bearer {KEY}"}
    with server(models, tmp_path / "journal") as found:
        admin = admin_app(found.store, Tokens(tmp_path / "tokens"), bounds, found.new)
        with listening(uvicorn_config(admin, bounds)) as door:
            assert door.post("/v1/admin/items", {"items": world.items}).status == 401
            answer = door.post("/v1/admin/items", {"model": "films", "items": world.items}, **key)
            assert answer.status == 200, answer.content
            assert answer.json["spare_items_left"] == {"1": SPARE - NEW}
            new = [item["item_id"] for item in world.items]
            assert answer.json["added"] == [{"item_id": item, "read_by": ["image", "text"]} for item in new]
            again = door.post("/v1/admin/items", {"items": world.items[:1]}, **key)
            assert again.status == 409 and again.json == {"error": f"the item '{new[0]}' is there already."}
            unknown = door.post("/v1/admin/items", {"items": [{**world.items[0], "txt": "x"}]}, **key)
            assert unknown.status == 400 and "did you mean 'text'" in unknown.json["error"]

        whole = Predictor.load(world.later)
        expected = whole.recommend(histories=[[new[1], world.old]], k=K_MAX)
        answer = found.recommending.recommend(RecommendRequest(history=(new[1], world.old), k=K_MAX))
        assert [item.item_id for item in answer.items] == [item.decode() for item in expected["item_ids"][0]]
        np.testing.assert_allclose([item.score for item in answer.items], expected["scores"][0], atol=1e-5)
        assert not answer.unknown_user

        with listening(uvicorn_config(app(found.store, found.recommending, bounds), bounds)) as door:
            found_by = door.post("/v1/recommend", {"history": [world.old], "filters": {"genres": ["new"]}, "k": 9}).json
            assert {item["item_id"] for item in found_by["items"]} == set(new)
            assert all(item["title"].startswith("Item ") for item in found_by["items"])
            shown = door.get(f"/v1/items?id={new[0]}").json["items"]
            told = {"title": world.items[0]["title"], "genres": ["new"], "year": 2026, "image": "added"}
            assert shown == [{"item_id": new[0], **told}]
            searched = door.get(f"/v1/items?search={world.items[2]['title'].replace(' ', '%20')}").json["items"]
            assert [item["item_id"] for item in searched] == [new[2]]
            assert "new" in door.get("/v1/catalogue").json["filters"]["genres"]
            picture = door.get(f"/v1/items/{new[0]}/image")
            assert picture.headers["content-type"] == "image/jpeg"
            assert picture.headers["x-content-type-options"] == "nosniff"
            with Image.open(io.BytesIO(picture.content)) as image:
                assert image.size == (16, 16)
            likened = door.post("/v1/similar", {"item_id": new[0], "k": 5}).json
            assert len(likened["items"]) == 5 and set(likened["members_used"]) == {"text", "image"}
            forbidden = door.post(
                "/v1/models/films:predict", {"signature_name": "add_items", "inputs": embedded(found)}
            )
            assert forbidden.status == 403 and "administrators" in forbidden.json["error"]


def test_answers_that_are_kept_know_of_changes(world: World, models: Path, tmp_path: Path) -> None:
    """O6: whoever asks again after an item came or went gets the new list."""
    with server(models, tmp_path / "journal", batching=BatchSettings(keep=100)) as found:
        before = found.ids()
        assert found.ids() == before
        found.new.withdraw("films", before[:1])
        assert found.ids() == found.ids() and before[0] not in found.ids()
        found.new.restore("films", before[:1])
        assert found.ids() == before
        asked = RecommendRequest(history=(world.old,), k=K_MAX, filters={"genres": ("new",)})
        assert not found.recommending.recommend(asked).items
        found.new.add("films", world.items)
        assert len(found.recommending.recommend(asked).items) == NEW


def embedded(found: Server) -> dict[str, Any]:
    """Inputs of `add_items`."""
    with found.store.lease() as servable:
        specs = servable.predictor.manifest.signatures["add_items"].inputs
    given: dict[str, Any] = {n: [[0.5] * (s.shape[1] or 0)] for n, s in specs.items() if n != "item_id"}
    return {**given, "item_id": ["stranger"]}


@pytest.mark.parametrize(
    "items, error, message",
    [
        ([7], InvalidRequest, "items.0 must be an object with an 'item_id'"),
        ([{"text": "word"}], InvalidRequest, "items.0 must be an object with an 'item_id'"),
        ([{"item_id": ""}], InvalidRequest, "items.0.item_id must have 1 to 256 characters"),
        ([{"item_id": "a\x00"}], InvalidRequest, "control character"),
        ([{"item_id": "\ud800"}], InvalidRequest, "items.0.item_id"),
        ([{"item_id": "a", "txt": "x"}], InvalidRequest, "no such column; received 'txt'; did you mean 'text'"),
        ([{"item_id": "a", "text": {"b": 1}}], InvalidRequest, "items.0.text must be text, a number"),
        ([{"item_id": "a", "year": math.inf}], InvalidRequest, "items.0.year must be a finite number"),
        (
            [{"item_id": "a", "text": "x", "genres": "new"}],
            InvalidRequest,
            "'genres' must be of the column's type, list",
        ),
        ([{"item_id": "a", "text": "x", "year": "soon"}], InvalidRequest, "'year' must be of the column's type, int64"),
        ([{"item_id": "a", "text": "x" * (LONGEST_TEXT + 1)}], LimitExceeded, "items.0.text must have at most 100000"),
        (
            [{"item_id": "a", "image": "A" * (LARGEST_IMAGE * 4 // 3 + 5)}],
            LimitExceeded,
            "items.0.image must have at most",
        ),
        ([{"item_id": "a", "image": "!!"}], InvalidRequest, "the image of 'a' must be in base64"),
        ([{"item_id": "a", "image": 5}], InvalidRequest, "items.0.image must be an image in base64"),
        ([{"item_id": "a", "image": base64.b64encode(b"GIF89a").decode()}], InvalidRequest, "not a JPEG, PNG, WEBP"),
        (
            [{"item_id": "a", "title": "No word"}],
            InvalidRequest,
            "must bring what an encoder reads, one of image, text",
        ),
        ([{"item_id": "i00", "text": "x"}], ItemExists, "'i00' is there already"),
        ([{"item_id": "a", "text": "x"}, {"item_id": "a", "text": "y"}], ItemExists, "'a' stands twice"),
        ([{"item_id": str(n), "text": "x"} for n in range(MOST + 1)], LimitExceeded, f"at most {MOST} items"),
        ([{"item_id": str(n), "text": "x"} for n in range(SPARE + 1)], NotPossible, "4 spare rows left, for 5 items"),
    ],
)
def test_what_is_refused(shared: Server, items: list[Any], error: type[ServingError], message: str) -> None:
    """One sentence each; nothing is kept and nothing is added. The last one names `export.spare_items`."""
    with pytest.raises(error, match=message) as refused:
        shared.new.add("films", items)
    assert type(refused.value) is error and len(str(refused.value)) < 300
    assert shared.new._journal.size == 0 and len(shared.known) == 40 - NEW
    assert error is not NotPossible or "export.spare_items" in str(refused.value)


def test_a_truncated_image_and_an_unknown_model(shared: Server, world: World) -> None:
    whole = base64.b64decode(world.items[0]["image"])
    broken = {"item_id": "a", "text": "x", "image": base64.b64encode(whole[: len(whole) // 2]).decode()}
    with pytest.raises(InvalidRequest, match="the image of 'a' cannot be used: cannot be decoded"):
        shared.new.add("", [broken])
    with pytest.raises(UnknownModel):
        shared.new.add("music", world.items)


def test_users_cannot_add(shared: Server) -> None:
    """By no door: `submit` is what all of them call. Nor can they withdraw."""
    with shared.store.lease() as servable:
        with pytest.raises(Forbidden, match="'add_items' is for administrators"):
            servable.call("add_items", embedded(shared))
        with pytest.raises(Forbidden, match="'withdraw_items' is for administrators"):
            servable.call("withdraw_items", {"item_id": ["i01"], "withdrawn": [True]})


def test_without_a_journal_or_spare_rows(world: World, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"ops {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    shutil.copytree(world.later, tmp_path / "films" / "1")
    with server(tmp_path / "films", tmp_path / "journal") as found:
        with pytest.raises(NotPossible, match=r"no version of 'films' .* export\.spare_items above 0"):
            found.new.add("films", [{"item_id": "a", "text": "x"}])
        with pytest.raises(NotPossible, match=r"version 1 of 'films' cannot withdraw .* export\.spare_items above 0"):
            found.new.withdraw("films", [world.old])
        bounds = RestSettings()
        admin = admin_app(found.store, Tokens(tmp_path / "tokens"), bounds)
        with listening(uvicorn_config(admin, bounds)) as door:
            for path, body in (("", {"items": [{"item_id": "a"}]}), ("/withdraw", {"item_ids": ["a"]})):
                answer = door.post(f"/v1/admin/items{path}", body, authorization=f"Bearer {KEY}")
                assert answer.status == 409 and "--items-journal" in answer.json["error"]


def test_a_restart_and_later_versions_have_them(
    world: World, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before they take over. What a version's own catalogue has is left out, and what it has no row for as well."""
    new, extra = [item["item_id"] for item in world.items], {**world.items[0], "item_id": "extra"}
    with server(models, tmp_path / "journal") as first:
        first.new.add("films", world.items[:2])
        answer = first.new.add("films", [world.items[2], extra])
        assert answer["spare_items_left"] == {"1": 0}
        before = first.ids(history=(new[0], world.old))
        first_lists = first.ids(history=(world.old,), include=tuple(new))
    journal = ItemsJournal(tmp_path / "journal")
    journal.append("music", [{**extra, "item_id": "song"}])
    journal.append("films", [{**extra, "item_id": "too many"}, extra])
    journal.append("films", [{"item_id": new[0]}], WITHDRAW)
    with server(models, tmp_path / "journal") as second:
        assert second.known[-NEW - 1 :] == [*new, "extra"]
        assert second.ids(history=(new[0], world.old)) == before and set(new[1:]) & set(before)
        assert new[0] in first_lists and new[0] not in second.ids(history=(world.old,), include=tuple(new))
        assert "version 1 lacks 1 new items: it has 0 spare rows (export.spare_items)" in caplog.text
        shutil.copytree(world.later, models / "2")  # has the three in its own catalogue, and no spare rows
        second.store.poll()
        assert second.known == [str(item) for item in world.whole.item_ids]
        assert "takes no new items (export.spare_items); 3 of the journal are left out" in caplog.text
        with pytest.raises(NotPossible):
            second.new.add("films", [{"item_id": "late", "text": "x"}])


def test_what_another_process_added(world: World, models: Path, tmp_path: Path) -> None:
    """O10: within a second, by itself; two that add at the same time agree on the rows."""
    with server(models, tmp_path / "journal") as one, server(models, tmp_path / "journal") as other:
        other.new.start()
        one.new.add("films", world.items[:1])
        limit = time.monotonic() + 5
        while len(other.known) == 40 - NEW and time.monotonic() < limit:
            time.sleep(0.05)
        assert other.known[-1] == world.items[0]["item_id"]
        other.new.add("films", world.items[1:2])
        with pytest.raises(ItemExists):
            one.new.add("films", world.items[1:2])
        one.new.add("films", world.items[2:])
        other.new.catch_up()
        assert one.known == other.known
        for request in ({"history": (world.items[0]["item_id"],)}, {"history": (world.old,)}):
            assert one.ids(**request) == other.ids(**request)


def test_lists_are_spread_by_what_new_items_are_like(world: World, models: Path, tmp_path: Path) -> None:
    """Their vectors are those that the same content has in the catalogue; so of twins one is enough."""
    twin = {**raw(world.whole, 5), "item_id": "twin"}
    with server(models, tmp_path / "journal") as found:
        found.new.add("films", [twin, *world.items])
        with found.store.lease() as servable:
            catalogue = found.recommending.catalogue(servable)
        ids = [str(item) for item in world.whole.item_ids]
        vectors = catalogue.vectors([*ids, "twin", "being added"])
        tables = [world.whole.members[name].table for name in ("text", "image")]
        both = np.hstack(tables)
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors[:40] @ vectors[:40].T, both @ both.T, atol=0.02)
        assert vectors[5] @ vectors[40] > 0.99 and not vectors[41].any()
        last = found.ids(history=(world.old,), include=("twin", *ids[5:16]))[-1]
        request: dict[str, Any] = {"history": (world.old,), "include": ("twin", ids[5], last), "k": 2}
        assert set(found.ids(**request)) == {"twin", ids[5]}
        assert last in found.ids(**request, diversity=1.0)


class TestWithdrawn:
    def test_by_the_door(self, world: World, models: Path, tmp_path: Path) -> None:
        """O6, O11: in no list, no search and on no page until they are put back; every process and each start knows."""
        (tmp_path / "tokens").write_text(f"ops {hashlib.sha256(KEY.encode()).hexdigest()}\n")
        bounds, key = RestSettings(seconds=60.0), {"authorization": f"Bearer {KEY}"}
        new, old = world.items[0]["item_id"], world.old
        words = world.items[0]["title"].replace(" ", "%20")
        gone = [new, old]
        with server(models, tmp_path / "journal") as found, server(models, tmp_path / "journal") as other:
            found.new.add("films", world.items[:1])
            admin = admin_app(found.store, Tokens(tmp_path / "tokens"), bounds, found.new)
            users = app(found.store, found.recommending, bounds)
            with (
                listening(uvicorn_config(admin, bounds)) as ops,
                listening(uvicorn_config(users, bounds)) as door,
            ):
                before = found.ids(include=tuple([*gone, "i07"]), history=("i05",))
                assert set(before) == {*gone, "i07"}
                assert ops.post("/v1/admin/items/withdraw", {"item_ids": gone}).status == 401
                answer = ops.post("/v1/admin/items/withdraw", {"model": "films", "item_ids": [*gone, new]}, **key)
                assert answer.json == {"item_ids": gone, "versions": [1]}
                assert ops.post("/v1/admin/items/withdraw", {"item_ids": gone}, **key).status == 200
                unknown = ops.post("/v1/admin/items/withdraw", {"item_ids": [old, "nobody"]}, **key)
                assert unknown.status == 404 and unknown.json == {"error": "the catalogue has no item 'nobody'."}

                assert found.ids(include=tuple([*gone, "i07"]), history=("i05",)) == ["i07"]
                for item in gone:
                    assert door.post("/v1/similar", {"item_id": item, "k": 5}).status == 404
                    assert door.get(f"/v1/items?id={item}").json == {"items": []}
                    assert door.get(f"/v1/items/{item}/image").status == 404
                likened = door.post("/v1/similar", {"item_id": "i05", "k": K_MAX}).json["items"]
                assert len(likened) == K_MAX and not {item["item_id"] for item in likened} & set(gone)
                assert new not in door.get(f"/v1/items?search={words}").content.decode()
                about = door.get("/v1/catalogue").json
                assert about["items"] == 40 - NEW + 1 - 2 and "new" not in about["filters"].get("genres", [])
                filtered = door.post("/v1/recommend", {"history": ["i05"], "filters": {"genres": ["new"]}}).json
                assert filtered["items"] == []
                known = found.recommending.recommend(RecommendRequest(history=(old,), k=1))
                assert not known.unknown_user, "a history knows them all the same"

                listed = ops.get("/v1/admin/items?model=films", **key).json["versions"]
                assert listed == {"1": {"added": [new], "withdrawn": [old, new], "spare_items_left": SPARE - 1}}

                assert other.new.catch_up()
                with server(models, tmp_path / "journal") as later:
                    for process in (other, later):
                        assert process.ids(include=tuple([*gone, "i07"]), history=("i05",)) == ["i07"]
                assert ops.post("/v1/admin/items/restore", {"item_ids": gone}, **key).json["versions"] == [1]
                assert door.get(f"/v1/items/{new}/image").headers["cache-control"] == "private, max-age=60"
                other.new.catch_up()
                for process in (found, other):
                    assert process.ids(include=tuple([*gone, "i07"]), history=("i05",)) == before

    def test_an_item_comes_again(self, world: World, models: Path, tmp_path: Path) -> None:
        """A new one with other texts, which takes one row more in every process; one of the catalogue is restored."""
        item, other = world.items[0], world.items[1]
        changed = {**other, "item_id": item["item_id"]}
        with server(models, tmp_path / "journal") as first:
            first.new.add("films", [item])
            first.new.withdraw("films", [item["item_id"], world.old])
            assert first.new.add("films", [changed])["spare_items_left"] == {"1": SPARE - 2}
            with pytest.raises(ItemExists, match=f"'{item['item_id']}' is there already.$"):
                first.new.add("films", [item])
            with pytest.raises(ItemExists, match="is there already, and withdrawn: restore it"):
                first.new.add("films", [{**item, "item_id": world.old}])
            first.new.add("films", [other])
        with server(models, tmp_path / "journal") as second:
            assert second.known == first_known(second, item, other)
            vectors = first_vectors(second, [item["item_id"], other["item_id"]])
            np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
            assert world.old not in second.ids(include=(world.old, "i07"))
            ItemsJournal(tmp_path / "journal").append("films", [{**item, "item_id": world.old}])
            second.new.catch_up()
            assert world.old in second.ids(include=(world.old, "i07")), "added where it was unknown, so it is offered"
            new = [item["item_id"], other["item_id"]]
            told = {"added": new, "withdrawn": [], "spare_items_left": SPARE - 3}
            assert second.new.listed("") == {"versions": {"1": told}}

    @pytest.mark.parametrize(
        "item_ids, error, message",
        [
            ([], LimitExceeded, "must name 1 to 1000 items; received 0"),
            (["a"] * (MOST_IDS + 1), LimitExceeded, "must name 1 to 1000 items; received 1001"),
            (["a", ""], InvalidRequest, "item_ids.1 must have 1 to 256 characters"),
            (["nobody"], UnknownItem, "the catalogue has no item 'nobody'"),
        ],
    )
    def test_what_is_refused(
        self, shared: Server, item_ids: list[str], error: type[ServingError], message: str
    ) -> None:
        for call in (shared.new.withdraw, shared.new.restore):
            with pytest.raises(error, match=message):
                call("films", item_ids)
        assert shared.new._journal.size == 0

    def test_what_changes_nothing_is_not_kept(self, world: World, models: Path, tmp_path: Path) -> None:
        """Or whoever asks again and again would fill the disk, and each start would read all of it."""
        journal, new = ItemsJournal(tmp_path / "journal"), world.items[0]["item_id"]
        with server(models, tmp_path / "journal") as found:
            found.new.restore("films", [world.old])
            assert journal.size == 0
            found.new.add("films", world.items[:1])
            found.new.restore("films", [new])
            found.new.withdraw("films", ["i01"])
            size = journal.size
            for _ in range(2):
                assert found.new.withdraw("films", ["i01"]) == {"item_ids": ["i01"], "versions": [1]}
            assert journal.size == size
            found.new.withdraw("films", ["i01", "i02", new])
            found.new.restore("films", ["i03", new])
        said = [(entry.action, entry.item["item_id"]) for entry in journal.read()]
        assert said == [(ADD, new), *((WITHDRAW, item) for item in ("i01", "i02", new)), (RESTORE, new)]
        with server(models, tmp_path / "journal") as second:  # what it knows of the journal, it has read
            second.new.withdraw("films", ["i02"])
            second.new.restore("films", [new])
        assert len(list(journal.read())) == len(said)

    def test_more_than_a_call_may_have_rows(self, world: World, models: Path, tmp_path: Path) -> None:
        """Changes are made in parts; and what a version would refuse does not come into the journal, or nobody could
        add or withdraw anything ever after."""
        ids, longer = [f"i{number:02d}" for number in range(5)], {**world.items[0], "item_id": "longer than that"}
        with server(models, tmp_path / "journal", Limits(rows=2, id_bytes=8)) as found:
            assert found.new.withdraw("films", ids)["item_ids"] == ids
            assert found.ids(include=(*ids, "i07"), history=("i05",)) == ["i07"]
            found.new.add("films", world.items)
            assert found.known[-NEW:] == [item["item_id"] for item in world.items]
            size = found.new._journal.size
            with pytest.raises(LimitExceeded, match="every id must have at most 8 bytes"):
                found.new.add("films", [longer])
            with found.store.lease() as servable:
                found.recommending.renew(servable, found.recommending.catalogue(servable).with_items([longer]))
            with pytest.raises(LimitExceeded, match="every id must have at most 8 bytes"):
                found.new.withdraw("films", ["i09", longer["item_id"]])
            assert found.new._journal.size == size
            found.new.restore("films", ids)
            before = found.ids(include=tuple(ids), history=("i05",))
        with server(models, tmp_path / "journal", Limits(rows=2)) as second:
            assert second.known[-NEW:] == [item["item_id"] for item in world.items]
            assert second.ids(include=tuple(ids), history=("i05",)) == before and set(before) == set(ids)

    def test_one_that_cannot_be_withdrawn_keeps_no_other_back(
        self,
        world: World,
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Nor the items that come after it in the journal."""
        with server(models, tmp_path / "journal") as found, found.store.lease() as servable:
            predict = servable.predictor.predict

            def refuses(signature: str, inputs: Any) -> Any:
                if signature == "withdraw_items" and "i01" in inputs["item_id"]:
                    raise InvalidRequest("not this one.")
                return predict(signature, inputs)

            monkeypatch.setattr(servable.predictor, "predict", refuses)
            journal = ItemsJournal(tmp_path / "journal")
            journal.append("films", [{"item_id": item} for item in ("i00", "i01", "i02")], WITHDRAW)
            journal.append("films", world.items[:1])
            assert found.new.catch_up() and found.known[-1] == world.items[0]["item_id"]
            assert found.new.listed("films")["versions"]["1"]["withdrawn"] == ["i00", "i02"]
            assert "'films' version 1 cannot withdraw an item: not this one." in caplog.text


class TestWithdrawnFromLaterVersions:
    """Whatever keeps new items out of a version: what is withdrawn is not listed by it."""

    def test_by_one_without_a_reader(
        self,
        world: World,
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        one, two = world.items[:2]
        gone = (world.old, "i01", "i02")
        with server(models, tmp_path / "journal") as found:
            found.new.withdraw("films", ["i01"])
            found.new.add("films", [one])
            found.new.withdraw("films", [world.old, one["item_id"]])
            found.new.add("films", [{**two, "item_id": one["item_id"]}])
            readers = found.new._reader

            def broken(folder: Path) -> Any:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(found.new, "_reader", broken)
            shutil.copytree(world.artifact, models / "2")
            found.store.poll()
            assert len(found.known) == 40 - NEW and "must say how its encoders read items" in caplog.text
            assert "i02" in found.ids(include=gone, history=("i07",))
            assert found.new.withdraw("films", ["i01", "i02"]) == {"item_ids": ["i01", "i02"], "versions": [2]}
            assert found.ids(include=gone, history=("i07",)) == []
            found.new.restore("films", ["i01"])
            assert found.ids(include=gone, history=("i07",)) == ["i01"]
            with pytest.raises(ServingError, match="version 2 of 'films' must say how its encoders read items"):
                found.new.add("films", [two])
            monkeypatch.setattr(found.new, "_reader", readers)
            assert found.new.catch_up()
            assert found.known == first_known(found, one, one)[:-1], "in the same rows as everywhere"
            told = {"added": [one["item_id"]], "withdrawn": [world.old, "i02"], "spare_items_left": SPARE - 2}
            assert found.new.listed("films") == {"versions": {"2": told}}

    def test_by_one_that_is_loaded_while_a_call_is_busy(
        self, world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving.new_items, "PATIENCE_S", 0.05)
        with server(models, tmp_path / "journal") as found:
            found.new.withdraw("films", [world.old, "i01"])
            found.new.restore("films", ["i01"])
            shutil.copytree(world.artifact, models / "2")
            with found.new._lock:
                found.store.poll()
            with found.store.lease() as servable:
                assert servable.version == 2
            assert found.ids(include=(world.old, "i01"), history=("i07",)) == ["i01"]

    def test_where_that_cannot_be_known_a_version_is_refused(
        self, world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(_: Any) -> int:
            raise ServingError("the journal of new items cannot be read.")

        with server(models, tmp_path / "journal") as found:
            found.new.withdraw("films", [world.old])
            shutil.copytree(world.artifact, models / "2")
            monkeypatch.setattr(ItemsJournal, "end", fails)
            found.store.poll()
            with found.store.lease() as servable:
                assert servable.version == 1
            assert "cannot be read" in {s.version: s.error for s in found.store.statuses("films")}[2]

    def test_a_new_item_that_came_before_what_fails(
        self, world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is withdrawn, although that stands behind what fails."""
        monkeypatch.setattr(serving.new_items, "TOGETHER", 1)
        one, two = (item["item_id"] for item in world.items[:2])
        with server(models, tmp_path / "journal") as found, found.store.lease() as servable:
            predict = servable.predictor.predict

            def fails(signature: str, inputs: Any) -> Any:
                if signature == "add_items" and inputs["item_id"] == [two]:
                    raise Overloaded("no memory")
                return predict(signature, inputs)

            monkeypatch.setattr(servable.predictor, "predict", fails)
            journal = ItemsJournal(tmp_path / "journal")
            journal.append("films", world.items[:2])
            journal.append("films", [{"item_id": one}], WITHDRAW)
            assert not found.new.catch_up()
            assert found.known[-1] == one and found.recommending.catalogue(servable).withdrawn == [one]


def first_known(found: Server, item: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The catalogue's items, and the new ones row by row."""
    return [*found.known[: 40 - NEW], item["item_id"], item["item_id"], other["item_id"]]


def first_vectors(found: Server, ids: list[str]) -> np.ndarray:
    with found.store.lease() as servable:
        return found.recommending.catalogue(servable).vectors(ids)


def test_an_older_version_withdraws_nothing(
    world: World, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exported before there was the signature, and what makes vectors: it still takes new items, and says what it
    cannot do."""
    manifest = verify_manifest(models / "1")
    (models / "1" / "item_projections.npz").unlink()
    signatures = {name: spec for name, spec in manifest.signatures.items() if name != "withdraw_items"}
    write_manifest(models / "1", replace(manifest, signatures=signatures))
    journal, item = ItemsJournal(tmp_path / "journal"), world.items[0]
    journal.append("films", [{**item, "item_id": world.old}, item])
    journal.append("films", [{"item_id": item["item_id"]}], WITHDRAW)
    with server(models, tmp_path / "journal") as found:
        assert found.known[40 - NEW :] == [item["item_id"]] and "version 1 cannot withdraw 1 items" in caplog.text
        with pytest.raises(NotPossible, match="version 1 of 'films' cannot withdraw items"):
            found.new.withdraw("", [world.old])
        assert not first_vectors(found, [item["item_id"]]).any(), "like no other"
        assert len(found.ids(history=(world.old,), diversity=0.5)) == K_MAX


def test_what_an_error_cut_short_is_tried_again(
    world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """O10: from where it broke off, so that nothing is left out and nothing done twice."""
    journal, (one, two, three) = ItemsJournal(tmp_path / "journal"), world.items
    monkeypatch.setattr(serving.new_items, "TOGETHER", 1)
    with server(models, tmp_path / "journal") as found, found.store.lease() as servable:
        journal.append("films", [one])
        journal.append("films", [{"item_id": one["item_id"]}, {"item_id": world.old}], WITHDRAW)
        journal.append("films", [{"item_id": one["item_id"]}], RESTORE)
        journal.append("films", [two, three])
        ends = [entry.end for entry in journal.read()]
        predict, faults = servable.predictor.predict, [OSError(5, "Input/output error"), Overloaded("no memory")]

        def fails(signature: str, inputs: Any) -> Any:
            if signature == "add_items" and inputs["item_id"] == [two["item_id"]] and faults:
                raise faults.pop()
            return predict(signature, inputs)

        monkeypatch.setattr(servable.predictor, "predict", fails)
        for _ in range(2):
            assert not found.new.catch_up()
            beside = found.new._beside(servable)
            assert (beside.read, beside.left) == (ends[3], SPARE - 1) and beside.seen != journal.size
            assert found.known[40 - NEW :] == [one["item_id"]] and "it is tried again" in caplog.text
        assert found.new.catch_up()
        assert found.known[40 - NEW :] == [item["item_id"] for item in world.items]
        assert (beside.read, beside.seen, beside.left) == (journal.size, journal.size, SPARE - 3)
        listed = found.ids(history=("i07",), include=(world.old, *found.known[40 - NEW :]))
        assert set(listed) == {item["item_id"] for item in world.items}


def test_pauses_grow_while_a_disk_refuses(shared: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two faults a second would fill the log, and the disk."""
    monkeypatch.setattr(serving.new_items, "WATCH_S", 0.01)
    tries = []

    def fails(_: Any) -> Any:
        tries.append(time.monotonic())
        raise ServingError("the journal of new items cannot be read.")

    monkeypatch.setattr(type(shared.new._journal), "size", property(fails))
    new = NewItems(shared.store, shared.recommending, shared.new._journal, ItemReader)
    new.start()
    time.sleep(0.7)
    new.close()
    assert 3 <= len(tries) <= 6
    assert all(later - earlier >= 0.01 * 2**n for n, (earlier, later) in enumerate(pairwise(tries), 1))


def test_lists_beside_a_call_are_whole(world: World, models: Path, tmp_path: Path) -> None:
    """O11: whoever asks while items are added meets ids that are right, one a place, and what was known before."""
    batch = [{**world.items[0], "item_id": f"n{number}"} for number in range(SPARE)]
    with server(models, tmp_path / "journal") as found, found.store.lease() as servable:
        predict, stop, faults, lists = servable.predictor.recommend, threading.Event(), list[Any](), list[Any]()
        found.new.add("films", batch[:1])

        def ask() -> None:
            while not stop.is_set():
                answer = predict(histories=[["n0", "i07"], ["i07", ""]], k=K_MAX)
                lists.append(answer["item_ids"])
                if not answer["item_ids"].astype(bool).all() or b"n0" in answer["item_ids"][0]:
                    faults.append(answer["item_ids"])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for item in batch[1:]:
            time.sleep(0.05)
            found.new.add("films", [item])
        stop.set()
        for thread in threads:
            thread.join()
        assert not faults and len(lists) > SPARE


def test_a_call_that_hangs_keeps_no_version_back(
    world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """O8: a version is loaded without its new items, and gets them afterwards; nor does a server hang at its end."""
    ItemsJournal(tmp_path / "journal").append("films", world.items[:1])
    for pause in ("PATIENCE_S", "CLOSE_S", "WATCH_S"):
        monkeypatch.setattr(serving.new_items, pause, 0.05)
    store = ModelStore([ModelConfig("films", models)], prepare=lambda servable: new.prepare(servable))
    recommending = Recommending(store, timeout_ms=60_000)
    new = NewItems(store, recommending, ItemsJournal(tmp_path / "journal"), ItemReader)
    try:
        with new._lock:
            store.poll()
        found = Server(store, recommending, new)
        assert len(found.known) == 40 - NEW and "gets its new items later: a call is busy" in caplog.text
        new.catch_up()
        assert found.known[-1] == world.items[0]["item_id"]
        ItemsJournal(tmp_path / "journal").append("films", world.items[1:])
        with new._lock:
            new.start()
            time.sleep(0.2)
            started = time.monotonic()
            new.close()
            assert time.monotonic() - started < 1.0
        assert new._thread is not None
        new._thread.join(10)
        assert not new._thread.is_alive() and found.known[-1] == world.items[0]["item_id"], "it stopped before the next"
    finally:
        store.close()


def test_calls_do_not_wait_without_limit(shared: Server, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that is busy, in this process or another one: they would take all threads of the door, and nobody could
    roll back."""
    calls = [
        lambda: shared.new.add("films", world.items[:1]),
        lambda: shared.new.withdraw("films", [world.old]),
        lambda: shared.new.restore("films", [world.old]),
        lambda: shared.new.listed("films"),
    ]
    monkeypatch.setattr(serving.new_items, "WAIT_S", 0.02)
    monkeypatch.setattr(serving.items_journal, "WAIT_S", 0.02)
    started = time.monotonic()
    for call in calls:
        with shared.new._lock, pytest.raises(Overloaded, match="other calls add or withdraw items") as refused:
            call()
        assert refused.value.retry_after
    for call in calls[:3]:
        with shared.new._journal.alone(), pytest.raises(Overloaded, match=r"has been busy for 0\.02 s"):
            call()
    assert time.monotonic() - started < 2.0
    assert shared.new.listed("films") and shared.new._journal.size == 0


def test_few_calls_wait(shared: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond CALLS are refused at once, so that the door has threads for other orders however many come; when the
    busy one has ended, those that waited are answered."""
    answers: list[Any] = []
    monkeypatch.setattr(serving.new_items, "WAIT_S", 60.0)
    threads = [threading.Thread(target=lambda: answers.append(shared.new.listed("films"))) for _ in range(CALLS)]
    with shared.new._lock:
        for thread in threads:
            thread.start()
        limit = time.monotonic() + 10
        while shared.new._places._value and time.monotonic() < limit:
            time.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(Overloaded, match="other calls add or withdraw items"):
            shared.new.listed("films")
        assert time.monotonic() - started < 1.0 and not answers
    for thread in threads:
        thread.join(10)
    assert len(answers) == CALLS and shared.new.listed("films")


def test_a_journal_that_became_shorter_is_read_anew(
    world: World, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator may have put an older one back. What was done once is not done twice."""
    journal, (one, two, three) = ItemsJournal(tmp_path / "journal"), world.items
    file = tmp_path / "journal" / FILE
    with server(models, tmp_path / "journal") as found:
        found.new.add("films", [one])
        found.new.withdraw("films", [one["item_id"], "i01"])
        found.new.add("films", [{**two, "item_id": one["item_id"]}])
        found.new.withdraw("films", ["i02"])
        before = [*found.known]
        older = file.read_bytes()
        found.new.restore("films", ["i02"])
        file.write_bytes(older)
        assert found.new.catch_up() and "read from its beginning" in caplog.text
        told = {"added": [one["item_id"]], "withdrawn": ["i01", "i02"], "spare_items_left": SPARE - 2}
        assert found.new.listed("films") == {"versions": {"1": told}} and found.known == before
        journal.append("films", [three])
        journal.append("films", [{"item_id": one["item_id"]}], WITHDRAW)
        journal.append("films", [{**two, "item_id": one["item_id"]}])
        assert found.new.catch_up()
        assert found.known == [*before, three["item_id"], one["item_id"]], "from there on all is as ever"


def test_a_reader_that_fails_is_one_sentence_without_a_path(
    world: World, shared: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared.store.lease() as servable:
        reader, folder = shared.new._beside(servable).reader, servable.folder

        def fails(*_: Any) -> Any:
            raise DataError(f"{folder}/examples/text.npz must be whole.")

        monkeypatch.setattr(reader, "read", fails)
        with pytest.raises(InvalidRequest, match=r"'image' cannot read the items: version 1/examples/text\.npz"):
            shared.new.add("films", world.items)
        monkeypatch.undo()
        monkeypatch.setattr(reader, "picture", lambda _: None)
        with pytest.raises(InvalidRequest, match=r"the image of '.*' cannot be used: no page could show it"):
            shared.new.add("films", world.items)
        monkeypatch.undo()
        monkeypatch.setattr(shared.new, "_reader", fails)
        monkeypatch.setattr(shared.new, "_versions", {})
        with pytest.raises(ServingError, match="version 1 of 'films' must say how its encoders read items"):
            shared.new.add("films", world.items)
    assert shared.new._journal.size == 0


@pytest.mark.parametrize("kind", [OSError, RuntimeError, ImportError])
def test_a_reader_that_is_broken_is_no_fault_of_the_items(
    world: World,
    shared: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    """503 with whose fault it is, not 500; where it lies and why is for the log. Nothing is kept of the call."""
    with shared.store.lease() as servable:
        why = f"{servable.folder}/examples/text.json"

        def fails(*_: Any) -> Any:
            raise kind(why)

        monkeypatch.setattr(shared.new._beside(servable).reader, "read", fails)
        for what in ("must read items with 'image'", "must say how its encoders read items"):
            caplog.clear()
            with pytest.raises(ArtifactRefused, match=f"version 1 of 'films' {what}, and does not") as caught:
                shared.new.add("films", world.items)
            assert caught.value.http_status == 503 and why not in str(caught.value) and why in caplog.text
            monkeypatch.setattr(shared.new, "_reader", fails)
            monkeypatch.setattr(shared.new, "_versions", {})
    assert shared.new._journal.size == 0


def test_a_journal_needs_a_reader(tmp_path: Path) -> None:
    """Or new items would be off without a word."""
    with pytest.raises(ConfigurationRefused, match="has an 'items_journal', and no 'item_reader'"):
        Worker(ServerSettings((), items_journal=tmp_path), None)


class TestJournal:
    def test_damaged_and_torn_lines_are_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        journal, file = ItemsJournal(tmp_path / "new" / "folder"), tmp_path / "new" / "folder" / FILE

        def read(start: int = 0) -> tuple[list[Entry], int]:
            return list(journal.read(start)), journal.end()

        assert read() == ([], 0) and journal.size == 0
        journal.append("films", [{"item_id": "ü", "year": 1.5}, {"item_id": "b", "genres": ["x"]}])
        whole = file.read_bytes()
        entries, end = read()
        half = whole.index(b"\n") + 1
        assert entries == [
            Entry("films", {"item_id": "ü", "year": 1.5}, ADD, half),
            Entry("films", {"item_id": "b", "genres": ["x"]}, ADD, len(whole)),
        ]
        assert read(half) == (entries[1:], end)
        assert end == len(whole) == journal.size and read(end) == ([], end)
        assert list(journal.read(0, half)) == entries[:1]
        file.write_bytes(whole + b"x" * 200_000)
        assert read() == (entries, end) and "cut off" in caplog.text
        file.write_bytes(whole + whole[:30])
        assert read() == (entries, end)
        journal.append("films", [{"item_id": "c"}], WITHDRAW)
        found, end = read(end)
        assert found == [Entry("films", {"item_id": "c"}, WITHDRAW, end)] and "damaged, at byte" in caplog.text
        file.write_bytes(file.read_bytes().replace(b'"withdraw"', b'"restore"'))
        assert read() == (entries, file.stat().st_size), "what was changed counts as damaged"
        file.write_bytes(whole.replace(b'"b"', b'"z"') + b'{"sha256": 5}\n[]\n' + b"[" * 5000 + b"\n\xff\n")
        assert [entry.item["item_id"] for entry in journal.read()] == ["ü"]

    def test_nobody_reads_what_is_taken_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process waits until it is known whether an append is kept, and misses none that follows."""
        one, other, seen = ItemsJournal(tmp_path), ItemsJournal(tmp_path), list[Any]()
        one.append("films", [{"item_id": "a"}])
        place = other.end()
        reader = threading.Thread(target=lambda: seen.append((list(other.read(place)), other.end())))

        def full(_: int) -> None:
            reader.start()
            time.sleep(0.1)
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", full)
            with pytest.raises(NotWritable, match="No space left"):
                one.append("films", [{"item_id": "refused" * 20}])
        reader.join(10)
        assert seen == [([], place)]
        one.append("films", [{"item_id": "b"}])
        assert [entry.item["item_id"] for entry in other.read(place)] == ["b"]

    def test_an_append_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its readers hang for a while only."""
        journal = ItemsJournal(tmp_path)
        monkeypatch.setattr(serving.items_journal, "WAIT_S", 0.02)
        refused: list[Any] = []

        def hangs(file: Any, content: bytes) -> None:
            with pytest.raises(Overloaded, match="has been busy for"):
                journal.end()
            refused.append(content)
            append_whole(file, content)

        monkeypatch.setattr(serving.items_journal, "append_whole", hangs)
        journal.append("films", [{"item_id": "a"}])
        assert len(refused) == 1 and journal.end() == journal.size > 0

    def test_one_line_at_a_time_is_in_memory(self, tmp_path: Path) -> None:
        """With the pictures of all new items a journal has hundreds of megabytes, and every version reads it."""
        journal, image = ItemsJournal(tmp_path), "A" * 200_000
        journal.append("films", [{"item_id": f"n{number}", "image": image} for number in range(40)])
        tracemalloc.start()
        try:
            assert sum(1 for _ in journal.read()) == 40
            assert tracemalloc.get_traced_memory()[1] < 10 * len(image) < journal.size / 3
        finally:
            tracemalloc.stop()

    def test_its_name_is_on_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And its folder's: a file is lost with its folder's entry, however often it was synchronised itself."""
        folders, fsync = list[int](), os.fsync

        def noted(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                folders.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        journal = ItemsJournal(tmp_path / "new" / "folder")
        assert folders == [tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino]
        for item in ("a", "b"):
            journal.append("films", [{"item_id": item}])
        assert folders[2:] == [(tmp_path / "new" / "folder").stat().st_ino], "once, before the first"

    def test_a_full_disk_adds_nothing(
        self, world: World, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with server(models, tmp_path / "journal") as found:

            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)
            with pytest.raises(NotWritable, match="No space left"):
                found.new.add("films", world.items[:1])
            monkeypatch.undo()
            assert found.new._journal.size == 0 and len(found.known) == 40 - NEW
            found.new.add("films", world.items[:1])
            assert len(found.known) == 41 - NEW

    def test_a_disk_that_refuses_is_one_sentence_without_a_path(self, tmp_path: Path) -> None:
        journal = ItemsJournal(tmp_path)
        (tmp_path / FILE).mkdir()
        with pytest.raises(ServingError, match="cannot be read; the disk answered 'Is a directory'") as refused:
            list(journal.read())
        assert str(tmp_path) not in str(refused.value)
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).mkdir()
        with pytest.raises(NotWritable, match="cannot be locked, the disk answered 'Is a directory'"), journal.alone():
            pass
        (tmp_path / LOCK).rmdir()
        (tmp_path / FILE).rmdir()
        tmp_path.rmdir()
        tmp_path.write_text("a file where the folder was")
        with pytest.raises(ServingError, match="cannot be read; the disk answered 'Not a directory'"):
            _ = journal.size
        tmp_path.unlink()

    def test_what_goes_wrong_while_it_is_locked_stays_what_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(FileExistsError), ItemsJournal(tmp_path).alone():
            raise FileExistsError

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ServingError, match="needs a folder it can write"):
            ItemsJournal(tmp_path / "file" / "journal")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_shows_their_titles_and_pictures(world: World, models: Path, tmp_path: Path) -> None:
    """O11, A7: in a real browser, under the page's own policy."""
    bounds = RestSettings(seconds=60.0)
    with server(models, tmp_path / "journal") as found:
        found.new.add("films", world.items)
        found.ids(history=(world.old,))  # the graph is traced at the first call
        with listening(uvicorn_config(app(found.store, found.recommending, bounds), bounds)) as door:
            command = [
                *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *(f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=8000"),
                *("--dump-dom", f"http://127.0.0.1:{door.port}/#liked={world.old}&k=5&filter-genres=new"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, "neither an error nor a violation of the policy"
    assert all(item["title"] in done.stdout for item in world.items)
    assert len(re.findall(r'<img class="poster" alt="" src="blob:', done.stdout)) == NEW


@pytest.mark.slow
def test_two_worker_processes_and_a_restart(world: World, models: Path, tmp_path: Path) -> None:
    """O10: a call to one worker reaches the other within a second or so, and a worker that takes the place of a dead
    one has the items before it answers."""
    (tmp_path / "tokens").write_text(f"ops {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    more = ["--admin-port", "0", "--admin-token-file", tmp_path / "tokens", "--items-journal", tmp_path / "journal"]
    command = [sys.executable, "tools/serve.py", models, "--workers", 2, *more, "--port", 0, "--rest-port", 0, "--json"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout is not None
            facts = json.loads(process.stdout.readline())
            doors = {name: Door(port) for name, port in facts["ports"].items()}
            new, key = world.items[0]["item_id"], {"authorization": f"Bearer {KEY}"}
            answer = doors["admin"].post("/v1/admin/items", {"items": world.items[:1]}, **key)
            assert answer.status == 200, answer.content
            time.sleep(1.5)

            def likened() -> set[int]:
                """Each on a connection of its own, which meets either worker."""
                return {doors["rest"].post("/v1/similar", {"item_id": new, "k": 3}).status for _ in range(30)}

            assert likened() == {200}
            os.kill(facts["processes"][0], signal.SIGKILL)
            limit = time.monotonic() + 120
            while (tmp_path / "log").read_text().count("serves after") < 3 and time.monotonic() < limit:
                time.sleep(0.2)
            time.sleep(1.0)
            assert likened() == {200}
            assert doors["admin"].post("/v1/admin/items/withdraw", {"item_ids": [new]}, **key).status == 200
            time.sleep(1.5)
            assert likened() == {404}
        finally:
            process.terminate()
            process.wait(60)
    answering = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if '"similar"' in line]
    assert len({line["process"] for line in answering}) == 3
