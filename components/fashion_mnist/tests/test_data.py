"""The data stages on made-up IDX files; what `validate` must refuse is in test_bad_data.py."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
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


def told_source(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "source.json").read_text()))


def test_a_folder_is_named_as_the_source_beside_the_files(tmp_path, source):
    run(tmp_path, source)
    files = json.loads((tmp_path / "validate" / "validation.json").read_text())["files"]
    assert told_source(tmp_path) == {"source": str(source), "files": files}
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == sorted(data.PUBLISHED)


@pytest.fixture
def published(monkeypatch) -> dict[str, bytes]:
    """Four small files in place of the published ones, packed."""
    packed = {name: gzip.compress(name.encode(), mtime=0) for name in data.PUBLISHED}
    sums = {
        name: (hashlib.md5(content).hexdigest(), hashlib.sha256(name.encode()).hexdigest())
        for name, content in packed.items()
    }
    monkeypatch.setattr(data, "PUBLISHED", sums)
    monkeypatch.delenv("TORCHRELAY_DATA", raising=False)
    return packed


def extract(folder: Path, source: str) -> int:
    params = folder / "params.yaml"
    params.write_text(PARAMS.format(source=source, limit="null"))
    return int(data.main(["extract", "--params", str(params), "--output", str(folder / "raw")]))


def test_the_authors_address_is_named_as_the_source(tmp_path, published, monkeypatch):
    monkeypatch.setattr(data, "download", lambda url: published[url.rsplit("/", 1)[1].removesuffix(".gz")])
    assert extract(tmp_path, "auto") == 0
    assert told_source(tmp_path)["source"] == data.URL
    assert (tmp_path / "raw" / "t10k-labels-idx1-ubyte").read_bytes() == b"t10k-labels-idx1-ubyte"


def test_files_that_are_in_place_keep_their_source(tmp_path, published, monkeypatch):
    monkeypatch.setattr(data, "download", lambda url: published[url.rsplit("/", 1)[1].removesuffix(".gz")])
    assert extract(tmp_path, "url") == extract(tmp_path, "debian") == 0
    assert told_source(tmp_path)["source"] == data.URL


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb to make a package: apt-get install dpkg")
def test_debians_package_is_named_as_the_source_without_a_password(tmp_path, published, monkeypatch, capsys):
    """A real package of the small files; only apt-get is a script that says and copies, slowly, what apt would."""
    monkeypatch.setattr(data, "PULSE_S", 0.1)
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN").chmod(0o755)
    (tree / "DEBIAN" / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: t\n"
    )
    (tree / "datasets").mkdir()
    for name, content in published.items():
        (tree / "datasets" / f"{name}.gz").write_bytes(content)
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "package.deb"], check=True, capture_output=True)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "apt-get"
    script.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        "*--print-uris*) echo \"'https://me:secret@mirror.example.org/d/package.deb' package.deb 1 SHA256:0\" ;;\n"
        f"*) cp {tmp_path}/package.deb . && sleep 0.5 ;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert extract(tmp_path, "debian") == 0
    assert told_source(tmp_path)["source"] == "https://mirror.example.org/d/package.deb"
    assert "extract: apt-get download 0.0 MB so far, 0 s\n" in capsys.readouterr().out


def test_an_apt_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PULSE_S", 0.05)
    monkeypatch.setattr(data, "APT_S", 0.1)
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(OSError, match="is not done after 0 s"):
        data.apt_download(tmp_path)


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
