"""Many generations in one host: memory stays, nothing is left, and a request draws the same picture each time.

``FUSION_SOAK`` is how many; 200 take 40 seconds of one core.
"""

from __future__ import annotations

import os

from tests.webui_live.client import Client, Pictures, RefusedError, expert
from tests.webui_live.conftest import Names

GENERATIONS = int(os.environ.get("FUSION_SOAK", "200"))
#: How much resident memory may grow after the first quarter.
GROWTH = 0.02
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "steps": 3}
FREEU = {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.7}
FORECAST = {"skipping": "Forecast", "skip_tolerance": 10}
UNIFORM = {"method": "AFA", "afa_maps": "uniform"}
FAULTS = ("lib_fusion.webui.a1111.host_step:HostStep._run_expert",
          "lib_fusion.webui.a1111.hooked_pass:FusionPass.end_step",
          "lib_fusion.webui.a1111.experts:load_unet", "lib_fusion.webui.a1111.conditioning:encode")  # fmt: skip


def requests(names: Names) -> list[tuple[dict | None, dict]]:
    """Every method, and methods together, each with another sampler, size or expert."""
    two = {"experts": [{"checkpoint": names.expert, "prompt": "a house"}, {"checkpoint": names.other}]}
    return [
        (None, {}),
        (expert(names.expert), {}),
        (expert(names.expert, snb_saliency="code", snb_hold=700), {"sampler_name": "DDIM"}),
        (expert(names.other, prompt="a dog", text_encoder="base"), {"width": 96}),
        (expert(names.other, method="Average"), {"sampler_name": "Heun"}),
        (expert(names.expert, **UNIFORM), {"sampler_name": "DPM++ 2M"}),
        (two, {"sampler_name": "Euler a", "batch_size": 2}),
        (FREEU, {"sampler_name": "UniPC", "height": 96}),
        (expert(names.expert, **FREEU), {"sampler_name": "LCM"}),
        (FORECAST, {"steps": 12}),
        ({"skipping": "Paper"}, {"steps": 12, "sampler_name": "DDIM"}),
        (expert(names.expert, **FORECAST), {"steps": 12, "sampler_name": "DPM++ 2M"}),
        ({**two, **UNIFORM, **FREEU, **FORECAST}, {"steps": 10}),
        (expert(names.copy, snb_window=[900, 100], snb_outside="expert"), {"sampler_name": "PLMS"}),
        (expert(names.expert, compare=True), {"n_iter": 2}),
        (expert(names.expert, passes="hires"), HIRES),
        (expert(names.expert, **FREEU), HIRES | {"sampler_name": "Euler a"}),
    ]


def test_soak(client: Client, names: Names) -> None:
    wanted = requests(names)
    first: dict[int, Pictures] = {}
    client.draw(width=64, height=64, steps=1)  # the WebUI loads its first checkpoint after its start
    before, fields = client.state(), ("ours", "threads")
    resources = [client.ask("/probe/resources")]
    drawn = failed = stopped = 0
    for i in range(GENERATIONS):
        which = (7 * i) % len(wanted)
        fusion, changes = wanted[which]
        size = {"width": 64, "height": 64, "steps": 4}
        if i % 5 == 3:  # a fault first, or a request that is refused
            target = FAULTS[(i // 5) % len(FAULTS)]
            client.ask("/probe/inject", target=target, kind=("bug", "cuda")[i % 2])
            try:
                client.draw(fusion if i % 3 else expert("nothing"), **size | changes)
            except RefusedError:
                failed += 1
            client.ask("/probe/restore")
        if i % 7 == 5:
            client.ask("/probe/arm", what=("interrupt", "skip")[i % 2], step=i % 4)
            client.draw(fusion, **size | changes)
            client.ask("/probe/arm", what="", step=0)
            stopped += 1
        found = client.draw(fusion, **size | changes)
        assert found.same_as(first.setdefault(which, found)), (i, fusion)
        drawn += 1
        if drawn in (GENERATIONS // 4, GENERATIONS):
            resources.append(client.ask("/probe/resources"))
    assert len(first) == len(wanted)
    assert client.state() == before
    assert {key: resources[-1][key] for key in fields} == {key: resources[0][key] for key in fields}
    growth = resources[2]["rss"] / resources[1]["rss"] - 1
    print(f"{drawn} drawn, {failed} failed, {stopped} stopped; "
          f"resident {', '.join(str(r['rss'] >> 20) for r in resources)} MiB, {growth:+.2%}")  # fmt: skip
    assert failed > 0
    assert stopped > 0
    assert growth < GROWTH
