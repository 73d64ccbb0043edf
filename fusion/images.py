"""Reads images of any origin into one uint8 array of square images; guards stand before the decoder.

A file or array that cannot be used is not an error but a reason: its row is black, marked as not ok, and the
caller masks it. There is no augmentation here.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fusion.errors import MachineError

MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
MISSING = "no image"
VERSION = 2
"""Raised when the pixels that come out change, so that older caches are not used."""

Progress = Callable[[int, int], None]
"""Called with the number of values done and the number of all."""


class _Refused(Exception):
    """Why one image cannot be used."""


def load_images(
    values: Sequence[Any], size: int, cache_dir: Path | None = None, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Reads images and brings them to `size` × `size` pixels: uint8 `[N, size, size, 3]`, bool ok `[N]`, reasons.

    A value is the path of a JPEG, PNG or WebP file, its content as bytes, an array, or '' where there is none. An image
    is cut to its central square and resized (bicubic, antialiased), which is how the ImageNet weights saw theirs.
    Transparency is laid on white, and the orientation that a camera noted is applied.

    Arrays are `[H, W]` or `[H, W, 3]`, uint8, or numbers from 0. What a float array's white is depends on the largest
    value among **all** of them: at most 1 means 1, at most 16 means 16 (scikit-learn's digits), at most 255 means 255.

    Rows that are not ok are black, and their reason says why; the reason of the others is ''. Files above 20 MB or
    64 million pixels are refused before they are decoded.

    With `cache_dir`, the result is kept under the hash of `size` and of each path, its time and its length (or of
    the array), and comes back as a read-only memory map. An image that lies in the cache at this size is not decoded
    again, whatever others stood beside it: it is copied. Raises MachineError when the cache cannot be written.
    """
    values = list(values)
    white = _white([value for value in values if isinstance(value, np.ndarray)])
    if cache_dir is None or not values:
        images = np.zeros((len(values), size, size, 3), np.uint8)
        return images, *_fill(images, values, white, [None] * len(values), progress)
    keys = [_key(value, white) for value in values]
    folder = Path(cache_dir) / f"images-{size}-{_digest(f'{VERSION}:{size}:{keys}')}"
    cached = _Cached.read(folder, keys, size)
    if cached is None:
        _write_folder(folder, values, keys, size, white, progress)
        cached = _Cached.read(folder, keys, size)
    if cached is None:
        raise MachineError(f"the cache folder {folder.parent} must give back what was written; {folder} is unreadable.")
    return cached.images, np.array([not reason for reason in cached.reasons], bool), cached.reasons


