"""Checkpoints and aggregators by their names, in the host's list as people's folders make it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_fusion.errors import SettingError
from lib_fusion.fusion.aggregator_files import identify_model, read_card
from lib_fusion.requests.settings import ExpertSettings, FusionSettings
from tests.training.conftest import DEMO
from tests.webui_fake import fakes

AGGREGATOR = "afa-animals-vehicles"


def entry(name: str, file: Path | None = None, sha256: str | None = None, partial: str = "0123abcd") -> SimpleNamespace:
    """The host's entry of a checkpoint; ``partial`` is its old hash, which files may share."""
    stem = Path(name.replace("\\", "/")).stem
    joined = name.replace("/", "_").replace("\\", "_").rpartition(".")[0]
    title = f"{name} [{sha256[:10]}]" if sha256 else name
    ids = [partial, joined, title, name, stem, f"{name} [{partial}]", *([sha256[:10], sha256] if sha256 else [])]
    return SimpleNamespace(name=name, filename=str(file or name), title=title, sha256=sha256, ids=ids,
                           is_safetensors=name.lower().endswith(".safetensors"))  # fmt: skip


class Host:
    """The extension's modules in a host with these checkpoints."""

    def __init__(self, tmp_path: Path) -> None:
        from modules import paths, sd_models

        from lib_fusion.webui.models import aggregators, checkpoints

        paths.models_path = str(tmp_path)
        self.folder = tmp_path / "denoiser-fusion"
        self.folder.mkdir()
        self.aggregators, self.checkpoints, self._models = aggregators, checkpoints, sd_models

    def has(self, *entries: SimpleNamespace) -> None:
        self._models.checkpoints_list.clear()
        self._models.checkpoint_aliases.clear()
        for info in entries:  # as the host does it: what comes last takes the names that others have, too
            self._models.checkpoints_list[info.title] = info
            self._models.checkpoint_aliases.update(dict.fromkeys(info.ids, info))

    def find(self, name: str) -> str:
        return self.checkpoints.find_checkpoint(name, "experts[0].checkpoint").name


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    fakes.install(monkeypatch)
    return Host(tmp_path)


def test_a_name_in_full_goes_before_one_without_its_folder(host: Host) -> None:
    host.has(entry("vehicles.safetensors"), entry("old/vehicles.safetensors"), entry("old/vehicles.ckpt"),
             entry("old_vehicles.safetensors"))  # fmt: skip
    assert host.find("vehicles") == host.find("vehicles.safetensors") == "vehicles.safetensors"
    assert host.find("old/vehicles") == host.find("old/vehicles.safetensors") == "old/vehicles.safetensors"
    assert host.find("old_vehicles") == "old_vehicles.safetensors"


def test_several_files_of_one_name_are_refused(host: Host) -> None:
    host.has(entry("a/fox.safetensors", sha256="1" * 64), entry("b/fox.safetensors", sha256="2" * 64))
    for name in ("fox", "0123abcd"):
        with pytest.raises(SettingError, match=r"several .* called so; allowed: a/fox.safetensors, b/fox.safetensors"):
            host.find(name)
    for name in ("b/fox", "2" * 10, "b/fox.safetensors [2222222222]"):
        assert host.find(name) == "b/fox.safetensors"
    host.has(entry("a/fox.safetensors", sha256="1" * 64), entry("b/fox.safetensors", sha256="1" * 64))
    assert host.find("fox") == "a/fox.safetensors"  # copies: either will do


def test_no_part_of_a_name_is_a_name(host: Host) -> None:
    host.has(entry("vehicles.safetensors"), entry("vehicles.ckpt"))
    with pytest.raises(SettingError, match=r"no such checkpoint; allowed: vehicles.safetensors$"):
        host.find("vehic")
    assert host.find("vehicles.ckpt") == "vehicles.ckpt"  # which is refused as what it is
    assert host.find("vehicles") == "vehicles.safetensors"
    assert host.checkpoints.list_checkpoints() == ["vehicles.safetensors"]


