"""Damaged, foreign, swapped and malicious archives: none comes in, each with an error that says why.

What is malicious here is signed by the right key, so that the checks behind the signature are what refuses it.
"""

import io
import os
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from torchrelay import archive
from torchrelay.archive import mar
from torchrelay.config import write_json
from torchrelay.errors import ArchiveError
from torchrelay.handover import Manifest

ODD_NAMES = [
    *("/etc/cron.d/job", "../outside.py", "a/../../outside.py", "..\\outside.py", "folder/module.py", "C:outside.py"),
    *("", ".", "..", ".hidden.py", "weights.pkl", "module.py\0.txt", "moduł.py", "line\nbreak.py"),
]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> archive.KeyPair:
    return archive.ensure_key(tmp_path_factory.mktemp("keys") / "dev")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, keys: archive.KeyPair) -> Path:
    folder = tmp_path_factory.mktemp("good") / "archive"
    tiny.signed(folder, keys.private)
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return tiny.copy(good, tmp_path / "archive")


def refused(folder: Path, keys: archive.KeyPair, reason: str | None = None, digest: str | None = None) -> None:
    with pytest.raises(ArchiveError, match=reason) as caught:
        archive.verify(folder, keys.public, digest)
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.next_command


def resigned(folder: Path, keys: archive.KeyPair, **changes: str) -> Path:
    """Sign `folder` as it is now, by the right key, with a manifest that gives its digest."""
    before = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    digest = archive.digest(folder / "model.mar")
    write_json(folder / "manifest.json", before.model_copy(update={"digest": digest, **changes}))
    archive.sign(folder, keys.private)
    return folder


