"""Encodes with tiny checkpoints, run by the host's Python: ``encode_kinds.py DATA_DIR WEBUI_DIR KIND [DEVICE]``.

Prints the largest differences between what ``HostEncoders`` gives and what the host's whole models give, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.webui_live import make_checkpoints as make

SD2 = make.sd1_config(parameterization="v")
PARAMS = SD2["model"]["params"]
PARAMS["unet_config"]["params"] |= {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 32}
PARAMS["cond_stage_config"] = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"arch": "tiny-openclip", "version": "", "device": "cpu", "layer": "penultimate"},
}
CONFIGS = {"sd1": make.sd1_config(), "sd2": SD2, "sdxl": make.sdxl_config()}
TEXTS = ["a fox, flat drawing", "", "a " * 90]
HEIGHT, WIDTH = 64, 48


def told_by(model: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States and SDXL's vector by the host's whole model. An empty text is given as an unconditional one is."""
    if kind != "sdxl":
        return model.get_learned_conditioning(TEXTS), None
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    found = []
    for text in TEXTS:
        batch = {"txt": [text], "original_size_as_tuple": sizes, "crop_coords_top_left": torch.zeros(1, 2),
                 "target_size_as_tuple": sizes}  # fmt: skip
        found.append(model.conditioner(batch, force_zero_embeddings=[] if text else ["txt"]))
    return torch.cat([f["crossattn"] for f in found]), torch.cat([f["vector"] for f in found])


def latent_by(model: Any, kind: str, picture: torch.Tensor) -> torch.Tensor:
    """The VAE's mode, scaled. SDXL's class draws around it, by its parent's posterior."""
    if kind != "sdxl":
        return model.get_first_stage_encoding(model.encode_first_stage(picture[None]).mode())[0]
    vae = model.first_stage_model
    return model.scale_factor * super(type(vae), vae).encode(picture[None]).mode()[0]


@torch.no_grad()
def main(kind: str, device: str = "cpu") -> None:
    from lib_fusion.unet.vector import sdxl_vector
    from lib_fusion.webui.training.host_encoders import HostEncoders

    make.MODELS.mkdir(parents=True, exist_ok=True)
    make.make_clip()
    make.make_open_clip()
    config = CONFIGS[kind]
    weights = [make.build(config, 1)]
    weights.append(make.vary(weights[0], 2))
    names = ("two_a", "two_b")
    for name, tensors in zip(names, weights):
        make.write(name, tensors, config)
    paths = [make.MODELS / f"{name}.safetensors" for name in names]
    encoders = HostEncoders(paths, [path.with_suffix(".yaml") for path in paths], device)
    picture = torch.rand(3, HEIGHT, WIDTH) * 2 - 1
    found = {"states": [], "vectors": [], "latent": 0.0, "models": encoders.identity["models"]}
    for i, tensors in enumerate(weights):
        model = make.instantiate_from_config(make.OmegaConf.create(config).model).eval()
        model.load_state_dict(tensors)
        text = encoders.encode_texts(TEXTS)[i]
        states, vectors = told_by(model, kind)
        found["states"].append((text.states.cpu() - states).abs().max().item())
        if vectors is not None:
            found["vectors"].append((sdxl_vector(text.pooled.cpu(), HEIGHT, WIDTH) - vectors).abs().max().item())
        if i == 0:
            latent = latent_by(model, kind, picture)
            found["latent"] = (encoders.encode_picture(picture).cpu() - latent).abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[3:])