def _fill(
    images: np.ndarray,
    values: Sequence[Any],
    white: float,
    known: Sequence[np.ndarray | None],
    progress: Progress | None,
) -> tuple[np.ndarray, list[str]]:
    """Copies what is `known` into the rows of `images`, and decodes the rest by threads; Pillow releases the
    interpreter lock while it decodes."""
    size = images.shape[1]

    def fill(row: int) -> str:
        pixels = known[row]
        if pixels is not None:
            images[row] = pixels
            return ""
        try:
            images[row] = _read(values[row], size, white)
        except _Refused as refusal:
            return str(refusal)
        return ""

    reasons: list[str] = []
    rows = iter(range(len(values)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(rows, 256)):
            reasons += pool.map(fill, batch)
            if progress is not None:
                progress(len(reasons), len(values))
    return np.array([not reason for reason in reasons], bool), reasons


def _read(value: Any, size: int, white: float) -> np.ndarray:
    """One value as uint8 `[size, size, 3]`; raises _Refused for whatever is wrong with it."""
    if isinstance(value, np.ndarray):
        image = _from_array(value, white)
    elif isinstance(value, bytes):
        image = _decoded(io.BytesIO(value), len(value), size)
    elif isinstance(value, str | os.PathLike):
        if not os.fspath(value):
            raise _Refused(MISSING)
        image = _from_file(Path(value), size)
    else:
        missing = value is None or isinstance(value, float)  # pandas writes a missing path as NaN
        raise _Refused(MISSING if missing else f"a {type(value).__name__} is not an image")
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if square.mode == "RGBA":  # laid on white only now, when it is small
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return np.asarray(square, np.uint8)


def _from_array(array: np.ndarray, white: float) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise _Refused(f"an array must be [H, W] or [H, W, 3]; it is {list(array.shape)}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _Refused(f"{array.shape[1]} x {array.shape[0]} pixels are more than {MAX_PIXELS}")
    if array.dtype != np.uint8:
        if not (np.issubdtype(array.dtype, np.number) and np.isrealobj(array)) or not np.isfinite(array).all():
            raise _Refused("an array must hold finite numbers")
        if array.min() < 0 or array.max() > white:
            raise _Refused(f"an array must hold numbers from 0 to 255; it has {array.min()} to {array.max()}")
        array = np.rint(array * (255.0 / white)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _white(arrays: Sequence[np.ndarray]) -> float:
    """The value of white in arrays that are not uint8: the smallest of 1, 16 and 255 that none of them exceeds."""
    scaled = [a for a in arrays if a.dtype != np.uint8 and a.size and np.issubdtype(a.dtype, np.number)]
    largest = max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in scaled), default=255.0)
    return next((white for white in (1.0, 16.0) if largest <= white), 255.0)


def _from_file(path: Path, size: int) -> Image.Image:
    """The decoded file as RGB or RGBA."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _Refused("the file does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise _Refused(f"cannot be decoded: {type(error).__name__}: {error}") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise _Refused("not a file")
    return _decoded(path, status.st_size, size)


def _decoded(file: Path | io.BytesIO, length: int, size: int) -> Image.Image:
    """The decoded content as RGB or RGBA. Guards run on its length and header, before decoding."""
    if length > MAX_FILE_BYTES:
        raise _Refused(f"{length} bytes are more than {MAX_FILE_BYTES}")
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _Refused(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
            return _rgb(ImageOps.exif_transpose(image))
    except _Refused:
        raise
    except FileNotFoundError:
        raise _Refused("the file does not exist") from None
    except Image.UnidentifiedImageError:
        raise _Refused(f"not a {', '.join(FORMATS)} file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Refused(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # a decoder can raise anything at all on a damaged or hostile file
        raise _Refused(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The image in the mode RGB, or RGBA where it has transparency."""
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion cuts off instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


# ---- cache ---------------------------------------------------------------------------------------------------


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _key(value: Any, white: float) -> str:
    """What the pixels of a value depend on, but for their number: half a SHA-256 (hex)."""
    if not isinstance(value, np.ndarray):
        return _digest(f"path:{_file_identity(value)}")[:32]
    digest = hashlib.sha256(f"array:{value.dtype.str}:{value.shape}:{white}:".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def _file_identity(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return repr(value)
    try:
        status = os.stat(value)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return f"{os.fspath(value)!r} is not there"
    return f"{os.path.abspath(value)!r} {status.st_mtime_ns} {status.st_size}"


@dataclass(frozen=True)
class _Cached:
    """What `_write_folder` left for N values: their pixels uint8 `[N, size, size, 3]`, reasons and keys."""

    images: np.ndarray
    reasons: list[str]
    keys: list[str]

    @classmethod
    def read(cls, folder: Path, keys: list[str] | None, size: int) -> _Cached | None:
        """None when the folder is not there, not whole, or not that of `keys`, where they are given."""
        try:
            status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
            images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            cached = cls(images, status["reasons"], status["keys"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        whole = images.shape == (len(cached.keys), size, size, 3) and len(cached.reasons) == len(images)
        return cached if whole and keys in (None, cached.keys) else None


def _write_folder(
    folder: Path, values: Sequence[Any], keys: list[str], size: int, white: float, progress: Progress | None
) -> None:
    """Writes `images.npy` and `status.json` beside `folder` and renames, so that a folder is there whole or not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".aside-", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        images = _reserve(aside / "images.npy", (len(keys), size, size, 3))
        _, reasons = _fill(images, values, white, _known(folder.parent, keys, size), progress)
        images.flush()
        (aside / "status.json").write_text(json.dumps({"reasons": reasons, "keys": keys}), encoding="utf-8")
        _publish(aside, folder, keys, size)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _known(cache_dir: Path, keys: Sequence[str], size: int) -> list[np.ndarray | None]:
    """The pixels that other folders of the cache hold for some keys: cleaning drops rows, and data sets grow."""
    found: dict[str, np.ndarray] = {}
    wanted = set(keys)
    for folder in cache_dir.glob(f"images-{size}-*"):
        cached = _Cached.read(folder, None, size)
        if cached is not None:
            decoded = enumerate(zip(cached.keys, cached.reasons, strict=True))
            found |= {key: cached.images[row] for row, (key, reason) in decoded if key in wanted and not reason}
    return [found.get(key) for key in keys]


def _publish(aside: Path, folder: Path, keys: list[str], size: int) -> None:
    """Renames, unless another process was faster with the same content; a damaged folder gives way."""
    if _Cached.read(folder, keys, size) is None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:
            if _Cached.read(folder, keys, size) is None:  # not a race that the other side won
                raise


def _reserve(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new `.npy` file with its blocks allocated: writing to a map on a full disk would kill the process."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the cache folder {path.parent} must be writable and have room; {error.strerror or error}. "
        "Free some space, or set another folder."
    )
