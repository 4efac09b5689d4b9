"""The data stages of fashion_mnist, which DVC runs one by one: extract, validate, prepare.

    python data.py extract  --params params.yaml --output RAW
    python data.py validate --params params.yaml --input RAW --output VALIDATED
    python data.py prepare  --params params.yaml --input RAW VALIDATED --output PREPARED

An error is three lines on stderr (found, expected, next) and exit code 1. Nothing here knows torch or MLflow.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CLASSES = 10
SIDE = 28
NAMED_BREACHES = 5
NAMED_TWINS = 3
PULSE_S = 5
APT_S = 300
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
NEXT = "mend the source of the data, then: make deploy-dev COMPONENT=fashion_mnist"

# The MD5s are those of the gzip files in the authors' README. Debian's gzip headers leave out name and time, so its
# files have other MD5s; with those two put back they have the authors' (tried for all four). The sha256 is of the
# content.
PUBLISHED = {
    "train-images-idx3-ubyte": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte": (
        "25c81989df183df01b3e8a0aad5dffbe",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte": (
        "bef4ecab320f06d8554ea6380940ec79",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte": (
        "bb300cfdad3c16e7a12a480ee83cd310",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
SPLITS = {"train": "train", "test": "t10k"}

# The element types of the IDX format, by the third byte of a file.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

THREE_WAYS = (
    f"one of three ways: (1) a network that reaches {URL}; (2) a Debian or Ubuntu machine where"
    f" `apt-get download {DEBIAN_PACKAGE}` works; (3) a folder with {', '.join(PUBLISHED)}, gzipped or not"
)


class BadDataError(Exception):
    """What was found, what was expected, and what to type next."""

    def __init__(self, found: str, expected: str, next_command: str = NEXT) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  next:     {next_command}")


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(line, flush=True)


# --- extract ---------------------------------------------------------------------------------------------------------


def extract(params: dict[str, Any], output: Path) -> None:
    """Bring the four IDX files, unpacked, so that every source gives the same bytes; `source.json` says which it was.

    A killed extract is resumed: files that are in place and have the published content are not brought again.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = os.environ.get("TORCHRELAY_DATA") or str(params["source"])
    if source in ("auto", "url", "debian"):
        used = bring_published(source, output)
    else:
        used = bring_folder(Path(source).expanduser(), output)
    for stray in set(output.iterdir()) - {output / name for name in PUBLISHED}:
        stray.unlink()
    if used:
        keep_source(used, output)


def keep_source(used: str, output: Path) -> None:
    """Say beside the folder where the files in it came from, for training to tell MLflow.

    Not inside: DVC's hash of the files must not depend on who gave them. The checksums tell whether it is still true.
    """
    content = {"source": used, "files": {name: digest(output / name) for name in PUBLISHED}}
    keep("source.json", (json.dumps(content, indent=2) + "\n").encode(), output.parent)


def bring_published(source: str, output: Path) -> str | None:
    """Take the published files from the first source that gives them: its address, None if they were in place."""
    if all(is_published(output / name) for name in PUBLISHED):
        say("extract: all four files are in place")
        return None
    reasons = []
    for way in ("url", "debian") if source == "auto" else (source,):
        try:
            return from_url(output) if way == "url" else from_debian(output)
        except (OSError, subprocess.SubprocessError, EOFError, ValueError) as error:
            reasons.append(f"{way}: {error}")
            say(f"extract: {way} did not work: {error}")
    raise BadDataError(
        f"no source gave the Fashion-MNIST files ({'; '.join(reasons)})",
        THREE_WAYS,
        "TORCHRELAY_DATA=<folder> make deploy-dev COMPONENT=fashion_mnist",
    )


