"""The command line: ``python -m lib_fusion COMMAND``. Flags come from the tables in settings.py."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from lib_fusion import __version__
from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.parameters import Parameter, read_rows
from lib_fusion.requests.presets import SHIPPED
from lib_fusion.requests.settings import (
    EXPERT_PARAMETERS,
    GENERATION_PARAMETERS,
    MAP_PARAMETERS,
    PARAMETERS,
    PREVIEW_PARAMETERS,
    PREVIEWS,
    SAME_AS_BASE,
    TIMESTEPS,
    FusionSettings,
    GenerationSettings,
)
from lib_fusion.training.options import (
    CACHE_PARAMETERS,
    EVALUATION_PARAMETERS,
    TRAINING_PARAMETERS,
    TrainingSettings,
)
from lib_fusion.unet.model_file import ModelFile, split_files

#: The rows of an expert that have a flag of their own, ``--expert-...``.
EXPERT_FLAGS = [row for row in EXPERT_PARAMETERS[1:] if "cli" in row.where]
#: What flags are added to: a parser, or a group of its flags.
Arguments = argparse.ArgumentParser | argparse._ArgumentGroup
DTYPES = ("float32", "bfloat16", "float16")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text, and exits with 2.

    Flags may be written as the API's keys, with underscores.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [_with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _with_dashes(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") and " " not in flag else word


#: The groups of flags in ``generate --help``, by the beginnings of their rows' keys; the rest is the fusion's.
GROUPS = {"AFA": ("afa_",), "FreeU": ("freeu",), "skipping": ("skip",), "guidance interval": ("guidance",)}
EXAMPLES = """
examples:
  two checkpoints, one picture
    %(prog)s --base demo/animals.safetensors --expert demo/vehicles.safetensors --width 256 --height 128 \\
        --prompt "a fox left of a tractor, flat drawing"
  two LoRAs of one checkpoint
    %(prog)s --base demo/general.safetensors --lora demo/loras/demo-animals.safetensors --expert "same as base" \\
        --expert-lora demo/loras/demo-vehicles.safetensors --width 256 --height 128 \\
        --prompt "a fox left of a tractor, flat drawing"
  one checkpoint, with FreeU and skipping
    %(prog)s --base sd15.safetensors --prompt "a fox in the snow" --freeu auto --skipping forecast
"""


GALLERY_EXAMPLE = """
example: two seeds of each prompt, the default settings and the published rule
  %(prog)s --base demo/animals.safetensors --expert demo/vehicles.safetensors --prompts demo/prompts.txt --count 2 \\
      --width 256 --height 128 --preset "As published (MagicFusion): a mask at every step"
"""


def add_rows(parser: Arguments, rows: Iterable[Parameter]) -> None:
    """A flag for each row; values stay text, and the table reads them."""
    for row in rows:
        if "cli" in row.where:
            text = f"{row.help} ({row.allowed}; default {row.show(row.default) or 'empty'})".replace("%", "%%")
            parser.add_argument(row.flag, dest=row.key, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def add_fusion(parser: argparse.ArgumentParser) -> None:
    """The flags of the fusion's rows, in groups."""
    rest = list(PARAMETERS)
    grouped = {title: [row for row in rest if row.key.startswith(keys)] for title, keys in GROUPS.items()}
    others = [row for row in rest if not any(row in rows for rows in grouped.values())]
    for title, rows in {"how experts are blended": others, **grouped}.items():
        add_rows(parser.add_argument_group(title), rows)


