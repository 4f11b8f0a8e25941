"""Weights from a Hugging Face repository, and files of other formats made ours."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from cwdm import checkpoint
from cwdm.errors import WeightsError
from cwdm.files import exists, is_file, output_errors, sha256
from cwdm.folders import locked
from cwdm.weights.folder import PUBLISHED_FILES, is_recorded, modality_of, put_entry, record, recorded
from cwdm.weights.listing import KNOWN_SHA256

PUBLISHED_REPO = "pfriedri/cwdm"


def download(
    folder: Path,
    repo: str = PUBLISHED_REPO,
    revision: str = "main",
    files: tuple[str, ...] = tuple(PUBLISHED_FILES.values()),
    on_kept: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Fetch weights from a Hugging Face repository, check and record their checksums.

    `HF_ENDPOINT` and `HF_TOKEN` are honoured. A file that is already there whole is not fetched again. One that is
    neither the repository's nor what was downloaded earlier stays as it is.

    Args:
        on_kept: told about each file of somebody else's that stays, and what to do.

    Returns:
        The repository's files that are there now.

    Raises:
        WeightsError: no connection, no such repository, revision or file, or a checksum that does not match.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [_download_one(folder, repo, revision, name, on_kept) for name in files]
    return [path for path in paths if path]


def _download_one(folder: Path, repo: str, revision: str, name: str, on_kept: Callable[[str], None]) -> Path | None:
    try:
        metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        commit = metadata.commit_hash or revision
        # The hub tags large files with their sha256; small ones carry a git hash, which says nothing about content.
        tag = metadata.etag if metadata.etag and len(metadata.etag) == 64 else None
        if _is_anothers(folder, name, tag):
            on_kept(
                f"{folder / name} is neither the file of {repo} ({revision}) nor one downloaded earlier, so it is "
                "kept; move it away to fetch that one, or download into another folder"
            )
            return None
        path = Path(str(hf_hub_download(repo, name, revision=commit, local_dir=folder)))
    except (HTTPError, HFValidationError, OSError) as error:
        raise WeightsError(f"{name} could not be downloaded from {repo} ({revision}): {error}") from error
    found = sha256(path)
    for expected in filter(None, (tag, KNOWN_SHA256.get(name))):
        if found != expected:
            path.unlink()
            raise WeightsError(f"{name}: downloaded with sha256 {found}, expected {expected}; removed, try again")
    record(folder, name, {"sha256": found, "repo": repo, "revision": commit})
    return path


def _is_anothers(folder: Path, name: str, tag: str | None) -> bool:
    """Whether a file stands under the name whose content no download can bring back.

    The hub's client would replace it: of its own record of the folder it compares the time of the file alone.
    """
    if not is_file(folder / name):
        return False
    entry = recorded(folder).get(name, {})
    downloaded = entry.get("sha256") if "repo" in entry else None
    return sha256(folder / name) not in (tag, downloaded)


def convert(source: Path, target: Path, modality: str | None, dtype: torch.dtype) -> Path:
    """Write a checkpoint as our safetensors, with what its header needs to say.

    Raises:
        WeightsError: the source is not usable, no one knows which modality it synthesises, or the target is the source
            or another file that was not converted here.
    """
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the converted file is a safetensors file and must be named so")
    _check_free(target, source)
    with output_errors(target.parent):
        target.parent.stat()  # it is not made here
    loaded = checkpoint.load(source)
    conditional = loaded.model.config.in_channels > loaded.model.config.out_channels
    modality = modality or loaded.record.modality or modality_of(source)
    if conditional and modality is None:
        raise WeightsError(f"{source}: the file does not say which modality it synthesises; give --modality")
    entry = loaded.record.model_copy(update={"modality": modality})
    with locked(target.parent):
        replaced = _check_free(target, source)

        def announce(digest: str) -> None:
            """Record the new file beside the old one, so that whichever a killed run leaves is known."""
            told = {"sha256": digest, "converted_from": loaded.sha256}
            put_entry(target.parent, target.name, {**told, "replaces": replaced} if replaced else told)

        checkpoint.save(target, loaded.model, entry, dtype, announce)
        put_entry(target.parent, target.name, {"sha256": sha256(target), "converted_from": loaded.sha256})
    return target


def _check_free(target: Path, source: Path) -> str | None:
    """The checksum of an earlier conversion that will be replaced, if there is one; nothing else may be there."""
    if not exists(target):
        return None
    entry, found = recorded(target.parent).get(target.name, {}), sha256(target)
    converted = "converted_from" in entry and is_recorded(entry, found)
    if not converted or (exists(source) and target.samefile(source)):
        raise WeightsError(
            f"{target} is there and is no earlier conversion of another file; move it away or give another name"
        )
    return found
