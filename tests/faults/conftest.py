"""One production for all tests of its faults, since it takes a quarter of a minute to come up."""

from collections.abc import Iterator

import pytest

from production_rig import Rig, production, scaled


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Rig]:
    """A running production."""
    with production(tmp_path_factory.mktemp("p"), component_python) as made:
        yield made


@pytest.fixture
def live(rig: Rig) -> str:
    """The version that production serves, asked for and nothing else; a good one is made where there is none."""
    rig.up()
    found = rig.state.live
    version = found.version if found and rig.tracking.version("points", found.version) else rig.version(scaled(1.0))
    rig.promote(version)
    rig.await_live(version)
    return version