def add_models(parser: argparse.ArgumentParser) -> None:
    """The flags that name the base and its experts."""
    models = parser.add_argument_group("models")
    models.add_argument("--base", required=True, metavar="FILE", help="the base checkpoint, SD1 .safetensors")
    models.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
                        help="a LoRA that is merged into the base (default weight 1); may be repeated")
    models.add_argument("--expert", action="append", default=[], metavar="FILE",
                        help=f"an expert's checkpoint, or \"{SAME_AS_BASE}\" for the base's without its LoRAs; may "
                        "be repeated, the --expert-... flags follow the same order")
    models.add_argument("--expert-lora", action="append", default=[], metavar="FILE[:WEIGHT]",
                        help="a LoRA that is merged into this expert, or several with + between them; \"\" for an "
                        "expert without one")
    for row in EXPERT_FLAGS:
        models.add_argument("--expert-" + row.key.replace("_", "-"), dest=f"expert_{row.key}", action="append",
                            default=[], metavar="VALUE", help=f"{row.help} ({row.allowed})")
    models.add_argument("--expert-mask", action="append", default=[], metavar="FILE",
                        help="a picture, white where the expert draws; \"\" for an expert without one")


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="lib_fusion", description="Combine diffusion models while they denoise.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)

    generate = commands.add_parser("generate", help="draw pictures with the embedded engine", epilog=EXAMPLES,
                                   usage="%(prog)s --base FILE --prompt TEXT [--expert FILE ...] [FLAG VALUE ...]",
                                   description="Draws pictures with SD1 checkpoints, alone or fused.",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_models(generate)
    picture = generate.add_argument_group("picture")
    picture.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be repeated")
    add_rows(picture, GENERATION_PARAMETERS)
    add_fusion(generate)
    output = generate.add_argument_group("output")
    output.add_argument("--out", default="outputs", metavar="FOLDER", help="where pictures go (default: outputs)")
    kinds = "; ".join(f"{row.key} ({row.help})" for row in PREVIEW_PARAMETERS)
    output.add_argument("--previews", nargs="*", metavar="KIND", help=f"save with each picture: {kinds}; "
                        "without a word all that there is")  # fmt: skip
    add_rows(output, MAP_PARAMETERS)
    _add_machine(output)

    convert = commands.add_parser("convert-afa", help="AFA aggregators of the official code -> an aggregator file")
    convert.add_argument("--source", required=True, metavar="PATH",
                         help="the folder with aggregator_0 and so on, or one .safetensors of them all")
    convert.add_argument("--model", action="append", required=True, metavar="FILE",
                         help="a checkpoint of the ensemble, or CHECKPOINT+LORA:WEIGHT; repeated, in its order")
    convert.add_argument("--heads", type=int, help="attention heads, where no config.json tells them (default: 8)")
    convert.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write")

    cache = commands.add_parser("cache", help="encode a captioned data set for training aggregators")
    cache.add_argument("--source", required=True, metavar="PATH",
                       help="a folder with metadata.jsonl or .txt captions, or a webdataset .tar")
    cache.add_argument("--vae", metavar="FILE", help="the checkpoint whose VAE encodes (default: the first model's)")
    add_rows(cache, CACHE_PARAMETERS)
    train = commands.add_parser("train", help="train aggregators on a cache; goes on where it was stopped")
    train.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write; its state lies beside")
    train.add_argument("--init", metavar="FILE", help="an aggregator file of the same sizes to begin with")
    add_rows(train, TRAINING_PARAMETERS)
    evaluate = commands.add_parser("evaluate", help="held-out loss of an aggregator and of everything it must beat")
    evaluate.add_argument("--aggregator", required=True, metavar="FILE")
    evaluate.add_argument("--out", required=True, metavar="FOLDER", help="where table, plot and JSON go")
    evaluate.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="0..999 (default: 100 300 500 700 900)")
    evaluate.add_argument("--no-captions", action="store_true", help="give the models the empty caption")
    add_rows(evaluate, EVALUATION_PARAMETERS)
    for command in (cache, train, evaluate):
        command.add_argument("--cache", required=True, metavar="FOLDER", help="the encoded data set")
        command.add_argument("--model", action="append", required=True, metavar="FILE",
                             help="a checkpoint of the ensemble, or one with LoRAs: CHECKPOINT+LORA:WEIGHT; repeated, "
                             "in its order, the base first")
        command.add_argument("--device", default="cpu", help="torch device (default: cpu)")

    gallery = commands.add_parser(
        "gallery", help="a page of pictures by every model alone and fused",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws every prompt with every model alone and fused, and writes one HTML page of all.\n"
        "Stop it at any time; the same command resumes.", epilog=GALLERY_EXAMPLE,
        usage="%(prog)s --base FILE --expert FILE --prompts FILE [--out FOLDER] [FLAG VALUE ...]",
    )  # fmt: skip
    add_models(gallery)
    picture = gallery.add_argument_group("pictures")
    picture.add_argument("--prompts", required=True, metavar="FILE",
                         help="a text file with one prompt on each line; lines that begin with # do not count")
    picture.add_argument("--preset", action="append", default=[], metavar="NAME",
                         help=f"a further column with a preset's values; may be repeated ({'; '.join(SHIPPED)})")
    add_rows(picture, GENERATION_PARAMETERS)
    add_fusion(gallery)
    output = gallery.add_argument_group("output")
    output.add_argument("--out", default="outputs/gallery", metavar="FOLDER",
                        help="where index.html and the pictures go (default: outputs/gallery)")
    _add_machine(output)

    demo = commands.add_parser("demo", help="fuse the demo's checkpoints and write a contact sheet")
    demo.add_argument("--out", default="outputs/demo.png", metavar="FILE", help="the sheet (default: outputs/demo.png)")
    demo.add_argument("--steps", default="20", metavar="VALUE", help="denoising steps (default 20)")
    demo.add_argument("--seed", default="0", metavar="VALUE", help="seed of the first row")
    _add_machine(demo)
    return parser


