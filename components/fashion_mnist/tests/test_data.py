"""The data stages on made-up IDX files; what `validate` must refuse is in test_bad_data.py."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import data

PARAMS = "source: {source}\nlimit: {limit}\nvalidation: {{share: 0.2, seed: 3}}\n"


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 100), ("t10k", 40)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        packed = gzip.compress(idx(images))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(packed)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return folder


def run(folder: Path, source: Path, limit: str = "null") -> Path:
    params = folder / "params.yaml"
    params.write_text(PARAMS.format(source=source, limit=limit))
    stages = {"extract": [], "validate": ["raw"], "prepare": ["raw", "validate"]}
    for stage, inputs in stages.items():
        output = folder / {"extract": "raw"}.get(stage, stage)
        given = [str(folder / name) for name in inputs]
        assert data.main([stage, "--params", str(params), "--input", *given, "--output", str(output)]) == 0
    return folder / "prepare"


def test_the_same_input_gives_the_same_bytes(tmp_path, source):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = run(tmp_path / "one", source), run(tmp_path / "two", source)
    assert sorted(path.name for path in one.iterdir()) == ["test.npz", "train.npz", "val.npz"]
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_every_class_is_held_back_in_the_same_share(tmp_path, source):
    with np.load(run(tmp_path, source) / "val.npz") as arrays:
        assert arrays["instances"].shape == (20, 28, 28)
        assert arrays["instances"].dtype == np.uint8
        assert np.bincount(arrays["labels"]).tolist() == [2] * 10


def test_a_limit_thins_every_part_alike(tmp_path, source):
    prepared = run(tmp_path, source, limit="50")
    sizes = {}
    for path in prepared.iterdir():
        with np.load(path) as arrays:
            sizes[path.stem] = len(arrays["labels"])
    assert sizes == {"train": 40, "val": 10, "test": 20}


def test_the_variable_wins_over_the_parameter(tmp_path, source, monkeypatch):
    monkeypatch.setenv("TORCHRELAY_DATA", str(source))
    assert run(tmp_path, Path("nowhere")).is_dir()
    assert json.loads((tmp_path / "validate" / "validation.json").read_text())["records"] == {"train": 100, "test": 40}


def test_no_source_names_the_three_ways(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError("out of reach")

    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)
    monkeypatch.setattr(data, "from_url", refuse)
    monkeypatch.setattr(data, "from_debian", refuse)
    params = tmp_path / "params.yaml"
    params.write_text(PARAMS.format(source="auto", limit="null"))
    assert data.main(["extract", "--params", str(params), "--output", str(tmp_path / "raw")]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in ("url: out of reach", "(1)", "(2)", "(3)", "next:     TORCHRELAY_DATA="))


def test_other_content_from_a_published_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        data.keep_published("t10k-labels-idx1-ubyte", b"something else", tmp_path)
    assert not list(tmp_path.iterdir())
