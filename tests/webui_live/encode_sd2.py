"""Encodes with tiny SD2 checkpoints, run by the host's Python: ``encode_sd2.py DATA_DIR WEBUI_DIR``.

Prints the largest differences between what ``HostEncoders`` gives and what the host's whole models give, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.webui_live import make_checkpoints as make

CONFIG = make.sd1_config(parameterization="v")
PARAMS = CONFIG["model"]["params"]
PARAMS["unet_config"]["params"] |= {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 32}
PARAMS["cond_stage_config"] = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"arch": "tiny-openclip", "version": "", "device": "cpu", "layer": "penultimate"},
}
TEXTS = ["a fox, flat drawing", "", "a " * 90]


@torch.no_grad()
def main() -> None:
    from lib_fusion.webui.encode import HostEncoders

    make.MODELS.mkdir(parents=True, exist_ok=True)
    make.make_open_clip()
    weights = [make.build(CONFIG, 1)]
    weights.append(make.vary(weights[0], 2))
    names = ("two_a", "two_b")
    for name, tensors in zip(names, weights):
        make.write(name, tensors, CONFIG)
    paths = [make.MODELS / f"{name}.safetensors" for name in names]
    encoders = HostEncoders(paths, [path.with_suffix(".yaml") for path in paths])
    picture = torch.rand(3, 64, 48) * 2 - 1
    found = {"states": [], "latent": 0.0, "models": encoders.identity["models"]}
    for i, tensors in enumerate(weights):
        model = make.instantiate_from_config(make.OmegaConf.create(CONFIG).model).eval()
        model.load_state_dict(tensors)
        states = encoders.encode_texts(TEXTS)[i].states - model.get_learned_conditioning(TEXTS)
        found["states"].append(states.abs().max().item())
        if i == 0:
            latent = model.get_first_stage_encoding(model.encode_first_stage(picture[None]).mode())[0]
            found["latent"] = (encoders.encode_picture(picture) - latent).abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
