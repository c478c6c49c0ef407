"""Every test of this folder runs in each fork that is found; each is started once, on a free port, and stopped.

All of them run in Forge Neo, which has most users. Forge shares the code that is tested, so tests with many cases run
there in some of them (the marker ``where``), chosen so that each case and each method is among them. A module's
IN_NEO: tests of AUTOMATIC1111's that run in Forge Neo alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.webui_forge.forks import FORKS, Fork, prepare_data, start
from tests.webui_live.client import PICTURE, Client, Pictures
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host, Installation, NoHostError
from tests.webui_live.needs import missing
from tests.webui_live.pages import browser, page  # noqa: F401 (fixtures)

#: The files that run in a fork which has the others' backend and few users.
FEW = {"ersatzforge": ("test_host.py", "test_what_works.py")}


class ForgeClient(Client):
    """Asks for hires fix as the page does: the API's defaults there are a guidance of 1, and what Forge can't read.

    Forge Neo has no upscaling of latents.
    """

    def draw(self, *args: Any, **changes: Any) -> Pictures:
        if changes.get("enable_hr"):
            guidance = changes.get("cfg_scale", PICTURE["cfg_scale"])
            changes = {"hr_additional_modules": ["Use same choices"], "hr_cfg": guidance} | changes
            changes["hr_upscaler"] = changes.get("hr_upscaler", "None").replace("Latent", "None")
        return super().draw(*args, **changes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the marker ``where`` does not select, and in the fork of FEW all but these files."""
    out = [item for item in items if is_left_out(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def is_left_out(item: pytest.Item) -> bool:
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    fork = parameters.pop("fork", None)
    if not isinstance(fork, Fork):
        return False
    if fork.name in FEW and item.path.name not in FEW[fork.name]:
        return True
    if fork.name != "neo" and getattr(item, "function", None) in getattr(item.module, "IN_NEO", ()):
        return True
    return not all(mark.args[0](fork=fork.name, **parameters) for mark in item.iter_markers("where"))


@pytest.fixture(scope="module", params=FORKS, ids=lambda fork: fork.name)
def fork(request: pytest.FixtureRequest) -> Fork:
    return request.param


@pytest.fixture(scope="module")
def installation(fork: Fork) -> Installation:
    try:
        return fork.find()
    except NoHostError as error:
        missing(str(error), fork.name)


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, Host]]:
    """The forks that have been started, by name: each stays for the files that follow, since starts take a minute."""
    hosts: dict[str, Host] = {}
    yield hosts
    for host in hosts.values():
        host.stop()
        shutil.rmtree(host.data / "models", ignore_errors=True)


@pytest.fixture(scope="module")
def host(
    fork: Fork, installation: Installation, running: dict[str, Host], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    if fork.name not in running:
        data = tmp_path_factory.mktemp(fork.name)
        prepare_data(data, installation)
        running[fork.name] = start(data, installation)
    return running[fork.name]


@pytest.fixture(scope="session")
def names() -> Names:
    return Names("general", "animals", "vehicles", "general_copy")


@pytest.fixture(scope="module")
def client(host: Host) -> Client:
    client = ForgeClient(host.url)
    client.draw(steps=1)  # a fork loads its checkpoint with the first picture
    return client


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test nothing of a pass is left on the model. One in which the WebUI has died says so, once."""
    if "client" not in request.fixturenames:
        yield
        return
    client, host = request.getfixturevalue("client"), request.getfixturevalue("host")
    yield
    host.revive()
    state = client.state()
    assert state["hooks"] == 0
    assert state["replaced"] == []
    assert state["options"] == []
    assert state["extra"] == 0
    assert not client.fusion()["running"]
