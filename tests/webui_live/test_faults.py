"""Whatever breaks, the host stays usable: the next picture is what it was, and nothing of ours is left.

Faults are real where they can be (files, a full disk), else raised by the tests' probe at a chosen call.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.webui_live.client import Client, Pictures, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host

SMALL = {"width": 64, "height": 64, "steps": 4}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
W, M, U = "lib_fusion.webui.", "lib_fusion.methods.", "lib_fusion.fusion."
S = W + "a1111."
FREEU = {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.7}
SKIPPING = {"skipping": "Forecast", "skip_tolerance": 10, "steps": 12}
UNIFORM = {"method": "AFA", "afa_maps": "uniform"}
FIRST = "input_blocks.0.0.weight"


def small(client: Client, fusion: dict | None = None, **changes: object) -> Pictures:
    return client.draw(fusion, **SMALL | changes)


@pytest.fixture
def unhurt(client: Client, names: Names) -> Iterator[None]:
    """After the test: the base's weights, hooks and threads are as before, and so are pictures without us and with."""
    off, on = small(client), small(client, expert(names.expert))
    before, threads = client.state(), client.ask("/probe/resources")["threads"]
    yield
    client.ask("/probe/restore")
    assert small(client).same_as(off)
    assert client.state() == before
    assert small(client, expert(names.expert)).same_as(on)
    found = client.ask("/probe/resources")
    assert found["ours"] == 0
    assert found["threads"] == threads


def fails(client: Client, fusion: dict, match: str = "", status: int = 422, **changes: object) -> None:
    """The generation ends with one sentence; right after it the hooks and the wrapper are gone."""
    with pytest.raises(RefusedError, match=match) as caught:
        small(client, fusion, **changes)
    assert caught.value.status == status, caught.value
    assert "\n" not in str(caught.value.answer["detail"])
    assert not client.fusion()["running"]


class Inject:
    """Within, a fault is armed; afterwards it must have happened."""

    def __init__(self, client: Client, target: str, kind: str = "bug", call: int = 1, file: str = "") -> None:
        self.client, self.target = client, target
        client.ask("/probe/inject", target=target, kind=kind, call=call, file=file)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        fired = self.client.ask("/probe/restore")["fired"]
        assert fired or kind, f"{self.target} was not reached"


# Files


@pytest.fixture
def victim(client: Client, host: Host, names: Names) -> Iterator[Path]:
    """A checkpoint of its own to be broken, which the host has listed."""
    folder = host.data / "models/Stable-diffusion"
    for suffix in (".safetensors", ".yaml"):
        shutil.copy(folder / f"{names.expert}{suffix}", folder / f"victim{suffix}")
    client.ask("/sdapi/v1/refresh-checkpoints", {})
    yield folder / "victim.safetensors"
    for suffix in (".safetensors", ".yaml"):
        (folder / f"victim{suffix}").unlink(missing_ok=True)
    client.ask("/sdapi/v1/refresh-checkpoints", {})


