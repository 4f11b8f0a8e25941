"""Scores of an evaluation that was stopped, so that the next one goes on where it was."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cwdm import __version__
from cwdm.evaluation.definitions import VERSIONS
from cwdm.evaluation.pairs import Pair
from cwdm.evaluation.score import Score, Scorer, score_pair
from cwdm.files import read_json, write_json


@dataclass(frozen=True)
class ScoreCache:
    """A file an image; what it was made from and by is part of it, and by which version of each metric's rule.

    Attributes:
        folder: must exist.
        make: makes a score that is not there yet.
        means: what it depends on beside the pair's files, in words, such as the segmenter's command.
        programs: files that it depends on; what else there is is not noticed.
        versions: of the metrics' rules.
        renew: nothing that is there counts.
        used: scores that were found.
    """

    folder: Path
    make: Scorer = score_pair
    means: Sequence[str] = ()
    programs: Sequence[Path] = ()
    versions: Mapping[str, int] = field(default_factory=lambda: VERSIONS)
    renew: bool = False
    used: list[Score] = field(default_factory=list)

    def score(self, pair: Pair) -> Score:
        """Like `make`, but for what is there already; raises OutputError too, if the folder cannot be written."""
        key = self._key(pair)
        known = self._get(pair, key)
        if known is None:
            known = self.make(pair)
            if key and key == self._key(pair):  # else the files have changed since
                write_json(self._path(pair), {"key": key, "score": known.record()})
        return known

    def _get(self, pair: Pair, key: str) -> Score | None:
        if self.renew or not key:
            return None
        try:
            found = read_json(self._path(pair))
            score = Score.of_record(found["score"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        self.used.extend([score] if score else [])
        return score

    def _path(self, pair: Pair) -> Path:
        return self.folder / f"{Score(pair.case, pair.modality).name}.json"

    def _key(self, pair: Pair) -> str:
        """Of the files and means, or empty where a file is not there."""
        files = [pair.prediction, pair.truth, *pair.others.values(), pair.seg, *self.programs]
        try:
            stats = [(os.path.realpath(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files if file]
        except OSError:
            return ""
        text = json.dumps([__version__, dict(self.versions), list(self.means), list(pair.others), stats])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
