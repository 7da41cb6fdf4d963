"""Images as files hold them: a folder, an array, a CIFAR archive, or scikit-learn's digits."""

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
"""Bytes of one file of a CIFAR archive; the largest has 155 million."""
_LARGEST_ARCHIVE = 2**32
"""Bytes of all that is packed in it."""
_LARGEST_ARRAY = 2**36
"""Bytes of an array that is packed: who has more gives it as it is, in an .npy file."""
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
"""Of image files: those that Pillow itself decodes. Others start programs, as EPS does, or are no pictures."""
_CIFAR_TRAINING = {"train", *(f"data_batch_{i}" for i in range(1, 6))}
"""Names of the files with the training images of CIFAR-100 and of CIFAR-10."""


class Images(Protocol):
    """Images of any sizes: number i is uint8 [channels, height, width], with 1 channel (grey) or 3."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Pixels: ...

    def digest(self) -> str:
        """Hash of all of them."""
        ...


def read_images(path: Path | str | None) -> Images:
    """The images at `path`, or scikit-learn's digits from None.

    A folder (also of folders) of image files, in the order of their paths; an `.npy` or `.npz` file of one uint8 array
    [images, height, width], [images, height, width, channels] or [images, channels, height, width]; the python version
    of the CIFAR-10 or CIFAR-100 archive, packed or not, of which the training images are read. Raises `DataError`.
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
    """Images of one size in memory: uint8 [images, channels, height, width]."""

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
    """Files in whatever formats Pillow reads, each opened when it is needed. Raises `DataError` where that fails."""

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
        found = hashlib.sha256()
        for path in self._files:
            found.update(str(path.relative_to(self._folder)).encode() + b"\0")
            with opened(path) as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:16]


def _digits() -> Pixels:
    """1797 handwritten digits of 8x8 pixels, [1797, 1, 8, 8]: the test set of Alpaydin & Kaynak, UCI repository."""
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
    except Exception as error:  # Damaged headers are parsed as Python's numbers, and raise what they do.
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
    """The arrays of an `.npz` file by name."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        found = {}
        for member in members[:2]:
            if member.file_size > _LARGEST_ARRAY:
                raise DataError(f"{path}: unpacks to {member.file_size} bytes; give it as an .npy file")
            with archive.open(member) as one:
                found[member.filename.removesuffix(".npy")] = _stored(path, one, member.file_size)
    return found


def _stored(path: Path, file: IO[bytes], size: int) -> Pixels:
    """An array in a file of so many bytes, which its header has to agree with."""
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
    """(name, content) of the training batches in a CIFAR archive."""
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
    """[images, 3, 32, 32]. Krizhevsky, Learning multiple layers of features from tiny images, 2009: rows of 3072 bytes,
    the red plane first."""
    parts = []
    for name, content in sorted(batches):
        try:
            _check_memo(content)
            batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        except Exception as error:  # What a damaged pickle puts on the stack, anything may refuse.
            raise DataError(f"{name}: is not a CIFAR batch: {error}") from error
        data = batch.get(b"data") if isinstance(batch, dict) else None
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32**2:
            raise DataError(f"{name}: is not a CIFAR batch: it has no uint8 array [images, 3072] called data")
        parts.append(data.reshape(-1, 3, 32, 32))
    if not parts:
        raise DataError(f"{where}: holds no training images of CIFAR-10 or CIFAR-100 (its python version)")
    return np.concatenate(parts)


class _PlainUnpickler(pickle.Unpickler):
    """Makes numbers, strings, lists, dicts and numpy arrays, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any] | str] = {
            # Only a name in the arguments of `_reconstruct`: called, it would make an array of whatever is in memory.
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
    """Raises `ValueError` for a pickle that is cut, or that would have a memory of more places than it has bytes."""
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and argument is not None and argument > len(content):
            raise ValueError(f"it keeps something at place {argument}")


_NDARRAY = "numpy.ndarray"


def _empty_array(kind: Any, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """What the state of a pickled array is put into."""
    if kind is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it has an array that is not made as numpy makes them")
    return np.empty(shape, np.dtype(dtype))


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 pickles bytes."""
    return text.encode("latin-1")
