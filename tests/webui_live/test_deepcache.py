"""Beside the extension DeepCache, which runs the U-Net's layers by itself: who acts on blocks is refused.

In a WebUI with no other extension, since some have a package of one name. Where it is looked for: test_extensions.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.webui_live.client import Client, RefusedError, expert
from tests.webui_live.host import Host
from tests.webui_live.test_extensions import BASE, FOLDER, OTHER, UNIFORM, find_python, prepare

ON = {"deepcache_enable_pass": "both passes", "deepcache_cache_enable_step_percentage": 0.2,
      "deepcache_full_run_step_rate": 3}  # fmt: skip
ACTING = {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.5}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    python = find_python()
    found = sorted(FOLDER.glob("sd-webui-deepcache-standalone*/scripts"))
    if not found:
        pytest.skip(f"sd-webui-deepcache-standalone is not in {FOLDER}")
    data = tmp_path_factory.mktemp("deepcache")
    prepare(data, {"sd-webui-deepcache-standalone": found[-1].parent}, python)
    running = Host(data, BASE, python=python)
    yield Client(running.url)
    running.stop()
    shutil.rmtree(data / "models", ignore_errors=True)


def test_deepcache(cached: Client) -> None:
    plain = cached.draw(steps=12)
    with cached.settings(ON):
        alone = cached.draw(steps=12)
        assert not alone.same_as(plain)
        for way, method in ((ACTING, "FreeU"), (UNIFORM, "AFA")):
            with pytest.raises(RefusedError, match=f"{method} could not act: another extension") as refused:
                cached.draw(way, steps=12)
            assert refused.value.status == 422
            assert cached.draw(steps=12).same_as(alone)
        assert cached.draw({"freeu": "Custom"}, steps=12).same_as(alone)
        assert cached.draw(expert(OTHER, snb_window=[0, 0]), steps=12).same_as(alone)
        fused = cached.draw(expert(OTHER), steps=12)
        assert fused.params["Fusion U-Net calls"] == "base 12, expert 1 12"
    assert cached.draw(steps=12).same_as(plain)
