"""Measures the demo's checkpoints and what fusing them gives: ``python -m demo.assess`` (about an hour on two cores).

Pictures are scored as latents, against the latents of the 72 concepts (encoded by the demo's VAE) and their blurred
versions. For each object of a scene: *sharp* is whether the nearest of the 144 references in the caption's style is the
right concept, sharp; *rms* is the distance to it. Parts can be run apart (``--part``); each leaves a JSON file, and
``--part report`` makes docs/measurements/demo.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from demo.concepts import CATEGORIES, CATEGORY_OF, CONCEPTS, STYLES, single_caption
from demo.data import render
from demo.experts import Latents, alphas_cumprod
from demo.report import write_report
from demo.scenes import CFGS, LAYOUTS, MODELS, RMS_BOUND, SEEDS, TIMESTEPS, Scene, methods, scenes
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import VAE_SCALE, quiet_libraries
from lib_fusion.engine.sheets import sheet
from lib_fusion.fusion.places import make_places
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.model_file import LoraFile, ModelFile

HERE = Path(__file__).resolve().parent


def load_engine(*names: str) -> Engine:
    """The demo's models by their names, the base first; ``general+animals:0.5``: with the LoRA of that category."""
    models = [model_of(name) for name in names]
    return Engine(models[0], models[1:])


def model_of(name: str, loras: Path = HERE / "loras") -> ModelFile:
    checkpoint, *others = name.split("+")
    found = []
    for other in others:
        category, _, weight = other.partition(":")
        found.append(LoraFile(loras / f"demo-{category}.safetensors", float(weight or 1)))
    return ModelFile(HERE / f"{checkpoint}.safetensors", tuple(found))


def reference_latents(engine: Engine, data: Path) -> Latents:
    """The demo's pictures through the VAE of the checkpoints."""

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return engine.vae.encode(pictures).latent_dist.mode() * VAE_SCALE

    with torch.no_grad():
        return Latents.encode(data, encode, "cpu")


@torch.no_grad()
def draw(
    engine: Engine, captions: Sequence[str], seeds: Sequence[int], size: tuple[int, int], cfg: float,
    fusion: FusionSettings, masks: torch.Tensor | None = None, batch: int = 16, steps: int = 50,
    sampler: str = "DDIM", session: type[FusionSession] = FusionSession,
) -> torch.Tensor:  # fmt: skip
    """Final latents of (caption, seed) pairs; ``size`` is (height, width) in pixels."""
    generation = GenerationSettings(
        tuple(captions), height=size[0], width=size[1], cfg_scale=cfg, steps=steps, sampler=sampler
    )
    result = []
    for i in range(0, len(captions), batch):
        jobs = list(zip(captions[i : i + batch], seeds[i : i + batch], strict=True))
        part = masks[i : i + batch] if masks is not None else None
        places = make_places(fusion, {} if part is None else {1: part})
        result.append(engine.denoise(jobs, generation, session(fusion, places)))
    return torch.cat(result)


class Scorer:
    """Compares object latents (4,16,16) with the references of a style."""

    def __init__(self, latents: Latents) -> None:
        self.references = {
            style: torch.stack([part[name, style] for part in (latents.sharp, latents.blurred) for name in CONCEPTS])
            for style in STYLES
        }

    def nearest(self, z: torch.Tensor, style: str) -> int:
        """Index of the nearest reference: 0..71 the sharp concepts, 72..143 the blurred ones."""
        return int((self.references[style] - z).square().mean(dim=(1, 2, 3)).argmin())

    def sharp(self, z: torch.Tensor, name: str, style: str) -> bool:
        return self.nearest(z, style) == CONCEPTS.index(name)

    def rms(self, z: torch.Tensor, name: str, style: str) -> float:
        return float((self.references[style][CONCEPTS.index(name)] - z).square().mean().sqrt())

    def scene(self, z: torch.Tensor, scene: Scene) -> dict[str, float]:
        """Scores of a scene's latent, by category; where no sides are named, of the better arrangement."""
        halves = z.chunk(2, dim=1 if scene.vertical else 2)
        names = (scene.first, scene.second)
        orders = (names, names[::-1]) if scene.layout == "sides not named" else (names,)
        results = []
        for order in orders:
            scores: dict[str, float] = {}
            for half, name in zip(halves, order, strict=True):
                scores[CATEGORY_OF[name]] = float(self.sharp(half, name, scene.style))
                scores[f"rms {CATEGORY_OF[name]}"] = self.rms(half, name, scene.style)
            scores["both"] = float(scores["animals"] and scores["vehicles"])
            scores["both rms"] = float(max(scores["rms animals"], scores["rms vehicles"]) < RMS_BOUND)
            results.append(scores)
        return max(results, key=lambda s: (s["both"], -s["rms animals"] - s["rms vehicles"]))


