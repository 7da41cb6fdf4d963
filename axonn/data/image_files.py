"""Readers of image files: a folder, an array, a CIFAR archive, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from axonn.durable_files import opened, read_bytes, reason_of
from axonn.errors import DataError

Pixels = npt.NDArray[np.uint8]
_ARRAYS = (".npy", ".npz")
_LARGEST_BATCH = 2**29
"""Upper bound in bytes of one file of a CIFAR archive; the largest has 155 million."""
_LARGEST_ARCHIVE = 2**32
"""Upper bound in bytes of all files of a CIFAR archive together, unpacked."""
_LARGEST_ARRAY = 2**36
"""Upper bound in bytes of an array in an .npz file; larger arrays must be given as .npy files."""
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
"""Image formats that Pillow decodes by itself. Others start external programs, as EPS does, or are no raster images."""
_CIFAR_TRAINING = {"train", *(f"data_batch_{i}" for i in range(1, 6))}
"""Names of the files with the training images of CIFAR-100 and of CIFAR-10."""


class Images(Protocol):
    """A sequence of images of any sizes: image i is uint8 [channels, height, width], with 1 channel (grey) or 3."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Pixels: ...

    def digest(self) -> str:
        """Return a hash of all images."""
        ...


def read_images(path: Path | str | None) -> Images:
    """Read the images at `path`, or scikit-learn's digits if it is None.

    `path` is one of: a folder, possibly nested, of image files, read in the order of their paths; an `.npy` or `.npz`
    file with one uint8 array [images, height, width], [images, height, width, channels] or [images, channels, height,
    width]; the Python version of the CIFAR-10 or CIFAR-100 archive, packed or unpacked, whose training images are read.
    Raises `DataError`.
    """
    if path is None:
        return ImageArray(_digits())
    path = Path(path)
    try:
        if path.is_dir():
            batches = sorted(p for p in path.rglob("*") if p.name in _CIFAR_TRAINING and p.is_file())
            if not batches:
                return ImageFolder(path)
            return ImageArray(_cifar((str(p), read_bytes(p, most=_LARGEST_BATCH)) for p in batches))
        with opened(path) as file:
            if path.suffix in _ARRAYS:
                return ImageArray(_array(path, file))
            if tarfile.is_tarfile(file):
                return ImageArray(_cifar(_members(path, file), where=str(path)))
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error, path)}") from error
    raise DataError(f"{path}: is no folder of images, no .npy or .npz file and no CIFAR archive")


class ImageArray:
    """Images of equal size in memory: uint8 [images, channels, height, width]."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, number: int) -> Pixels:
        return cast(Pixels, self._pixels[number])

    def digest(self) -> str:
        shape = str(self._pixels.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self._pixels).tobytes()).hexdigest()[:16]


class ImageFolder:
    """A folder of image files, each decoded by Pillow when it is needed. Raises `DataError` when that fails."""

    def __init__(self, folder: Path) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError(f"{folder}: images are read by Pillow, which is missing; pip install pillow") from error
        self._pillow = Image
        known = {ending for ending, name in Image.registered_extensions().items() if name in _FORMATS}
        self._folder = folder
        self._files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
        if not self._files:
            raise DataError(f"{folder}: holds no images in a format that Pillow knows, and no CIFAR batches")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Pixels:
        path = self._files[number]
        try:
            with opened(path) as file, self._pillow.open(file, formats=_FORMATS) as image:
                grey = image.mode in ("1", "L", "LA", "I;16")
                pixels = np.array(image.convert("L" if grey else "RGB"), dtype=np.uint8)
        except Exception as error:  # Damaged files raise anything in its decoders.
            raise DataError(f"{path}: is not an image that can be read: {error}") from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(str(path.relative_to(self._folder)).encode() + b"\0")
            with opened(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def _digits() -> Pixels:
    """Return 1797 handwritten digits of 8x8 pixels, [1797, 1, 8, 8]: the test set of Alpaydin & Kaynak (UCI)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the default images are scikit-learn's digits, and scikit-learn is missing; pip install scikit-learn, "
            "or give images with data.path"
        ) from error
    images: npt.NDArray[np.float64] = load_digits().images
    return np.rint(images * (255 / 16)).astype(np.uint8)[:, None]


