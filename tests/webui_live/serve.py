"""Starts the WebUI of the live tests for a person: ``python -m tests.webui_live.serve [--port 7860] [--data DIR]``.

The data directory is kept, so that settings and pictures stay; Ctrl+C stops the WebUI.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.webui_live.host import Host, NoHostError, find_host, make_checkpoints, prepare_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--data", type=Path, default=Path("outputs/webui-data"), help="its data directory")
    parser.add_argument("--ckpt", help="checkpoint to begin with (default: the demo's general one)")
    args, extra = parser.parse_known_args()
    data = args.data.resolve()
    try:
        folder, python = find_host()
    except NoHostError as error:
        print(error, file=sys.stderr)
        return 2
    names = prepare_data(data)
    if not names:
        make_checkpoints(data, python, folder)
    print("Starting the WebUI ...", flush=True)
    host = Host(data, args.ckpt or (names[0] if names else "tiny_a"), args.port, tuple(extra))
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