def _add_machine(parser: Arguments) -> None:
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, mps (default: cpu)")
    parser.add_argument("--dtype", default="float32", help=f"of the U-Nets: {', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--json", action="store_true", help="print the run's record as JSON on stdout")


def read_experts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The experts as the API would give them; raises SettingError where flags outnumber experts."""
    experts = [{"checkpoint": file} for file in args.expert]
    for row in EXPERT_FLAGS:
        values = getattr(args, f"expert_{row.key}")
        if len(values) > len(experts):
            flag = "expert-" + row.key.replace("_", "-")
            raise SettingError(flag, values[-1], f"allowed: one for each --expert ({len(experts)})")
        for expert, value in zip(experts, values, strict=False):
            expert[row.key] = value
    if len(args.expert_mask) > len(experts):
        raise SettingError("expert-mask", args.expert_mask[-1], f"allowed: one for each --expert ({len(experts)})")
    for expert, file in zip(experts, args.expert_mask, strict=False):
        if file:
            expert["place"] = "mask"
    return experts


def read_models(args: argparse.Namespace) -> list[ModelFile]:
    """The base and the experts, with their LoRAs; raises SettingError."""
    if len(args.expert_lora) > len(args.expert):
        raise SettingError("expert-lora", args.expert_lora[-1], f"allowed: one for each --expert ({len(args.expert)})")
    base = Path(args.base)
    loras = [part for text in args.lora for part in split_files(text, "lora")]
    models = [ModelFile(base, tuple(loras))]
    for name, text in zip_longest(args.expert, args.expert_lora, fillvalue=""):
        path = base if name == SAME_AS_BASE else Path(name)
        models.append(ModelFile(path, tuple(split_files(text, "expert-lora"))))
    return models


def read_settings(args: argparse.Namespace) -> tuple[GenerationSettings, FusionSettings]:
    generation, fusion = given_rows(args, GENERATION_PARAMETERS), given_rows(args, PARAMETERS)
    return (
        GenerationSettings.from_dict({"prompts": args.prompt, **generation}),
        FusionSettings.from_dict({"experts": read_experts(args), **fusion}),
    )


def read_machine(args: argparse.Namespace):
    """The torch dtype and device; raises SettingError."""
    import torch

    if args.dtype not in DTYPES:
        raise SettingError("dtype", args.dtype, f"allowed: {', '.join(DTYPES)}")
    return getattr(torch, args.dtype), read_device(args.device)


def read_device(name: str):
    """The torch device of this name; raises SettingError."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError("device", name, "allowed: a torch device of this machine, such as cpu") from error
    return device


