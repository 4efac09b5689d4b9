"""Settings and components: unknown keys are refused, overlays are deep, errors name file and key."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay import config
from torchrelay.config import Settings, component, component_names, merge, settings, validated, write_file
from torchrelay.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Snakefile").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "defaults.yaml").write_text("port_base: 20000\n")
    folder = tmp_path / "components" / "tiny"
    folder.mkdir(parents=True)
    (folder / "component.yaml").write_text(
        "name: tiny\ndescription: d\ntask: classification\ndata: none\nmetric: {floor: 0.5}\n"
    )
    for key in list(os.environ):
        if key.startswith("TORCHRELAY_"):
            monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def test_the_state_folder_is_in_the_checkout_unless_set(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().state == checkout / ".torchrelay"
    settings.cache_clear()
    monkeypatch.setenv("TORCHRELAY_STATE", "/elsewhere")
    assert settings().state == Path("/elsewhere")


def test_the_environment_wins_over_the_overlay_and_the_overlay_over_the_defaults(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "config" / "local.yaml").write_text("port_base: 21000\n")
    assert settings().port_base == 21000
    settings.cache_clear()
    monkeypatch.setenv("TORCHRELAY_PORT_BASE", "22000")
    assert settings().port_base == 22000


def test_a_misspelt_key_names_its_file_and_itself(checkout: Path) -> None:
    (checkout / "config" / "local.yaml").write_text("port_bsae: 21000\n")
    with pytest.raises(ConfigError, match=r"local\.yaml: port_bsae"):
        settings()


def test_an_overlay_reaches_into_a_component(checkout: Path) -> None:
    (checkout / "config" / "local.yaml").write_text("components: {tiny: {metric: {floor: 0.25}}}\n")
    assert component("tiny").metric.floor == 0.25
    assert component("tiny").metric.name == "accuracy"


def test_an_unknown_component_lists_those_that_are_there(checkout: Path) -> None:
    assert component_names() == ["tiny"]
    with pytest.raises(ConfigError, match="no component 'tin'") as caught:
        component("tin")
    assert "tiny" in caught.value.expected


def test_a_component_under_another_name_is_refused(checkout: Path) -> None:
    (checkout / "components" / "tiny").rename(checkout / "components" / "other")
    with pytest.raises(ConfigError, match="names itself 'tiny'"):
        component("other")


def test_outside_a_checkout_the_error_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match="not inside a Torchrelay checkout"):
        config.root()


def test_broken_yaml_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        config.read_yaml(path)


tree = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
mappings = st.dictionaries(st.sampled_from("abc"), tree)


@given(mappings)
def test_merging_nothing_changes_nothing(base: dict[str, object]) -> None:
    assert merge(base, {}) == base
    assert merge({}, base) == base


@given(mappings, mappings)
def test_the_overlay_wins_and_merging_it_twice_is_merging_it_once(
    base: dict[str, object], over: dict[str, object]
) -> None:
    once = merge(base, over)
    assert merge(once, over) == once


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, b"one", mode=0o600)
    write_file(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def listening(**settings_of_it: object) -> config.Listen:
    return config.Listen.model_validate(settings_of_it)


@pytest.mark.parametrize(
    ("wrong", "found", "next_command"),
    [
        ({"address": "0.0.0.0"}, "beyond loopback, and listen.names is empty", "LISTEN_NAMES"),
        ({"address": "192.0.2.7"}, "beyond loopback, and listen.names is empty", "listen.address to 127.0.0.1"),
        ({"address": "::", "names": []}, "listen.address is ::", "LISTEN_NAMES"),
        ({"address": "relay.example.org", "names": ["relay.example.org"]}, "listen.address is", "LISTEN_ADDRESS"),
        ({"names": ["relay.example.org:443"]}, "'relay.example.org:443'", "LISTEN_NAMES"),
        ({"names": ["a", "https://b"]}, "'https://b'", "LISTEN_NAMES"),
        ({"names": ["1.2.3.400"]}, "'1.2.3.400'", "LISTEN_NAMES"),
        ({"names": [""]}, "''", "LISTEN_NAMES"),
        ({"names": ["a."]}, "'a.'", "LISTEN_NAMES"),
        ({"certificate": "c.pem"}, "listen.certificate is set, and listen.key is not", "LISTEN_KEY"),
        ({"key": "k.pem"}, "listen.key is set, and listen.certificate is not", "LISTEN_CERTIFICATE"),
    ],
)
def test_listening_for_others_needs_what_a_certificate_needs(
    wrong: dict[str, object], found: str, next_command: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        listening(**wrong)
    assert found in caught.value.found
    assert caught.value.expected
    assert next_command in caught.value.next_command


def test_loopback_is_where_everything_listens_unless_told_otherwise(checkout: Path) -> None:
    assert settings().listen == config.Listen()
    assert not settings().listen.beyond_loopback
    assert [listening(address=address).beyond_loopback for address in ("127.0.0.1", "127.9.9.9", "::1")] == [False] * 3
    assert listening(address="0.0.0.0", names=["relay", "10.0.0.7", "::1"]).hosts == ("relay", "10.0.0.7", "[::1]")


def test_listening_is_set_by_the_environment_over_the_overlay(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "config" / "local.yaml").write_text("listen: {names: [old], certificate: tls/c.pem, key: ~/k.pem}\n")
    monkeypatch.setenv("TORCHRELAY_LISTEN_ADDRESS", "0.0.0.0")
    monkeypatch.setenv("TORCHRELAY_LISTEN_NAMES", "relay.example.org, 192.0.2.7")
    found = settings().listen
    assert (found.address, found.names) == ("0.0.0.0", ("relay.example.org", "192.0.2.7"))
    assert (found.certificate, found.key) == (checkout / "tls" / "c.pem", Path.home() / "k.pem")


@pytest.mark.parametrize(
    ("wrong", "found", "next_command"),
    [
        ({"bucket": "my-bucket"}, "bucket is 'my-bucket'", "TORCHRELAY_BUCKET"),
        ({"bucket": "gs://b"}, "bucket is 'gs://b'", "TORCHRELAY_BUCKET"),
        ({"bucket": "gs://bucket/"}, "bucket is 'gs://bucket/'", "TORCHRELAY_BUCKET"),
        ({"bucket": "gs://bucket/../other"}, "bucket is 'gs://bucket/../other'", "TORCHRELAY_BUCKET"),
        ({"bucket": "gs://bucket", "backup": {"folder": "/b"}}, "and backup.folder is /b", "backup.folder to null"),
        ({"backup": {"recipient": "AGE-SECRET-KEY-1"}}, "backup.recipient is", "make recovery-key"),
    ],
)
def test_a_bucket_is_a_gs_url_and_backups_have_one_place(
    wrong: dict[str, object], found: str, next_command: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.model_validate(wrong)
    assert found in caught.value.found
    assert next_command in caught.value.next_command


def test_the_bucket_decides_for_artifacts_and_backups(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = settings()
    assert (here.artifacts, here.backups) == (str(checkout / ".torchrelay" / "tracking" / "artifacts"), None)
    monkeypatch.setenv("TORCHRELAY_BACKUP_FOLDER", "~/copies")
    settings.cache_clear()
    assert settings().backups == str(Path.home() / "copies")
    monkeypatch.delenv("TORCHRELAY_BACKUP_FOLDER")
    monkeypatch.setenv("TORCHRELAY_BUCKET", "gs://models/relay")
    settings.cache_clear()
    here = settings()
    assert (here.artifacts, here.backups) == ("gs://models/relay/artifacts", "gs://models/relay/backup")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        validated(Settings, {}, Path("x")).port_base = 1
