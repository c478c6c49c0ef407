"""What a LoRA expert costs in the WebUI, at real sizes: ``python -m benchmarks.lora_experts --kind sd1``.

The host's own U-Net class with random weights and its own LoRA code, in its own Python, without its page: one call of
the U-Net (two rows) for the base, for an expert whose layers are kept merged, for one whose layers are merged at each
call, and for the base by the host's own way of changing LoRAs. All ways in turn, in each round; figures are the medians
of the rounds' ratios to the base's call, in the process's own seconds where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The usual ranges of LoRAs, by the ends of layers' paths; an empty one is all linear and convolutional layers.
RANGES = {"attention": ("to_q", "to_k", "to_v", "to_out.0"), "blocks": (), "all": ()}
CONFIGS = {"sd1": ("configs/v1-inference.yaml", "unet_config"),
           "sdxl": ("repositories/generative-models/configs/inference/sd_xl_base.yaml", "network_config")}  # fmt: skip
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=sorted(CONFIGS), default="sd1")
    parser.add_argument("--range", choices=sorted(RANGES), default="blocks", help="the layers that the LoRA is for")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--switch", action="store_true", help="also the host's own change of its list")
    parser.add_argument("--no-kept", dest="kept", action="store_false", help="without merged layers that are kept")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.webui_live.host import FLAGS, environment, find_host, prepare_data

    folder, python = find_host()
    with tempfile.TemporaryDirectory() as data:
        prepare_data(Path(data))
        command = [str(python), __file__, "inside", json.dumps(vars(args)), *FLAGS, "--ui-debug-mode",
                   "--data-dir", data]  # fmt: skip
        subprocess.run(command, cwd=folder, env=environment(), check=True)


def is_chosen(path: str, name: str) -> bool:
    if name == "blocks":
        return ".transformer_blocks." in path or path.endswith(("proj_in", "proj_out"))
    return not RANGES[name] or path.endswith(RANGES[name])


def inside(options: dict[str, Any]) -> None:
    """In the host's Python: measures, and prints."""
    sys.path[:0] = [str(Path.cwd()), str(ROOT)]
    from modules import initialize

    initialize.imports()
    initialize.initialize()
    import torch

    with torch.no_grad():
        measure(options)