@pytest.mark.parametrize(("listed", "asked"), [
    ("sub\\fox.safetensors", "sub/fox.safetensors"), ("sub/fox.safetensors", "sub\\fox.safetensors"),
    ("sub/fox.safetensors", "sub\\fox"), ("sub\\fox.safetensors", "sub\\fox.safetensors"),
])  # fmt: skip
def test_names_of_other_systems(host: Host, listed: str, asked: str) -> None:
    """An infotext or preset made on Windows, on Linux, and the other way round."""
    host.has(entry(listed), entry("fox.safetensors"))
    assert host.find(asked) == listed


def test_a_backslash_may_be_a_letter(host: Host) -> None:
    host.has(entry("sub\\fox.safetensors"), entry("sub/fox.safetensors"))
    assert host.find("sub\\fox.safetensors") == "sub\\fox.safetensors"
    assert host.find("sub/fox.safetensors") == "sub/fox.safetensors"


def test_the_experts_of_an_aggregator_are_found_by_their_weights(host: Host, tmp_path: Path) -> None:
    """A newer file of the same name in another folder, and one of the same name in another format."""
    card = read_card(DEMO / f"{AGGREGATOR}.safetensors")
    (tmp_path / "vehicles.safetensors").write_bytes((DEMO / "food.safetensors").read_bytes())
    own, other = DEMO / "vehicles.safetensors", tmp_path / "vehicles.safetensors"
    assert identify_model(own).unet == card.models[1].unet != identify_model(other).unet
    pickle = entry("vehicles.ckpt", tmp_path / "vehicles.ckpt")
    for order in ((other, own), (own, other)):
        host.has(pickle, *(entry(f"{'old/' if file is own else ''}vehicles.safetensors", file) for file in order))
        assert host.aggregators.experts_of(card) == [ExpertSettings("old/vehicles.safetensors")]
    host.has(pickle, entry("vehicles.safetensors", other))
    assert host.aggregators.experts_of(card) == [ExpertSettings("vehicles.safetensors")]  # its weights are refused
    host.has(pickle)
    with pytest.raises(SettingError, match="vehicles is not among the checkpoints"):
        host.aggregators.experts_of(card)


def test_aggregators_of_any_ending_and_name(host: Host) -> None:
    for name in ("None.safetensors", "sub/Upper.SAFETENSORS", "a.b.safetensors"):
        (host.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / f"{AGGREGATOR}.safetensors", host.folder / name)
    host.has(entry("vehicles.safetensors", DEMO / "vehicles.safetensors"))
    assert host.aggregators.list_aggregators() == ["None", "a.b", "sub/Upper"]
    for name in ("None", "sub/Upper", "sub\\Upper", "sub/Upper.SAFETENSORS", "a.b", "a.b.safetensors"):
        assert host.aggregators.find_aggregator(name).is_file()
        settings = FusionSettings.from_dict({"method": "AFA", "afa_aggregator": name})
        assert [expert.checkpoint for expert in host.aggregators.complete(settings).experts] == ["vehicles.safetensors"]
    with pytest.raises(SettingError, match="allowed: an aggregator, or afa_maps uniform"):
        host.aggregators.complete(FusionSettings.from_dict({"method": "AFA"}))


def test_a_unet_alone_is_refused_as_what_it_is(host: Host, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from lib_fusion.errors import CheckpointError
    from lib_fusion.unet.checkpoint import UNET_PREFIX, Checkpoint

    weights = load_file(DEMO / "vehicles.safetensors")
    bare = {key.removeprefix(UNET_PREFIX): value for key, value in weights.items() if key.startswith(UNET_PREFIX)}
    save_file(bare, tmp_path / "bare.safetensors")
    host.checkpoints.check_is_whole(Checkpoint.open(DEMO / "vehicles.safetensors"))
    with pytest.raises(CheckpointError, match=r"a U-Net alone, whose tensors' names do not start with model"):
        host.checkpoints.check_is_whole(Checkpoint.open(tmp_path / "bare.safetensors"))