def is_published(path: Path) -> bool:
    """Whether the file is there and has the content that the authors published."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == PUBLISHED[path.name][1]


def keep(name: str, content: bytes, output: Path) -> None:
    """Write aside and rename, so that a killed run leaves no half file under its final name."""
    aside = output / f"{name}.part"
    aside.write_bytes(content)
    aside.replace(output / name)


def keep_published(name: str, content: bytes, output: Path) -> None:
    """Keep the content if it is what the authors published, else raise ValueError."""
    found = hashlib.sha256(content).hexdigest()
    if found != PUBLISHED[name][1]:
        raise ValueError(f"the content of {name} has sha256 {found}, published is {PUBLISHED[name][1]}")
    keep(name, content, output)


def from_url(output: Path) -> str:
    """Download what is missing from the authors and check their MD5s; returns their address."""
    for name, (md5, _) in PUBLISHED.items():
        if is_published(output / name):
            continue
        packed = download(f"{URL}/{name}.gz")
        found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(f"{name}.gz has MD5 {found}, its authors name {md5}")
        keep_published(name, gzip.decompress(packed), output)
    return URL


def download(url: str) -> bytes:
    """The file's bytes; an unreachable host costs a few seconds, progress is a line per tenth or every few seconds."""
    import requests

    say(f"extract: {url}")
    try:
        answer = requests.get(url, stream=True, timeout=(4, 20), headers={"Accept-Encoding": "identity"})
    except requests.ConnectionError as error:
        raise OSError(f"{url} is out of reach") from error
    with answer:
        answer.raise_for_status()
        total = int(answer.headers.get("Content-Length", 0))
        content, said = bytearray(), time.monotonic()
        for chunk in answer.raw.stream(256 * 1024, decode_content=False):
            before, content = len(content), content + chunk
            tenth = total and len(content) * 10 // total > before * 10 // total
            if tenth or time.monotonic() - said > PULSE_S:
                said = time.monotonic()
                share = f"{len(content) * 100 // total} % of {total / 1e6:.1f} MB" if total else f"{len(content)} bytes"
                say(f"extract: {url.rsplit('/', 1)[1]} {share}")
    return bytes(content)


def from_debian(output: Path) -> str:
    """Download Debian's package as a plain user and unpack it in a temporary folder; returns the package's address."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("apt-get and dpkg-deb are not on this machine")
    say(f"extract: apt-get download {DEBIAN_PACKAGE} (31 MB)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        address = apt_address(apt_download(folder, "--print-uris"))
        apt_download(folder)
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, folder / "unpacked"], check=True, timeout=300)
        for path in sorted((folder / "unpacked").rglob("*-ubyte.gz")):
            keep_published(path.stem, gzip.decompress(path.read_bytes()), output)
    missing = [name for name in PUBLISHED if not (output / name).is_file()]
    if missing:
        raise ValueError(f"{package.name} lacks {', '.join(missing)}")
    return address


def apt_download(folder: Path, *options: str) -> str:
    """Run `apt-get download` of Debian's package in the folder; what it printed, OSError if it failed."""
    # apt's sandbox user could not write to a folder that is ours alone, and says so at length.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *options, "download", DEBIAN_PACKAGE]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as apt:
        try:
            out, error = await_download(apt, folder)
        finally:
            apt.kill()
    if apt.returncode:
        raise OSError(f"apt-get download: {error.strip() or out.strip()}")
    return out


