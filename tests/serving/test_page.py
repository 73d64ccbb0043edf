"""The page at `/`, as files and in a real browser without a window."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from browser import browsing
from fake_serving import FakeServable, FakeStore, write_tables
from loopback import listening
from serving.recommending import Recommending
from serving.rest_guard import RestSettings, uvicorn_config
from serving.rest_server import PAGE, PAGE_FILES, app
from serving.security import Tokens

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A document as lists of (tag, attributes, text below it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = (tag, {name: value or "" for name, value in attributes}, [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def all(self, tag=None, **wanted):
        """Text and attributes of the elements of a tag, or whose attributes are these (`cls` is the class)."""
        wanted = {name.replace("cls", "class"): value for name, value in wanted.items()}
        return [
            ("".join(text), attributes)
            for name, attributes, text in self.elements
            if tag in (None, name) and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def text(self, identifier):
        return self.all(id=identifier)[0][0]


# ---- the files -----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_the_network_and_nothing_inline():
    """So that a policy which allows files of this server alone holds."""
    page = Page((PAGE / "index.html").read_text(encoding="utf-8"))
    for tag, attributes, text in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag not in ("style", "iframe", "object") and (tag != "script" or (attributes["src"] and not text))
    for name, _ in PAGE_FILES.values():
        text = (PAGE / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|@import|innerHTML|outerHTML|\beval\b|document\.write", text), name
    assert sum((PAGE / name).stat().st_size for name, _ in PAGE_FILES.values()) < 40_000


def test_every_field_of_the_page_has_a_label():
    page = Page((PAGE / "index.html").read_text(encoding="utf-8"))
    labelled = {attributes["for"] for _, attributes in page.all("label")}
    fields = {a["id"] for tag in ("input", "select") for _, a in page.all(tag)}
    assert fields == labelled
    assert page.all("html")[0][1]["lang"] == "en" and page.all(id="said")[0][1]["aria-live"] == "polite"


# ---- the browser ---------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "1"
    return FakeServable(folder, files=write_tables(folder))


def browse(servable, tmp_path, address="", tokens=None, width=1300):
    """The document after its scripts have run."""
    store, settings = FakeStore(servable), RestSettings()
    with listening(uvicorn_config(app(store, Recommending(store), settings, tokens), settings)) as door:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=4000"),
            *(f"--window-size={width},800", "--dump-dom", f"http://127.0.0.1:{door.port}/{address}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Page(done.stdout), [line for line in said if tokens is None or "401" not in line]


@needs_chromium
def test_the_page_shows_the_list_that_was_asked_for(servable, tmp_path):
    """O11, A7, A8: a user, a liked item, a filter and weights out of the address; titles, shares and a picture."""
    address = "#user=u1&liked=i2&liked=nope&k=3&weight-text=0&weight-image=0&filter-language=en&filter-language=de"
    page, said = browse(servable, tmp_path, address)
    assert said == [], "neither an error nor a violation of the policy"
    assert [text for text, _ in page.all("b")] == ["Film 0", "Film 4", "Film 6"]
    assert [text for text, _ in page.all(cls="score")] == ["-1.000", "-5.000", "-7.000"]
    assert [text for text, _ in page.all(cls="facts")] == ["i0 · en · war, love", "i4 · de · war", "i6 · en · love"]
    bars = [attributes for _, attributes in page.all(role="img")]
    assert bars[1]["aria-label"] == "members: likes -5.000, text 0.000, image 0.000"
    assert len(page.all(cls="less")) == 3, "one part a row: the two others weigh nothing"
    posters = page.all("img")
    assert posters[0][1]["class"] == "poster" and posters[0][1]["src"].startswith("blob:")
    assert [attributes["class"] for _, attributes in posters[1:]] == ["poster none"] * 2
    assert page.text("model") == "films, version 1 · 8 items · 3 users" and "3 items in" in page.text("said")
    assert page.text("liked") == "× Film 2× nope (unknown)" and page.text("legend") == "likestextimage"
    assert page.text("weights").replace("\n", "") == "likes1text0image0" and "0.25" in page.text("figures")
    assert len(page.all("input", type="checkbox")) == 10


@needs_chromium
@pytest.mark.slow
def test_the_page_says_what_is_missing(servable, tmp_path):
    """H7: who was left out, and that nobody knows the visitor."""
    servable.faults = {"text": "raise"}
    try:
        page, said = browse(servable, tmp_path, "#k=2", width=400)
    finally:
        servable.faults = {}
    assert said == [] and page.text("fallback") == "'text' failed."
    assert "hidden" not in page.all(id="fallback")[0][1] and page.text("legend") == "likesimage"
    assert "for somebody unknown" in page.text("said")
    assert all("open" not in attributes for _, attributes in page.all("details", cls="card")), "folded on a phone"


@needs_chromium
@pytest.mark.slow
def test_the_page_asks_for_a_token_where_the_server_does(servable, tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"shop {hashlib.sha256(b's3cret').hexdigest()}")
    page, said = browse(servable, tmp_path / "browser", "", Tokens(path))
    assert said == [] and "hidden" not in page.all(id="token-box")[0][1]
    assert "this server needs the header" in page.text("said")


@needs_chromium
@pytest.mark.slow
def test_the_page_is_used_by_keyboard_alone(servable, tmp_path):
    """A8: a slider changes the list, a liked item is found by its title, a filter is ticked; without a mouse."""
    store, settings = FakeStore(servable), RestSettings()
    titles = "[...document.querySelectorAll('#list b')].map((line) => line.textContent).join()"
    focus = "document.activeElement.id"
    with (
        listening(uvicorn_config(app(store, Recommending(store), settings), settings)) as door,
        browsing(CHROMIUM, tmp_path / "profile") as browser,
    ):
        browser.resize(1300, 800)
        browser.open(f"http://127.0.0.1:{door.port}/#k=2")
        browser.until(f"{titles} === 'Film 2,Film 1'")
        browser.press("Tab", 6)  # past the link to the list and the four links above
        assert browser.run(focus) == "user"
        browser.type("u1")
        browser.until(
            "document.getElementById('said').textContent.includes('2 items') && location.hash.includes('user=u1')"
        )
        browser.press("Tab")
        browser.type("film 2")
        browser.until("document.querySelectorAll('#found button').length === 1")
        browser.press("Enter")
        browser.until(f"{titles} === 'i3,Film 0'")
        assert browser.run("document.getElementById('liked').textContent") == "× Film 2"
        browser.run("document.getElementById('weight-2').focus()")
        browser.press("Home")
        browser.until(f"{titles} === 'Film 0,i3'")
        assert browser.run("document.querySelector('output[for=weight-2]').textContent") == "0"
        browser.run("document.getElementById('reset').focus()")
        browser.press(" ")
        browser.until(f"{titles} === 'i3,Film 0'")
        browser.run("document.querySelector('#filters summary').focus()")
        browser.press("Enter")
        browser.press("Tab")
        browser.press(" ")
        browser.until(f"{titles} === 'Film 4'")
        browser.screenshot(tmp_path / "page.png")
        assert browser.run("document.documentElement.scrollWidth") <= 1300
        browser.resize(400, 800)
        assert browser.run("document.documentElement.scrollWidth") <= 400, "nothing stands out at the side"
        assert browser.complaints == []
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