def run_generate(args: argparse.Namespace) -> int:
    generation, fusion = read_settings(args)
    base, *experts = read_models(args)
    dtype, device = read_machine(args)
    masks, keep = read_masks(args.expert_mask), read_keep(args)
    from lib_fusion.engine.generate import Engine
    from lib_fusion.engine.loader import quiet_libraries
    from lib_fusion.engine.sheets import font, infotext, lora_words, name_loras, save_png
    from lib_fusion.previews import draw_previews
    from lib_fusion.unet.checkpoint import distinct_names

    quiet_libraries()
    engine = Engine(base, experts, dtype=dtype, device=device)
    run = engine.generate(
        generation, fusion, masks=masks, keep=keep, progress=sys.stderr.isatty()
    )
    names = distinct_names([model.name for model in (base, *experts)])
    shown = name_loras(fusion, experts)
    files = []
    for i, picture in enumerate(run.pictures):
        path = free_path(Path(args.out), f"{picture.seed:05d}-{i:03d}")
        prompt = picture.prompt + lora_words(base)
        save_png(picture.image, path, infotext(prompt, picture.seed, generation, shown, base.path.stem))
        files.append(str(path))
        for kind, image in draw_previews(keep.kinds, picture.image, picture.records, names, fusion, font):
            beside = path.with_name(f"{path.stem}-{kind}.png")
            save_png(image, beside, "")
            files.append(str(beside))
    run.record["files"] = files
    if args.json:
        print(json.dumps(run.record))
    else:
        print("\n".join(files))
    return 0


def read_masks(files: Sequence[str]) -> dict[int, Any]:
    """The painted masks (1,1,h,w) in 0..1 by expert, 1 the first; raises SettingError."""
    from lib_fusion.fusion.places import read_mask

    masks = {}
    for i, file in enumerate(files):
        if file:
            try:
                masks[i + 1] = read_mask(Path(file).read_bytes(), "expert-mask", file)
            except OSError as error:
                raise SettingError("expert-mask", file, "allowed: a picture file") from error
    return masks


def read_keep(args: argparse.Namespace):
    """What the pictures are to tell, for their previews; raises SettingError."""
    from lib_fusion.fusion.records import Keep

    kinds = [] if args.previews is None else args.previews or list(PREVIEWS)
    return Keep.read(kinds, given_rows(args, MAP_PARAMETERS))


def free_path(folder: Path, name: str) -> Path:
    """A name in the folder that no file has yet."""
    path, number = folder / f"{name}.png", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.png", number + 1
    return path


def make_engine_encoders(args: argparse.Namespace) -> Any:
    from lib_fusion.engine.loader import quiet_libraries
    from lib_fusion.engine.training_encoders import EngineEncoders

    quiet_libraries()
    return EngineEncoders(args.model, args.vae, read_device(args.device))


def run_cache(args: argparse.Namespace, make_encoders: Callable[[argparse.Namespace], Any] | None = None) -> int:
    """``make_encoders``: what encodes; the engine's where nothing else is given."""
    from lib_fusion.training.cache import write_cache
    from lib_fusion.training.train import teller

    values = read_rows(CACHE_PARAMETERS, given_rows(args, CACHE_PARAMETERS))
    encoders = (make_encoders or make_engine_encoders)(args)
    report = write_cache(Path(args.source), Path(args.cache), encoders, **values, tell=teller())
    print(f"{args.cache}: {report.cached} pictures, {report.new} of them new, {len(report.skipped)} skipped")
    return 0


