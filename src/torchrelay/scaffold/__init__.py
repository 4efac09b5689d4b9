"""Lays out a new component from the template beside this file; adding a component is adding a folder."""

import tempfile
from pathlib import Path

from torchrelay.components import conda_environment
from torchrelay.config import Name, root, write_file
from torchrelay.errors import ConfigError

_TEMPLATE = Path(__file__).with_name("template")


def create(name: str) -> Path:
    """Write components/`name` and return it: the whole folder or, whatever happens meanwhile, none of it.

    A ConfigError where `name` cannot be a component's name or is taken.
    """
    _check_name(name)
    target = root() / "components" / name
    if target.exists():
        raise ConfigError(
            f"{target} exists already", "a name that is not taken", "make new-component NAME=another_name"
        )
    # One floor further down than components are looked for, so nobody takes it for one before it is whole.
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as aside:
        rendered = Path(aside) / name
        _render(name, rendered)
        write_file(rendered / "conda.yaml", conda_environment(rendered).encode())
        rendered.rename(target)
    return target


def _check_name(name: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot be the name of a component",
            "a lower case letter, then lower case letters, digits and _, 63 at most",
            "make new-component NAME=tiny_moons",
        ) from error


def _render(name: str, target: Path) -> None:
    # Half a second to import, which no other verb should pay.
    from copier import run_copy

    run_copy(str(_TEMPLATE), target, data={"name": name}, defaults=True, quiet=True, unsafe=False)
