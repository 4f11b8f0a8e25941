"""Weights found in folders, checked, loaded and listed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support import TINY, hostile, link_to_a_name_too_long, spoil

from cwdm import Synthesizer, checkpoint, weights
from cwdm.checkpoint import ANY, Record, load_published
from cwdm.errors import WeightsError
from cwdm.images.cases import MODALITIES
from cwdm.unet import UNet, UNetConfig
from cwdm.weights.folder import BUNDLED, CHECKSUMS, PUBLISHED_FILES, folder_of, load_for
from cwdm.weights.listing import inspect
from cwdm.weights.untrained import untrained_state


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "any.pt"
    torch.save(untrained_state(TINY), path)
    return path


def test_published_and_own_files_are_found_in_a_folder(published_file: Path, tmp_path: Path) -> None:
    for name in PUBLISHED_FILES.values():
        (tmp_path / name).write_bytes(published_file.read_bytes())
    assert {m: weights.find(tmp_path, m).name for m in MODALITIES} == PUBLISHED_FILES
    checkpoint.save(tmp_path / "t1c.safetensors", load_published(untrained_state(TINY)), Record(modality="t1c"))
    assert weights.find(tmp_path, "t1c").name == "t1c.safetensors"
    assert weights.load_for(tmp_path, "t1c").warnings == ()


def test_the_newest_checkpoint_of_the_published_training_is_found(published_file: Path, tmp_path: Path) -> None:
    for name in ("brats_010000.pt", "brats_990000.pt", "brats_1200000.pt", "brats_best.pt", "brats_99.pt"):
        (tmp_path / name).write_bytes(published_file.read_bytes())
    loaded = weights.load_for(tmp_path, "t2f")
    assert loaded.path == tmp_path / "brats_1200000.pt"
    assert loaded.warnings == ("brats_1200000.pt does not say which modality it synthesises; taken for t2f",)
    (tmp_path / "t2f").mkdir()
    (tmp_path / "t2f" / "brats_000100.pt").write_bytes(published_file.read_bytes())
    loaded = weights.load_for(tmp_path, "t2f")
    assert (loaded.path, loaded.warnings) == (tmp_path / "t2f" / "brats_000100.pt", ())


def test_a_file_is_taken_as_it_is_unless_it_says_otherwise(published_file: Path, tmp_path: Path) -> None:
    assert weights.load_for(published_file, "t1n").warnings
    checkpoint.save(tmp_path / "mine.safetensors", load_published(untrained_state(TINY)), Record(modality="t2w"))
    assert weights.load_for(tmp_path / "mine.safetensors", "t2w").record.modality == "t2w"
    with pytest.raises(WeightsError, match="synthesises t2w, but t1n is missing"):
        weights.load_for(tmp_path / "mine.safetensors", "t1n")


def test_missing_and_unconditional_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights for t1n .* looked for t1n.safetensors, t1_gen.pt"):
        weights.find(tmp_path, "t1n")
    config = UNetConfig(in_channels=8, model_channels=32, channel_mult=(1, 2), skips="additive")
    torch.save(untrained_state(config), tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match="unconditional"):
        weights.load_for(tmp_path, "t1n")


def test_notice_becomes_a_warning(tmp_path: Path) -> None:
    notice = "trained on phantoms, not for clinical use"
    record = Record(modality="t1n", notice=notice)
    checkpoint.save(tmp_path / "t1n.safetensors", load_published(untrained_state(TINY)), record)
    assert weights.load_for(tmp_path, "t1n").warnings == (notice,)


def test_weights_that_differ_from_their_checksum_are_not_used(published_file: Path, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(published_file.read_bytes())
    weights.record(tmp_path, "t1_gen.pt", {"sha256": "0" * 64})
    weights.record(tmp_path, "t2_gen.pt", {"sha256": "0" * 64})
    with pytest.raises(WeightsError, match=r"checksums\.json beside it says 0000"):
        weights.load_for(tmp_path, "t1n")
    faults = [listed.fault for listed in weights.inspect(tmp_path)]
    assert "recorded 0000" in faults[0]
    assert "not there" in faults[1]


def test_networks_for_another_number_of_conditions_are_refused(tmp_path: Path) -> None:
    config = UNetConfig(in_channels=24, model_channels=32, channel_mult=(1, 2))
    torch.save(untrained_state(config), tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match="24 inputs, 8 outputs and 0 targets"):
        weights.load_for(tmp_path, "t1n")


def test_a_files_name_tells_more_than_its_folders() -> None:
    assert weights.modality_of(Path("t1n/flair_gen.pt")) == "t2f"
    assert weights.modality_of(Path("t1n/brats_100000.pt")) == "t1n"
    assert weights.modality_of(Path("somewhere/brats_100000.pt")) is None


def test_damaged_checksums_are_said(published_file: Path, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(published_file.read_bytes())
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(WeightsError, match=r"checksums\.json"):
        list(weights.inspect(tmp_path))


ANY_CONFIG = UNetConfig(in_channels=40, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, groups=8, targets=4)


def test_one_file_for_any_modality_serves_those_without_one_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "any.safetensors", UNet(ANY_CONFIG), Record(modality=ANY, window="brain"))
    torch.save(untrained_state(TINY), tmp_path / "t1_gen.pt")
    synthesizer = Synthesizer(tmp_path, device="cpu")
    assert [synthesizer.pipeline(m).checkpoint.path.name for m in ("t1c", "t1n", "t2w", "t2f")] == [
        "any.safetensors",
        "t1_gen.pt",
        "any.safetensors",
        "any.safetensors",
    ]
    assert synthesizer.pipeline("t2w").checkpoint is synthesizer.pipeline("t2f").checkpoint  # not read again


def test_a_network_that_contradicts_its_record_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", UNet(ANY_CONFIG), Record(modality="t1n"))
    with pytest.raises(WeightsError, match="says that it synthesises t1n"):
        load_for(tmp_path / "a.safetensors", "t1n")
    checkpoint.save(tmp_path / "b.safetensors", UNet(TINY), Record(modality=ANY))
    with pytest.raises(WeightsError, match="says that it synthesises any"):
        load_for(tmp_path / "b.safetensors", "t1n")


def test_bundled_weights_load_and_say_what_they_are() -> None:
    (listed,) = inspect(folder_of(BUNDLED))
    assert listed.verified
    assert listed.loaded is not None
    record = listed.loaded.record
    assert record.modality == ANY
    assert "not for clinical use" in record.notice
    assert listed.path.stat().st_size < 12e6
    for modality in ("t1n", "t1c", "t2w", "t2f"):
        assert record.notice in load_for(folder_of(BUNDLED), modality).warnings


@hostile
def test_hostile_checksums_are_said(weights_folder: Path, tmp_path: Path, how: str) -> None:
    shutil.copy(weights_folder / "t1_gen.pt", tmp_path)
    spoil(tmp_path / CHECKSUMS, how)
    with pytest.raises(WeightsError, match=r"checksums\.json: cannot be read"):
        weights.load_for(tmp_path, "t1n")


@pytest.mark.parametrize("name", ["t1n.safetensors", "t1_gen.pt"])
def test_a_pipe_is_no_file_of_weights(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for read in (checkpoint.load, checkpoint.read_record if name.endswith("s") else checkpoint.load):
        with pytest.raises(WeightsError, match="not a regular file"):
            read(tmp_path / name)


def test_links_that_cannot_be_followed_are_no_weights(weights_folder: Path, tmp_path: Path) -> None:
    link_to_a_name_too_long(tmp_path / "t1n.safetensors")
    with pytest.raises(WeightsError, match="no weights for t1n"):
        weights.find(tmp_path, "t1n")
    shutil.copy(weights_folder / "t1_gen.pt", tmp_path)
    assert weights.find(tmp_path, "t1n").name == "t1_gen.pt"
    assert [listed.path.name for listed in weights.inspect(tmp_path)] == ["t1_gen.pt"]
    with pytest.raises(WeightsError, match="name too long"):
        weights.find(tmp_path / ("x" * 300), "t1n")
