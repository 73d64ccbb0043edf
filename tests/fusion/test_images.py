"""Reading images: every format and every way in which a file can be bad, and the cache."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion import images as module
from fusion.errors import MachineError
from fusion.images import load_images

RED, WHITE, BLACK = [255, 0, 0], [255, 255, 255], [0, 0, 0]


def save(path, image, **options):
    image.save(path, **options)
    return str(path)


def solid(colour="red", size=(20, 10), mode="RGB"):
    return Image.new(mode, size, colour)


def load_one(value, size=8):
    pixels, ok, reasons = load_images([value], size)
    assert pixels.shape == (1, size, size, 3)
    assert pixels.dtype == np.uint8
    assert bool(ok[0]) == (reasons[0] == "")
    if not ok[0]:
        assert not pixels.any()
    return pixels[0], reasons[0]


def bomb(path, width, height):
    """A PNG whose header promises more pixels than it has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")))
    return str(path)


@pytest.mark.parametrize(("suffix", "tolerance"), [("jpg", 2), ("png", 0), ("webp", 12)])
def test_formats_are_read(tmp_path, suffix, tolerance):
    pixels, reason = load_one(save(tmp_path / f"a.{suffix}", solid()))
    assert reason == ""
    assert np.abs(pixels.astype(int) - RED).max() <= tolerance


def test_the_centre_is_cut_out_and_the_aspect_kept(tmp_path):
    """A red image with green ends of a quarter each, at twice the width: no green is left, in either direction."""
    image = solid(size=(40, 20))
    image.paste("green", (0, 0, 10, 20))
    image.paste("green", (30, 0, 40, 20))
    for turned in (image, image.rotate(90, expand=True)):
        pixels, _ = load_one(save(tmp_path / "a.png", turned), size=4)
        assert pixels[..., 0].min() > 200  # letterboxed or squeezed, its ends would be green


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid((255, 0, 0, 0), mode="RGBA"), WHITE),
        (solid((255, 0, 0, 255), mode="RGBA"), RED),
        (solid((0, 0), mode="LA"), WHITE),
        (solid(255, mode="L"), WHITE),
        (solid(1, mode="1"), WHITE),
        (solid().convert("P"), RED),
        (Image.fromarray(np.full((10, 20), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((10, 20), 255, np.uint16)), BLACK),
    ],
)
def test_modes_become_rgb_and_transparency_becomes_white(tmp_path, image, expected):
    pixels, reason = load_one(save(tmp_path / "a.png", image))
    assert reason == ""
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_the_camera_s_orientation_is_applied(tmp_path):
    image = solid("black", (20, 20))
    image.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels, _ = load_one(save(tmp_path / "a.png", image, exif=exif))
    assert pixels[-1].min() > 200
    assert pixels[0].max() < 50


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8), 255, np.uint8),
        np.full((8, 8, 3), 1.0),
        np.full((8, 8), 16.0, np.float32),
        np.full((8, 8, 3), 255.0),
        np.full((8, 8), 16, np.int64),
    ],
)
def test_arrays_are_scaled_to_white(array):
    pixels, reason = load_one(array)
    assert reason == ""
    assert (pixels == 255).all()


def test_the_scale_of_arrays_is_that_of_all_of_them():
    """A dark digit is not stretched because it stands beside a bright one, and the batch order does not matter."""
    dark, bright = np.full((8, 8), 1.0), np.full((8, 8), 16.0)
    pixels, _, _ = load_images([dark, bright], 8)
    assert pixels[:, 0, 0, 0].tolist() == [16, 255]
    stack, _, _ = load_images(np.stack([dark, bright]), 8)
    np.testing.assert_array_equal(stack, pixels)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "no image"),
        (None, "no image"),
        (float("nan"), "no image"),
        (7, "int is not an image"),
        ("/no/such/file.png", "does not exist"),
        ("a\x00b.png", "null"),
        ("/", "not a file"),
        (os.devnull, "not a file"),
        (np.zeros((4, 4, 4)), r"\[H, W\] or \[H, W, 3\]"),
        (np.zeros((0, 4)), r"\[H, W\] or \[H, W, 3\]"),
        (np.full((4, 4), np.nan), "finite"),
        (np.full((4, 4), -1.0), "from 0 to 255"),
        (np.full((4, 4), 300.0), "from 0 to 255"),
        (np.full((4, 4), "x"), "finite numbers"),
        (np.full((4, 4), 1j), "finite numbers"),
    ],
)
def test_what_is_no_image_has_a_reason(value, reason):
    import re

    assert re.search(reason, load_one(value)[1])


