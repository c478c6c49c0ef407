"""Starts the WebUI of the live tests for a person: ``python -m tests.webui_live.serve [--port 7860] [--data DIR]``.

The data directory is kept, so that settings and pictures stay; Ctrl+C stops the WebUI.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--data", type=Path, default=Path("outputs/webui-data"), help="its data directory")
    parser.add_argument("--ckpt", help="checkpoint to begin with (default: the demo's animals)")
    args, extra = parser.parse_known_args()
    data = args.data.resolve()
    try:
        folder, python = find_host()
    except NoHostError as error:
        print(error, file=sys.stderr)
        return 2
    names = prepare_data(data)
    if names:
        prepare_demo(data)
    else:
        make_checkpoints(data, python, folder)
    print("Starting the WebUI ...", flush=True)
    host = Host(data, args.ckpt or ("animals" if "animals" in names else "tiny_a"), args.port, tuple(extra))
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
