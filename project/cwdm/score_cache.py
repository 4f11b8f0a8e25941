"""Scores of an evaluation that was stopped, so that the next one goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cwdm import __version__
from cwdm.files import write_json
from cwdm.scoring import Pair, Score, score_pair
from cwdm.segment import Segmenter

_SCORE = TypeAdapter(Score)


@dataclass(frozen=True)
class ScoreCache:
    """A file an image; what it was made from and by is part of it.

    Attributes:
        folder: must exist.
        segmenter: what segments, in words.
        programs: its files; what else it depends on is not noticed.
        renew: nothing that is there counts.
        used: scores that were found.
    """

    folder: Path
    segmenter: str = ""
    programs: Sequence[Path] = ()
    renew: bool = False
    used: list[Score] = field(default_factory=list)

    def score(self, pair: Pair, segmenter: Segmenter | None = None) -> Score:
        """Like `score_pair`, but for what is there already; raises OutputError too, if the folder cannot be written."""
        key = self._key(pair)
        known = self._get(pair, key)
        if known is None:
            known = score_pair(pair, segmenter)
            if key and key == self._key(pair):  # else the files have changed since
                write_json(self._path(pair), {"key": key, "score": asdict(known)})
        return known

    def _get(self, pair: Pair, key: str) -> Score | None:
        if self.renew or not key:
            return None
        try:
            found = json.loads(self._path(pair).read_text(encoding="utf-8"))
            score = _SCORE.validate_python(found["score"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        self.used.extend([score] if score else [])
        return score

    def _path(self, pair: Pair) -> Path:
        return self.folder / f"{pair.case}-{pair.modality}.json"

    def _key(self, pair: Pair) -> str:
        """Of the files and means, or empty where a file is not there."""
        files = [pair.prediction, pair.truth, *pair.contrasts.values(), pair.seg, *self.programs]
        try:
            stats = [(str(file.resolve()), (s := file.stat()).st_size, s.st_mtime_ns) for file in files if file]
        except (OSError, RuntimeError):
            return ""
        text = json.dumps([__version__, self.segmenter, list(pair.contrasts), stats])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
