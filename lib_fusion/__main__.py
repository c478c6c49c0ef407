"""``python -m lib_fusion``: the command line."""

from lib_fusion.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
