"""Presets: named settings, as the API takes them. Some are shipped, a person's own are in one JSON file. Host-free."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.files import read_text, write_whole
from lib_fusion.requests.settings import PARAMETERS, FusionSettings

LONGEST_NAME = 200
#: The name of a person's own file, in the WebUI's data directory.
FILE = "denoiser-fusion-presets.json"
#: The paper's rule: a mask at every step, one guidance scale.
PAPER: dict[str, Any] = {
    "method": "SNB", "snb_window": [1000, 0], "snb_outside": "base", "k_general": 1.0, "k_expert": 1.0,
    "snb_saliency": "own", "snb_hold": 0.0, "snb_from": 1000.0, "guidance": "off",
}  # fmt: skip
#: The panel's own values for the fusion, the best that was measured for two experts.
RECOMMENDED: dict[str, Any] = {
    key: value for key, value in FusionSettings().to_dict().items()
    if key in PAPER or key in ("guidance_until", "guidance_after")
}  # fmt: skip
#: The presets that are shipped, the best first.
SHIPPED: dict[str, dict[str, Any]] = {
    "Objects of two checkpoints in one picture": RECOMMENDED,
    "LoRAs or experts trained from the base": RECOMMENDED | {"snb_saliency": "divergence"},
    "AFA without coarse parts: average first": {
        "method": "AFA", "snb_window": [500, 0], "snb_outside": "average",
    },
    "Sharper parts and harsher colours: mask used at once": PAPER | {"snb_hold": 900.0},
    "As published (MagicFusion): a mask at every step": PAPER,
    "As published: the lion (the base draws the detail)": PAPER | {"snb_window": [1000, 600], "snb_saliency": "code"},
    "As published: the bee (the base draws the layout)": PAPER | {"snb_window": [850, 0], "snb_saliency": "code"},
    "Defaults": FusionSettings().to_dict() | {"experts": None},
}  # fmt: skip
#: Names that shipped presets had in earlier versions, which requests and plots may still give.
EARLIER_NAMES = {
    "Two experts: decide early, average, then place": "Objects of two checkpoints in one picture",
    "General base with experts made from it": "LoRAs or experts trained from the base",
    "Average first, then AFA": "AFA without coarse parts: average first",
    "Held mask, used at once": "Sharper parts and harsher colours: mask used at once",
    "MagicFusion (paper): a mask at every step": "As published (MagicFusion): a mask at every step",
    "MagicFusion: lion (first SNB, then the base)": "As published: the lion (the base draws the detail)",
    "MagicFusion: bee (first the base, then SNB)": "As published: the bee (the base draws the layout)",
}


class Presets:
    """The shipped presets and those in ``path``, a JSON object of API dicts by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [*SHIPPED, *sorted(self._read())]

    def get(self, name: str) -> dict[str, Any]:
        """The values of a preset; raises SettingError where there is none of this name, or a value is not allowed."""
        own = self._read()
        if name not in own:
            name = EARLIER_NAMES.get(name, name)
        if name not in own and name not in SHIPPED:
            raise SettingError("preset", name, f"allowed: {', '.join(self.names())}")
        values = {key: value for key, value in (own.get(name) or SHIPPED[name]).items() if value is not None}
        FusionSettings.from_dict(values)
        return values

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keeps values under a name of a person's own; a wrong value or a shipped name is refused."""
        name = (name or "").strip()
        if not name or len(name) > LONGEST_NAME or name in SHIPPED:
            allowed = f"a name of your own, of at most {LONGEST_NAME} characters, that no shipped preset has"
            raise SettingError("preset", name, f"allowed: {allowed}")
        FusionSettings.from_dict(values)
        self._write({**self._read(), name: values})

    def is_own(self, name: str) -> bool:
        """Whether a person has saved a preset under this name; raises FusionError where the file can't be read."""
        return (name or "").strip() in self._read()

    def delete(self, name: str) -> None:
        """Forgets a preset of a person's own."""
        own = self._read()
        if name not in own:
            raise SettingError("preset", name, "allowed: a preset of your own; shipped ones can't be deleted")
        self._write({key: value for key, value in own.items() if key != name})

    def _read(self) -> dict[str, dict[str, Any]]:
        """A file that can't be read is never written over: it may be mended."""
        try:
            found = json.loads(read_text(self.path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise FusionError(f"{self.path.name}: can't be read ({error}); mend or remove it") from error
        if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
            raise FusionError(f"{self.path.name}: allowed: a JSON object of presets by name")
        return {name: complete_earlier(values) for name, values in found.items()}

    def _write(self, presets: dict[str, dict[str, Any]]) -> None:
        text = json.dumps(presets, indent=1, ensure_ascii=False)
        if self.path.is_file() and not self.path.stat().st_mode & stat.S_IWUSR:
            raise FusionError(f"{self.path.name}: is read-only; nothing has changed")
        try:
            write_whole(self.path, lambda partial: partial.write_text(text, "utf-8"))
        except (OSError, ValueError) as error:
            raise FusionError(f"{self.path.name}: can't be written ({error}); nothing has changed") from error


def complete_earlier(values: dict[str, Any]) -> dict[str, Any]:
    """A preset saved before some rows were added, with the values for them that it was saved under."""
    if "snb_hold" not in values:
        return values
    return {**{row.key: row.earlier for row in PARAMETERS if row.earlier is not None}, **values}
