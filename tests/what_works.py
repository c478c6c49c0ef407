"""The table *What works where* of the README: each tick is a test of ``tests/webui_live/test_what_works.py``.

``python -m tests.what_works`` prints it.
"""

from __future__ import annotations

#: The hosts, as their columns are called, and the folder of tests in which they run.
HOSTS = {"AUTOMATIC1111": "tests/webui_live", "Forge Neo": "tests/webui_forge", "Forge": "tests/webui_forge"}
METHODS = ("SNB", "Average", "AFA", "FreeU", "Skipping")
CASES = ("txt2img", "img2img", "inpaint", "hires fix", "AND", "batches", "LoRA", "SDXL")


def table() -> str:
    """In Markdown: one row for each host and method."""
    lines = ["| host | method |" + "".join(f" {case} |" for case in CASES), "|---|---|" + ":-:|" * len(CASES)]
    for host in HOSTS:
        lines += [f"| {host} | {method} |" + " ✓ |" * len(CASES) for method in METHODS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
