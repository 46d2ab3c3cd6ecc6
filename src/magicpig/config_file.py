"""Settings in a JSON file: found by `magicpig tune`, or written by hand.

    {"format": "magicpig.config", "version": 1, "settings": {"sampler": "sketch", "layers": {"2": {"budget": 256}}}}

`settings` are those of `Config`; `about`, which may be missing, says where they come from and is not looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from magicpig import strict_json
from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.wording import shown

FORMAT = "magicpig.config"
VERSION = 1
KEYS = ("format", "version", "settings", "about")


class ConfigFileError(ArgumentError):
    """A file of settings that cannot be used. One line, naming the file and what in it is wrong."""

    code = "invalid_config_file"


def load_config(path: Path | str) -> Config:
    """Read a file of settings. Raises ConfigFileError."""
    try:
        return Config(**_settings(strict_json.parse(Path(path).read_bytes())))
    except OSError as error:
        raise ConfigFileError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigFileError(f"{path}: {error}") from None


def to_text(config: Config, about: dict[str, Any]) -> str:
    """The content of a file: the sampler, the settings that differ from the defaults, and `about`, as JSON has it."""
    content = {"format": FORMAT, "version": VERSION, "settings": config.nondefault(), "about": about}
    return json.dumps(content, indent=2) + "\n"


def _settings(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArgumentError(f'not a file of settings: it has no "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ArgumentError(f"version={shown(content.get('version'))} of the format; this package reads {VERSION}")
    if unknown := sorted(set(content) - set(KEYS)):
        raise ArgumentError(f"{shown(unknown[0])}: there is no such key; allowed: {', '.join(KEYS)}")
    settings = content.get("settings")
    if not isinstance(settings, dict):
        raise ArgumentError(f"settings={shown(settings)}: must be an object of settings by name")
    return settings
