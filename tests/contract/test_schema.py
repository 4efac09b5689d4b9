"""The shipped defaults and schemas are those of the models; after a change: make schema."""

import json
from pathlib import Path

import yaml

from torchrelay.config import Component, Settings

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_has_a_default_in_the_file_and_no_other() -> None:
    assert set(yaml.safe_load((ROOT / "config" / "defaults.yaml").read_text())) == set(Settings.model_fields)


def test_the_schemas_are_those_of_the_models() -> None:
    shipped = json.loads((ROOT / "config" / "schema.json").read_text())
    now = {"settings": Settings.model_json_schema(), "component": Component.model_json_schema()}
    assert shipped == now, "config/schema.json is out of step: make schema"


def test_every_setting_is_described() -> None:
    for model in (Settings, Component):
        for name, field in model.model_fields.items():
            assert field.description or field.annotation.__doc__, f"{model.__name__}.{name}"
