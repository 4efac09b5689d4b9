"""The data stages: the same bytes again, and every broken rule refused by name."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import data

HERE = Path(__file__).resolve().parents[1]


def stage(name: str, output: Path, *inputs: Path) -> int:
    words = [name, "--params", str(HERE / "params.yaml"), "--output", str(output)]
    return data.main([*words, *(["--input", *map(str, inputs)] if inputs else [])])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    assert stage("extract", tmp_path / "raw") == 0
    return tmp_path / "raw"


def test_the_stages_leave_disjoint_parts_of_both_classes_and_the_same_bytes_again(raw: Path, tmp_path: Path) -> None:
    assert stage("validate", tmp_path / "validated", raw) == 0
    for target in ("once", "again"):
        assert stage("prepare", tmp_path / target, raw, tmp_path / "validated") == 0
    seen: set[tuple[float, ...]] = set()
    for name in ("train.npz", "val.npz", "test.npz"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        with np.load(tmp_path / "once" / name) as arrays:
            instances, labels = arrays["instances"], arrays["labels"]
        assert instances.dtype == np.float32
        assert set(labels.tolist()) == {0, 1}
        points = {tuple(point) for point in instances.tolist()}
        assert not points & seen
        seen |= points


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [("id", 1, "unique"), ("x", float("nan"), "null"), ("y", 99.0, "in_range"), ("label", 2, "known_class")],
)
def test_a_broken_record_is_named_with_its_rule(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, value: float, rule: str
) -> None:
    table = pd.read_csv(raw / data.FILE)
    table.loc[0, column] = value
    table.to_csv(raw / data.FILE, index=False)
    assert stage("validate", tmp_path / "validated", raw) == 1
    told = capsys.readouterr().err
    assert f"record 0, column {column}" in told
    assert rule in told


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "whole_file"),
        ("id,x,y,label\n1,0.5,0.5,0\n", "enough_records"),
        ("id,x,y,label\n" + "".join(f"{i},0.1,0.1,0\n" for i in range(50)), "no_empty_class"),
        ("id,x,label\n1,0.5,0\n", "column_in_dataframe"),
    ],
    ids=["empty", "one row", "one class", "no column y"],
)
def test_a_broken_file_is_refused(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, rule: str
) -> None:
    (raw / data.FILE).write_text(content)
    assert stage("validate", tmp_path / "validated", raw) == 1
    assert rule in capsys.readouterr().err


def test_a_file_changed_after_validation_is_not_prepared(raw: Path, tmp_path: Path) -> None:
    assert stage("validate", tmp_path / "validated", raw) == 0
    with (raw / data.FILE).open("a") as file:
        file.write("9999,0.5,0.5,0\n")
    assert stage("prepare", tmp_path / "prepared", raw, tmp_path / "validated") == 1