def run_train(args: argparse.Namespace) -> int:
    from lib_fusion.training.train import is_first_process, teller, train

    settings = TrainingSettings(**read_rows(TRAINING_PARAMETERS, given_rows(args, TRAINING_PARAMETERS)))
    card = train(args.cache, args.model, args.out, settings, read_device(args.device), teller(), args.init)
    if is_first_process():
        print(f"{args.out}: {card.describe()}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from lib_fusion.training.evaluate import BUCKETS, evaluate, write_report
    from lib_fusion.training.train import teller

    timesteps = args.timesteps or BUCKETS
    if not all(0 <= t < TIMESTEPS for t in timesteps):
        raise SettingError("timesteps", list(timesteps), f"allowed: 0 to {TIMESTEPS - 1}")
    device = read_device(args.device)
    values = read_rows(EVALUATION_PARAMETERS, given_rows(args, EVALUATION_PARAMETERS))
    result = evaluate(
        args.cache, args.model, args.aggregator, timesteps, not args.no_captions, device, teller(), **values
    )
    print(write_report(result, Path(args.out), f"{Path(args.aggregator).stem} on {Path(args.cache).name}"))
    return 0


def given_rows(args: argparse.Namespace, rows: Iterable[Parameter]) -> dict[str, Any]:
    """What was given on the command line for these rows."""
    given = vars(args)
    return {row.key: given[row.key] for row in rows if row.key in given}


def run_convert(args: argparse.Namespace) -> int:
    from lib_fusion.fusion.aggregator_files import convert_official, save_aggregators

    if Path(args.out).suffix != ".safetensors":
        raise SettingError("out", args.out, "allowed: a name that ends in .safetensors")
    card, tensors = convert_official(args.source, args.model, args.heads)
    save_aggregators(args.out, card, tensors)
    print(f"{args.out}: {card.describe()}")
    return 0


def run_gallery(args: argparse.Namespace) -> int:
    from lib_fusion.engine.gallery import Gallery, columns_of, read_prompts

    if not args.expert:
        raise SettingError("expert", "", "allowed: one to three --expert FILE")
    args.prompt = read_prompts(args.prompts)
    generation, fusion = read_settings(args)
    models = read_models(args)
    dtype, device = read_machine(args)
    from lib_fusion.engine.generate import Engine
    from lib_fusion.engine.loader import quiet_libraries
    from lib_fusion.unet.checkpoint import distinct_names

    columns = columns_of(distinct_names([model.name for model in models]), fusion, args.preset)
    quiet_libraries()
    engine = Engine(models[0], models[1:], dtype=dtype, device=device)
    out = Path(args.out)
    gallery = Gallery(models, columns, generation, out, read_masks(args.expert_mask))
    try:
        page = gallery.make(engine, lambda line: print(line, file=sys.stderr, flush=True), sys.stderr.isatty())
    except KeyboardInterrupt:
        print(f"stopped; the same command resumes. So far: {out / 'index.html'}", file=sys.stderr)
        return 130
    print(json.dumps({"page": str(page)}) if args.json else page)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    generation = GenerationSettings.from_dict({"prompts": ["demo"], "steps": args.steps, "seed": args.seed})
    dtype, device = read_machine(args)
    import torch

    from lib_fusion.engine.demo_sheet import make_sheet
    from lib_fusion.engine.loader import quiet_libraries

    quiet_libraries()
    if device.type == "cpu":  # such small tensors are not worth a second thread, and on a busy machine it costs minutes
        torch.set_num_threads(1)
    record = make_sheet(Path(args.out), generation.steps, generation.seed, dtype, device, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps(record))
    else:
        print(record["told"])
        print(f"The sheet: {record['sheet']}\nWho drew where: {record['masks']}")
    return 0


COMMANDS = {"generate": run_generate, "demo": run_demo, "gallery": run_gallery, "cache": run_cache, "train": run_train,
            "evaluate": run_evaluate, "convert-afa": run_convert}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a Windows console's code page has no letter for every file's name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except FusionError as error:
        print(f"lib_fusion {args.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        hint = "pip install 'sd-webui-denoiser-fusion[engine]'"
        print(f"lib_fusion {args.command}: {error.name} is missing; {hint}", file=sys.stderr)
        return 2

