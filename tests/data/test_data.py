"""Text as tokens: what is read, what is refused, and which rank sees which sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from axonn.config.train_config import DataConfig, EvaluationConfig, TrainConfig
from axonn.data.text import TextData, read_tokens, standard_library_text
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine
from axonn.errors import DataError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.models.registry import make_data


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """401 different-looking bytes: 40 windows of 10 tokens."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes((7 * i + i // 256) % 256 for i in range(401)))
    return path


def test_a_text_file_is_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("aé\n\0".encode())
    assert read_tokens(path).tolist() == [97, 0xC3, 0xA9, 10, 0]


def test_a_bin_file_is_read_as_uint16(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    tokens = [0, 1, 256, 50256, 65535] * 3
    np.array(tokens, dtype="<u2").tofile(path)
    assert read_tokens(path).tolist() == tokens
    data = TextData(path, seq_len=4, vocab=65536, seed=0)
    assert data.windows == 3
    assert sorted(data.sample(i)[0] for i in range(3)) == sorted(tokens[0:12:4])


def test_without_a_path_the_standard_library_is_read() -> None:
    text = standard_library_text()
    assert len(text) > 1_000_000
    assert b"class OrderedDict(dict)" in text
    assert TextData(None, seq_len=64, vocab=256, seed=0).windows == (len(text) - 1) // 64


@pytest.mark.parametrize(
    ("name", "content", "vocab", "message"),
    [
        ("odd.bin", b"\1\2\3", 9, "odd.bin: holds an odd number of bytes, but a .bin file holds uint16 tokens"),
        ("short.txt", b"1234", 256, "short.txt: 4 tokens are fewer than seq_len . 1 = 5"),
        ("short.bin", b"1234", 65536, "short.bin: 2 tokens are fewer"),
        ("empty.txt", b"", 256, "empty.txt: 0 tokens are fewer"),
        ("empty.bin", b"", 256, "empty.bin: 0 tokens are fewer"),
        ("large.txt", b"abcdez", 122, "large.txt: token 122 is outside the vocabulary of 122; raise model.vocab"),
        ("large.bin", b"\0\0\0\1" * 5, 256, "large.bin: token 256 is outside the vocabulary of 256"),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, name: str, content: bytes, vocab: int, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        TextData(path, seq_len=4, vocab=vocab, seed=0)


@pytest.mark.parametrize("suffix", [".txt", ".bin"])
def test_data_that_cannot_be_read_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    for path in (tmp_path / f"none{suffix}", folder):
        with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
            read_tokens(path)


def test_just_enough_data_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abcde")
    data = TextData(path, seq_len=4, vocab=256, seed=0)
    inputs, targets = data.batch(range(3))
    assert inputs.tolist() == [list(b"abcd")] * 3
    assert targets.tolist() == [list(b"bcde")] * 3


def test_each_window_comes_once_per_epoch_in_another_order(text: Path) -> None:
    data = TextData(text, seq_len=10, vocab=256, seed=3)
    tokens = data.tokens
    windows = sorted(tokens[i * 10 : i * 10 + 11].tolist() for i in range(40))
    epochs = [[data.sample(epoch * 40 + i).tolist() for i in range(40)] for epoch in range(3)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_sample_depends_on_seed_and_number_alone(text: Path) -> None:
    data = TextData(text, seq_len=10, vocab=256, seed=3)
    forwards = [data.sample(i).tolist() for i in range(100)]
    again = TextData(text, seq_len=10, vocab=256, seed=3)
    assert [again.sample(i).tolist() for i in reversed(range(100))] == forwards[::-1]
    other = TextData(text, seq_len=10, vocab=256, seed=4)
    assert [other.sample(i).tolist() for i in range(100)] != forwards


@pytest.mark.parametrize(("held_out", "windows"), [(0.0, 0), (0.01, 1), (0.25, 10), (0.26, 11), (0.97, 39)])
def test_held_out_windows_are_the_last_and_never_trained_on(text: Path, held_out: float, windows: int) -> None:
    data = TextData(text, seq_len=10, vocab=256, seed=3, held_out=held_out)
    assert (data.held_out_windows, data.windows) == (windows, 40 - windows)
    every = [data.tokens[i * 10 : i * 10 + 11].tolist() for i in range(40)]
    for epoch in range(2):
        trained = [data.sample(epoch * data.windows + i).tolist() for i in range(data.windows)]
        assert sorted(trained) == sorted(every[: 40 - windows])
    if windows:
        # In their order, and from the first again.
        found = [data.held_out_sample(i).tolist() for i in range(2 * windows)]
        assert found == 2 * every[40 - windows :]
        inputs, targets = data.held_out_batch(range(1))
        assert (inputs[0].tolist(), targets[0].tolist()) == (found[0][:-1], found[0][1:])


def test_evaluation_holds_data_out_by_itself(text: Path) -> None:
    model = GPTConfig(name="t", layers=1, hidden=4, heads=1, seq_len=10, vocab=256)

    def held_out(evaluation: EvaluationConfig | None, part: float) -> int:
        data = DataConfig(path=str(text), held_out=part)
        config = TrainConfig(model=model, batch_size=1, microbatch_size=1, data=data, evaluation=evaluation)
        return make_data(config).held_out_windows

    assert held_out(None, 0.0) == 0
    assert held_out(EvaluationConfig(every=1), 0.0) == 2
    assert held_out(EvaluationConfig(every=1), 0.2) == 8
    assert held_out(None, 0.2) == 8


def test_what_cannot_be_held_out_is_refused(text: Path) -> None:
    with pytest.raises(DataError, match=r"of 40 windows of 10 tokens none is left to train on; lower data.held_out"):
        TextData(text, seq_len=10, vocab=256, seed=0, held_out=0.98)
    with pytest.raises(DataError, match=r"no data is held out to evaluate on; set data.held_out"):
        TextData(text, seq_len=10, vocab=256, seed=0).held_out_sample(0)


def test_targets_are_the_inputs_one_token_on(text: Path) -> None:
    inputs, targets = TextData(text, seq_len=10, vocab=256, seed=0).batch(range(50, 58))
    assert inputs.shape == targets.shape == (8, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_digest_tells_texts_apart(text: Path, tmp_path: Path) -> None:
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    copy.write_bytes(text.read_bytes())
    changed.write_bytes(text.read_bytes()[:-1] + b"\0")
    digests = [TextData(path, seq_len=10, vocab=256, seed=0).digest for path in (text, copy, changed)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("data", "inter"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)])
def test_every_grid_reads_the_same_batches(data: int, inter: int) -> None:
    """The shards of the replicas are the batch, in order, and the stages of one pipeline agree on theirs."""
    grid = ProcessGrid(data=data, inter=inter)
    world = InProcessWorld(grid.size)
    model = GPT(GPTConfig(name="t", layers=2, hidden=4, heads=1, seq_len=4, vocab=8))

    def shards(rank: int) -> list[range]:
        engine = Engine(
            model,
            grid=grid,
            rank=rank,
            batch_size=8,
            microbatch_size=1,
            transport=InProcessTransport(world, rank),
            collectives=InProcessCollectives(world, grid, rank),
        )
        return [engine.shard(step) for step in range(3)]

    by_rank = world.run(shards)
    for step in range(3):
        for stage in range(inter):
            ranges = [by_rank[grid.rank(data=d, inter=stage)][step] for d in range(data)]
            assert [number for r in ranges for number in r] == list(range(8 * step, 8 * step + 8))