def rezipped(folder: Path, change: Callable[[zipfile.ZipFile], None], skip: str = "") -> None:
    """Rewrite the .mar with the same members, and whatever `change` adds."""
    members = {name: content for name, content in contents(folder).items() if name != skip}
    buffer = io.BytesIO()
    mar.write(buffer, {name: mar.Member.of(content) for name, content in members.items()})
    with zipfile.ZipFile(buffer, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about names that appear twice
        change(file)
    (folder / "model.mar").write_bytes(buffer.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(folder / "model.mar") as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize("name", ["model.mar", "manifest.json", "model.sig"])
def test_no_flipped_bit_comes_in(name: str, good: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    folder = tiny.copy(good, tmp_path / "archive")
    content = (good / name).read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(position=st.integers(0, len(content) * 8 - 1))
    def flip(position: int) -> None:
        (folder / name).write_bytes(flipped(content, position))
        refused(folder, keys)

    flip()


def test_no_flipped_bit_passes_even_without_the_signature(good: Path, tmp_path: Path) -> None:
    """The checks of the .mar alone (CRC, layout) find each of them, so `unpack` and `prove` are safe as well."""
    content = (good / "model.mar").read_bytes()
    file = tmp_path / "model.mar"

    @settings(max_examples=300, deadline=None)
    @given(position=st.integers(0, len(content) * 8 - 1))
    def flip(position: int) -> None:
        file.write_bytes(flipped(content, position))
        with pytest.raises(ArchiveError):
            mar.check(file)

    flip()


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["model.mar", "manifest.json", "model.sig"])
@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
def test_a_truncated_file(name: str, kept: float, copy: Path, keys: archive.KeyPair) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, int(kept * size) if 0 < kept < 1 else int(kept) % size)
    refused(copy, keys)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_that_was_signed_as_such(kept: float, copy: Path, keys: archive.KeyPair) -> None:
    os.truncate(copy / "model.mar", int(kept * (copy / "model.mar").stat().st_size))
    refused(resigned(copy, keys), keys, "is damaged")


@pytest.mark.parametrize("name", ["model.mar", "manifest.json", "model.sig"])
def test_a_missing_file(name: str, copy: Path, keys: archive.KeyPair) -> None:
    (copy / name).unlink()
    refused(copy, keys, "holds")


def test_an_empty_or_missing_folder(tmp_path: Path, keys: archive.KeyPair) -> None:
    refused(tmp_path, keys, "holds nothing")
    refused(tmp_path / "absent", keys, "holds nothing")


def test_a_file_that_nobody_signed(copy: Path, keys: archive.KeyPair) -> None:
    (copy / "sitecustomize.py").write_text("import os")
    refused(copy, keys, "sitecustomize.py")


def test_a_link_in_place_of_a_file(copy: Path, good: Path, keys: archive.KeyPair) -> None:
    (copy / "model.mar").unlink()
    (copy / "model.mar").symlink_to(good / "model.mar")
    refused(copy, keys, "not a regular file")


def test_the_signature_of_another_key(copy: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    other = archive.ensure_key(tmp_path / "other")
    archive.sign(copy, other.private)
    refused(copy, keys, "is not signed by")


def test_a_signature_that_claims_to_be_by_the_right_key(copy: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    """Signed by another key, with the hint of the right one written over it."""
    right = (copy / "model.sig").read_text().split('"hint":')[1].split('"')[1]
    archive.sign(copy, archive.ensure_key(tmp_path / "other").private)
    wrong = (copy / "model.sig").read_text().split('"hint":')[1].split('"')[1]
    (copy / "model.sig").write_text((copy / "model.sig").read_text().replace(wrong, right))
    refused(copy, keys, "the signature does not match")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"mediaType": 1}'])
def test_a_signature_that_is_none(content: bytes, copy: Path, keys: archive.KeyPair) -> None:
    (copy / "model.sig").write_bytes(content)
    refused(copy, keys, "is not a signature|has been altered")


def test_a_signature_with_more_in_it(copy: Path, keys: archive.KeyPair, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / "model.sig").read_text()
    for altered in (text + " ", text.replace("{", '{"note": "free text", ', 1), text.replace('"hint"', '"hunt"')):
        (copy / "model.sig").write_text(altered)
        refused(copy, keys, "is not a signature|has been altered")
    assert capsys.readouterr().out == ""


def test_the_signature_of_another_archive(copy: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    tiny.signed(tmp_path / "other", keys.private, version="2")
    (copy / "model.sig").write_bytes((tmp_path / "other" / "model.sig").read_bytes())
    refused(copy, keys, "Hash mismatch")


def test_no_public_key_is_no_permission(copy: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no public key"):
        archive.verify(copy, tmp_path / "signing.pub")
    (tmp_path / "signing.pub").write_bytes(b"not a key")
    with pytest.raises(ArchiveError, match="is not a P-256"):
        archive.verify(copy, tmp_path / "signing.pub")


@pytest.mark.parametrize("other", [{"version": "2"}, {"component": "other"}])
def test_another_signed_archive_presented_as_this_one(
    other: dict[str, str], good: Path, keys: archive.KeyPair, tmp_path: Path
) -> None:
    wanted = archive.verify(good, keys.public).digest
    tiny.signed(tmp_path / "other", keys.private, **other)
    archive.verify(tmp_path / "other", keys.public)
    refused(tmp_path / "other", keys, "with the digest", digest=wanted)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2"}, "release.json"),
        ({"component": "other"}, "release.json"),
        ({"environment": "py3.11-cuda-0"}, "release.json"),
        ({"run_id": "another"}, "release.json"),
        ({"golden": "0" * 64}, "golden.json"),
        ({"digest": "0" * 64}, "has the digest"),
    ],
)
def test_a_signed_manifest_that_tells_of_another_archive(
    changes: dict[str, str], reason: str, copy: Path, keys: archive.KeyPair
) -> None:
    refused(resigned(copy, keys, **changes), keys, reason)


def test_a_torchserve_manifest_for_another_name(copy: Path, keys: archive.KeyPair) -> None:
    members = contents(copy)
    members[mar.TORCHSERVE_MANIFEST] = members[mar.TORCHSERVE_MANIFEST].replace(b'"tiny"', b'"other"')
    with (copy / "model.mar").open("wb") as file:
        mar.write(file, {name: mar.Member.of(content) for name, content in members.items()})
    refused(resigned(copy, keys), keys, "MANIFEST.json")


def test_a_signed_manifest_that_is_none(copy: Path, keys: archive.KeyPair) -> None:
    (copy / "manifest.json").write_text("{}")
    archive.sign(copy, keys.private)
    refused(copy, keys, "is not a manifest")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_does_not_belong(name: str, copy: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    def add(file: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("placeholder", (1980, 1, 1, 0, 0, 0))
        entry.filename = name
        entry.external_attr = (stat.S_IFREG | 0o644) << 16
        file.writestr(entry, b"x = 1\n")

    rezipped(copy, add)
    refused(resigned(copy, keys), keys)
    with pytest.raises(ArchiveError):
        archive.unpack(copy / "model.mar", tmp_path / "unpacked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]


def test_a_symbolic_link(copy: Path, keys: archive.KeyPair) -> None:
    def add(file: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("link.py", (1980, 1, 1, 0, 0, 0))
        entry.create_system = 3
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "/etc/passwd")

    rezipped(copy, add)
    refused(resigned(copy, keys), keys, "symbolic link")


def test_a_name_that_is_there_twice(copy: Path, keys: archive.KeyPair) -> None:
    rezipped(copy, lambda file: file.writestr("handler.py", b"import os"))
    refused(resigned(copy, keys), keys, "twice")


def test_a_member_that_is_missing(copy: Path, keys: archive.KeyPair) -> None:
    rezipped(copy, lambda _: None, skip="golden.json")
    refused(resigned(copy, keys), keys, "lacks golden.json")


def test_too_many_members(copy: Path, keys: archive.KeyPair) -> None:
    def add(file: zipfile.ZipFile) -> None:
        for index in range(mar.MAX_MEMBERS):
            file.writestr(f"module_{index}.py", b"")

    rezipped(copy, add)
    refused(resigned(copy, keys), keys, "members")


def test_a_zip_bomb(copy: Path, keys: archive.KeyPair) -> None:
    """Thirty megabytes of nothing in thirty kilobytes."""

    def add(file: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("bomb.py", (1980, 1, 1, 0, 0, 0))
        entry.external_attr = (stat.S_IFREG | 0o644) << 16
        file.writestr(entry, bytes(30 * 2**20), zipfile.ZIP_DEFLATED)

    rezipped(copy, add)
    assert (copy / "model.mar").stat().st_size < 100_000
    refused(resigned(copy, keys), keys, "compressed")


def test_a_bomb_of_overlapping_members(copy: Path, keys: archive.KeyPair) -> None:
    """Stored members that all point at the same bytes: more content than archive."""
    with zipfile.ZipFile(copy / "model.mar") as file:
        weights = file.getinfo("model.safetensors")

    def add(file: zipfile.ZipFile) -> None:
        for index in range(100):
            entry = zipfile.ZipInfo(f"copy_{index}.py", (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.header_offset, entry.CRC = weights.header_offset, weights.CRC
            entry.file_size = entry.compress_size = 2**20
            file.filelist.append(entry)
            file.NameToInfo[entry.filename] = entry
        file._didModify = True  # type: ignore[attr-defined]

    rezipped(copy, add)
    refused(resigned(copy, keys), keys, "would unpack to")


def test_a_member_that_claims_to_be_shorter_than_it_is(copy: Path, keys: archive.KeyPair) -> None:
    content = bytearray((copy / "model.mar").read_bytes())
    with zipfile.ZipFile(copy / "model.mar") as file:
        central = content.index(b"PK\x01\x02", file.start_dir)
    struct.pack_into("<I", content, central + 24, 1)
    (copy / "model.mar").write_bytes(content)
    refused(resigned(copy, keys), keys)


@pytest.mark.parametrize("where", ["front", "end", "comment"])
def test_bytes_that_belong_to_no_member(where: str, copy: Path, keys: archive.KeyPair) -> None:
    """TorchServe reads a zip from its front, Python from its end: both must see the same thing."""
    content = (copy / "model.mar").read_bytes()
    smuggled = io.BytesIO()
    with zipfile.ZipFile(smuggled, "w") as file:
        file.writestr("handler.py", b"import os")
    if where == "comment":
        with zipfile.ZipFile(copy / "model.mar", "a") as file:
            file.comment = b"hello"
    else:
        parts = (smuggled.getvalue(), content) if where == "front" else (content, b"\0" * 10)
        (copy / "model.mar").write_bytes(b"".join(parts))
    refused(resigned(copy, keys), keys, "not laid out|damaged")


def test_a_pickle_in_place_of_the_weights(copy: Path, keys: archive.KeyPair) -> None:
    members = contents(copy)
    members["model.safetensors"] = b"\x80\x04cposix\nsystem\n(S'true'\ntR."
    with (copy / "model.mar").open("wb") as file:
        mar.write(file, {name: mar.Member.of(content) for name, content in members.items()})
    refused(resigned(copy, keys), keys, "safetensors format")


def test_a_huge_manifest_is_not_even_read(copy: Path, keys: archive.KeyPair) -> None:
    os.truncate(copy / "manifest.json", 2**20)
    refused(copy, keys, "at most 65536")
