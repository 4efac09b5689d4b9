"""Broken Fashion-MNIST files, one rule at a time: refused before any training, with file, record or column and rule."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data

Files = dict[str, bytes | None]
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
CODES = {"uint8": 0x08, ">i4": 0x0C, ">f4": 0x0D}


def idx(values: np.ndarray, kind: str = "uint8") -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, CODES[kind], values.ndim]) + sizes + values.astype(kind).tobytes()


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


TRAIN, TEST = images(60, 1), images(30, 2)
CLASSES = np.arange(60, dtype=np.uint8) % 10


def good() -> Files:
    return {
        IMAGES: idx(TRAIN),
        LABELS: idx(CLASSES),
        TEST_IMAGES: idx(TEST),
        TEST_LABELS: idx(CLASSES[:30]),
    }


def changed(values: np.ndarray, place: object, value: object, kind: str = "uint8") -> np.ndarray:
    copy = values.astype(kind)
    copy[place] = value
    return copy


def repeated() -> np.ndarray:
    return changed(TRAIN, 7, TRAIN[3])


CASES: dict[str, tuple[Files, tuple[str, ...]]] = {
    "truncated images": ({IMAGES: idx(TRAIN)[:-100]}, (IMAGES, "rule whole_file", "bytes")),
    "empty file": ({LABELS: b""}, (LABELS, "0 bytes", "rule not_empty")),
    "not an IDX file": ({LABELS: b"label\n1\n2\n"}, (LABELS, "rule idx_format")),
    "other shape": ({IMAGES: idx(images(60, 1)[:, :, :27])}, (IMAGES, "(28, 27)", "rule shape: (28, 28)")),
    "other dimensions": ({LABELS: idx(CLASSES.reshape(30, 2))}, (LABELS, "2 dimensions", "rule shape")),
    "other element type": ({LABELS: idx(CLASSES, ">i4")}, ("train, column label", "int32", "rule dtype: uint8")),
    "NaN pixel": (
        {IMAGES: idx(changed(TRAIN, (4, 2, 2), np.nan, ">f4"), ">f4")},
        ("column image: element type float32", "train[4], column mean: nan", "rule no_nan"),
    ),
    "NaN label": (
        {LABELS: idx(changed(CLASSES, 9, np.nan, ">f4"), ">f4")},
        ("train[9], column label: nan", "rule no_nan"),
    ),
    "pixel out of range": (
        {IMAGES: idx(changed(TRAIN, (4, 2, 2), 300, ">i4"), ">i4")},
        ("train[4], column most: 300", "rule byte"),
    ),
    "label out of range": (
        {LABELS: idx(changed(CLASSES, 17, 10))},
        ("train[17], column label: 10", "rule class_index"),
    ),
    "empty class": (
        {TEST_LABELS: idx(np.where(CLASSES[:30] == 4, 3, CLASSES[:30]))},
        ("test, column label: class 4 has no record", "rule no_empty_class"),
    ),
    "duplicate key": (
        {IMAGES: idx(repeated())},
        ("train[3], column image: the same pixels as train[7]", "rule unique_key"),
    ),
    "test image in training": ({IMAGES: idx(changed(TRAIN, 5, TEST[2]))}, ("train[5]", "test[2]", "rule unique_key")),
    "no records": (
        {IMAGES: idx(TRAIN[:0]), LABELS: idx(CLASSES[:0])},
        ("train: 0 records", "rule enough_records: at least 20"),
    ),
    "one row": (
        {IMAGES: idx(TRAIN[:1]), LABELS: idx(CLASSES[:1])},
        ("train: 1 records", "rule enough_records: at least 20"),
    ),
    "a label too few": ({LABELS: idx(CLASSES[:-1])}, ("60 images, 59 labels", "rule same_count")),
}


def stage(folder: Path, name: str, inputs: tuple[str, ...], output: str) -> int:
    given = [str(folder / part) for part in inputs]
    params = str(folder / "params.yaml")
    return int(data.main([name, "--params", params, "--input", *given, "--output", str(folder / output)]))


def place(folder: Path, files: Files) -> None:
    """A source folder with these files, and parameters that name it."""
    (folder / "source").mkdir()
    for name, content in files.items():
        if content is not None:
            (folder / "source" / name).write_bytes(content)
    (folder / "params.yaml").write_text(
        f"source: {folder / 'source'}\nlimit: null\nvalidation: {{share: 0.1, seed: 1}}\n"
    )


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch) -> Callable[[Files], str]:
    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)

    def judge(files: Files) -> str:
        place(tmp_path, good() | files)
        assert stage(tmp_path, "extract", (), "raw") == 0
        assert stage(tmp_path, "validate", ("raw",), "validated") == 1
        assert stage(tmp_path, "prepare", ("raw", "validated"), "prepared") == 1
        assert not (tmp_path / "prepared").exists()
        return str(capsys.readouterr().err)

    return judge


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_named(refused, tmp_path, case):
    files, words = CASES[case]
    told = refused(files).splitlines()
    for word in words:
        assert word in told[0]
    assert told[0].startswith("error: ")
    assert told[1].startswith("  expected: ")
    assert told[2].startswith("  next:     ")
    report = json.loads((tmp_path / "validated" / "validation.json").read_text())
    assert report["verdict"] == "refused"
    assert any(words[-1] in breach for breach in report["breaches"])


def test_many_breaches_are_counted_not_listed(refused):
    told = refused({LABELS: idx(CLASSES + 100)})
    assert "train[0], column label: 100" in told
    assert "and 65 more" in told.splitlines()[0]


def test_thousands_of_repeated_images_are_explained_in_seconds():
    count = 20_000
    seen = np.zeros((count, 28, 28), dtype=np.uint8)
    seen[:, 0, 0], seen[:, 0, 1] = np.arange(count) // 4 % 256, np.arange(count) // 4 // 256
    facts = data.facts_table({"train": (seen, np.zeros(count, dtype=np.uint8))})
    began = time.process_time()
    breaches = data.broken_records(facts)
    assert time.process_time() - began < 10
    assert len(breaches) == count
    rule = data.EXPLAINED["field_uniqueness"]
    assert f"train[2], column image: the same pixels as train[0], train[1], train[3] (rule {rule})" in breaches


def test_good_files_pass(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)
    place(tmp_path, good())
    assert stage(tmp_path, "extract", (), "raw") == 0
    assert stage(tmp_path, "validate", ("raw",), "validated") == 0
    assert stage(tmp_path, "prepare", ("raw", "validated"), "prepared") == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({IMAGES: None}, ("has neither", IMAGES, "(1)", "(2)", "(3)")),
        ({IMAGES: None, f"{IMAGES}.gz": gzip.compress(idx(TRAIN))[:-50]}, (f"{IMAGES}.gz", "rule whole_file")),
        ({IMAGES: None, f"{IMAGES}.gz": b"not gzip"}, (f"{IMAGES}.gz", "rule whole_file")),
    ],
    ids=["missing file", "truncated gzip", "no gzip"],
)
def test_a_source_that_lacks_a_whole_file_is_refused(tmp_path, capsys, monkeypatch, files, words):
    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)
    place(tmp_path, good() | files)
    assert stage(tmp_path, "extract", (), "raw") == 1
    told = capsys.readouterr().err
    for word in words:
        assert word in told


def test_raw_files_changed_after_validation_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)
    place(tmp_path, good())
    assert stage(tmp_path, "extract", (), "raw") == 0
    assert stage(tmp_path, "validate", ("raw",), "validated") == 0
    (tmp_path / "raw" / LABELS).write_bytes(idx(CLASSES[::-1]))
    assert stage(tmp_path, "prepare", ("raw", "validated"), "prepared") == 1
    assert "does not accept these files" in capsys.readouterr().err
