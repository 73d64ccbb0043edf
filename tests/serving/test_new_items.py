"""New items by an administrator's call: in a journal, and in every process and every later version (O6, O11)."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopback import Door, listening
from new_item_shops import K_MAX, NEW, Shop, raw, two_shops
from recsys.examples import ItemReader
from serving.errors import (
    Forbidden,
    InvalidRequest,
    ItemExists,
    LimitExceeded,
    NotPossible,
    NotWritable,
    ServingError,
    UnknownModel,
)
from serving.items_journal import FILE, ItemsJournal
from serving.messages import RecommendRequest
from serving.model_store import ModelConfig, ModelStore
from serving.new_items import LARGEST_IMAGE, LONGEST_TEXT, MOST, NewItems
from serving.predictor import Predictor
from serving.recommending import Recommending
from serving.rest_guard import RestSettings, uvicorn_config
from serving.rest_server import admin_app, app
from serving.security import Tokens

ROOT = Path(__file__).parents[2]
SPARE = 4
KEY = "s3cret"


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
def server(models: Path, journal: Path) -> Iterator[Server]:
    store = ModelStore([ModelConfig("films", models)], prepare=lambda servable: new.prepare(servable))
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
            assert shown == [{"item_id": new[0], "title": world.items[0]["title"], "genres": ["new"], "year": 2026}]
            searched = door.get(f"/v1/items?search={world.items[2]['title'].replace(' ', '%20')}").json["items"]
            assert [item["item_id"] for item in searched] == [new[2]]
            assert "new" in door.get("/v1/catalogue").json["filters"]["genres"]
            assert door.get(f"/v1/items/{new[0]}/image").status == 404
            likened = door.post("/v1/similar", {"item_id": new[0], "k": 5}).json
            assert len(likened["items"]) == 5 and set(likened["members_used"]) == {"text", "image"}
            forbidden = door.post(
                "/v1/models/films:predict", {"signature_name": "add_items", "inputs": embedded(found)}
            )
            assert forbidden.status == 403 and "administrators" in forbidden.json["error"]
        spread = found.recommending.recommend(RecommendRequest(history=(world.old,), k=K_MAX, diversity=0.5))
        assert len(spread.items) == K_MAX, "a new item has no vector, and is like no other"


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
    """By no door: `submit` is what all of them call."""
    with shared.store.lease() as servable, pytest.raises(Forbidden, match="for administrators"):
        servable.call("add_items", embedded(shared))


def test_without_a_journal_or_spare_rows(world: World, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"ops {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    shutil.copytree(world.later, tmp_path / "films" / "1")
    with server(tmp_path / "films", tmp_path / "journal") as found:
        with pytest.raises(NotPossible, match=r"no version of 'films' .* export\.spare_items above 0"):
            found.new.add("films", [{"item_id": "a", "text": "x"}])
        bounds = RestSettings()
        admin = admin_app(found.store, Tokens(tmp_path / "tokens"), bounds)
        with listening(uvicorn_config(admin, bounds)) as door:
            answer = door.post("/v1/admin/items", {"items": [{"item_id": "a"}]}, authorization=f"Bearer {KEY}")
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
    journal = ItemsJournal(tmp_path / "journal")
    journal.append("music", [{**extra, "item_id": "song"}])
    journal.append("films", [{**extra, "item_id": "too many"}, extra])
    with server(models, tmp_path / "journal") as second:
        assert second.known[-NEW - 1 :] == [*new, "extra"]
        assert second.ids(history=(new[0], world.old)) == before and set(new[1:]) & set(before)
        assert "version 1 lacks 1 new items: it has 0 spare rows (export.spare_items)" in caplog.text
        shutil.copytree(world.later, models / "2")  # has the three in its own catalogue, and no spare rows
        second.store.poll()
        assert second.known == [str(item) for item in world.whole.item_ids]
        assert "takes no new items (export.spare_items); 2 of the journal are left out" in caplog.text
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


class TestJournal:
    def test_damaged_and_torn_lines_are_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        journal, file = ItemsJournal(tmp_path / "new" / "folder"), tmp_path / "new" / "folder" / FILE
        assert journal.read() == ([], 0) and journal.size == 0
        journal.append("films", [{"item_id": "ü", "year": 1.5}, {"item_id": "b", "genres": ["x"]}])
        whole = file.read_bytes()
        entries, end = journal.read()
        assert [(model, item) for model, item in entries] == [
            ("films", {"item_id": "ü", "year": 1.5}),
            ("films", {"item_id": "b", "genres": ["x"]}),
        ]
        assert end == len(whole) == journal.size and journal.read(end) == ([], end)
        file.write_bytes(whole + whole[:30])
        assert journal.read() == (entries, end) and "cut off" in caplog.text
        journal.append("films", [{"item_id": "c"}])
        found, _ = journal.read(end)
        assert [item["item_id"] for _, item in found] == ["c"] and "damaged, at byte" in caplog.text
        file.write_bytes(whole.replace(b'"b"', b'"z"') + b'{"sha256": 5}\n[]\n' + b"[" * 5000 + b"\n\xff\n")
        assert [item["item_id"] for _, item in journal.read()[0]] == ["ü"]

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

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ServingError, match="needs a folder it can write"):
            ItemsJournal(tmp_path / "file" / "journal")


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
        finally:
            process.terminate()
            process.wait(60)
    answering = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if '"similar"' in line]
    assert len({line["process"] for line in answering}) == 3
