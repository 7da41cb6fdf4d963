"""Images as data: what is read, what is refused, and which noise a sample gets."""

from __future__ import annotations

import gzip
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from axonn.config.train_config import DataConfig, EvaluationConfig, TrainConfig
from axonn.data.diffusion import Noising, signal_variances
from axonn.data.image_files import read_images
from axonn.data.images import ImageData, fitted
from axonn.data.text import TextData
from axonn.errors import DataError
from axonn.models.registry import make_data
from tests.helpers.command_line import tiny
from tests.helpers.training import UNET

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)


def data_of(path: Path | str | None, **changes: Any) -> ImageData:
    return ImageData(path, **({"image_size": 6, "channels": 3, "noise_steps": 50, "seed": 3} | changes))


@pytest.fixture
def array(tmp_path: Path) -> Path:
    path = tmp_path / "images.npy"
    np.save(path, PIXELS)
    return path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Two batches of CIFAR-10 and its test batch, as Python 2 pickled them."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, value in (("data_batch_2", 2), ("data_batch_1", 1), ("test_batch", 9)):
        rows = np.full((3, 3072), value, dtype=np.uint8)
        rows[:, 1024:2048] += 10
        (folder / name).write_bytes(python2_pickle(rows))
    return folder


def python2_pickle(rows: np.ndarray) -> bytes:
    """{"data": rows} with byte strings where Python 3 would have text, protocol 2."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    kind = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"(M" + len(rows).to_bytes(2, "little") + b"M" + rows.shape[1].to_bytes(2, "little") + b"t"
    state = b"(K\x01" + shape + kind + b"\x89" + text(rows.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + empty + state + b"u."


def packed(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return path


# --- what is read


def test_the_default_is_digits() -> None:
    images = read_images(None)
    assert len(images) == 1797
    assert images[0].shape == (1, 8, 8)
    values = np.unique(np.stack([images[i] for i in range(len(images))]))
    assert (len(values), values.min(), values.max()) == (17, 0, 255)
    data = data_of(None, image_size=8, channels=1)
    assert (data.summary, data.image(5).shape) == ("1797 images", (1, 8, 8))
    assert data.image(5).aminmax() == (-1, 1)


@pytest.mark.parametrize("layout", ["grey", "last", "second"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_are_read_in_every_layout(tmp_path: Path, layout: str, suffix: str) -> None:
    stored = {"grey": PIXELS[..., 0], "last": PIXELS, "second": PIXELS.transpose(0, 3, 1, 2)}[layout]
    path = tmp_path / f"images.{suffix}"
    np.save(path, stored) if suffix == "npy" else np.savez(path, images=stored)
    images = read_images(path)
    assert len(images) == len(PIXELS)
    expected = PIXELS[4].transpose(2, 0, 1)
    assert np.array_equal(images[4], expected[:1] if layout == "grey" else expected)


def test_a_folder_is_read_in_the_order_of_its_paths_whatever_the_formats(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "b" / "z.png")
    Image.fromarray(PIXELS[1]).save(tmp_path / "c.bmp")
    Image.fromarray(PIXELS[2][..., 0]).save(tmp_path / "a.PNG")
    Image.fromarray(PIXELS[3]).convert("P").save(tmp_path / "d.gif")
    (tmp_path / "notes.txt").write_text("no image")
    images = read_images(tmp_path)
    assert [images[i].shape for i in range(len(images))] == [(1, 6, 6), (3, 6, 6), (3, 6, 6), (3, 6, 6)]
    assert np.array_equal(images[0][0], PIXELS[2][..., 0])
    assert np.array_equal(images[1], PIXELS[0].transpose(2, 0, 1))
    assert np.array_equal(images[2], PIXELS[1].transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["folder", "archive", "uncompressed"])
def test_cifar_is_read_without_its_test_images(cifar: Path, tmp_path: Path, form: str) -> None:
    path = cifar
    if form != "folder":
        path = packed(cifar, tmp_path / "cifar-10-python.tar.gz")
    if form == "uncompressed":
        path = tmp_path / "cifar.tar"
        path.write_bytes(gzip.decompress((tmp_path / "cifar-10-python.tar.gz").read_bytes()))
    images = read_images(path)
    assert len(images) == 6
    assert [images[i][0, 0, 0] for i in range(6)] == [1, 1, 1, 2, 2, 2]
    assert [int(plane) for plane in images[0].max((1, 2))] == [1, 11, 1]
    assert data_of(path, image_size=32).image(0)[1, 3, 3] == pytest.approx(11 / 127.5 - 1)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_100_and_other_pickle_protocols_are_read(tmp_path: Path, protocol: int) -> None:
    rows = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    content = {b"data": rows, b"fine_labels": [1, 2, 3, 4], b"filenames": [b"a"]}
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    images = read_images(packed(tmp_path, tmp_path.parent / f"cifar-100-{protocol}.tar.gz"))
    assert len(images) == 4
    assert np.array_equal(images[2].reshape(-1), rows[2])


def test_images_are_cropped_to_their_middle_and_resized() -> None:
    wide = np.zeros((1, 4, 8), dtype=np.uint8)
    wide[0, :, 2:6] = 200
    assert torch.equal(fitted(wide, size=4, channels=1), torch.full((1, 4, 4), 200 / 127.5 - 1))
    assert torch.allclose(fitted(wide, size=2, channels=3), torch.full((3, 2, 2), 200 / 127.5 - 1))
    assert fitted(wide.transpose(0, 2, 1).copy(), size=4, channels=1).min() > 0.5
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    small = fitted(ramp, size=4, channels=1)
    assert float(small.mean()) == pytest.approx(float(fitted(ramp, size=8, channels=1).mean()), abs=1e-3)
    assert (small[0, 1:] > small[0, :-1]).all()


def test_colours_become_grey_by_their_luminance() -> None:
    green = np.zeros((3, 2, 2), dtype=np.uint8)
    green[1] = 255
    assert torch.allclose(fitted(green, size=2, channels=1), torch.full((1, 2, 2), 2 * 0.587 - 1))


# --- what is refused


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (PIXELS.astype(np.float32), "images.npy: holds float32; images are uint8, from 0 to 255"),
        (PIXELS[..., :2], r"images.npy: has shape \[20, 6, 6, 2\]; images are"),
        (PIXELS[0, 0], r"images.npy: has shape \[6, 3\]"),
        (np.empty((0, 6, 6), np.uint8), "images.npy: holds no images"),
        (np.array([{"a": 1}]), "images.npy: is not an array that can be read: Object arrays"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, stored: Any, message: str) -> None:
    path = tmp_path / "images.npy"
    np.save(path, stored, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        data_of(path)


def test_several_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=PIXELS, y=PIXELS)
    with pytest.raises(DataError, match=r"a.npz: holds 2 arrays \(x, y\); give a file with the images alone"):
        read_images(tmp_path / "a.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken.npy").write_bytes(b"text")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none": "none: cannot be read: .*No such file",
        "text.txt": "text.txt: is no folder of images, no .npy or .npz file and no CIFAR archive",
        "broken.npy": "broken.npy: is not an array that can be read",
        "folder": "folder: holds no images in a format that Pillow knows, and no CIFAR batches",
    }.items():
        with pytest.raises(DataError, match=message):
            read_images(tmp_path / name)
    (tmp_path / "folder" / "broken.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"broken.png: is not an image that can be read"):
        read_images(tmp_path / "folder")[0]


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("called",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Malicious()}), "data_batch_1: is not a CIFAR batch: it would load builtins.print"),
        (pickle.dumps({b"labels": [1]}), r"has no uint8 array \[images, 3072\] called data"),
        (pickle.dumps({b"data": np.zeros((2, 100), np.uint8)}, protocol=2), "has no uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 3072))}, protocol=2), "has no uint8 array"),
        (pickle.dumps([1]), "has no uint8 array"),
        (b"text", "data_batch_1: is not a CIFAR batch"),
        (b"", "data_batch_1: is not a CIFAR batch"),
    ],
)
def test_other_pickles_are_refused_and_call_nothing(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path)
    assert capsys.readouterr().out == ""


def test_an_archive_of_something_else_is_refused(cifar: Path, tmp_path: Path) -> None:
    for batch in cifar.glob("data_batch_*"):
        batch.unlink()
    with pytest.raises(DataError, match=r"other.tar.gz: holds no training images of CIFAR-10 or CIFAR-100"):
        read_images(packed(cifar, tmp_path / "other.tar.gz"))


@pytest.mark.parametrize(("module", "call"), [("sklearn", "digits"), ("PIL", "folder")])
def test_a_missing_package_is_named(module: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module, *(m for m in sys.modules if m.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    package = {"sklearn": "scikit-learn", "PIL": "pillow"}[module]
    with pytest.raises(DataError, match=f"pip install {package}"):
        read_images(None if call == "digits" else tmp_path)


def test_what_the_model_cannot_take_is_refused(array: Path) -> None:
    with pytest.raises(DataError, match=r"images have 1 channel or 3, model.channels is 4"):
        data_of(array, channels=4)
    with pytest.raises(DataError, match=r"of 20 images none is left to train on; lower data.held_out"):
        data_of(array, held_out=0.96)
    with pytest.raises(DataError, match=r"no data is held out to evaluate on; set data.held_out"):
        data_of(array).held_out_batch(range(1))


# --- noise


def test_the_linear_schedule_is_the_published_one() -> None:
    """Ho, Jain & Abbeel: from 1 - 1e-4 down to almost nothing, alpha-bar of step 1000 being about 4e-5."""
    variances = signal_variances("linear", 1000)
    assert variances[0] == pytest.approx(1 - 1e-4)
    assert variances[-1] == pytest.approx(4.04e-5, rel=1e-2)
    assert variances[1] / variances[0] == pytest.approx(1 - (1e-4 + (0.02 - 1e-4) / 999))


def test_the_cosine_schedule_is_the_published_one() -> None:
    """Nichol & Dhariwal: half of the variance is left halfway, but for their offset; its last steps are clipped."""
    variances = signal_variances("cosine", 1000)
    assert variances[499] == pytest.approx(0.494, abs=2e-3)
    assert 0 < variances[-1] < 1e-6
    assert variances[-1] / variances[-2] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_noise_grows_from_step_to_step(schedule: Any, steps: int) -> None:
    variances = signal_variances(schedule, steps)
    assert variances.shape == (steps,)
    assert ((variances > 0) & (variances < 1)).all()
    assert (variances[1:] < variances[:-1]).all()
    assert steps < 20 or variances[-1] < 1e-3


def test_noisy_images_are_image_and_noise_by_their_variances() -> None:
    noising = Noising("linear", 20, seed=1)
    images = torch.rand(200, 3, 8, 8)
    noisy, steps, noise = noising(images, range(200), stream="training")
    left = signal_variances("linear", 20)[steps].view(-1, 1, 1, 1)
    assert torch.allclose(noisy, (left.sqrt() * images + (1 - left).sqrt() * noise).float(), atol=1e-6)
    assert noisy.dtype == noise.dtype == torch.float32
    assert set(steps.tolist()) == set(range(20))
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    # No two samples, pixels or channels share their noise.
    assert len(noise.unique()) > 0.999 * noise.numel()


def test_noise_depends_on_seed_stream_and_number_alone() -> None:
    images = torch.zeros(4, 1, 2, 2)

    def drawn(seed: int, stream: str, numbers: Any) -> tuple[torch.Tensor, ...]:
        return Noising("linear", 1000, seed=seed)(images[: len(numbers)], numbers, stream=stream)[1:]

    steps, noise = drawn(1, "training", range(4))
    for number in range(4):
        one_step, one_noise = drawn(1, "training", [number])
        assert torch.equal(one_step[0], steps[number])
        assert torch.equal(one_noise[0], noise[number])
    for other in (drawn(2, "training", range(4)), drawn(1, "held out", range(4)), drawn(1, "training", range(4, 8))):
        assert not torch.equal(other[0], steps)
        assert not torch.isin(other[1], noise).any()


# --- samples


def test_batches_are_the_same_on_every_grid(array: Path) -> None:
    data = data_of(array)
    (noisy, steps), noise = data.batch(range(16, 48))
    assert (noisy.shape, steps.shape, noise.shape) == ((32, 3, 6, 6), (32,), (32, 3, 6, 6))
    for part in (range(16, 20), range(20, 48)):
        (a, b), c = data_of(array).batch(part)
        rows = slice(part.start - 16, part.stop - 16)
        assert torch.equal(a, noisy[rows])
        assert torch.equal(b, steps[rows])
        assert torch.equal(c, noise[rows])
    (other, _), _ = data_of(array, seed=4).batch(range(16, 48))
    assert not torch.equal(other, noisy)


def images_in(data: ImageData, batch: Any) -> list[int]:
    """Which images are under the noise of a batch."""
    (noisy, steps), noise = batch
    left = signal_variances("linear", 50)[steps].view(-1, 1, 1, 1)
    clean = (noisy - (1 - left).sqrt() * noise) / left.sqrt()
    known = torch.stack([data.image(i) for i in range(20)])
    distances = torch.cdist(clean.flatten(1).double(), known.flatten(1).double())
    assert distances.min(1).values.max() < 1e-3
    return distances.argmin(1).tolist()


def test_held_out_images_are_the_last_and_never_trained_on(array: Path) -> None:
    data = data_of(array, held_out=0.26)
    assert (data.trained_images, data.held_out_images) == (14, 6)
    for epoch in range(2):
        batch = data.batch(range(14 * epoch, 14 * epoch + 14))
        assert sorted(images_in(data, batch)) == list(range(14))
    first = data.held_out_batch(range(12))
    assert images_in(data, first) == 2 * list(range(14, 20))
    # Evaluations are comparable: the same noise each time, another for each sample.
    assert torch.equal(data.held_out_batch(range(12))[1], first[1])
    assert not torch.equal(first[1][:6], first[1][6:])
    assert not torch.isin(first[1], data.batch(range(12))[1]).any()


def test_the_digest_tells_images_apart(tmp_path: Path) -> None:
    def digest(pixels: Any) -> str:
        np.save(tmp_path / "x.npy", pixels)
        return data_of(tmp_path / "x.npy").digest

    changed = PIXELS.copy()
    changed[19, 5, 5, 2] ^= 1
    assert digest(PIXELS) == digest(PIXELS.copy())
    assert len({digest(PIXELS), digest(changed), digest(PIXELS[:19]), digest(PIXELS.reshape(20, 3, 12, 3))}) == 4
    folder = tmp_path / "folder"
    folder.mkdir()
    digests = []
    for name, pixels in (("a.png", PIXELS[0]), ("a.png", PIXELS[1]), ("b.png", PIXELS[1])):
        for old in folder.iterdir():
            old.unlink()
        Image.fromarray(pixels).save(folder / name)
        digests.append(data_of(folder).digest)
    assert len(set(digests)) == 3


def test_the_data_of_a_run_follows_its_model(array: Path) -> None:
    unet = UNET.model_copy(update={"image_size": 6, "multipliers": (1, 2)})
    data = DataConfig(path=str(array))
    config = TrainConfig(model=unet, batch_size=2, microbatch_size=1, data=data, evaluation=EvaluationConfig(every=1))
    made = make_data(config)
    assert isinstance(made, ImageData)
    assert (made.trained_images, made.held_out_images) == (19, 1)
    (noisy, steps), _ = made.batch(range(2))
    assert noisy.shape == (2, 3, 6, 6)
    assert steps.max() < UNET.noise_steps
    assert isinstance(make_data(tiny(inter=1)), TextData)