def test_damaged_and_hostile_files_have_a_reason(tmp_path, monkeypatch):
    """C6, B2: a truncated JPEG, a decompression bomb, text, another format, a file too long: never a crash."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    files = {
        "cut.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "text.png": b"this is not an image",
        "empty.png": b"",
        "long.png": b"\0" * 2000,
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    solid().save(tmp_path / "picture.gif")
    good = save(tmp_path / "good.png", solid())
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 5000)
    bombs = [bomb(tmp_path / f"{n}.png", n, n) for n in (9_000, 30_000)]
    (tmp_path / "large.png").write_bytes(b"\0" * 5001)
    paths = [str(tmp_path / name) for name in (*files, "picture.gif", "large.png")]
    pixels, ok, reasons = load_images([*paths, *bombs, good], 8)
    expected = ["cannot be decoded", "not a JPEG", "not a JPEG", "not a JPEG", "not a JPEG", "not a JPEG"]
    expected += ["5001 bytes are more", "pixels", "pixels", ""]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True)), reasons
    assert ok.tolist() == [False] * 9 + [True]
    assert (pixels[-1] == RED).all()


def test_content_is_read_as_its_file_is(tmp_path, monkeypatch):
    """The same pixels, and the same guards before the decoder."""
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 5000)
    paths = [save(tmp_path / "good.png", solid()), bomb(tmp_path / "bomb.png", 9_000, 9_000)]
    for name, content in (("text.png", b"no image"), ("empty.png", b""), ("large.png", b"\0" * 5001)):
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
    files, contents = (load_images(values, 8) for values in (paths, [Path(path).read_bytes() for path in paths]))
    np.testing.assert_array_equal(contents[0], files[0])
    assert contents[2] == files[2] and contents[1].tolist() == [True, False, False, False, False]


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert load_one(str(tmp_path / "pipe.png"))[1] == "not a file"


def test_no_values_give_no_rows(tmp_path):
    pixels, ok, reasons = load_images([], 8, tmp_path)
    assert (pixels.shape, ok.shape, reasons) == ((0, 8, 8, 3), (0,), [])


def test_progress_counts_to_the_end(tmp_path):
    calls = []
    load_images([""] * 300, 8, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(256, 300), (300, 300)]


# ---- cache


def test_the_cache_gives_the_same_and_is_used(tmp_path, monkeypatch):
    values = [save(tmp_path / "a.png", solid()), "", str(tmp_path / "none.png"), np.ones((8, 8))]
    plain = load_images(values, 8)
    first = load_images(values, 8, tmp_path / "cache")
    monkeypatch.setattr(module, "_read", lambda *_: pytest.fail("decoded again"))
    second = load_images(values, 8, tmp_path / "cache")
    assert isinstance(second[0], np.memmap)
    for cached in (first, second):
        np.testing.assert_array_equal(cached[0], plain[0])
        np.testing.assert_array_equal(cached[1], plain[1])
        assert cached[2] == plain[2]


def test_an_image_is_decoded_once_whatever_list_it_stands_in(tmp_path, monkeypatch):
    """F12: what cleaning drops, or a data set that grows, costs no second decoding; other sizes and whites do."""
    colours = {"a": "red", "b": "white", "c": "black", "d": "blue"}
    paths = {name: save(tmp_path / f"{name}.png", solid(colour)) for name, colour in colours.items()}
    bad, dark = str(tmp_path / "none.png"), np.ones((4, 4))
    decoded = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda value, *rest: (decoded.append(value), read(value, *rest))[1])

    def load(*values, size=8):
        decoded.clear()
        pixels, _, reasons = load_images(values, size, tmp_path / "cache")
        read_here = [value if isinstance(value, str) else "array" for value in decoded]
        expected, _, why = load_images(values, size)
        np.testing.assert_array_equal(pixels, expected)
        assert reasons == why
        return sorted(read_here)

    assert load(paths["a"], bad, paths["b"], dark, paths["c"]) == sorted([*map(paths.get, "abc"), bad, "array"])
    assert load(paths["c"], paths["a"]) == []
    assert load(paths["d"], bad, paths["c"], paths["a"], dark) == sorted([paths["d"], bad])
    assert load(dark, 16 * dark, paths["a"]) == ["array", "array"], "with another white, other pixels"
    assert load(paths["a"], size=4) == [paths["a"]]
    (tmp_path / "cache" / "images-4-damaged").mkdir()
    assert load(paths["a"], paths["b"], size=4) == [paths["b"]]


def test_a_changed_file_or_size_is_read_anew(tmp_path):
    path = save(tmp_path / "a.png", solid())
    load_images([path], 8, tmp_path / "cache")
    save(tmp_path / "a.png", solid("white"))
    os.utime(path, ns=(1, 1))
    assert (load_images([path], 8, tmp_path / "cache")[0] == 255).all()
    assert load_images([path], 4, tmp_path / "cache")[0].shape == (1, 4, 4, 3)


def test_an_interrupted_or_damaged_cache_is_not_believed(tmp_path, monkeypatch):
    path, cache = save(tmp_path / "a.png", solid()), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_images([path], 8, cache)
    assert list(cache.iterdir()) == []
    load_images([path], 8, cache)
    (folder,) = cache.iterdir()
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-1])
    assert (load_images([path], 8, cache)[0] == RED).all()


def test_a_full_disk_and_a_file_in_the_way_are_one_sentence(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", solid())
    with pytest.raises(MachineError, match="must be writable"):
        load_images([path], 8, tmp_path / "a.png" / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match="No space left"):
        load_images([path], 8, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