@pytest.mark.parametrize("loaded", [False, True])
def test_expert_file_changes_after_it_was_chosen(
    client: Client, victim: Path, names: Names, unhurt: None, loaded: bool
) -> None:
    """Also where the expert is loaded already: it is the file on disk that was asked for."""
    whole, fusion = victim.read_bytes(), expert("victim")
    half = whole[: len(whole) // 2]
    other = (victim.with_name("tiny_xl.safetensors")).read_bytes()
    faults = {
        "no such file": None, "truncated or not": half, "not a safetensors file": b"not a file at all",
        "truncated": b"", "it is sdxl; allowed with this base: sd1": other,
        "no Stable Diffusion U-Net": safetensors({"a": [2]}),
        "lacks": safetensors({key: [8, 4, 1, 1] for key in (FIRST, "out.2.weight", "x.proj_in.weight")}),
        "input channels|lacks": safetensors({FIRST: [8], "out.2.weight": [], "x.proj_in.weight": [1, 1, 1, 1]}),
    }  # fmt: skip
    for told, content in faults.items():
        if loaded:
            small(client, fusion)
        victim.unlink()
        if content is not None:
            victim.write_bytes(content)
        fails(client, fusion, rf"experts\[0\].checkpoint: 'victim.safetensors' is not allowed; .*{told}")
        victim.write_bytes(whole)
        assert small(client, fusion).same_as(small(client, expert(names.expert)))


def safetensors(shapes: dict[str, list[int]], prefix: str = "model.diffusion_model.") -> bytes:
    """A well-formed file of such tensors, all zeros, in float16."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[prefix + key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * end


def test_expert_file_is_deleted_while_it_is_loaded(client: Client, victim: Path, unhurt: None) -> None:
    whole, fusion = victim.read_bytes(), expert("victim")
    for target in (S + "experts:read_weights", S + "experts:check_fits", S + "launch:prepare"):
        with Inject(client, target, "delete", file=str(victim)):
            fails(client, fusion, "victim.safetensors.*no such file")
        victim.write_bytes(whole)
    assert small(client, fusion).pixels


def test_expert_with_a_configuration_that_is_not_its_own(client: Client, victim: Path, unhurt: None) -> None:
    config = victim.with_suffix(".yaml")
    text = config.read_text("utf-8")
    for wrong in (text.replace("model_channels: ", "model_channels: 3"), "{", "model: 7", "", "- a\n- b", "\0"):
        config.write_text(wrong, "utf-8")
        fails(client, expert("victim"), "victim")
    config.write_text(text, "utf-8")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_expert_with_broken_weights_is_named(client: Client, victim: Path, unhurt: None, value: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(victim)
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    weights[key].view(-1)[7] = float(value)
    save_file(weights, victim)
    fails(client, expert("victim"), rf"victim.safetensors: 1 tensors .* such as {key[22:]}")


@pytest.fixture
def aggregator(host: Host) -> Iterator[Path]:
    """A file of aggregators for tiny_a and tiny_b, with random weights."""
    import torch

    from lib_fusion.fusion.aggregator_files import Card, identify_model, save_aggregators
    from lib_fusion.fusion.lockstep import sizes_for
    from lib_fusion.unet.model import load_unet

    paths = [host.data / f"models/Stable-diffusion/{name}.safetensors" for name in ("tiny_a", "tiny_b")]
    unet = load_unet(paths[0])
    sizes = sizes_for(unet, 2, hidden=8, layers=1, heads=2)
    card = Card(unet.kind, "epsilon", sizes, tuple(map(identify_model, paths)))
    path = host.data / "models/denoiser-fusion/faulty.safetensors"
    save_aggregators(path, card, sizes.make().state_dict(), torch.float32)
    yield path
    path.unlink(missing_ok=True)


def test_aggregator_file_changes_after_it_was_chosen(client: Client, aggregator: Path, unhurt: None) -> None:
    whole = aggregator.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    fusion = {"method": "AFA", "afa_aggregator": "faulty"}
    on = small(client, fusion, model="tiny_a")

    def with_card(**changes: object) -> bytes:
        card = json.loads(header["__metadata__"]["card"]) | changes
        metadata = {**header["__metadata__"], "card": json.dumps(card)}
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        return len(text).to_bytes(8, "little") + text + whole[length:]

    sizes = json.loads(header["__metadata__"]["card"])["sizes"]
    faults = {
        "truncated": [whole[:-100], b"", b"no"],
        "no such aggregator|no such file": [None],
        "not an aggregator file": [safetensors({"a": [2]})],
        "its card can't be read": [
            with_card(sizes=sizes | {"layers": 10**9}), with_card(sizes=sizes | {"num_models": -1}),
            with_card(sizes=sizes | {"channels": 7}), with_card(sizes=None), with_card(models=[1, 2]),
            with_card(training=[]), with_card(sizes=sizes | {"hidden": 1e308}), with_card(more=1),
            with_card(sizes=sizes | {"heads": 3}), with_card(sizes=sizes | {"channels": [2**40] * 20}),
        ],
        "other widths": [with_card(sizes=sizes | {"context_dim": 5})],
        "tensors are not those": [with_card(sizes=sizes | {"layers": 2})],
    }  # fmt: skip
    for told, contents in faults.items():
        for content in contents:
            aggregator.unlink(missing_ok=True)
            if content is not None:
                aggregator.write_bytes(content)
            fails(client, fusion, rf"^422: afa_aggregator: 'faulty' is not allowed; .*({told})", model="tiny_a")
    aggregator.write_bytes(whole)
    for target in ("models.aggregators:AggregatorCache.load", "a1111.hooked_pass:make_lockstep"):
        with Inject(client, W + target, "delete", file=str(aggregator)):
            fails(client, fusion, "no such", model="tiny_a")
        aggregator.write_bytes(whole)
    assert small(client, fusion, model="tiny_a").same_as(on)


# What a model predicts


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_prediction_that_is_no_number_is_named(
    client: Client, names: Names, unhurt: None, value: str, call: int
) -> None:
    """At any step, the last one too; it is blended into no picture."""
    cases = [
        (S + "host_step:HostStep._run_expert", expert(names.expert), rf"expert 1 \({names.expert}"),
        (S + "host_step:HostStep._run_expert", expert(names.expert, method="Average"), rf"expert 1 \({names.expert}"),
        (U + "lockstep:Lockstep._run_experts", expert(names.expert, **UNIFORM), rf"expert 1 \({names.expert}"),
        (U + "lockstep:Lockstep._aggregate", expert(names.expert, **UNIFORM), "the base|the aggregator uniform"),
    ]
    for target, fusion, told in cases:
        with Inject(client, target, value, call):
            fails(client, fusion, f"^422: ({told}).* has predicted infinite values or NaN")
    client.ask("/probe/arm", what=value, step=call - 1)
    fails(client, FREEU, rf"^422: the base \({names.base}\) has predicted infinite values or NaN")


# Memory


@pytest.mark.parametrize("kind", ["cuda", "cpu", "memory"])
def test_out_of_memory(client: Client, names: Names, unhurt: None, kind: str) -> None:
    """The experts are unloaded, so that the next picture has room, and the sentence says what can be done."""
    client.ask("/probe/state")
    places = [("a1111.experts:load_unet", 1), ("a1111.text_encoders:put_weights", 1)]
    places += [("a1111.hooked_pass:FusionPass.attach", 1)]
    places += [("a1111.host_step:HostStep._run_expert", call) for call in (1, 3)]
    for target, call in places:
        client.draw(expert(names.copy), **SMALL)  # another expert is loaded
        with Inject(client, W + target, kind, call):
            fails(client, expert(names.expert), "do not fit into memory together.*wait in RAM", 500)
        assert client.fusion()["experts"] == []
        assert client.fusion()["text_bytes"] == 0
    with Inject(client, U + "lockstep:Lockstep._run_experts", kind, 30):
        fails(client, expert(names.expert, **UNIFORM), "do not fit into memory", 500)


# Every function of ours that the host, a sampler, or torch calls: (where, call, with which request, ends how)

TWO = {"snb_hold": 500}
HOOKS: list[tuple[str, int, dict, dict]] = [
    # script methods, and what they do
    *[(W + f"script:{name}", 1, TWO, {}) for name in (
        "begin", "read_args", "find_checkpoint", "write_infotext", "complete", "values_of", "Request.begin_batch",
        "Request.add", "_tell")],
    (W + "script:_is_left_out", 1, {"passes": "hires"}, HIRES),
    (W + "script:compare.keep_request", 1, {"compare": True}, {}),
    # a pass: made, attached, given the levels, taken off
    *[(W + f"sampling.launch:{name}", 1, TWO, {}) for name in ("launch", "announced_levels")],
    (W + "a1111.adapter:prepare", 1, TWO, {}),
    *[(S + f"launch:{name}", 1, TWO, {}) for name in ("find_expert", "check_base", "check_parts", "check_passes")],
    *[(S + f"hooked_pass:{name}", 1, TWO, {}) for name in (
        "FusionPass.__init__", "FusionPass.attach", "FusionPass.detach", "FusionPass.finish", "set_tiling")],
    (S + "hooked_pass:levels_of", 1, FREEU, {}),
    (W + "runtime:Runtime._guard", 1, TWO, {}),
    *[(S + f"experts:{name}", 1, TWO, {}) for name in (
        "ExpertCache.acquire", "check_fits", "load_unet", "read_weights", "check_finite", "built_as_told")],
    *[(S + f"conditioning:{name}", 1, TWO, {}) for name in (
        "TextCache.encode", "prompts_of", "encode")],
    *[(S + f"text_encoders:{name}", 1, TWO, {}) for name in ("clone_module", "put_weights", "strip_loras")],
    # callbacks and the wrapper of apply_model, at the first call and in the middle
    *[(S + f"hooked_pass:{name}", call, TWO, {}) for call in (1, 3) for name in (
        "FusionPass.begin_step", "FusionPass.apply_model", "FusionPass.end_step", "FusionPass.check_finite")],
    *[(S + f"host_step:{name}", call, TWO, {}) for call in (1, 3) for name in (
        "HostStep.__init__", "HostStep.run", "HostStep._begin", "HostStep._predict", "HostStep._run_expert",
        "HostStep.end", "output_scale", "borrowed_forward", "weights_of", "put_context", "alpha_of")],
    *[(f"lib_fusion.fusion.{name}", call, TWO, {}) for call in (1, 3) for name in (
        "session:FusionSession.using_freeu", "session:FusionSession.count", "session:FusionSession.watch",
        "session:FusionSession.check_finite", "blend:Blend.models_at", "blend:Blend.in_lockstep", "blend:Blend.fuse",
        "blend:Blend._place", "step:Step.__init__", "step:Step.run", "step:Step.observe",
        "step:Step.fuse", "step:Step._predict", "rows:Rows.combine")],
    *[("lib_fusion.fusion.blend:Blend._log_maps", call, TWO, {}) for call in (1, 2)],  # until the mask is held
    (S + "contexts:Context.slice", 2, TWO, {}),
    *[(S + f"placement:{name}", 2, TWO, {"settings": {"denoiser_fusion_place": "RAM between U-Net calls"}})
      for name in ("bring", "put_back")],
    # AFA's hooks
    *[(U + f"lockstep:Lockstep.{name}", call, UNIFORM, {}) for call in (1, 3) for name in (
        "_begin", "_run_experts", "_aggregate", "_keep_last", "_out", "_end", "_forget", "running")],
    *[(U + f"lockstep:Lockstep.{name}", 1, UNIFORM, {}) for name in ("__init__", "attach")],
    (S + "hooked_pass:make_lockstep", 1, UNIFORM, {}),
    (S + "host_step:together", 3, UNIFORM, {}),
    # FreeU's
    (S + "hooked_pass:attach_freeu", 1, FREEU, {}),
    *[(M + "freeu:FreeU.edit_", call, FREEU, {}) for call in (1, 9)],
    # skipping's
    *[(f"lib_fusion.fusion.step:Step.{name}", call, SKIPPING, {}) for call in (1, 2) for name in (
        "_computed", "_keep", "guidance")],
    ("lib_fusion.fusion.step:Step._with_forecasts", 6, SKIPPING, {}),
    (W + "sampling.correcting:EulerCorrector.after_model", 1, SKIPPING, {}),
    (W + "sampling.correcting:EulerCorrector.after_model", 2, SKIPPING, {}),
    (W + "sampling.correcting:EulerCorrector._replay", 1, SKIPPING, {}),
    (S + "hooked_pass:FusionPass.begin_skipping", 1, SKIPPING, {}),
    *[(f"lib_fusion.fusion.policies:Skips.{name}", 1, SKIPPING, {}) for name in (
        "begin_step", "needed", "observe", "forecast", "take_corrections")],
]  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_every_hook_and_callback_breaks_once(client: Client, names: Names, unhurt: None, part: int) -> None:
    """The generation ends with an error, and never as a normal-looking picture; the next one is as ever."""
    off, on = small(client), small(client, expert(names.expert, **TWO))
    for target, call, how, changes in HOOKS[part::4]:
        more = dict(how)
        steps = {"steps": more.pop("steps")} if "steps" in more else {}
        client.ask("/probe/free")
        client.ask("/probe/inject", target=target, call=call)
        answer = ask(client, expert(names.expert, **more), None, **steps, **changes)
        assert client.ask("/probe/restore")["fired"], f"{target} was not reached"
        assert isinstance(answer, str), f"{target}, call {call}: a picture was made"
        assert re.search(r"the probe has broken this|could not read|announces no steps", answer), (target, answer)
        assert small(client).same_as(off), target
        state = client.state()
        assert (state["hooks"], state["replaced"], client.fusion()["running"]) == (0, [], False), target
    assert small(client, expert(names.expert, **TWO)).same_as(on)


#: What happens when the pictures are there already.
AFTER = [(W + "script:gallery.add_previews", {"denoiser_fusion_preview_masks": True}, {}, "preview"),
         (W + "script:compare.add_comparison", {}, {"compare": True}, "comparison"),
         (W + "panel.compare:images.draw_grid_annotations", {}, {"compare": True}, "comparison"),
         (W + "script:runtime.drop_leftovers", {}, {}, "")]  # fmt: skip


@pytest.mark.parametrize("kind", ["bug", "disk"])
def test_what_fails_beside_a_picture_does_not_lose_it(
    client: Client, names: Names, unhurt: None, kind: str
) -> None:
    on = small(client, expert(names.expert))
    for target, settings, more, told in AFTER:
        if told:
            with client.settings(settings), Inject(client, target, kind):
                drawn = small(client, expert(names.expert, **more))
            assert drawn.same_as(on)
            assert f"the {told} could not be made" in drawn.params["Fusion comment"]


def test_a_full_disk(client: Client, host: Host, names: Names, unhurt: None) -> None:
    """The picture arrives, though what is beside it can't be saved."""
    folder = host.data / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        (folder / "fill").write_bytes(b"x" * 4096)
        on = small(client, expert(names.expert))
        full = {"outdir_txt2img_grids": str(folder), "grid_save": True}
        with client.settings(full):
            drawn = small(client, expert(names.expert, compare=True))
        assert drawn.same_as(on)
        assert "the comparison could not be made" in drawn.params["Fusion comment"]
        assert "No space left" in drawn.params["Fusion comment"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Interrupts, and several at a time


@pytest.mark.parametrize("what", ["interrupt", "skip"])
@pytest.mark.parametrize("how", [TWO, UNIFORM, FREEU, SKIPPING, {"compare": True}])
def test_stopped_at_every_step(client: Client, names: Names, unhurt: None, what: str, how: dict) -> None:
    more = dict(how)
    steps = more.pop("steps", 4)
    off = small(client)
    for step in range(steps):
        client.ask("/probe/arm", what=what, step=step)
        small(client, expert(names.expert, **more), steps=steps)
        assert small(client).same_as(off), step
    for step in range(4):
        client.ask("/probe/arm", what=what, step=step)
        small(client, expert(names.expert, **more), steps=2, **HIRES)


def test_two_clients_at_once(client: Client, names: Names, unhurt: None) -> None:
    """Each gets its own pictures, whatever checkpoints the others have asked for."""
    wanted = [
        (None, names.base), (expert("tiny_b"), "tiny_a"), (expert("tiny_b", **UNIFORM), "tiny_a"), (FREEU, names.base),
        (expert("tiny_xl_b"), "tiny_xl"), (expert(names.expert, prompt="a dog"), names.base), (None, "tiny_xl"),
        (expert("nothing"), "tiny_a"),
    ]  # fmt: skip
    alone = [ask(client, *each) for each in wanted]
    queues = [[wanted[(i * step) % 8] for i in range(8)] for step in (1, 3)]
    for queue, answers in zip(queues, together(client, queues)):
        assert answers == [alone[wanted.index(each)] for each in queue]


def test_checkpoint_switched_in_the_middle_of_a_queue(client: Client, names: Names, unhurt: None) -> None:
    """By the host's settings, which take effect between pictures: each is drawn by one checkpoint, or refused."""
    fusions = [None, expert("tiny_b"), expert("tiny_b", **UNIFORM), FREEU]
    models = [names.base, "tiny_a", "tiny_xl"]
    alone = [[ask(client, fusion, model) for model in models] for fusion in fusions]
    ask(client, None, names.base)
    queues = [[(fusions[(i + start) % 4], None) for i in range(8)] for start in (0, 2)]

    def switch() -> None:
        for name in [*models[1:], models[0]]:
            time.sleep(0.7)
            client.ask("/sdapi/v1/options", {"sd_model_checkpoint": f"{name}.safetensors"})

    try:
        for queue, answers in zip(queues, together(client, queues, switch)):
            for (fusion, _), answer in zip(queue, answers):
                assert answer in alone[fusions.index(fusion)], fusion
    finally:
        client.ask("/sdapi/v1/options", {"sd_model_checkpoint": f"{names.base}.safetensors"})


def ask(client: Client, fusion: dict | None, model: str | None, **changes: object) -> bytes | str:
    """The picture's pixels, or what the answer says instead."""
    try:
        return small(client, fusion, model=model, **changes).pixels[0].tobytes()
    except RefusedError as error:
        return str(error)


def together(client: Client, queues: list[list], meanwhile: Callable[[], None] = lambda: None) -> list[list]:
    """Each queue's answers, one client a queue, all at once."""
    with ThreadPoolExecutor() as pool:
        each = [pool.submit(lambda queue=queue: [ask(Client(client.url), *one) for one in queue]) for queue in queues]
        meanwhile()
        return [answers.result(240) for answers in each]


def test_memory_is_freed_while_a_picture_is_made(client: Client, names: Names, unhurt: None) -> None:
    """The button waits for its turn: the picture under way is what it would have been."""
    from tests.webui_live.test_lifecycle import press

    on = small(client, expert(names.expert), steps=30)
    drawn: list[Pictures] = []
    thread = threading.Thread(target=lambda: drawn.append(small(Client(client.url), expert(names.expert), steps=30)))
    thread.start()
    while not client.fusion()["running"] and thread.is_alive():
        time.sleep(0.01)
    press(client, "Free memory")
    thread.join(60)
    assert drawn[0].same_as(on)
    assert client.fusion()["experts"] == []
