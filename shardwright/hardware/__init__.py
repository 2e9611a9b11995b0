"""The catalogue of devices, links and machines, as data.

`devices.json`, `links.json` and `machines.json` hold numbers, each with its unit and the key of its source in
`sources.json`. A source that begins with `recalled:` was not read again when the number was written down; one that
begins with `default:` is a choice of ours. `shardwright.schemas.catalogue` reads them.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal


@cache
def table(name: Literal["devices", "links", "machines", "sources"]) -> dict[str, Any]:
    """One file of the catalogue. The caller must not change it."""
    loaded: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return loaded