def oracle_masks(group: Sequence[Scene]) -> torch.Tensor:
    """The vehicle's half of each scene, bool (N,1,16 or 32,32 or 16)."""
    masks = []
    for scene in group:
        second = torch.zeros(2, dtype=torch.bool)
        second[0 if CATEGORY_OF[scene.first] == "vehicles" else 1] = True
        line = second.repeat_interleave(16)
        masks.append(line.view(-1, 1).expand(32, 16) if scene.vertical else line.view(1, -1).expand(16, 32))
    return torch.stack(masks)[:, None]


def assess_scenes(
    data: Path, pairs: int, seeds: Sequence[int] = SEEDS, cfgs: Sequence[float] = CFGS, only: Sequence[str] = (),
    steps: int = 50,
) -> dict:  # fmt: skip
    """{cfg: {method: {layout: mean scores}}} over ``pairs`` held-out pairs a layout; ``only``: these methods."""
    table: dict = {}
    all_scenes = scenes(pairs)
    scorer = Scorer(reference_latents(load_engine("general"), data))
    for name, (models, fusion) in methods().items():
        if only and name not in only:
            continue
        engine = load_engine(*models)
        for cfg in cfgs:
            began = time.monotonic()
            scores: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
            for vertical in (False, True):
                group = [s for s in all_scenes if s.vertical == vertical for _ in seeds]
                own_seeds = [seed + i for i in range(len(group) // len(seeds)) for seed in seeds]
                masks = oracle_masks(group) if fusion.experts and fusion.experts[0].is_painted else None
                size = (256, 128) if vertical else (128, 256)
                z = draw(engine, [s.caption for s in group], own_seeds, size, cfg, fusion, masks, steps=steps)
                for scene, latent in zip(group, z, strict=True):
                    scores[scene.layout].append(scorer.scene(latent, scene))
            scores["all"] = [s for part in list(scores.values()) for s in part]
            table.setdefault(f"{cfg:g}", {})[name] = {
                layout: {key: sum(s[key] for s in part) / len(part) for key in part[0]}
                | {"pairs": len(part) // len(seeds), "seeds": len(seeds)}
                for layout, part in scores.items()
            }
            both = table[f"{cfg:g}"][name]["all"]
            shown = " ".join(f"{key} {both[key]:.2f}" for key in ("animals", "vehicles", "both", "both rms"))
            print(f"{name}, CFG {cfg:g}: {shown} ({time.monotonic() - began:.0f} s)", flush=True)
    return table


def assess_singles(data: Path, only: Sequence[str] = (), steps: int = 50) -> dict:
    """{method: {category: {hit, rms}}} on single objects of the models' categories, CFG 4, one seed a caption."""
    table: dict = {}
    scorer = Scorer(reference_latents(load_engine("general"), data))
    for name, (models, fusion) in methods().items():
        if (fusion.experts and fusion.experts[0].is_painted) or (only and name not in only):
            continue
        engine = load_engine(*models)
        table[name] = {}
        for category in ("animals", "vehicles", *(["food"] if "food" in models else [])):
            keys = [(n, s) for n in CATEGORIES[category] for s in STYLES]
            captions = [single_caption(*k) for k in keys]
            z = draw(engine, captions, range(len(keys)), (128, 128), 4.0, fusion, steps=steps)
            hits = [scorer.nearest(x, s) % len(CONCEPTS) == CONCEPTS.index(n) for x, (n, s) in zip(z, keys)]
            distances = [scorer.rms(x, n, s) for x, (n, s) in zip(z, keys)]
            table[name][category] = {"hit": sum(hits) / len(keys), "rms": sum(distances) / len(keys)}
        print(name, table[name], flush=True)
    return table


def train_classifier(latents: Latents, steps: int = 400) -> nn.Module:
    """A small CNN on shifted and noised latents of all concepts in both styles: (B,4,16,16) -> 72 logits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(96, 128, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 16, len(CONCEPTS)),
    )  # fmt: skip
    keys = list(latents.sharp)
    x = torch.stack([latents.sharp[key] for key in keys])
    y = torch.tensor([CONCEPTS.index(name) for name, _ in keys])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        z = torch.roll(x[index], shift, dims=(2, 3))
        loss = F.cross_entropy(net(z + 0.3 * torch.rand(1) * torch.randn_like(z)), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def assess_models(data: Path) -> dict:
    """Denoising loss, nearest-latent and classifier accuracy of each model on each category, and loss on scenes."""
    latents = reference_latents(load_engine("general"), data)
    scorer = Scorer(latents)
    with torch.enable_grad():
        classifier = train_classifier(latents)
    schedule = alphas_cumprod()
    held = scenes(24)
    table: dict = {}
    for name in MODELS:
        engine = load_engine(name)
        row = table[name] = {"loss": {}, "nearest": {}, "classifier": {}}
        sets = {
            c: [(single_caption(n, s), latents.sharp[n, s]) for n in CATEGORIES[c] for s in STYLES] for c in CATEGORIES
        }
        sets["scenes, animal"] = sets["scenes, vehicle"] = [
            (s.caption, torch.cat([latents.sharp[n, s.style] for n in (s.first, s.second)], dim=2))
            for s in held if not s.vertical
        ]  # fmt: skip
        sides = [s for s in held if not s.vertical]
        for key, examples in sets.items():
            x = torch.stack([latent for _, latent in examples])
            context = engine.models[0].text([caption for caption, _ in examples])
            total = 0.0
            for t in TIMESTEPS:
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
                noisy = schedule[t].sqrt() * x + (1 - schedule[t]).sqrt() * noise
                error = (engine.models[0].unet(noisy, torch.full((len(x),), t), context) - noise).square().mean(dim=1)
                if key.startswith("scenes"):
                    wanted = "animals" if key.endswith("animal") else "vehicles"
                    side = [0 if CATEGORY_OF[s.first] == wanted else 1 for s in sides]
                    error = torch.stack([e.chunk(2, dim=1)[i] for e, i in zip(error, side)])
                total += error.mean().item() / len(TIMESTEPS)
            row["loss"][key] = total
        for category in CATEGORIES:
            keys = [(n, s) for n in CATEGORIES[category] for s in STYLES]
            seeds = range(500, 500 + len(keys))
            z = draw(engine, [single_caption(*k) for k in keys], seeds, (128, 128), 4.0, FusionSettings())
            row["nearest"][category] = sum(scorer.sharp(x, n, s) for x, (n, s) in zip(z, keys)) / len(keys)
            guess = classifier(z).argmax(dim=1).tolist()
            row["classifier"][category] = sum(CONCEPTS[g] == n for g, (n, _) in zip(guess, keys)) / len(keys)
        print(name, row, flush=True)
    clean = torch.stack(list(latents.sharp.values()))
    right = torch.tensor([CONCEPTS.index(n) for n, _ in latents.sharp])
    table["classifier on the pictures themselves"] = (classifier(clean).argmax(1) == right).float().mean().item()
    return table


SHOWN = ("dog", "panda", "owl", "bus", "bicycle", "rocket", "pizza", "grapes", "doughnut")


def draw_sheet(path: Path) -> None:
    """What each model makes of the same nine captions and seeds."""
    captions = tuple(single_caption(name, list(STYLES)[i % 2]) for i, name in enumerate(SHOWN))
    generation = GenerationSettings(captions, width=128, height=128, cfg_scale=4.0, batch_size=9, seed=11)
    rows = [(name, [p.image for p in load_engine(name).generate(generation).pictures]) for name in MODELS]
    sheet(rows, SHOWN, path, "Four models, the same captions", "Flat and glossy by turns; one seed, not chosen.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.assess", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where demo.train keeps the pictures")
    parser.add_argument("--results", type=Path, default=HERE / "state", help="where the JSON files are kept")
    parser.add_argument("--part", choices=("models", "scenes", "singles", "sheet", "report"), help="only this part")
    parser.add_argument("--pairs", type=int, default=12, help="held-out pairs for each of the four layouts")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"seeds of each scene, 1 to {len(SEEDS)}")
    parser.add_argument("--cfg", type=float, nargs="+", default=CFGS, help="guidance scales of the scenes")
    parser.add_argument("--methods", nargs="+", default=(), choices=list(methods()), help="only these")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    args = parser.parse_args()
    quiet_libraries()
    render(args.data)
    args.results.mkdir(parents=True, exist_ok=True)
    parts = {
        "models": lambda: assess_models(args.data),
        "scenes": lambda: assess_scenes(args.data, args.pairs, SEEDS[: args.seeds], args.cfg, args.methods, args.steps),
        "singles": lambda: assess_singles(args.data, args.methods, args.steps),
    }
    for part, measure in parts.items():
        if args.part in (None, part):
            name = f"{part} {args.methods[0]}" if part != "models" and args.methods else part
            name += f", {args.steps} steps" if args.steps != 50 else ""
            (args.results / f"{name}.json").write_text(json.dumps(measure(), indent=1), "utf-8")
    if args.part in (None, "sheet"):
        draw_sheet(HERE.parent / "docs" / "demo-models.png")
    if args.part in (None, "report"):
        print(write_report(args.results, HERE.parent / "docs/measurements"))


if __name__ == "__main__":
    main()
