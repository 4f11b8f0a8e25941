"""Which modality an image is: told from words in its name, from its timings, and from contrast agent; never guessed.

Words come from file names, BIDS entities, series descriptions and protocol names; the rest from DICOM headers or the
JSON sidecars that converters write, both under the names of BIDS sidecars. Where two of these contradict each other,
the image is ambiguous, and a person has to say what it is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cwdm.scans.headers import component_of

T1, T1C, T2, FLAIR = "t1n", "t1c", "t2w", "t2f"

_WORDS = {
    "T1": "t1 t1w t1wi t1n t1c t1ce t1gd mprage bravo spgr fspgr",
    "T2": "t2 t2w t2wi",
    "FLAIR": "flair fla t2f darkfluid",
    "agent": "t1c t1ce t1gd gd gad gado gadolinium ce post postcontrast postgd postgad km contrast enhanced dotarem "
    "gadovist magnevist prohance omniscan multihance clariscan",
    "native": "t1n pre precontrast pregd native nativ unenhanced plain",
}
"""What an image says of itself -> words."""

_REASONS = {
    "a localiser": "localizer localiser localizers loc scout survey 3plane planscan aahead smartbrain",
    "diffusion": "dwi dti adc eadc trace tracew diff diffusion ep2d colfa tensor ivim b0 b1000",
    "perfusion": "dsc dce pwi perf perfusion asl cbf cbv rcbv rcbf mtt ttp tmax ktrans",
    "a phase image": "phase ph pha",
    "susceptibility": "swi swan venbold hemo t2star t2starw t2s qsm",
    "angiography": "tof mra mrv angio pca",
    "a projection": "mip minip mpvr vrt",
    "a reformatted image": "mpr reformat reformatted",
    "a derived map": "map t1map t2map relaxometry sub subtraction subtracted chimap r1map r2map r2starmap",
    "a mask": "mask brainmask seg dseg probseg segmentation label labels roi lesion lesions aseg aparc",
    "synthesised, not scanned": "synthetic synthesised synthesized",
    "functional": "bold fmri func rest sbref",
    "a calibration": "calib calibration asset fieldmap fmap",
    "proton density": "pd pdw proton",
    "STIR": "stir",
    "bSSFP": "ciss fiesta trufi",
    "spectroscopy": "csi svs spectro",
    "a T1 or T2 image of another kind": "mp2rage unit1 inv1 inv2 pdt2 inplanet1 inplanet2 mese megre irt1 vfa",
}
"""Why an image is none of the four modalities -> words."""

_NEUTRAL = "w ax axial tra trans sag sagittal cor coronal 2d 3d se tse fse tirm space cube vista brain head ffe tfe ir"

_MEANINGS: dict[str, set[str]] = {}
for _meaning, _words in (*_WORDS.items(), *_REASONS.items(), ("", _NEUTRAL)):
    for _word in _words.split():
        _MEANINGS.setdefault(_word, set()).add(_meaning)

_GLUED = re.compile("|".join(sorted(map(re.escape, _MEANINGS), key=len, reverse=True)))
_AGENTS = r"(?:contrast|gd|gad|gado|gadolinium|ce|km|c)"
_REWRITTEN = (
    (re.compile(rf"(?<![a-z0-9])w(?:ith)?[\W_]*(?:and)?[\W_]*w(?:ithout|/?o)(?:[\W_]*{_AGENTS})?(?![a-z0-9])"), " "),
    (re.compile(r"(?<![a-z0-9])(?:sub|ses)-[a-z0-9]+"), " "),  # BIDS: whose image it is
    (re.compile(r"(?<![a-z0-9])ce-(?:none|no|without|pre)(?![a-z0-9])"), " native "),
    (re.compile(rf"\b(?:without|w/?o|non?|pre)[\W_]*{_AGENTS}(?![a-z0-9])"), " native "),
    (re.compile(r"\b(?:pre|post)[\W_]?op(?:erative)?(?![a-z0-9])"), " "),
    (re.compile(r"\+ ?c(?![a-z0-9])|(?<![a-z0-9])c ?\+"), " gd "),
    (re.compile(r"(?<![a-z0-9])c-(?![a-z0-9])"), " native "),
    (re.compile(r"t2[\W_]?(?:\*|star)"), " t2star "),
    (re.compile(r"dark[\W_]fluid"), " darkfluid "),
    (re.compile(r"(?<![a-z0-9])[es](?=t[12]w)"), ""),  # Philips: eT1W, sT2W
    (re.compile(r"three[\W_]plane|3[\W_]plane|3[\W_]pl(?![a-z0-9])"), " 3plane "),
)

_DERIVED_TYPES = {
    "LOCALIZER": "a localiser",
    "MPR": "a reformatted image",
    "CSA RESAMPLED": "a reformatted image",
    "REFORMATTED": "a reformatted image",
    "CSAPARALLEL": "a reformatted image",
    "MIP": "a projection",
    "MIN IP": "a projection",
    "MNIP": "a projection",
    "PROJECTION IMAGE": "a projection",
    "ADC": "diffusion",
    "TRACEW": "diffusion",
    "FA": "diffusion",
    "DIFFUSION": "diffusion",
    "PERFUSION": "perfusion",
    "SUBTRACT": "a derived map",
    "SUB": "a derived map",
    "T1 MAP": "a derived map",
    "T2 MAP": "a derived map",
    "SYNTHETIC": "synthesised, not scanned",
    "SECONDARY": "a derived image (image type SECONDARY)",
}

_NO_AGENT = {"", "no", "none", "n", "0", "-", "without", "no contrast", "na", "n/a"}


@dataclass(frozen=True)
class Naming:
    """What is known of an image's modality.

    Attributes:
        modality: t1n, t1c, t2w or t2f; empty where nothing tells, or where `reason` says why it is none.
        said: of t1n, whether something says that no agent was given, rather than nothing that one was.
        reason: why the image is none of the four.
        conflict: what contradicts what.
    """

    modality: str = ""
    said: bool = True
    reason: str = ""
    conflict: str = ""


def name_image(texts: Iterable[str], fields: Mapping[str, Any]) -> Naming:
    """The modality of an image.

    Args:
        texts: its name and descriptions, which must not contradict each other.
        fields: of its header, under the names and in the units of BIDS sidecars.
    """
    texts = list(texts)
    meanings = [meanings_of(text) for text in texts]
    if reason := _reason_of_header(fields) or _reason_of_words(meanings, fields) or _reason_of_timings(fields):
        return Naming(reason=reason)
    worded, conflict = _weighting_of_words(meanings, fields)
    timed = _weighting_of_timings(fields)
    conflict = conflict or _contradiction(worded, fields)
    weighting = worded or timed
    if conflict:
        return Naming(conflict=conflict)
    if weighting != "T1":
        return Naming({"T2": T2, "FLAIR": FLAIR}.get(weighting, ""))
    return _with_agent(set().union(*meanings), fields)


def meanings_of(text: str) -> set[str]:
    """What the words of a name or description mean, joined ones (`t1ce`, `T2_FLAIR`, `axt1`) too."""
    text = text.lower()
    for pattern, word in _REWRITTEN:
        text = pattern.sub(word, text)
    meanings: set[str] = set()
    for token in re.findall(r"[a-z0-9]+", text):
        meanings |= {meaning for word in _words_in(token) for meaning in _MEANINGS[word]}
    return meanings - {""}


def is_of_acquisition(word: str) -> bool:
    """Whether a word is one that names of scans consist of, whoever the patient is."""
    return bool(_words_in(word.lower()))


def _words_in(token: str) -> list[str]:
    """The known words that a token consists of; none if anything else is in it."""
    words = [token] if token in _MEANINGS else _GLUED.findall(token)
    return words if "".join(words) == token else []


def has_weighting(text: str) -> bool:
    """Whether a word of a text names a weighting."""
    return bool(meanings_of(text) & {"T1", "T2", "FLAIR"})


def _reason_of_header(fields: Mapping[str, Any]) -> str:
    """Why the header rules the image out."""
    kind = str(fields.get("Modality") or "MR").upper()
    if kind not in ("MR", "MAGNETIC RESONANCE"):
        return f"{kind}, not MR"
    if component := component_of({**fields, "ImageType": _listed(fields.get("ImageType"))}):
        return "a phase image" if component == "PHASE" else f"the {component.lower()} part of the signal"
    types = {str(part).upper() for part in _listed(fields.get("ImageType"))}
    if str(fields.get("AngioFlag", "")).upper() == "Y":
        return "angiography"
    return next((reason for mark, reason in _DERIVED_TYPES.items() if mark in types), "")


def _reason_of_words(meanings: list[set[str]], fields: Mapping[str, Any]) -> str:
    """Why its words rule the image out."""
    # Some call an MPRAGE mpr, which its header then says is the original.
    original = "ORIGINAL" in {str(part).upper() for part in _listed(fields.get("ImageType"))}
    pardoned = {"a reformatted image"} if original else set()
    found = [reason for reason in _REASONS if any(reason in of_text for of_text in meanings)]
    return next((reason for reason in found if reason not in pardoned), "")


def _reason_of_timings(fields: Mapping[str, Any]) -> str:
    te, _, ti = timings_ms(fields)
    sequence = sequence_of(fields)
    if "EP" in sequence:
        return "echo-planar (diffusion, perfusion or functional)"
    if "GR" in sequence and "SE" not in sequence and te is not None and te >= 15:
        return "susceptibility"
    if ti is not None and 0 < ti < 300 and "SE" in sequence:
        return "STIR"
    return ""


def _weighting_of_words(meanings: list[set[str]], fields: Mapping[str, Any]) -> tuple[str, str]:
    """The weighting that words name, and what is contradictory in them."""
    named = []
    for of_text in meanings:
        weightings = of_text & {"T1", "T2", "FLAIR"}
        if weightings == {"T2", "FLAIR"}:
            weightings = {"FLAIR"}
        elif len(weightings) > 1:  # T1-weighted FLAIR, or "T1 and T2"
            timed = _weighting_of_timings(fields)
            if timed not in weightings:
                return "", f"its name says {' and '.join(sorted(weightings))}"
            weightings = {timed}
        named += list(weightings)
    if len(set(named)) > 1:
        return "", f"one name says {named[0]}, another {next(one for one in named if one != named[0])}"
    return (named[0] if named else ""), ""


def _weighting_of_timings(fields: Mapping[str, Any]) -> str:
    """The weighting that the header's timings leave no doubt about; empty where they do.

    Inversion nulls fluid at 1.4 s and more (FLAIR), and prepares T1 weighting below. Without it, long echoes are T2,
    and short ones with short repetition T1; of gradient echoes only spoiled or prepared ones.
    """
    te, tr, ti = timings_ms(fields)
    sequence = sequence_of(fields)
    if te is None or tr is None:
        return ""
    if ti:
        if ti >= 1400 and te >= 60 and tr >= 4000:
            return "FLAIR"
        return "T1" if 300 <= ti < 1400 and te <= 30 else ""
    if "IR" in sequence or not sequence:
        return ""
    if "GR" in sequence and "SE" not in sequence:
        variant = {str(part).upper() for part in _listed(fields.get("SequenceVariant"))}
        return "T1" if te <= 12 and variant & {"SP", "MP"} else ""
    if te >= 60 and tr >= 2000:
        return "T2"
    return "T1" if te <= 30 and tr <= 1000 else ""


def _contradiction(worded: str, fields: Mapping[str, Any]) -> str:
    te, tr, ti = timings_ms(fields)
    if not worded or te is None:
        return ""
    impossible = {
        "T1": te >= 60,
        "T2": te <= 30 or (ti is not None and ti >= 1400),
        "FLAIR": te <= 30 or (ti is not None and 0 < ti < 1000) or (tr is not None and tr < 3000),
    }
    if not impossible[worded]:
        return ""
    told = ", ".join(f"{name} {ms:g} ms" for name, ms in (("TE", te), ("TR", tr), ("TI", ti)) if ms)
    return f"its name says {worded}, its header {told}"


def _with_agent(meanings: set[str], fields: Mapping[str, Any]) -> Naming:
    """T1-weighted: before or after contrast agent."""
    ingredient = fields.get("ContrastBolusIngredient") or fields.get("ContrastBolusAgent")
    agent = " ".join(map(str, _listed(ingredient))).strip()
    given = agent.lower() not in _NO_AGENT
    if "native" in meanings and ("agent" in meanings or given):
        other = "also of one" if "agent" in meanings else f"its header names {agent!r}"
        return Naming(conflict=f"its name speaks of no contrast agent, and {other}")
    if "agent" in meanings or given:
        return Naming(T1C)
    return Naming(T1, said="native" in meanings)


def timings_ms(fields: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Echo, repetition and inversion time in ms."""

    def milliseconds(name: str) -> float | None:
        value = fields.get(name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1000
        return float(value) * 1000 if good and value is not None else None

    te, tr, ti = (milliseconds(name) for name in ("EchoTime", "RepetitionTime", "InversionTime"))
    return te, tr, ti


def sequence_of(fields: Mapping[str, Any]) -> set[str]:
    """SE, IR, GR, EP, RM, as headers abbreviate what a sequence consists of."""
    parts = [str(part).upper() for part in _listed(fields.get("ScanningSequence"))]
    return {word for part in parts for word in re.split(r"[\\_/ ]+", part) if word}


def _listed(value: object) -> list[Any]:
    """A value that may be one, or a list of them; sidecars join them with backslashes or underscores."""
    if isinstance(value, str):
        return value.split("\\")
    return list(value)[:32] if isinstance(value, list | tuple) else []