def measure(options: dict[str, Any]) -> None:
    import extra_networks_lora
    import network
    import networks
    import torch
    from modules import devices, sd_models, shared
    from safetensors.torch import save_file

    from lib_fusion.webui.a1111 import loras, worn

    networks.extra_network_lora = extra_networks_lora.ExtraNetworkLora()
    devices.dtype_unet = torch.float32  # as the host's flags for the CPU say
    base = make_base(options["kind"])
    sd_models.model_data.sd_model, sd_models.model_data.was_loaded_at_least_once = base, True
    networks.assign_network_names_to_compvis_modules(base)
    unet = base.model.diffusion_model
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {path: layer for path, layer in unet.named_modules()
              if isinstance(layer, kinds) and is_chosen(path, options["range"])}  # fmt: skip
    file = Path(shared.cmd_opts.data_dir) / "lora.safetensors"
    save_file(make_lora(layers, options["rank"]), file)
    on_disk = network.NetworkOnDisk("lora", str(file))
    networks.available_networks["lora"] = networks.available_network_aliases["lora"] = on_disk

    size = options["size"]
    x, t = (torch.zeros(2, *shape, device=devices.device, dtype=devices.dtype_unet) for shape in ((4, size, size), ()))
    context = torch.zeros(2, 77, 768 if options["kind"] == "sd1" else 2048, device=x.device, dtype=x.dtype)
    given = {} if options["kind"] == "sd1" else {"y": torch.zeros(2, 2816, device=x.device, dtype=x.dtype)}

    on_gpu = devices.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time  # the CPU may have other work, too

    def seconds(act: Callable[[], Any]) -> float:
        began = clock()
        act()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - began

    def call() -> None:
        with devices.autocast():
            unet(x, t, context, **given)

    def expert(way: Any) -> Callable[[], None]:
        def act() -> None:
            with way.on():
                call()

        return act

    def switched() -> None:  # and back, which the base's next call would else do
        with worn.listed(nets):
            call()
        for layer in base.network_layer_mapping.values():
            if isinstance(layer, worn.KINDS):
                networks.network_apply_weights(layer)

    call()
    cache = loras.LoraCache()
    calls = loras.find_loras("<lora:lora:1>", "prompt")[1]
    ways: dict[str, Callable[[], None]] = {"base": call}
    nets = cache.nets(calls, base, "prompt")
    acting = worn.touched(nets, base.network_layer_mapping)
    merged_in = None
    if options["kept"]:
        began = clock()
        (kept,) = cache.acquire([(calls, "prompt")], base)
        merged_in = clock() - began
        ways["expert, kept merged"] = expert(kept)
    ways["expert, merged at each call"] = expert(worn.MergedAtEachCall(acting, nets, "prompt"))
    if options["switch"]:
        ways["host's list changed and back"] = switched
    rounds = [{name: seconds(act) for name, act in ways.items()} for _ in range(options["rounds"])]

    whole, touched = (sum(p.numel() * p.element_size() for m in modules for p in m.parameters(recurse=False))
                      for modules in (unet.modules(), acting.values()))  # fmt: skip
    print(f"\n{options['kind']}, rank {options['rank']} on {options['range']} ({len(acting)} layers), {x.dtype}, "
          f"{x.device}, latents of {size} x {size}: the U-Net takes {whole / MIB:.0f} MiB")  # fmt: skip
    print(f"kept merged: {touched / MIB:.0f} MiB for each expert, x {touched / whole:.2f} of a second U-Net"
          + (f"; merged once in x {merged_in / rounds[0]['base']:.2f} of a call" if merged_in else ""))
    for name in ways:
        ratios = [each[name] / each["base"] for each in rounds]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:<28} x {statistics.median(ratios):.2f} of the base's call ({each})")
    if options["kept"]:
        on = [seconds(lambda: put(kept)) for _ in range(20)]
        print(f"on and off: {1000 * statistics.median(on):.2f} ms")


def put(kept: Any) -> None:
    with kept.on():
        pass


def make_base(kind: str) -> Any:
    """The host's U-Net class with random weights, in as much of a model as LoRAs ask for."""
    import torch
    from modules import devices, sd_models
    from omegaconf import OmegaConf

    config, key = CONFIGS[kind]
    node = OmegaConf.to_container(OmegaConf.load(config).model.params[key])
    node["params"] |= {"use_checkpoint": False}
    if kind == "sdxl":
        node["params"] |= {"spatial_transformer_attn_type": "softmax"}
    with torch.device("meta"):
        unet = sd_models.get_obj_from_str(node["target"])(**node["params"])
    unet = unet.to(devices.dtype_unet).to_empty(device=devices.device).eval().requires_grad_(False)
    unet.dtype = devices.dtype_unet
    generator = torch.Generator(devices.device).manual_seed(0)
    for parameter in unet.parameters():
        parameter.uniform_(-0.03, 0.03, generator=generator)
    base = torch.nn.Module()
    base.model = torch.nn.Module()
    base.model.diffusion_model = unet
    base.is_sdxl = kind == "sdxl"
    base.cond_stage_model = base.conditioner = torch.nn.Module()
    base.conditioner.embedders = []
    base.sd_checkpoint_info = type("Info", (), {"filename": "random"})
    return base


def make_lora(layers: dict[str, Any], rank: int) -> dict[str, Any]:
    """A LoRA in kohya's naming for these layers."""
    import torch

    tensors = {}
    for path, layer in layers.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        out, into, *size = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.full((rank, into, *size), 0.01)
        tensors[f"{name}.lora_up.weight"] = torch.full((out, rank, *[1] * len(size)), 0.01)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        given = json.loads(sys.argv[2])
        sys.argv = [sys.argv[0], *sys.argv[3:]]
        inside(given)
    else:
        main()
