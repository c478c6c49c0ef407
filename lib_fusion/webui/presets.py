"""Presets: named settings, as the API takes them. Some are shipped, a person's own are in one JSON file. Host-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.settings import FusionSettings

#: The name of a person's own file, in the WebUI's data directory.
FILE = "denoiser-fusion-presets.json"
#: MagicFusion's published settings (its own examples; the code's saliency) and the mask held after the noisiest steps.
SHIPPED: dict[str, dict[str, Any]] = {
    "MagicFusion: lion (first SNB, then the base)": {
        "method": "SNB", "snb_window": [1000, 600], "snb_outside": "base", "k_general": 1.0, "k_expert": 1.0,
        "snb_saliency": "code", "snb_hold": 0.0,
    },
    "MagicFusion: bee (first the base, then SNB)": {
        "method": "SNB", "snb_window": [850, 0], "snb_outside": "base", "k_general": 1.0, "k_expert": 1.0,
        "snb_saliency": "code", "snb_hold": 0.0,
    },
    "Held mask: who draws what is decided early": {
        "method": "SNB", "snb_window": [1000, 0], "snb_outside": "base", "k_general": 1.0, "k_expert": 1.0,
        "snb_saliency": "own", "snb_hold": 900.0,
    },
    "Defaults": FusionSettings().to_dict() | {"experts": None},
}  # fmt: skip


class Presets:
    """The shipped presets and those in ``path``, a JSON object of API dicts by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [*SHIPPED, *sorted(self._read())]

    def get(self, name: str) -> dict[str, Any]:
        """The values of a preset; raises SettingError where there is none of this name."""
        own = self._read()
        if name not in own and name not in SHIPPED:
            raise SettingError("preset", name, f"allowed: {', '.join(self.names())}")
        return {key: value for key, value in (own.get(name) or SHIPPED[name]).items() if value is not None}

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keeps values under a name of a person's own; a wrong value or a shipped name is refused."""
        name = name.strip()
        if not name or name in SHIPPED:
            raise SettingError("preset", name, "allowed: a name of your own, other than the shipped presets'")
        FusionSettings.from_dict(values)
        self._write({**self._read(), name: values})

    def delete(self, name: str) -> None:
        """Forgets a preset of a person's own."""
        own = self._read()
        if name not in own:
            raise SettingError("preset", name, "allowed: a preset of your own; shipped ones can't be deleted")
        self._write({key: value for key, value in own.items() if key != name})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FusionError(f"{self.path.name}: can't be read ({error})") from error
        if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
            raise FusionError(f"{self.path.name}: allowed: a JSON object of presets by name")
        return found

    def _write(self, presets: dict[str, dict[str, Any]]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(presets, indent=1, ensure_ascii=False), "utf-8")
        partial.replace(self.path)
