"""Starts the WebUI of the live tests for a person: ``python -m tests.webui_live.serve [--port 7860] [--data DIR]``.

``--fork neo`` (or forge, ersatzforge) starts that fork. The data directory is kept, so that settings and pictures stay;
Ctrl+C stops the WebUI.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

from tests.webui_forge import forks
from tests.webui_live.host import REPOSITORY, Host, NoHostError, find_host, make_checkpoints, prepare_data

#: What the demo's models draw well, as the page's first values.
FIRST = {"txt2img/Width/value": 256, "txt2img/Height/value": 128, "txt2img/CFG Scale/value": 4,
         "txt2img/Prompt/value": "a fox left of a tractor, flat drawing"}  # fmt: skip


def prepare_demo(data: Path) -> None:
    """The demo's aggregators, and the page's first values where the data directory has none yet."""
    aggregators = data / "models/denoiser-fusion"
    aggregators.mkdir(parents=True, exist_ok=True)
    for file in (REPOSITORY / "demo").glob("afa-*.safetensors"):
        shutil.copy(file, aggregators)
    config = data / "ui-config.json"
    if not config.exists():
        config.write_text(json.dumps(FIRST, indent=1), "utf-8")


def start_fork(name: str, data: Path, port: int, extra: tuple[str, ...]) -> Host:
    installation = next(fork for fork in forks.FORKS if fork.name == name).find()
    config = data / "config.json"
    is_new = not config.exists()
    forks.prepare_data(data, installation)
    if is_new:
        begun = json.loads(config.read_text("utf-8")) | {"sd_model_checkpoint": "animals.safetensors"}
        config.write_text(json.dumps(begun), "utf-8")
    prepare_demo(data)
    print("Starting the WebUI ...", flush=True)
    return Host(data, None, port, extra, installation=installation)


def start_a1111(data: Path, checkpoint: str | None, port: int, extra: tuple[str, ...]) -> Host:
    folder, python = find_host()
    names = prepare_data(data)
    if names:
        prepare_demo(data)
    else:
        make_checkpoints(data, python, folder)
    print("Starting the WebUI ...", flush=True)
    return Host(data, checkpoint or ("animals" if "animals" in names else "tiny_a"), port, extra)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--data", type=Path, default=Path("outputs/webui-data"), help="its data directory")
    parser.add_argument("--ckpt", help="checkpoint to begin with (default: the demo's animals)")
    parser.add_argument("--fork", choices=[fork.name for fork in forks.FORKS], help="a fork instead of AUTOMATIC1111's")
    args, extra = parser.parse_known_args()
    data = args.data.resolve()
    try:
        if args.fork:
            host = start_fork(args.fork, data, args.port, tuple(extra))
        else:
            host = start_a1111(data, args.ckpt, args.port, tuple(extra))
    except NoHostError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The WebUI is at {host.url}; its log is {data / 'host.log'}. Ctrl+C stops it.", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the WebUI is stopped then, too
    try:
        host.process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        host.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
