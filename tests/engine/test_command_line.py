"""``python -m lib_fusion``: what it writes, and that bad input is one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demo.concepts import is_held_out
from lib_fusion import __version__
from lib_fusion.cli import build_parser, main
from lib_fusion.engine.demo_sheet import COLUMNS, SCENES
from lib_fusion.requests.settings import EXPERT_PARAMETERS, GENERATION_PARAMETERS, PARAMETERS

DEMO = Path(__file__).resolve().parents[2] / "demo"
ANIMALS, VEHICLES = (str(DEMO / f"{name}.safetensors") for name in ("animals", "vehicles"))
SMALL = ["--width", "64", "--height", "64", "--steps", "2"]


def exit_code(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_generate_writes_pictures_that_carry_their_settings(tmp_path, capsys):
    argv = ["generate", "--base", ANIMALS, "--expert", VEHICLES, "--prompt", "a fox", "--prompt", "a bus, flat drawing",
            "--expert-prompt", "a bus", "--snb-window", "1000:600", "--snb-outside", "base", "--k-general", "1",
            "--k-expert", "2", "--out", str(tmp_path), "--json", *SMALL]  # fmt: skip
    assert main(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["snb_window"] == [1000, 600]
    assert record["unet_calls"][0] == 2
    assert record["experts"][0]["prompt"] == "a bus"
    assert len(record["files"]) == 2
    with Image.open(record["files"][1]) as image:
        text = image.info["parameters"]
        assert image.size == (64, 64)
    assert text.splitlines()[0] == "a bus, flat drawing"
    assert "Fusion expert 1 checkpoint: vehicles.safetensors" in text
    assert "Fusion expert 1 prompt: a bus" in text
    assert 'Fusion window: "1000:600"' in text
    assert "Fusion k expert: 2" in text
    assert text.endswith(f", Fusion version: {__version__}")


def test_pictures_are_never_overwritten(tmp_path, capsys):
    argv = ["generate", "--base", ANIMALS, "--prompt", "a dog", "--out", str(tmp_path), *SMALL]
    assert main(argv) == main(argv) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_every_row_has_a_flag():
    help_text = build_parser()._subparsers._group_actions[0].choices["generate"].format_help()
    for row in [*PARAMETERS, *GENERATION_PARAMETERS]:
        assert (row.flag in help_text) == ("cli" in row.where)
    for row in EXPERT_PARAMETERS[1:]:
        assert ("--expert-" + row.key.replace("_", "-") in help_text) == ("cli" in row.where)


def test_flags_may_be_written_as_the_apis_keys():
    parse = build_parser().parse_args
    words = ["generate", "--base", "a_b.safetensors", "--prompt", "--a_b c"]
    by_dashes = parse([*words, "--snb-hold", "800", "--expert", "c_d", "--expert-text-encoder=base"])
    assert parse([*words, "--snb_hold", "800", "--expert", "c_d", "--expert_text_encoder=base"]) == by_dashes
    assert (by_dashes.base, by_dashes.prompt, by_dashes.snb_hold) == ("a_b.safetensors", ["--a_b c"], "800")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, str]:
    """Files that can't be used, made from a real one."""
    folder = tmp_path_factory.mktemp("broken")
    tensors = load_file(ANIMALS)
    unet = "model.diffusion_model."
    whole = Path(ANIMALS).read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("not a checkpoint")
    (folder / "model.ckpt").write_bytes(b"\x80\x02")
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
    out = {key: tensors[unet + key] for key in ("out.2.weight", "out.2.bias")}
    five = {unet + key: torch.cat([value, value[:1]]) for key, value in out.items()}
    save_file(tensors | five, folder / "five.safetensors")
    nine = torch.cat([tensors[unet + "input_blocks.0.0.weight"]] * 3, dim=1)[:, :9].contiguous()
    save_file(tensors | {unet + "input_blocks.0.0.weight": nine}, folder / "inpainting.safetensors")
    linear = {
        key: value[..., 0, 0].contiguous() if key.endswith(("proj_in.weight", "proj_out.weight")) else value
        for key, value in tensors.items() if key.startswith(unet)
    }  # fmt: skip
    save_file(tensors | linear, folder / "sd2.safetensors")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--base", "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["--expert", "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["--base", "{truncated}"], ["truncated"]),
        (["--base", "{text}"], ["not a safetensors file"]),
        (["--base", "{model}"], ["only .safetensors"]),
        (["--expert", "{other}"], ["no Stable Diffusion U-Net"]),
        (["--expert", "{five}"], ["5 latent channels", "allowed: 4"]),
        (["--expert", "{inpainting}"], ["takes 9 channels", "allowed: 4"]),
        (["--expert", "{sd2}"], ["SD1", "sd2"]),
        (["--k-general", "-1"], ["k_general", "at least 0"]),
        (["--k-expert", "nan"], ["k_expert", "a number"]),
        (["--snb-window", "1001:0"], ["snb_window", "1000"]),
        (["--snb-window", "200:600"], ["snb_window", "START"]),
        (["--snb-hold", "-5"], ["snb_hold", "at least 0"]),
        (["--width", "100"], ["width", "divisible by 8"]),
        (["--height", "0"], ["height", "at least 64"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--sampler", "PLMS"], ["sampler", "DDIM"]),
        (["--expert-place", "mask"], ["mask"]),
        (["--expert-mask", "{other}"], ["expert-mask", "picture file"]),
        (["--expert-mask", "nowhere.png"], ["expert-mask", "picture file"]),
        (["--dtype", "int8"], ["dtype", "float32"]),
        (["--device", "nowhere"], ["device"]),
        (["--snb-outside", "nobody"], ["snb_outside", "base, expert, average"]),
        (["--expert-prompt", "a", "--expert-prompt", "b"], ["expert-prompt"]),
        (["--previews", "mask"], ["previews", "allowed: masks, skips, weights, maps"]),
        (["--map-timesteps", "early"], ["map_timesteps", "at most 1000"]),
        (["--method", "afa", "--afa-maps", "uniform", "--previews", "maps", "--map-blocks", "in.0"],
         ["map_blocks", "input_blocks.0"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, broken, change, words):
    change = [part.format(**broken) if part.startswith("{") else part for part in change]
    argv = ["generate", "--base", ANIMALS, "--prompt", "a fox", "--out", str(tmp_path / "out"), *SMALL]
    if "--expert" not in change:
        argv += ["--expert", VEHICLES]
    assert exit_code([*argv, *change]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "out").exists()


def test_an_empty_list_of_prompts(tmp_path, capsys):
    assert exit_code(["generate", "--base", ANIMALS, "--out", str(tmp_path / "out")]) == 2
    assert "prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_demos_scenes_are_of_pairs_that_nothing_was_trained_on():
    for *_, prompt in SCENES:
        first, second = re.fullmatch(r"an? (.+) left of an? (.+), .+", prompt).groups()
        assert is_held_out(first, second), prompt


def test_the_demo_says_what_is_better_and_by_how_much(tmp_path, capsys):
    """In half of its steps already: more objects are sharp when fused, and they are nearer to those learned."""
    sheet = tmp_path / "sheets" / "demo.png"
    assert main(["demo", "--out", str(sheet), "--steps", "10", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    fused, *others = (record["methods"][name] for name in ("fused", *COLUMNS[:-1]))
    assert fused["sharp"] == fused["pictures"] == len(SCENES)
    assert all(other["sharp"] == 0 for other in others)
    assert sum(other["pictures"] for other in others) == 3 * len(SCENES)
    assert all(mean(fused["distances"]) < 0.8 * mean(other["distances"]) for other in others)
    assert f"sharp in {len(SCENES)} of {len(SCENES)} pictures" in record["told"]
    with Image.open(sheet) as image, Image.open(record["masks"]) as masks:
        assert 850 < image.width < 1200  # legible where GitHub shows it at 850
        assert masks.width < image.width


def test_previews_are_written_beside_the_pictures(tmp_path, capsys):
    base = ["generate", "--base", ANIMALS, "--expert", VEHICLES, "--prompt", "a fox", *SMALL, "--json"]
    afa = ["--method", "afa", "--afa-maps", "uniform", "--skipping", "forecast"]

    def written(folder: str, *flags: str) -> set[str]:
        assert main([*base, "--out", str(tmp_path / folder), *flags]) == 0
        files = json.loads(capsys.readouterr().out)["files"]
        assert sorted(files) == sorted(map(str, (tmp_path / folder).iterdir()))
        return {Path(file).stem.rpartition("-")[2] for file in files[1:]}

    assert written("none") == set()
    assert written("all", "--previews") == {"masks"}
    assert written("afa", "--previews", *afa) == {"skips", "weights", "maps"}
    assert written("some", *afa, "--previews", "weights") == {"weights"}
    few = ["--map-blocks", "middle_block", "--map-timesteps", "900"]
    assert written("few", *afa, *few, "--previews", "maps") == {"maps"}
    heights = [Image.open(tmp_path / folder / "00000-000-maps.png").height for folder in ("few", "afa")]
    assert heights[0] < heights[1]


def test_a_mask_for_each_expert_and_their_places(tmp_path, capsys):
    """Black: the base alone, the expert never run. White: the expert alone. A half: as its column."""
    masks = {name: tmp_path / f"{name}.png" for name in ("black", "white", "half")}
    for name, colour in (("black", 0), ("white", 255), ("half", 0)):
        image = Image.new("L", (64, 64), colour)
        if name == "half":
            image.paste(255, (32, 0, 64, 64))
        image.save(masks[name])

    def drawn(*flags: str, base: str = ANIMALS) -> tuple[bytes, list[int]]:
        argv = ["generate", "--base", base, "--prompt", "a fox", "--guidance", "off", "--out", str(tmp_path / "out"),
                "--json", *SMALL, *flags]  # fmt: skip
        assert main(argv) == 0
        record = json.loads(capsys.readouterr().out)
        with Image.open(record["files"][0]) as image:
            return image.tobytes(), record["unet_calls"]

    fused = {name: drawn("--expert", VEHICLES, "--expert-mask", str(file)) for name, file in masks.items()}
    assert fused["black"] == (drawn()[0], [2, 0])
    assert fused["white"] == (drawn(base=VEHICLES)[0], [0, 2])
    assert fused["half"] == drawn("--expert", VEHICLES, "--expert-place", "columns 1:1 2")
    two = drawn("--expert", VEHICLES, "--expert", VEHICLES, "--expert-mask", "", "--expert-mask", str(masks["white"]))
    assert two[1] == [0, 0, 2]