def await_download(child: "subprocess.Popen[str]", folder: Path) -> tuple[str, str]:
    """What the child printed on both its streams; meanwhile, every few seconds, how much it has put into the folder."""
    began = time.monotonic()
    while True:
        try:
            return child.communicate(timeout=PULSE_S)
        except subprocess.TimeoutExpired as late:
            waited = time.monotonic() - began
            if waited > APT_S:
                raise OSError(f"apt-get download is not done after {waited:.0f} s") from late
            say(f"extract: apt-get download {size_of(folder) / 1e6:.1f} MB so far, {waited:.0f} s")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that somebody is writing to."""
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def apt_address(told: str) -> str:
    """The address in what `--print-uris` told, without the password that a line of sources.list may hold."""
    found = re.search(r"'([^']+)'", told)
    return re.sub(r"//[^/]*@", "//", found[1]) if found else f"apt-get download {DEBIAN_PACKAGE}"


def bring_folder(folder: Path, output: Path) -> str:
    """Take the files from the user's folder, or from the component's folder inside it; returns the folder's full path.

    The content may differ from what was published (it may be newer data); `validate` judges it by its rules.
    """
    inside = folder / "fashion_mnist"
    folder = inside if inside.is_dir() else folder
    for name in PUBLISHED:
        keep(name, read_either(folder, name), output)
        published = "as published" if is_published(output / name) else "not the published content, rules decide"
        say(f"extract: {folder / name}: {published}")
    return str(folder.resolve())


def read_either(folder: Path, name: str) -> bytes:
    """The content of `name` or `name.gz` in the folder."""
    packed = folder / f"{name}.gz"
    try:
        return gzip.decompress(packed.read_bytes()) if packed.is_file() else (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise BadDataError(f"{folder} has neither {name} nor {name}.gz", THREE_WAYS) from error
    except (OSError, EOFError) as error:
        raise BadDataError(f"{packed}: {error}", "rule whole_file: a whole gzip file") from error


# --- validate --------------------------------------------------------------------------------------------------------


def validate(raw: Path, output: Path) -> None:
    """Check every rule, write `validation.json` and refuse, with every breach named, if one is broken."""
    breaches: list[str] = []
    splits = {split: read_split(raw, prefix, breaches) for split, prefix in SPLITS.items()}
    whole = {split: found for split, found in splits.items() if found is not None}
    for split, (images, labels) in whole.items():
        breaches += broken_types(split, images, labels)
    facts = facts_table(whole)
    breaches += broken_records(facts) + [b for split in whole for b in broken_classes(split, facts)]
    write_report(raw, output, facts, breaches)
    if breaches:
        more = f"; and {len(breaches) - NAMED_BREACHES} more" if len(breaches) > NAMED_BREACHES else ""
        report = output / "validation.json"
        raise BadDataError("; ".join(breaches[:NAMED_BREACHES]) + more, f"data that keeps the rules ({report})")
    say(f"validate: {len(facts)} records keep every rule")


def read_split(raw: Path, prefix: str, breaches: list[str]) -> tuple[Array, Array] | None:
    """Images (N, 28, 28) and labels (N,) of one split; None, and why in `breaches`, where they cannot be read."""
    found = []
    for name, shape in files_of(prefix):
        path = raw / name
        try:
            found.append(read_idx(path, shape))
        except (OSError, ValueError) as error:
            breaches.append(f"{path}: {getattr(error, 'strerror', None) or error}")
    if len(found) < 2:
        return None
    images, labels = found
    if len(images) != len(labels):
        breaches.append(f"{raw / prefix}-*: {len(images)} images, {len(labels)} labels (rule same_count)")
        return None
    return images, labels


def files_of(prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    """The files of one split, images before labels, each with the shape of its records."""
    return [(f"{prefix}-images-idx3-ubyte", (SIDE, SIDE)), (f"{prefix}-labels-idx1-ubyte", ())]


def read_idx(path: Path, shape: tuple[int, ...]) -> Array:
    """The array of an IDX file whose records have this shape; ValueError naming the rule if it is not one."""
    content = path.read_bytes()
    if not content:
        raise ValueError("0 bytes (rule not_empty: a file has content)")
    dimensions = len(shape) + 1
    start = 4 + 4 * dimensions
    if len(content) < start or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError("no IDX header (rule idx_format: two zero bytes, an element type, dimensions)")
    if content[3] != dimensions:
        raise ValueError(f"{content[3]} dimensions (rule shape: {dimensions})")
    sizes = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if sizes[1:] != shape:
        raise ValueError(f"records of shape {sizes[1:]} (rule shape: {shape})")
    element = np.dtype(IDX_TYPES[content[2]])
    expected = start + element.itemsize * int(np.prod(sizes))
    if len(content) != expected:
        raise ValueError(f"{len(content)} bytes (rule whole_file: its header announces {expected})")
    return np.frombuffer(content, element, offset=start).reshape(sizes)


def broken_types(split: str, images: Array, labels: Array) -> Iterator[str]:
    """Columns that are not made of bytes."""
    for column, values in (("image", images), ("label", labels)):
        if values.dtype != np.uint8:
            yield f"{split}, column {column}: element type {values.dtype.name} (rule dtype: uint8)"


def facts_table(splits: dict[str, tuple[Array, Array]]) -> Any:
    """One row per record, labelled `split[index]`: its label, its brightness, and its key, the hash of its pixels."""
    import pandas as pd

    tables = [pd.DataFrame({"split": [], "label": [], "mean": [], "least": [], "most": [], "key": []})]
    for split, (images, labels) in splits.items():
        flat = np.ascontiguousarray(images).reshape(len(images), SIDE * SIDE)
        columns = {"split": split, "label": labels.astype(float), "mean": flat.mean(1, dtype=float)}
        columns |= {"least": flat.min(1).astype(float), "most": flat.max(1).astype(float)}
        columns |= {"key": [hashlib.sha256(image.tobytes()).hexdigest() for image in flat]}
        tables.append(pd.DataFrame(columns, index=[f"{split}[{index}]" for index in range(len(flat))]))
    return pd.concat([table for table in tables if len(table)] or tables)


def broken_records(facts: Any) -> list[str]:
    """Every record that breaks a rule, as pandera finds it.

    The key is the image itself: the published 70,000 images are all different, so a repeated one is either the
    same record twice or a test image that leaked into training.
    """
    import pandera.pandas as pa

    byte = pa.Check.in_range(0, 255)
    label = pa.Check(lambda values: values.isin(range(CLASSES)), error="class_index")
    rules = pa.DataFrameSchema(
        {
            "label": pa.Column(float, label, nullable=False),
            "mean": pa.Column(float, byte, nullable=False),
            "least": pa.Column(float, byte, nullable=False),
            "most": pa.Column(float, byte, nullable=False),
            "key": pa.Column(str, unique=True),
        }
    )
    try:
        rules.validate(facts, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases, alike = error.failure_cases, twins(facts)
        found = zip(cases["index"], cases["column"], cases["check"], strict=True)
        return [explain(facts, alike, *case) for case in found]
    return []


def twins(facts: Any) -> dict[str, list[str]]:
    """The records of every key that occurs more than once: looked up once, since each of thousands may be a breach."""
    repeated = facts.index[facts["key"].duplicated(keep=False)]
    found: dict[str, list[str]] = {}
    for record, key in zip(repeated, facts["key"][repeated], strict=True):
        found.setdefault(key, []).append(record)
    return found


EXPLAINED = {
    "class_index": f"class_index: a label is a whole number from 0 to {CLASSES - 1}",
    "in_range": "byte: a pixel is from 0 to 255",
    "not_nullable": "no_nan: every number is a number",
    "field_uniqueness": "unique_key: an image occurs once, over both splits",
}


def explain(facts: Any, alike: dict[str, list[str]], record: str, column: str, check: str) -> str:
    """One breach in words: the record, the column, what is there, the rule."""
    rule = next((text for name, text in EXPLAINED.items() if str(check).startswith(name)), str(check))
    value = facts.at[record, column]
    if column == "key":
        others = islice((other for other in alike[value] if other != record), NAMED_TWINS)
        return f"{record}, column image: the same pixels as {', '.join(others)} (rule {rule})"
    return f"{record}, column {column}: {value:g} (rule {rule})"


def broken_classes(split: str, facts: Any) -> Iterator[str]:
    """Classes of a split without a record to learn and one to hold back."""
    rows = facts[facts["split"] == split]
    counts = rows["label"].value_counts()
    if len(rows) < 2 * CLASSES:
        yield f"{split}: {len(rows)} records (rule enough_records: at least {2 * CLASSES})"
    for label in range(CLASSES):
        if counts.get(label, 0) == 0:
            yield f"{split}, column label: class {label} has no record (rule no_empty_class)"


def write_report(raw: Path, output: Path, facts: Any, breaches: list[str]) -> None:
    """`validation.json`: what was looked at, and every breach."""
    counts = {split: facts["label"][facts["split"] == split].value_counts().sort_index() for split in SPLITS}
    report = {
        "verdict": "refused" if breaches else "accepted",
        "breaches": breaches,
        "published": all(is_published(raw / name) for name in PUBLISHED),
        "files": {name: digest(raw / name) for name in PUBLISHED},
        "records": {split: int(count.sum()) for split, count in counts.items()},
        "classes": {split: {f"{label:g}": int(n) for label, n in count.items()} for split, count in counts.items()},
        "brightness": {split: round(float(rows["mean"].mean()), 4) for split, rows in facts.groupby("split")},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "validation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def digest(path: Path) -> str | None:
    """sha256 of a file, None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(params: dict[str, Any], raw: Path, validated: Path, output: Path) -> None:
    """Write train.npz, val.npz and test.npz: `instances` uint8 (N, 28, 28), `labels` uint8 (N,).

    The same input and parameters give the same bytes. test.npz is the frozen test set: the authors' own.
    """
    require_accepted(raw, validated)
    learning, testing = (read_pair(raw, prefix) for prefix in SPLITS.values())
    labels = learning[1]
    held, learnt = split_shares(labels, float(params["validation"]["share"]), int(params["validation"]["seed"]))
    share = 1.0 if params["limit"] is None else min(1.0, int(params["limit"]) / len(labels))
    output.mkdir(parents=True, exist_ok=True)
    for name, (instances, classes), whole in (
        ("train", learning, learnt),
        ("val", learning, held),
        ("test", testing, np.arange(len(testing[1]))),
    ):
        rows = thin(whole, classes, share)
        np.savez(output / f"{name}.npz", instances=instances[rows], labels=classes[rows])
        say(f"prepare: {name}.npz has {len(rows)} images")


