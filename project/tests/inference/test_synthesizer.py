import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support import CASES, SHAPE, SHARED, TINY, golden, link_case, needs_cases

from cwdm import Settings, Synthesizer, checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.errors import CaseError, WeightsError
from cwdm.files import sha256
from cwdm.images import case_folder as find_case
from cwdm.images.cases import MODALITIES, MOST_SIMILAR, Case, read_case
from cwdm.images.geometry import choose_window
from cwdm.images.intensity import as_published, normalise, with_tail
from cwdm.inference.provenance import describe
from cwdm.inference.steps import PreparedCase, Samples, postprocess, prepare
from cwdm.samplers import ddim
from cwdm.settings import load_settings
from cwdm.weights.untrained import untrained_state

FOUR_STEPS = "sampler.timesteps=[3, 2, 1, 0]"


def synthesizer(weights: Path, *overrides: str) -> Synthesizer:
    return Synthesizer(weights, load_settings(overrides=("precision=fp32", FOUR_STEPS, *overrides)), "cpu")


def prepared_by(made: Synthesizer, case: Case) -> PreparedCase:
    return prepare(case, made.pipeline(case.target), made.settings)


@pytest.mark.full
@needs_cases
@pytest.mark.parametrize("name", golden("case.json"))
def test_golden_case_as_published(name: str, weights_folder: Path, tmp_path: Path) -> None:
    run = golden("case.json")[name]
    case = link_case(CASES / run["case"], tmp_path, run["missing"])
    published = ("output.intensity=unit", "output.background=threshold", f"output.threshold={run['zero_at_or_below']}")
    volume = synthesizer(weights_folder, f"seed={run['seed']}", *published)(case).volume
    expected = np.load(SHARED / "golden" / f"{name}.npz")
    settled = np.abs(expected["values"] - run["zero_at_or_below"]) > 1e-3
    values = volume[tuple(expected["voxels"].astype(int).T)]
    np.testing.assert_allclose(values[settled], expected["values"][settled], atol=1e-4, rtol=0)
    blocks = volume[:, :, :152].reshape(30, 8, 30, 8, 19, 8).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(blocks, expected["block_mean"], atol=5e-4, rtol=0)


@pytest.fixture
def case(phantoms: Path, tmp_path: Path) -> Path:
    return link_case(sorted(phantoms.iterdir())[0], tmp_path, "t1n")


def test_native_intensities_span_the_nearest_contrasts_clipping_range(case: Path, weights_folder: Path) -> None:
    unit = synthesizer(weights_folder, "output.intensity=unit")(case)
    native = synthesizer(weights_folder)(case)
    low, high = normalise(unit.case.volumes[MOST_SIMILAR["t1n"]])[1]
    brain = np.logical_or.reduce([volume != 0 for volume in unit.case.volumes.values()])
    assert unit.volume.shape == native.volume.shape == SHAPE
    assert unit.volume.dtype == native.volume.dtype == np.float32
    np.testing.assert_allclose(native.volume[brain], unit.volume[brain] * (high - low) + low, atol=1e-2, rtol=1e-5)
    assert not unit.volume[~brain].any()
    assert not native.volume[~brain].any()


def test_a_network_sees_the_window_that_it_was_trained_on(case: Path, weights_folder: Path, tmp_path: Path) -> None:
    loaded = synthesizer(weights_folder).pipeline("t1n").checkpoint
    record = loaded.record.model_copy(update={"window": (64, 32, 48)})
    checkpoint.save(tmp_path / "t1n.safetensors", loaded.model, record)
    prepared = prepared_by(synthesizer(tmp_path), read_case(find_case(case)))
    brain = np.logical_or.reduce([volume != 0 for volume in prepared.case.volumes.values()])
    multiple = 2 * loaded.model.config.size_multiple
    assert prepared.window == choose_window(brain, multiple, (64, 32, 48))[0]
    assert prepared.window != prepared_by(synthesizer(weights_folder), prepared.case).window


def test_background_rules(case: Path, weights_folder: Path) -> None:
    def volume(rule: str) -> np.ndarray:
        return synthesizer(weights_folder, "output.intensity=unit", f"output.background={rule}")(case).volume

    everything = volume("none")
    np.testing.assert_array_equal(volume("threshold"), np.where(everything > np.float32(0.04), everything, 0))
    masked = volume("mask")
    assert np.isin(masked, (0, *everything[masked != 0])).all()
    assert np.count_nonzero(masked) < np.count_nonzero(everything)


def test_same_seed_same_volume_another_seed_another(case: Path, weights_folder: Path) -> None:
    first = synthesizer(weights_folder, "seed=1")
    assert np.array_equal(first(case).volume, first(case).volume)
    assert not np.array_equal(first(case).volume, synthesizer(weights_folder, "seed=2")(case).volume)


