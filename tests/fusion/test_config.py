"""A4, A11: configs as data: inheritance, overrides, and faults that name the key and the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator

from fusion.config import (
    Settings,
    content_hash,
    expand_path,
    merge,
    parse,
    parse_part,
    parse_yaml,
    part_of,
    read_config,
)
from fusion.errors import ConfigError
from fusion.registry import Registry


class Tree:
    """A part with nested settings and a part inside."""

    class Config(Settings):
        class Training(Settings):
            epochs: int = Field(1, ge=1)
            """How often."""

        depth: int = Field(3, ge=1, le=10)
        """Levels."""
        training: Training = Training()
        """The loop."""
        encoder: part_of(Registry("encoder", {"tree": f"{__name__}:Tree", "leaf": f"{__name__}:Leaf"})) = None  # type: ignore[valid-type]
        """What reads."""


class Leaf:
    """A part whose validators raise our own errors."""

    class Config(Settings):
        width: Annotated[float, Field(gt=0)] = 1.0
        """Of the leaf."""
        colour: str = "green"
        """Of the leaf."""

        @field_validator("colour")
        @classmethod
        def _green(cls, colour: str) -> str:
            if colour != "green":
                raise ConfigError(f"'colour' must be green; received '{colour}'.")
            return colour


PARTS = Registry("plant", {"tree": f"{__name__}:Tree", "leaf": f"{__name__}:Leaf"})


class Garden(Settings):
    name: str
    """Of the garden."""
    shape: Literal["round", "square"] = "round"
    """Of the beds."""
    plants: dict[str, part_of(PARTS)] = Field(min_length=1)  # type: ignore[valid-type]
    """By name."""
    nested: Tree.Config.Training = Tree.Config.Training()
    """A plain nested class."""


def fault(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Garden, data)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


def garden(**plant: Any) -> dict[str, Any]:
    return {"name": "g", "plants": {"oak": {"kind": "tree", **plant}}}


# ---- reading ------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path):
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return file


def test_extends_is_laid_under_the_file_key_by_key(write) -> None:
    write("base.yaml", "a: {x: 1, y: 2}\nlist: [1, 2]\ngone: 1")
    write("more.yaml", "a: {y: 3}\nonly: here")
    path = write("sub/own.yaml", "extends: [../base.yaml, ../more.yaml]\na: {z: 4}\nlist: [3]\ngone: null")
    assert read_config(path) == {"a": {"x": 1, "y": 3, "z": 4}, "list": [3], "only": "here"}


def test_later_parents_win_and_grandparents_are_read(write) -> None:
    write("a.yaml", "k: a\nfrom_a: 1")
    write("b.yaml", "extends: a.yaml\nk: b")
    write("c.yaml", "k: c")
    assert read_config(write("d.yaml", "extends: [c.yaml, b.yaml]")) == {"k": "b", "from_a": 1}


def test_one_parent_twice_is_no_cycle_but_a_circle_is(write) -> None:
    write("root.yaml", "k: 1")
    write("left.yaml", "extends: root.yaml")
    write("right.yaml", "extends: root.yaml")
    assert read_config(write("both.yaml", "extends: [left.yaml, right.yaml]")) == {"k": 1}
    write("snake.yaml", "extends: tail.yaml")
    with pytest.raises(ConfigError, match="must not extend itself"):
        read_config(write("tail.yaml", "extends: snake.yaml"))


def test_overrides_are_applied_in_order_and_null_removes(write) -> None:
    path = write("c.yaml", "a: {x: 1}\nmembers: {text: {kind: t}, image: {kind: i}}")
    overrides = ["a.x=2", "a.x=3", "a.new.deep=[1, two]", "members.text=null", "name=b=c"]
    assert read_config(path, overrides) == {
        "a": {"x": 3, "new": {"deep": [1, "two"]}}, "members": {"image": {"kind": "i"}}, "name": "b=c"
    }  # fmt: skip
    assert read_config(path, ["a.x=3", "a.x=2"])["a"] == {"x": 2}


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"x": 1}}, {"a": {"x": None, "y": 2}}
    assert merge(base, over) == {"a": {"y": 2}}
    assert (base, over) == ({"a": {"x": 1}}, {"a": {"x": None, "y": 2}})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", ".1e-2", "0.001"])
def test_floats_as_people_write_them(text: str) -> None:
    """YAML 1.1 itself reads 1e-3 as a string."""
    assert parse_yaml(f"rate: {text}", "t") == {"rate": pytest.approx(0.001)}
    assert parse_yaml("rate: 1e-3x", "t") == {"rate": "1e-3x"}


def test_anchors_may_be_merged(write) -> None:
    path = write("c.yaml", "base: &base {x: 1, y: 2}\nown: {<<: *base, y: 3}")
    assert read_config(path)["own"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "'a' twice (line 3)"),
        ("a: {b: 1, b: 2}", "'b' twice (line 1)"),
        ("1: a", "a key must be a word; received 1 (line 1)"),
        ("yes: a", "a key must be a word; received True"),
        ("? [a]\n: b", "a key must be a word; received"),
        ("a: [1", "must be valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "must be valid YAML"),
        ("a: \0", "must be valid YAML"),
        ("- a", "must be a mapping of keys"),
        ("", "must be a mapping of keys"),
        ("extends: 5", "extends must name a config file"),
        ("extends: [a.yaml, 5]", "extends must name a config file"),
        ("extends: none.yaml", "none.yaml does not exist"),
    ],
)
def test_files_that_are_no_config(write, text: str, message: str) -> None:
    path = write("bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    sentence = str(caught.value)
    assert message in sentence and str(path.parent) in sentence and "\n" not in sentence


def test_missing_and_unreadable_files(write, tmp_path: Path) -> None:
    write("smoke.yaml", "a: 1")
    with pytest.raises(ConfigError, match=r"smok.yaml does not exist: did you mean '.*smoke.yaml'"):
        read_config(tmp_path / "smok.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path / "none" / "smoke.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [("a.b", "takes KEY=VALUE"), ("=1", "takes KEY=VALUE"), ("a={", "must be valid YAML"), ("a={b: 1, b: 2}", "twice")],
)
def test_overrides_that_are_none(write, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write("c.yaml", "a: 1"), [override])


# ---- checking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "g", "plants": {}}, "unknown key 'nmae': did you mean 'name'?"),
        (garden() | {"nested": {"epoch": 1}}, "unknown key 'nested.epoch': did you mean 'epochs'?"),
        (garden(dept=1), "unknown key 'plants.oak.dept': did you mean 'depth'?"),
        (garden(training={"epoch": 1}), "unknown key 'plants.oak.training.epoch': did you mean 'epochs'?"),
        (
            garden(encoder={"kind": "leaf", "with": 1}),
            "unknown key 'plants.oak.encoder.with': did you mean 'width'?",
        ),
        (
            garden(encoder={"kind": "tree", "encoder": {"kind": "tree", "training": {"epcohs": 1}}}),
            "unknown key 'plants.oak.encoder.encoder.training.epcohs': did you mean 'epochs'?",
        ),
        ({"name": "g", "zzz": 1, "plants": {}}, "unknown key 'zzz': known are name, nested, plants, shape."),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(data: dict[str, Any], message: str) -> None:
    """A4: at every level, inside parts and inside parts of parts."""
    assert fault(data) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"plants": {}}, "the key 'name' is required and is not there."),
        ({"name": "g", "plants": {}}, "plants: dictionary should have at least 1 item"),
        (garden(depth=0), "plants.oak.depth: input should be greater than or equal to 1; received 0."),
        (garden(depth=11), "plants.oak.depth: input should be less than or equal to 10; received 11."),
        (garden(depth="deep"), "plants.oak.depth: input should be a valid integer"),
        (garden(training={"epochs": 0}), "plants.oak.training.epochs: input should be greater"),
        (garden(training=3), "plants.oak.training: input should be a valid dictionary"),
        (garden(encoder={"kind": "leaf", "width": 0}), "plants.oak.encoder.width: input should be greater than 0"),
        (garden(encoder={"kind": "leaf", "colour": "red"}), "plants.oak.encoder: 'colour' must be green"),
        (garden() | {"shape": "oval"}, "shape: input should be 'round' or 'square'; received 'oval'."),
        ({"name": "g", "plants": {"oak": {"kind": "leave"}}}, "plants.oak.kind: unknown plant 'leave': did you mean"),
        ({"name": "g", "plants": {"oak": {"depth": 1}}}, "plants.oak must name its kind, as in 'kind: tree'"),
        ({"name": "g", "plants": {"oak": {"kind": ["x"]}}}, "plants.oak must name its kind"),
        ({"name": "g", "plants": {"oak": None}}, "plants.oak must name its kind, as in 'kind: tree'; received None."),
        ([1], "the config must be a mapping of keys; received [1]."),
    ],
)
def test_values_are_checked_where_they_stand(data: Any, message: str) -> None:
    """A4: ranges, types, names; the sentence says where and what was received."""
    assert fault(data).startswith(message)


def test_long_values_are_cut_in_messages() -> None:
    assert len(fault(garden(depth="x" * 10_000))) < 300


def test_good_settings_are_frozen_and_dumped_with_defaults() -> None:
    """The negative control."""
    settings = parse(Garden, garden(encoder={"kind": "leaf", "width": 2}))
    assert settings.plants["oak"].config.encoder.config.width == 2.0
    assert parse(Garden, settings.model_dump()) == settings, "what is dumped can be read again"
    assert settings.model_dump()["plants"]["oak"]["encoder"] == {"kind": "leaf", "width": 2.0, "colour": "green"}
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "other"


def test_a_part_names_the_place_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'data\.dept': did you mean 'depth'"):
        parse_part(PARTS, {"kind": "tree", "dept": 1}, "data")
    part = parse_part(PARTS, {"kind": "tree"}, "data")
    assert parse_part(PARTS, part, "data") is part


# ---- paths and hashes ---------------------------------------------------------------------------------------


def test_paths_use_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GARDEN", "/g")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand_path("$GARDEN/a") == expand_path("${GARDEN}/a") == Path("/g/a")
    assert expand_path("~/x") == Path.home() / "x"
    for path in ("$NOWHERE/a", "a/${NOWHERE}"):
        with pytest.raises(ConfigError, match=r"\$NOWHERE, which is not set"):
            expand_path(path)


def test_the_hash_depends_on_content_and_not_on_order() -> None:
    assert content_hash({"a": 1, "b": {"c": 2, "d": 3}}) == content_hash({"b": {"d": 3, "c": 2}, "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": None}, {}]
    assert len({content_hash(value) for value in different}) == len(different)
    assert len(content_hash({})) == 64
