"""Loaders, on tiny files in the published formats, whole and damaged."""

import gzip
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphsplit as gs
from graphsplit.errors import InputError, LoadError, UserError


def idx(values: np.ndarray, kind: int = 0x08) -> bytes:
    """An array in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + values.tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([7, 0, 9], np.uint8)


def write_mnist(folder: Path, packed: bool = False, prefix: str = "train") -> None:
    for name, values in (("images-idx3-ubyte", IMAGES), ("labels-idx1-ubyte", LABELS)):
        content = idx(values)
        (folder / f"{prefix}-{name}{'.gz' if packed else ''}").write_bytes(
            gzip.compress(content) if packed else content
        )


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, packed)
    images, labels = gs.data.mnist(tmp_path)
    assert images.shape == (3, 1, 4, 5) and images.dtype == torch.float32
    assert torch.equal(images[:, 0] * 255, torch.from_numpy(IMAGES).float())
    assert labels.tolist() == [7, 0, 9] and labels.dtype == torch.int64
    with pytest.raises(LoadError, match="t10k-images-idx3-ubyte"):
        gs.data.mnist(tmp_path, train=False)


def test_names_with_a_dot(tmp_path: Path) -> None:
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(LABELS))
    assert gs.data.mnist(tmp_path)[1].tolist() == [7, 0, 9]


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True, prefix="emnist-letters-train")
    images, _ = gs.data.mnist(tmp_path, split="letters")
    assert torch.equal(images[0, 0] * 255, torch.from_numpy(IMAGES[0].T.copy()).float())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")],
)
def test_every_type_of_idx(tmp_path: Path, kind: int, dtype: str) -> None:
    values = np.array([[1, 2, 3], [-4 if dtype[-2] != "u" else 4, 5, 100]]).astype(dtype)
    path = tmp_path / "values"
    path.write_bytes(idx(values, kind))
    assert np.array_equal(gs.data.read_idx(path).numpy(), values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "has 75 bytes, its header of 3 dimensions .* says 76"),
        (lambda content: content + b"\0", "has 77 bytes"),
        (lambda content: content[:9], "has 9 bytes"),
        (lambda content: b"", "is no IDX file: it begins with nothing"),
        (lambda content: b"<html>", "is no IDX file: it begins with 3c68746d"),
        (lambda content: b"\0\0\x07" + content[3:], "is no IDX file"),
        (lambda content: gzip.compress(content)[:-6], "is a damaged gzip file"),
        (lambda content: gzip.compress(content)[:12] + bytes(30), "is a damaged gzip file"),
    ],
)
def test_damaged_idx(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx(IMAGES)))
    with pytest.raises(LoadError, match=message) as caught:
        gs.data.read_idx(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:2]))
    with pytest.raises(LoadError, match="3 images, train-labels-idx1-ubyte 2 labels"):
        gs.data.mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(LoadError, match=r"expected bytes \[N, H, W\]"):
        gs.data.mnist(tmp_path)
    with pytest.raises(LoadError, match="there is no folder"):
        gs.data.mnist(tmp_path / "nowhere")


def records(labels: list[list[int]]) -> bytes:
    """Records of CIFAR: labels, then pixels that count up."""
    pixels = (np.arange(3072) % 251).astype(np.uint8).tobytes()
    return b"".join(bytes(label) + pixels for label in labels)


def test_cifar10(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records([[number], [0]]))
    (tmp_path / "test_batch.bin").write_bytes(records([[9]]))
    images, labels = gs.data.cifar10(tmp_path)
    assert images.shape == (10, 3, 32, 32) and labels.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert images[0, 0, 0, :3].mul(255).tolist() == [0, 1, 2]
    assert round(float(images[0, 1, 0, 0] * 255)) == 1024 % 251, "channels come first"
    assert gs.data.cifar10(tmp_path, train=False)[1].tolist() == [9]
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(LoadError, match=r"holds no data_batch_4\.bin"):
        gs.data.cifar10(tmp_path)


def test_cifar100(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(records([[19, 99], [3, 4]]))
    assert gs.data.cifar100(tmp_path)[1].tolist() == [99, 4]
    assert gs.data.cifar100(tmp_path, coarse=True)[1].tolist() == [19, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (records([[1]])[:-1], "no multiple of a record's 3,073"),
        (b"", "has 0 bytes"),
        (records([[1], [10]]), "has a label 10, expected less than 10"),
    ],
)
def test_damaged_cifar(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(LoadError, match=message):
        gs.data.cifar10(tmp_path, train=False)


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("äb" * 50, encoding="utf-8")
    found = gs.data.text(path)
    assert found.symbols == ("b", "ä")
    assert [len(part) for part in (found.train, found.valid, found.test)] == [90, 5, 5]
    assert found.decode(found.train[:4]) == "äbäb"
    packed = tmp_path / "poem.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert torch.equal(gs.data.text(packed).train, found.train)


def test_penn_treebank(tmp_path: Path) -> None:
    for name, content in (("train", "a b <unk> \n"), ("valid", "b a\n"), ("test", "c\n")):
        (tmp_path / f"ptb.{name}.txt").write_text(content)
    found = gs.data.text(tmp_path)
    assert found.decode(found.test) == "c\n" and found.decode(found.train) == "a b <unk> \n"
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(LoadError, match=r"ptb\.valid\.txt"):
        gs.data.text(tmp_path)


def test_damaged_text(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="there is no file"):
        gs.data.text(tmp_path / "none.txt")
    path = tmp_path / "enwik8"
    path.write_bytes(b"<mediawiki>")
    with pytest.raises(LoadError, match="has 11 bytes, enwik8 has 100,000,000"):
        gs.data.text(path)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(LoadError, match="byte 3 is 0xe9"):
        gs.data.text(path)
    path.write_bytes(b"short")
    with pytest.raises(LoadError, match="too little text"):
        gs.data.text(path)


def test_enwik8_is_read_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphsplit.data.corpora.ENWIK8_BYTES", 200)
    path = tmp_path / "enwik8.gz"
    path.write_bytes(gzip.compress(("é" * 100).encode()))
    found = gs.data.text(path)
    assert len(found.train) == 180 and len(found.test) == 10 and len(found.symbols) == 2


def test_standard_library() -> None:
    found = gs.data.standard_library(10_000)
    assert sum(len(part) for part in (found.train, found.valid, found.test)) == 10_000
    assert set(found.symbols) <= {chr(code) for code in range(32, 127)} | {"\n", "\t"}
    assert "import" in found.decode(found.train)
    assert torch.equal(found.train, gs.data.standard_library(10_000).train)


def test_windows() -> None:
    pairs = gs.data.windows(torch.arange(14), length=3, batch=3)
    assert [tuple(x.shape) for x, _ in pairs] == [(3, 3), (1, 3)]
    assert pairs[0][0][1].tolist() == [3, 4, 5] and pairs[0][1][1].tolist() == [4, 5, 6]
    assert pairs[-1][1].tolist() == [[10, 11, 12]]
    with pytest.raises(LoadError, match="no window of 20"):
        gs.data.windows(torch.arange(20), 20, 1)


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra 'data')")
    train, labels = gs.data.digits()
    test, test_labels = gs.data.digits(train=False)
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8)
    assert float(train.min()) >= 0 and float(train.max()) == 1
    assert torch.bincount(torch.cat([labels, test_labels])).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert not (train[:, None] == test[None]).flatten(2).all(2).any(), "no image is in both"
    assert gs.data.digits(size=28)[0].shape == (1437, 1, 28, 28)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(LoadError, match="scikit-learn, which is not installed") as caught:
        gs.data.digits()
    assert "graphsplit[data]" in str(caught.value)


# -- as many of each class -----------------------------------------------------------------------------------

LABELLED = torch.tensor([2, 0, 0, 1, 2, 0, 1, 0, 2, 1, 0, 1])


def test_balanced_takes_as_many_of_each_class_in_turns() -> None:
    x = torch.arange(12.0)[:, None]
    inputs, targets = gs.data.balanced((x, LABELLED), 2)
    assert targets.tolist() == [0, 1, 2, 0, 1, 2], "each half has as many of each"
    places = inputs[:, 0].long()
    assert LABELLED[places].tolist() == targets.tolist() and len(places.unique()) == 6
    again, _ = gs.data.balanced((x, LABELLED), 2)
    other, _ = gs.data.balanced((x, LABELLED), 2, seed=1)
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)


def test_balanced_reads_batches_until_there_are_enough() -> None:
    read = []

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for start in range(0, 12, 4):
            read.append(start)
            x = torch.arange(start, start + 4)
            yield {"x": x, "mask": x > 3}, LABELLED[start : start + 4]

    inputs, targets = gs.data.balanced(batches(), 1, classes=3)
    assert read == [0] and inputs["x"].tolist() == [1, 3, 0] and targets.tolist() == [0, 1, 2]
    inputs, _ = gs.data.balanced(batches(), 2)
    assert read[1:] == [0, 4, 8] and inputs["x"].tolist() == [1, 3, 0, 2, 6, 4]
    assert inputs["mask"].tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ((torch.randn(12, 3), LABELLED), {"per_class": 4}, InputError, r"fewer than 4 examples of 1 of 3 .* 2 \(3\)"),
        ((torch.randn(12, 3), LABELLED), {"classes": 4, "per_class": 1}, InputError, r"1 of 4 classes: 3 \(0\)"),
        ((torch.randn(12, 3), LABELLED), {"classes": 2}, InputError, "a target is 2, expected 0 to 1"),
        ((torch.randn(12, 3), torch.randn(12)), {}, InputError, r"of shape \[12\], expected class numbers"),
        ((torch.randn(3, 3), LABELLED), {}, InputError, r"shape \[3, 3\] beside 12 targets"),
        ([], {}, InputError, "gave no example"),
        ((torch.randn(12, 3), LABELLED), {"per_class": 0}, UserError, "per_class is 0"),
        ((torch.randn(12, 3), LABELLED), {"classes": 2.0}, UserError, r"classes is 2\.0"),
        ([1, 2, 3], {}, UserError, "a batch is a int"),
    ],
)  # fmt: skip
def test_balanced_refuses(data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gs.data.balanced(data, **options)