def test_mean_and_std_of_several_samples(case: Path, weights_folder: Path) -> None:
    singles = [synthesizer(weights_folder, f"seed={seed}")(case).volume for seed in (5, 6, 7)]
    assert synthesizer(weights_folder)(case).std is None
    several = synthesizer(weights_folder, "seed=5", "samples=3")(case)
    np.testing.assert_allclose(several.volume, np.mean(singles, axis=0), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(several.std, np.std(singles, axis=0, ddof=1), rtol=1e-3, atol=2e-2)


def test_several_samples_are_checked_with_their_std(case: Path, weights_folder: Path) -> None:
    single, several = synthesizer(weights_folder)(case), synthesizer(weights_folder, "samples=2")(case)
    assert "spread" not in single.quality.figures
    assert several.quality.figures["spread"] > 0
    assert single.quality.verdict in ("look", "reject")  # what untrained weights make is noise
    assert single.quality.reasons


def test_every_network_evaluation_is_reported(case: Path, weights_folder: Path) -> None:
    steps = []
    synthesizer(weights_folder, "samples=2")(case, lambda step, total, x0: steps.append((step, total, len(x0))))
    assert steps == [(step, 4, 1) for _ in range(2) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("code", ["RAS", "PIR", "SLA"])
def test_another_orientation_gives_the_same_image_in_the_order_of_the_file(
    code: str, case: Path, weights_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "turned" / case.name
    other.mkdir(parents=True)
    for path in sorted(case.iterdir()):
        image = nib.load(path)
        change = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(code))
        )
        nib.save(image.as_reoriented(change), other / path.name)
    straight, turned = synthesizer(weights_folder)(case), synthesizer(weights_folder)(other)
    back = nib.orientations.ornt_transform(
        nib.io_orientation(turned.case.affine), nib.io_orientation(straight.case.affine)
    )
    np.testing.assert_array_equal(nib.orientations.apply_orientation(turned.volume, back), straight.volume)
    assert any("orientation" in warning for warning in turned.warnings)
    assert not any("orientation" in warning for warning in straight.warnings)


def test_a_file_that_does_not_say_its_orientation_is_left_as_it_is(
    case: Path, weights_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare" / case.name
    bare.mkdir(parents=True)
    for path in sorted(case.iterdir()):
        image = nib.load(path)
        header = image.header.copy()
        header["qform_code"] = header["sform_code"] = 0
        header["vox_offset"] = 352
        (bare / path.name.removesuffix(".gz")).write_bytes(
            header.binaryblock + bytes(4) + image.dataobj.get_unscaled().tobytes("F")
        )
    result = synthesizer(weights_folder)(bare)
    assert np.array_equal(result.volume, synthesizer(weights_folder)(case).volume)
    assert any("does not say how the head lies" in warning for warning in result.warnings)


def test_constant_contrast_is_the_cases_fault(case: Path, weights_folder: Path, tmp_path: Path) -> None:
    path = case / f"{case.name}-t2w.nii.gz"
    image = nib.load(path)
    path.unlink()
    data = np.zeros(image.shape, np.int16)
    data[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(data, image.affine), path)
    with pytest.raises(CaseError, match=r"t2w: .*same intensity"):
        synthesizer(weights_folder)(case)


def test_checkpoint_recommends_and_settings_override(weights_folder: Path, tmp_path: Path) -> None:
    record = Record(modality="t1n", sampler="dpmpp", steps=7)
    checkpoint.save(tmp_path / "t1n.safetensors", load_published(untrained_state(TINY)), record)

    def plan(*overrides: str) -> tuple[str, list[int]]:
        made = Synthesizer(tmp_path, load_settings(overrides=overrides), "cpu").pipeline("t1n")
        return made.sampler_name, list(made.timesteps)

    assert (plan()[0], len(plan()[1])) == ("dpmpp", 7)
    assert plan("sampler.name=ddim", "sampler.steps=3") == ("ddim", [999, 500, 0])
    assert plan("sampler.timesteps=[9, 0]") == ("dpmpp", [9, 0])
    published = Synthesizer(weights_folder, Settings(), "cpu")
    pipeline = published.pipeline("t1n")
    assert (pipeline.sampler_name, pipeline.timesteps) == ("ddpm", tuple(range(999, -1, -1)))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_every_sampler_runs_a_case(sampler: str, case: Path, weights_folder: Path) -> None:
    result = synthesizer(weights_folder, f"sampler.name={sampler}", "output.intensity=unit")(case)
    assert 0 < result.volume.mean() < 1
    assert result.volume.min() >= -1e-5
    assert result.volume.max() <= 1 + 1e-5


def test_bfloat16_stays_close_to_float32(case: Path, weights_folder: Path) -> None:
    options = ("output.intensity=unit", "sampler.timesteps=[2, 0]")  # two steps, for processors that emulate it
    exact = synthesizer(weights_folder, *options, "precision=fp32")(case).volume
    fast = synthesizer(weights_folder, *options, "precision=bf16")(case).volume
    rms = np.sqrt(np.mean((exact - fast) ** 2))
    assert 0 < rms < 0.02


def test_a_sampler_of_ones_own(case: Path, weights_folder: Path) -> None:
    calls = []

    def mine(denoise, noise, timesteps, generator):
        calls.append(list(timesteps))
        return ddim(denoise, noise, timesteps, generator)

    settings = load_settings(overrides=("precision=fp32", FOUR_STEPS))
    made = Synthesizer(weights_folder, settings, "cpu", sampler=mine)
    expected = synthesizer(weights_folder, "sampler.name=ddim")(case).volume
    assert np.array_equal(made(case).volume, expected)
    assert calls == [[3, 2, 1, 0]]
    assert describe(made.pipeline("t1n"), settings)["sampler"] == "mine"


def test_a_brain_too_large_to_compute_is_the_cases_fault(case: Path, weights_folder: Path) -> None:
    read = read_case(find_case(case))
    large = {name: np.ones((400, 400, 256), np.float32) for name in read.volumes}
    with pytest.raises(CaseError, match="resample the case to 1 mm"):
        prepared_by(synthesizer(weights_folder), dataclasses.replace(read, volumes=large))


def test_unlabelled_weights_are_believed_for_one_contrast_only(weights_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "brats_1200000.pt").symlink_to(weights_folder / "t1_gen.pt")
    made = synthesizer(tmp_path)
    made.pipeline("t1n")
    with pytest.raises(WeightsError, match="was taken for t1n"):
        made.pipeline("t2f")
    made.pipeline("t1n")


def test_value_range_of_the_checkpoint_is_mapped_to_unit(case: Path, tmp_path: Path) -> None:
    record = Record(modality="t1n", value_range=(-1, 1))
    checkpoint.save(tmp_path / "t1n.safetensors", load_published(untrained_state(TINY)), record)
    volume = synthesizer(tmp_path, "output.intensity=unit", "output.background=none")(case).volume
    assert volume.min() >= -1e-5
    assert volume.max() <= 1 + 1e-5


def test_brain_intensities_are_what_the_network_sees_and_what_it_makes(case: Path, tmp_path: Path) -> None:
    record = Record(modality="t1n", intensities="brain")
    checkpoint.save(tmp_path / "t1n.safetensors", load_published(untrained_state(TINY)), record)
    made = synthesizer(tmp_path, "output.intensity=unit")
    prepared = prepared_by(made, read_case(find_case(case)))
    volumes = prepared.case.volumes
    for name, unit in zip(prepared.names, prepared.unit[0].numpy(), strict=True):
        np.testing.assert_array_equal(prepared.window.restore(unit), normalise(volumes[name], "brain")[0])
    # The nearest contrast stands in for the network.
    nearest = Samples(prepared.unit[0, prepared.names.index("t1c")], None, 0.0)
    expected = as_published(normalise(volumes["t1c"], "brain")[0], "t1n", "brain")
    unit = postprocess(prepared, nearest, made.settings.output).volume
    np.testing.assert_array_equal(unit, np.clip(expected, 0, 1))
    native = postprocess(prepared, nearest, Settings().output).volume
    low, high = normalise(volumes["t1c"])[1]
    usual = with_tail(np.where(prepared.mask, expected, 0))
    np.testing.assert_allclose(native, np.where(prepared.mask, usual * (high - low) + low, 0), rtol=1e-5, atol=1e-3)


def test_only_the_last_contrasts_weights_stay_in_memory(weights_folder: Path) -> None:
    made = synthesizer(weights_folder)
    first = made.pipeline("t1n")
    assert made.pipeline("t1n") is first
    assert made.pipeline("t2f") is not first
    assert made.pipeline("t1n").checkpoint is not first.checkpoint


def test_no_weights_no_gpu(tmp_path: Path, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        Synthesizer(tmp_path / "none")
    monkeypatch.setenv("CWDM_WEIGHTS", str(weights_folder))
    assert Synthesizer().weights == weights_folder


@needs_cases
@pytest.mark.parametrize("name", ["BraTS-GLI-00001-000", "BraTS-TCGA-07294-000"])
@pytest.mark.parametrize("missing", MODALITIES)
def test_real_cases_are_read_prepared_and_written_with_their_geometry(
    name: str, missing: str, weights_folder: Path, tmp_path: Path
) -> None:
    made = synthesizer(weights_folder)
    case = read_case(find_case(link_case(CASES / name, tmp_path, missing)))
    prepared = prepared_by(made, case)
    assert prepared.unit.shape == (1, 3, 224, 224, 160)
    assert prepared.warnings == ()
    # The nearest contrast stands in for the network, which would take minutes here.
    order = [modality for modality in MODALITIES if modality != missing]
    stand_in = prepared.unit[:, order.index(MOST_SIMILAR[missing])]
    result = postprocess(prepared, Samples(stand_in[0], None, 0.0), made.settings.output)
    result.save(tmp_path / "out.nii.gz")
    written, nearest = (
        nib.load(tmp_path / "out.nii.gz"),
        nib.load(CASES / name / f"{name}-{MOST_SIMILAR[missing]}.nii.gz"),
    )
    np.testing.assert_array_equal(written.affine, nearest.affine)
    assert written.shape == (240, 240, 155)
    clipped = np.clip(nearest.get_fdata(), *prepared.clip_range)
    np.testing.assert_allclose(written.get_fdata(), clipped, atol=0.51 + 1e-4 * prepared.clip_range.high)


def test_record_describes_what_decides_the_result(weights_folder: Path) -> None:
    made = synthesizer(weights_folder)
    described = json.loads(json.dumps(describe(made.pipeline("t1c"), made.settings)))
    assert described["weights"]["sha256"] == sha256(weights_folder / "t1ce_gen.pt")
    assert described["timesteps"] == [3, 2, 1, 0]
    assert described["settings"]["seed"] == 42


def test_volumes_in_memory_give_what_their_files_give(case: Path, weights_folder: Path) -> None:
    steps = []
    files = synthesizer(weights_folder)(case)
    affine = nib.load(next(case.glob("*-t2w.nii.gz"))).affine
    volumes = {name: volume.copy() for name, volume in files.case.volumes.items()}
    before = {name: volume.copy() for name, volume in volumes.items()}
    memory = synthesizer(weights_folder).from_arrays(volumes, affine, callback=lambda step, *_: steps.append(step))
    np.testing.assert_array_equal(memory.volume, files.volume)
    assert memory.case.target == "t1n"
    assert (memory.quality, memory.warnings) == (files.quality, files.warnings)
    assert steps == [1, 2, 3, 4]
    for name, volume in volumes.items():
        np.testing.assert_array_equal(volume, before[name])


def test_volumes_in_memory_lie_as_their_affine_says(case: Path, weights_folder: Path, tmp_path: Path) -> None:
    straight = synthesizer(weights_folder)(case)
    affine, (x, y, z) = straight.case.affine, straight.volume.shape
    turn = np.array([[0, -1, 0, x - 1], [0, 0, 1, 0], [-1, 0, 0, z - 1], [0, 0, 0, 1]], float)  # index there -> here
    turned = {name: volume[::-1, :, ::-1].transpose(2, 0, 1) for name, volume in straight.case.volumes.items()}
    result = synthesizer(weights_folder).from_arrays(turned, affine @ turn)
    assert result.volume.shape == (z, x, y)
    np.testing.assert_array_equal(result.volume, straight.volume[::-1, :, ::-1].transpose(2, 0, 1))
    result.save(tmp_path / "made.nii.gz")
    written = nib.load(tmp_path / "made.nii.gz")
    np.testing.assert_allclose(written.affine, affine @ turn, atol=1e-4)
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), result.volume)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"t1c": None}, "exactly one missing"),
        ({"T2": np.ones((3, 4, 5))}, "'T2'"),
        ({"t2f": np.ones((3, 4))}, "t2f: expected real numbers"),
        ({"t2f": np.full((31, 32, 25), np.nan)}, "t2f: 24800 voxels are not finite"),
        ({"t2f": np.ones((3, 4, 5))}, "one shape"),
        ({"affine": np.zeros((4, 4))}, "affine"),
    ],
)
def test_volumes_in_memory_are_checked(change: dict, fault: str, case: Path, weights_folder: Path) -> None:
    given = dict(read_case(find_case(case)).volumes) | change
    affine = given.pop("affine", np.diag([-6.5, -6.5, 6.5, 1]))
    volumes = {name: volume for name, volume in given.items() if volume is not None}
    with pytest.raises(CaseError, match=fault):
        synthesizer(weights_folder).from_arrays(volumes, affine)


def test_without_turning_the_check_still_sees_the_head_as_it_lies(case: Path, weights_folder: Path) -> None:
    """A field of view cut off at the top is called so, whether or not the network sees the head turned."""
    whole = read_case(find_case(case))
    top = int(np.flatnonzero(np.any([volume != 0 for volume in whole.volumes.values()], axis=(0, 1, 2)))[-1])
    cut = {name: volume[:, :, : top - 3][:, :, ::-1] for name, volume in whole.volumes.items()}
    affine = whole.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, top - 4], [0, 0, 0, 1]], float)
    for orient in ("true", "false"):
        found = synthesizer(weights_folder, f"output.orient={orient}").from_arrays(cut, affine).quality
        assert "the brain is cut off at the top: the field of view is truncated" in found.reasons
