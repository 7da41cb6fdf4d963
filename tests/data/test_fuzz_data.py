"""Data and weights of strangers: tokens, images, archives, safetensors; read, or refused by their names."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from axonn.data.image_files import Images, read_images
from axonn.data.text import TextData, read_tokens
from axonn.errors import AxonnError, ConfigError, DataError
from axonn.models.registry import make_model
from axonn.models.weights_file import check_weights
from axonn.tensor import TensorContext
from tests.helpers.command_line import tiny
from tests.helpers.fuzzing import bounded_memory, damaged, fuzz, read_or_refused, special_files

PIXELS = np.random.default_rng(7).integers(0, 256, (5, 6, 6), dtype=np.uint8)


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npz(values: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=values)
    return file.getvalue()


def cifar(content: bytes | None = None) -> bytes:
    """An archive of one batch."""
    rows = np.random.default_rng(3).integers(0, 256, (3, 3072), dtype=np.uint8)
    batch = pickle.dumps({b"data": rows, b"labels": [1, 2, 3]}, protocol=2) if content is None else content
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("cifar/data_batch_1")
        member.size = len(batch)
        archive.addfile(member, io.BytesIO(batch))
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.stack([PIXELS[0]] * 3, axis=2)).save(file, kind)
    return file.getvalue()


def everything(images: Images) -> list[tuple[int, ...]]:
    """Shapes of all images, which are read for it."""
    found = [images[i] for i in range(len(images))]
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in found)
    assert images.digest()
    return [image.shape for image in found]


GOOD: dict[str, bytes] = {
    "images.npy": npy(PIXELS),
    "images.npz": npz(PIXELS),
    "images.tar": cifar(),
    "images.tar.gz": gzip.compress(cifar(), mtime=0),
}


@pytest.mark.parametrize("name", GOOD)
@fuzz(60)
@given(choice=st.data())
def test_damaged_arrays_and_archives(name: str, tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(choice.draw(damaged(GOOD[name])))
    with bounded_memory(2**31):
        read_or_refused(lambda: everything(read_images(path)), names=path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "jpeg", "tiff", "ppm", "webp", "tga"])
@fuzz(25)
@given(choice=st.data())
def test_damaged_pictures(kind: str, tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / f"one.{kind}"
    path.write_bytes(choice.draw(damaged(picture(kind))))
    read_or_refused(lambda: everything(read_images(tmp_path)), names=path)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_cut_is_never_taken_for_less(name: str, tmp_path: Path) -> None:
    """But for padding at the end, which nobody needs."""
    path = tmp_path / name
    whole = GOOD[name]
    path.write_bytes(whole)
    expected = everything(read_images(path))
    for length in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:length])
        found = read_or_refused(lambda: everything(read_images(path)), names=path)
        assert found is None or found == expected


def header(shape: str, kind: str = "|u1") -> bytes:
    said = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    said += b" " * (-(len(said) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said


def packed_as(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    return file.getvalue()


BOMBS: dict[str, tuple[str, bytes]] = {
    "an array that says it is huge": ("x.npy", header("(1000000000000, 8, 8)") + b"\0" * 64),
    "one that says so, packed": ("x.npz", packed_as(header("(1000000000000, 8, 8)") + b"\0" * 64)),
    "a negative shape": ("x.npy", header("(-1, 8, 8)") + b"\0" * 64),
    "objects": ("x.npy", npy(np.array([{"a": 1}], dtype=object))),
    "a header without end": ("x.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000),
    "a pickle called array": ("x.npy", pickle.dumps([1, 2])),
    "a pickle with a huge memory": ("x.tar", cifar(b"\x80\x02]r\xff\xff\xff\x7f.")),
    "a pickle of endless bytes": ("x.tar", cifar(b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.")),
    "an array of what is in memory": (
        "x.tar",
        cifar(b"\x80\x02}U\x04datacnumpy\nndarray\n(K\x02M\x00\x0c\x86U\x02u1tRs."),
    ),
    "an array that is made huge": (
        "x.tar",
        cifar(
            b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            b"\x8a\x06\xff\xff\xff\xff\xff\x00\x85U\x01b\x87Rs."
        ),
    ),
    "deep lists": ("x.tar", cifar(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_anything_is_made_of_them(bomb: str, tmp_path: Path) -> None:
    name, content = BOMBS[bomb]
    path = tmp_path / name
    path.write_bytes(content)
    with bounded_memory(2**29), pytest.raises(DataError) as caught:
        everything(read_images(path))
    assert str(path) in str(caught.value)


def test_the_pickles_of_bombs_are_pickles() -> None:
    """So that what is refused is the bomb, and not a slip of this file."""
    for name in ("an array of what is in memory", "an array that is made huge"):
        content = BOMBS[name][1]
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            file = archive.extractfile("cifar/data_batch_1")
            assert file is not None
            assert [operation.name for operation, _, _ in pickletools.genops(file.read())][-1] == "STOP"


def test_images_start_no_program(tmp_path: Path) -> None:
    """PostScript would be drawn by Ghostscript, whatever the file is called."""
    (tmp_path / "one.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(DataError, match="holds no images"):
        read_images(tmp_path)
    (tmp_path / "one.png").write_bytes((tmp_path / "one.eps").read_bytes())
    with pytest.raises(DataError, match=r"one\.png: is not an image"):
        everything(read_images(tmp_path))


def test_archives_do_not_unpack_to_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar"
    member = tarfile.TarInfo("cifar/data_batch_1")
    member.size = 2**40
    path.write_bytes(member.tobuf() + b"\0" * 1024)
    with bounded_memory(2**29), pytest.raises(DataError, match=r"cifar\.tar"):
        read_images(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tar", ".bin", ".txt"])
def test_what_is_no_file(suffix: str, tmp_path: Path) -> None:
    read: Callable[[Path], Any] = read_tokens if suffix in {".bin", ".txt"} else read_images
    for path in special_files(tmp_path, suffix):
        if path.name.startswith("empty") and read is read_tokens:
            assert len(read_tokens(path)) == 0
            continue
        with pytest.raises(DataError) as caught:
            read(path)
        assert path.name.replace("\0", "") in str(caught.value).replace("\0", "")


@pytest.mark.parametrize("suffix", [".bin", ".txt"])
@fuzz(60)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_tokens_or_refused(suffix: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content)
    data = read_or_refused(lambda: TextData(path, seq_len=4, vocab=256, seed=0), names=path)
    if data is not None:
        assert all(0 <= token < 256 for token in data.sample(0))


# Weights

MODEL = make_model(tiny().model)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Those of a small model."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    tied = {second for _, second in MODEL.ties}
    tensors = {
        f"{layer.name}.{name}": parameter.detach().clone()
        for layer in MODEL.layers
        for name, parameter in layer.build(TensorContext.serial()).named_parameters()
        if f"{layer.name}.{name}" not in tied
    }
    save_file(tensors, path)
    return path.read_bytes()


def checked(path: Path) -> bool:
    check_weights(path, MODEL)
    return True


def test_weights_are_taken(weights: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights)
    assert checked(path)


@fuzz(150)
@given(choice=st.data())
def test_damaged_weights(weights: bytes, tmp_path: Path, choice: st.DataObject) -> None:
    length = struct.unpack("<Q", weights[:8])[0]
    path = tmp_path / "model.safetensors"
    path.write_bytes(choice.draw(damaged(weights[: 8 + length])) + weights[8 + length :])
    with bounded_memory(2**30):
        read_or_refused(lambda: checked(path), names=path)


def test_weights_that_are_cut_are_refused_at_every_length(weights: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in range(0, len(weights), 97):
        path.write_bytes(weights[:length])
        with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read as safetensors"):
            checked(path)


@pytest.mark.parametrize(
    "said",
    [
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"x": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}},
        [],
        None,
    ],
)
def test_headers_that_lie(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read as safetensors"):
        checked(path)
    path.write_bytes(struct.pack("<Q", 2**63) + text)
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read as safetensors"):
        checked(path)


def test_weights_are_floating(weights: bytes, tmp_path: Path) -> None:
    from safetensors.torch import load

    path = tmp_path / "model.safetensors"
    tensors = load(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int32)}, path)
    with pytest.raises(ConfigError, match=r"holds I32; weights are F64, F32, F16, BF16"):
        checked(path)


def test_weights_are_a_file(tmp_path: Path) -> None:
    for path in special_files(tmp_path, ".safetensors"):
        with pytest.raises(AxonnError, match=r"cannot be read as safetensors"):
            checked(path)
