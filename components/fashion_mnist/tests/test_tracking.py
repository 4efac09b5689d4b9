"""What a run says of its data and its environment, where it is not what it is on this machine."""

import json
import sys
from pathlib import Path

import pytest

import tracking

FILES = {"train-images-idx3-ubyte": "0a", "train-labels-idx1-ubyte": "1b"}


def lay_out(folder: Path, source: str, files: dict[str, str]) -> Path:
    """What the data stages leave: `source.json` of these files, and a report that accepted FILES."""
    (folder / "validated").mkdir()
    (folder / "validated" / "validation.json").write_text(json.dumps({"files": FILES}))
    (folder / "source.json").write_text(json.dumps({"source": source, "files": files}))
    return folder / "prepared"


def test_data_from_the_web_have_its_address_as_source(tmp_path):
    address = "http://mirror.example/debian/pool/main/d/dataset-fashion-mnist/x_all.deb"
    assert tracking.describe_source(lay_out(tmp_path, address, FILES)) == ("http", {"url": address})


def test_data_from_a_folder_have_it_as_source(tmp_path):
    assert tracking.describe_source(lay_out(tmp_path, "/srv/mine", FILES)) == ("local", {"uri": "/srv/mine"})


def test_a_source_of_other_files_is_not_believed(tmp_path):
    prepared = lay_out(tmp_path, "/srv/mine", FILES | {"train-labels-idx1-ubyte": "2c"})
    assert tracking.describe_source(prepared) == ("local", {"uri": str(prepared)})


def test_prepared_data_that_nobody_tells_of_are_their_own_source(tmp_path):
    assert tracking.describe_source(tmp_path) == ("local", {"uri": str(tmp_path)})


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_environment_is_the_one_beside_the_interpreter_and_so_are_the_requirements(tmp_path, monkeypatch, variant):
    described = {"name": f"py311-{variant}-0123456789ab", "variant": variant, "lock_sha256": "0" * 64}
    (tmp_path / "environment.json").write_text(json.dumps(described))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert tracking.running_environment() == described
    pins = tracking.pinned_requirements(variant)
    assert any(pin.startswith("nvidia-") for pin in pins) == (variant == "cuda")
    assert any(pin.startswith("torch==") for pin in pins)
    assert not [pin for pin in pins if "--hash" in pin or "\\" in pin]


def test_an_environment_made_by_hand_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(tracking.torch.version, "cuda", "13.0")
    assert tracking.running_environment() == {"name": str(tmp_path), "variant": "cuda"}
