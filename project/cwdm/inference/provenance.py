"""What decides an image beside its case: whole for its record, and in a few characters for its header."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdm.images import read_description
from cwdm.pipeline import Pipeline
from cwdm.settings import Settings

_MARK = re.compile(r"weights ([0-9a-f]{12}), settings ([0-9a-f]{8})")


def describe(pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    """What decides a result beside the case itself, for the record."""
    checkpoint = pipeline.checkpoint
    return {
        "weights": {"file": str(checkpoint.path), "sha256": checkpoint.sha256},
        "weights_record": checkpoint.record.model_dump(mode="json"),
        **pipeline.describe(),
        "settings": settings.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class Provenance:
    """The same as short checksums, so that a later run can compare.

    Attributes:
        weights: the first 12 digits of the sha256 of the weights' file.
        settings: the first 8 of that of everything else: sampler, timesteps, precision, seed, samples, output.
    """

    weights: str
    settings: str

    def __str__(self) -> str:
        return f"weights {self.weights}, settings {self.settings}"


def provenance(described: Mapping[str, Any]) -> Provenance:
    """The provenance in what `describe` gives, whatever machine computed."""
    others = {key: value for key, value in described.items() if key not in ("weights", "weights_record", "device")}
    # As asked for, these may be left open; what came of them stands beside.
    settings = {key: value for key, value in others["settings"].items() if key not in ("sampler", "precision")}
    text = json.dumps({**others, "settings": settings}, sort_keys=True)
    return Provenance(short(described["weights"]["sha256"]), hashlib.sha256(text.encode()).hexdigest()[:8])


def short(sha256: str) -> str:
    """As much of a file's checksum as a header has room for."""
    return sha256[:12]


def read_provenance(image: Path) -> Provenance | None:
    """What the header of an image says; None where it says nothing."""
    match = _MARK.search(read_description(image))
    return Provenance(match[1], match[2]) if match else None