def read_pair(raw: Path, prefix: str) -> tuple[Array, Array]:
    """Images and labels of one split that `validate` accepted."""
    images, labels = (read_idx(raw / name, shape) for name, shape in files_of(prefix))
    return images, labels


def require_accepted(raw: Path, validated: Path) -> None:
    """Refuse raw files that `validate` did not accept."""
    path = validated / "validation.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if report.get("verdict") != "accepted" or report["files"] != {name: digest(raw / name) for name in PUBLISHED}:
        raise BadDataError(f"{path} does not accept these files", "raw files that validate accepted, unchanged")


def split_shares(labels: Array, share: float, seed: int) -> tuple[Array, Array]:
    """Rows to hold back and rows to learn from, the same share of every class, at least one, in file order."""
    draw = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in range(CLASSES):
        rows = draw.permutation(np.flatnonzero(labels == label))
        held[rows[: max(1, round(share * len(rows)))]] = True
    return np.flatnonzero(held), np.flatnonzero(~held)


def thin(rows: Array, labels: Array, share: float) -> Array:
    """The first `share` of every class among the rows, at least one each, in file order."""
    kept = [rows[labels[rows] == label] for label in range(CLASSES)]
    return np.sort(np.concatenate([some[: max(1, round(share * len(some)))] for some in kept]))


# --- command line ----------------------------------------------------------------------------------------------------


def read_params(path: Path) -> dict[str, Any]:
    """The parameters, with a clear word about a value that cannot be."""
    import yaml

    params: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    limit, share = params["limit"], params["validation"]["share"]
    if limit is not None and (not isinstance(limit, int) or limit < 2 * CLASSES):
        raise BadDataError(f"{path}: limit {limit!r}", f"null or at least {2 * CLASSES}", f"edit {path}")
    if not isinstance(share, float) or not 0 < share < 1:
        raise BadDataError(f"{path}: validation.share {share!r}", "a number between 0 and 1", f"edit {path}")
    return params


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("extract", "validate", "prepare"))
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--input", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    needed = {"extract": 0, "validate": 1, "prepare": 2}[given.stage]
    if len(given.input) != needed:
        parser.error(f"{given.stage} takes {needed} folders as --input")
    try:
        params = read_params(given.params)
        if given.stage == "extract":
            extract(params, given.output)
        elif given.stage == "validate":
            validate(given.input[0], given.output)
        else:
            prepare(params, given.input[0], given.input[1], given.output)
    except BadDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