def _array(path: Path, file: IO[bytes]) -> Pixels:
    try:
        arrays = _packed(path, file) if zipfile.is_zipfile(file) else {"": _stored(path, file, path.stat().st_size)}
    except DataError:
        raise
    except Exception as error:  # Headers are parsed as Python literals: damaged ones raise anything.
        raise DataError(f"{path}: is not an array that can be read: {error}") from error
    if len(arrays) != 1:
        raise DataError(f"{path}: holds {len(arrays)} arrays ({', '.join(arrays)}); give a file with the images alone")
    (pixels,) = arrays.values()
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[-1] in (1, 3):
        return pixels.transpose(0, 3, 1, 2)
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels
    raise DataError(
        f"{path}: has shape {list(pixels.shape)}; images are [images, height, width], with 1 or 3 channels as the last "
        "or the second dim if there is a fourth"
    )


def _packed(path: Path, file: IO[bytes]) -> dict[str, Pixels]:
    """Read the arrays of an `.npz` file, by name."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        arrays = {}
        for member in members[:2]:
            if member.file_size > _LARGEST_ARRAY:
                raise DataError(f"{path}: unpacks to {member.file_size} bytes; give it as an .npy file")
            with archive.open(member) as one:
                arrays[member.filename.removesuffix(".npy")] = _stored(path, one, member.file_size)
    return arrays


def _stored(path: Path, file: IO[bytes], size: int) -> Pixels:
    """Read the array in a file of `size` bytes. Raises `ValueError` when the header does not fit that size."""
    file.seek(0)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(file))
    if read is None:
        raise ValueError("a version of the format that no image needs")
    shape, by_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickles, which nobody else's file may have")
    if dtype != np.uint8:
        raise DataError(f"{path}: holds {dtype}; images are uint8, from 0 to 255")
    if any(extent < 0 for extent in shape) or prod(shape) != size - file.tell():
        raise ValueError(f"shape {list(shape)} does not fit the {size - file.tell()} bytes after it")
    values = np.frombuffer(file.read(), dtype=np.uint8)
    return values.reshape(shape, order="F" if by_columns else "C")


def _members(path: Path, packed: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each training batch in a CIFAR archive."""
    packed.seek(0)
    total = 0
    with tarfile.open(fileobj=packed) as archive:
        for member in archive:
            total += member.size
            if member.size > _LARGEST_BATCH or total > _LARGEST_ARCHIVE:
                raise DataError(f"{path}: {member.name!r} makes it larger than any CIFAR archive is; download it anew")
            if Path(member.name).name in _CIFAR_TRAINING and member.isfile():
                file = archive.extractfile(member)
                assert file is not None, "a regular file can be read"
                yield f"{path}: {member.name}", file.read()


def _cifar(batches: Iterable[tuple[str, bytes]], where: str = "") -> Pixels:
    """Decode CIFAR batches into [images, 3, 32, 32].

    Krizhevsky, Learning multiple layers of features from tiny images, 2009: rows of 3072 bytes, the red plane first.
    """
    images = []
    for name, content in sorted(batches):
        try:
            _check_memo(content)
            batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        except Exception as error:  # A damaged pickle can raise any exception.
            raise DataError(f"{name}: is not a CIFAR batch: {error}") from error
        data = batch.get(b"data") if isinstance(batch, dict) else None
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32**2:
            raise DataError(f"{name}: is not a CIFAR batch: it has no uint8 array [images, 3072] called data")
        images.append(data.reshape(-1, 3, 32, 32))
    if not images:
        raise DataError(f"{where}: holds no training images of CIFAR-10 or CIFAR-100 (its python version)")
    return np.concatenate(images)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of numbers, strings, lists, dicts and numpy arrays; it refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any] | str] = {
            # Only a name in the arguments of `_reconstruct`: calling it would make an array of uninitialised memory.
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        for core in ("numpy.core", "numpy._core"):
            allowed[f"{core}.multiarray", "_reconstruct"] = _empty_array
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it would load {module}.{name}, which no images need")
        return allowed[module, name]


def _check_memo(content: bytes) -> None:
    """Raise `ValueError` for a truncated pickle, or one whose memo index exceeds its size and would exhaust memory."""
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and argument is not None and argument > len(content):
            raise ValueError(f"it keeps something at place {argument}")


_NDARRAY = "numpy.ndarray"


def _empty_array(kind: Any, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return the empty array that unpickling fills with the state of a pickled array."""
    if kind is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it has an array that is not made as numpy makes them")
    return np.empty(shape, np.dtype(dtype))


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that pickle protocol 2 stores as a latin-1 string."""
    return text.encode("latin-1")
