"""The README's claims that can be checked without running an experiment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving.openapi import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?P<ids>[A-R]\d+m?(?:, [A-R]\d+m?)*) \| [^|]+ \| (?P<files>[^|]+) \|$", re.MULTILINE)
CLAIMS = [
    (row_id, [file.strip(" `") for file in row["files"].split(",")])
    for row in ROW.finditer(README)
    for row_id in row["ids"].split(", ")
]


@pytest.mark.parametrize(("row_id", "files"), CLAIMS, ids=[row_id for row_id, _ in CLAIMS])
def test_every_claimed_capability_is_named_by_a_test(row_id: str, files: list[str]) -> None:
    """A row that the README claims is named in the test file that it points to."""
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    assert any(re.search(rf"\b{row_id}\b", text) for text in texts), f"none of {files} names {row_id}"


def test_capabilities_are_claimed() -> None:
    """The table was found, and names no row twice."""
    ids = [row_id for row_id, _ in CLAIMS]
    assert len(ids) >= 30
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|tools)/[a-z_0-9]+\.(?:yaml|py)", README))))
def test_what_the_readme_names_is_there(path: str) -> None:
    """Configs and tools of the commands exist."""
    assert (ROOT / path).is_file()


def test_the_readme_names_every_call_of_the_administration() -> None:
    """And none that is not there."""
    named = set(re.findall(r"`((?:GET|POST) /v1/admin/[^`]+)`", README))
    assert named == {f"{operation.method} {operation.path}" for operation in OPERATIONS if operation.admin}
