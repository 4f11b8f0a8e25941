"""Maps of relaxation times, held against what phantoms are made of."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support import CASES, needs_cases

from cwdm.images import MODALITIES, find_cases, read_grid
from cwdm.phantoms.anatomy import Anatomy, make_anatomy
from cwdm.phantoms.patients import make_phantom
from cwdm.phantoms.physics import TISSUES, Timing
from cwdm.phantoms.relaxometry import ANCHORS, Maps, estimate, without_noise
from cwdm.phantoms.variation import Variation

SHAPE, SPACING_MM, SEED = (96, 80, 66), 2.5, (7, 1)
PLAIN = Variation(
    bias=(0.1, 0.1),
    noise=(0.01, 0.01),
    misregistration_mm=(0.0, 0.0),
    thick_slice=0.0,
    tissue=0.0,
    patchiness=(0.0, 0.0),
    outlier=0.0,
)


def volumes_of(variation: Variation = PLAIN) -> dict[str, NDArray[np.float32]]:
    made = make_phantom(SEED, SHAPE, SPACING_MM, variation)
    return {name: volume.astype(np.float32) for name, volume in made.volumes.items()}


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """Of the phantom: the first of the generators that one is drawn from makes its anatomy."""
    return make_anatomy(np.random.default_rng(SEED).spawn(1)[0], SHAPE, SPACING_MM, PLAIN)


@pytest.fixture(scope="module")
def maps() -> Maps:
    return estimate(volumes_of(), [SPACING_MM] * 3)


def inside(anatomy: Anatomy, tissue: str, maps: Maps) -> NDArray[np.bool_]:
    """Voxels of the maps that hold one tissue alone."""
    fraction = np.zeros(len(anatomy.grid.near), np.float32)
    for layer in anatomy.layers:
        fraction[layer.index] *= 1 - layer.fraction
        if layer.tissue == tissue:
            fraction[layer.index] += layer.fraction
    found: NDArray[np.bool_] = anatomy.grid.embed(anatomy.grid.volume(fraction))[maps.mask] > 0.95
    assert found.sum() > 20, tissue
    return found


@pytest.mark.parametrize("tissue", [*ANCHORS, "striatum"])
def test_relaxation_times_and_proton_density_of_healthy_tissue_are_found(
    tissue: str, maps: Maps, anatomy: Anatomy
) -> None:
    here, true = inside(anatomy, tissue, maps), TISSUES[tissue]
    assert np.median(maps.t1[here]) == pytest.approx(true.t1, rel=0.1)
    assert np.median(maps.t2[here]) == pytest.approx(true.t2, rel=0.1)
    assert np.median(maps.pd[here]) == pytest.approx(true.pd, rel=0.05)


@pytest.mark.parametrize("tissue", ["necrosis", "enhancing"])
def test_those_of_lesions_are_found_within_40_percent(tissue: str, maps: Maps, anatomy: Anatomy) -> None:
    """They are extrapolated from healthy tissue, with timings that are none of the scanner's own."""
    here, true, grey = inside(anatomy, tissue, maps), TISSUES[tissue], inside(anatomy, "grey", maps)
    assert np.median(maps.t1[here]) == pytest.approx(true.t1, rel=0.4)
    assert np.median(maps.t2[here]) == pytest.approx(true.t2, rel=0.4)
    assert np.median(maps.t2[here]) > 1.1 * np.median(maps.t2[grey])


def test_the_agent_shortens_t1_where_it_is_taken_up(maps: Maps, anatomy: Anatomy) -> None:
    assert maps.t1_enhanced is not None
    tumour, white = (inside(anatomy, tissue, maps) for tissue in ("enhancing", "white"))
    true = TISSUES["enhancing"]
    expected = true.t1 / (1 + true.t1 / 1000 * 4.5 * true.gd)
    assert np.median(maps.t1_enhanced[tumour]) == pytest.approx(expected, rel=0.4)
    assert np.median((maps.t1_enhanced / maps.t1)[tumour]) < 0.5
    assert np.median((maps.t1_enhanced / maps.t1)[white]) > 0.9


def test_images_with_the_timings_that_were_believed_are_the_originals(maps: Maps) -> None:
    for name, volume in volumes_of().items():
        again = maps.gains[name] * maps.bias[name] * maps.signal(name, maps.timings[name])
        assert np.corrcoef(again, volume[maps.mask])[0, 1] > 0.99


@pytest.mark.parametrize("contrast", ["t1n", "t2w"])
def test_what_is_imaged_anew_is_what_another_scanner_makes(contrast: str, anatomy: Anatomy) -> None:
    """The same phantom by spin echo and by inversion; one is made from the other."""
    spin, inversion = (volumes_of(replace(PLAIN, bias=(0, 0), inversion_prepared_t1=share)) for share in (0.0, 1.0))
    found = estimate(spin, [SPACING_MM] * 3)
    timing = Timing(2100, 3.5, 950) if contrast == "t1n" else Timing(6000, 100)
    truth, anew = inversion[contrast][found.mask], found.signal(contrast, timing)
    assert np.corrcoef(truth, anew)[0, 1] > 0.95


def test_noise_goes_and_borders_stay() -> None:
    rng, step = np.random.default_rng(2), np.zeros((20, 18, 16), np.float32)
    step[10:] = 1
    mask = rng.random(step.shape) < 0.9
    noisy = step + 0.02 * rng.standard_normal(step.shape, np.float32)
    quiet = np.zeros_like(step)
    quiet[mask] = without_noise(noisy[mask], mask)
    error = (quiet - step)[mask]
    assert error.std() < 0.6 * (noisy - step)[mask].std()
    assert abs(error).max() < 0.1
    np.testing.assert_allclose(without_noise(np.full(mask.sum(), 3, np.float32), mask), 3, rtol=1e-4)


def test_three_contrasts_are_enough_and_two_are_not() -> None:
    volumes = volumes_of()
    three = estimate({name: volumes[name] for name in ("t1n", "t2w", "t2f")}, [SPACING_MM] * 3)
    assert three.t1_enhanced is None
    assert set(three.unexplained) == {"t1n", "t2w", "t2f"}
    with pytest.raises(ValueError, match="t2f missing"):
        estimate({name: volumes[name] for name in ("t1n", "t2w", "t1c")}, [SPACING_MM] * 3)


@needs_cases
@pytest.mark.full
@pytest.mark.parametrize("name", ["MS-07", "MS-19", "BraTS-TCGA-07294-000"])
def test_real_patients_are_explained_and_given_back(name: str) -> None:
    (case,) = (case for case in find_cases(CASES) if case.name == name)
    volumes = {modality: read_grid(case.files[modality]).volume for modality in MODALITIES}
    found = estimate(volumes, [1.0] * 3)
    for modality, volume in volumes.items():
        original, timing = volume[found.mask] / found.bias[modality], found.timings[modality]
        assert np.corrcoef(found.explained(modality, timing), original)[0, 1] > 0.95
        assert np.corrcoef(found.signal(modality, timing), original)[0, 1] > 0.96
