from typing import Any

import pytest

from cwdm.scans.naming import meanings_of, name_image

SE = {"ScanningSequence": "SE"}
FLAIR = {"EchoTime": 0.11, "RepetitionTime": 9.0, "InversionTime": 2.5, "ScanningSequence": "SE\\IR"}
T2 = {"EchoTime": 0.1, "RepetitionTime": 5.0, **SE}
T1 = {"EchoTime": 0.011, "RepetitionTime": 0.55, **SE}
T1_FLAIR = {"EchoTime": 0.02, "RepetitionTime": 2.1, "InversionTime": 0.75, "ScanningSequence": ["SE", "IR"]}
MPRAGE = {
    **{"EchoTime": 0.003, "RepetitionTime": 2.3, "InversionTime": 0.9},
    **{"ScanningSequence": "GR\\IR", "SequenceVariant": "SK\\SP\\MP"},
}


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        *[(text, "t1n") for text in ("t1", "T1W", "t1n", "AX T1 PRE GD", "t1_mprage_sag", "eT1W_TSE", "SAG BRAVO")],
        *[
            (text, "t1n")
            for text in ("T1 without contrast", "T1 C-", "t1 non-contrast", "post-op T1", "sub-03_ses-post_T1w")
        ],
        *[(text, "t1c") for text in ("t1ce", "T1Gd", "t1c", "AX T1 POST GAD", "t1 +C", "T1 C+", "axt1post", "T1_KM")],
        *[(text, "t1c") for text in ("sub-01_ce-gadolinium_T1w", "T1W_3D_FFE_GD", "ax_t1_se_contrast")],
        *[(text, "t2w") for text in ("t2", "T2W", "t2_tse_tra", "sT2W_TSE", "AX T2", "sub-pre_ses-1_T2w")],
        *[(text, "t2f") for text in ("fla", "FLAIR", "T2_FLAIR", "t2f", "Ax T2 FLAIR", "t2_tirm_tra_dark-fluid")],
        *[(text, "") for text in ("ax_3", "brain", "scan7", "T12", "at1")],
    ],
)
def test_words_of_a_name(text: str, modality: str) -> None:
    naming = name_image([text], {})
    assert (naming.modality, naming.reason, naming.conflict) == (modality, "", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *[("3-plane loc", "a localiser"), ("AAHead_Scout", "a localiser"), ("ADC map", "diffusion")],
        *[("ep2d_diff_TRACEW", "diffusion"), ("t1_MPR_cor", "a reformatted image"), ("MIP T1", "a projection")],
        *[("t2_phase", "a phase image"), ("sub-01_part-phase_T1w", "a phase image"), ("T2*", "susceptibility")],
        *[("mask_t1", "a mask"), ("t1_seg", "a mask"), ("T1 map", "a derived map"), ("rCBV", "perfusion")],
        *[("sub-01_desc-synthetic_T1w", "synthesised, not scanned"), ("T2 STIR", "STIR"), ("PD", "proton density")],
        *[("t1_sub", "a derived map"), ("TOF 3D", "angiography")],
    ],
)
def test_what_is_none_of_the_modalities_says_why(text: str, reason: str) -> None:
    naming = name_image([text], {})
    assert (naming.modality, naming.reason) == ("", reason)


@pytest.mark.parametrize(
    ("fields", "modality"),
    [
        *[(FLAIR, "t2f"), (T2, "t2w"), (T1, "t1n"), (T1_FLAIR, "t1n"), (MPRAGE, "t1n")],
        ({**T1, "ContrastBolusIngredient": "GADOLINIUM"}, "t1c"),
        ({**T1, "ContrastBolusAgent": "NONE"}, "t1n"),
        ({**T2, "ContrastBolusAgent": "Dotarem"}, "t2w"),
        ({"EchoTime": 0.1, "RepetitionTime": 9.0, "ScanningSequence": "IR"}, ""),  # inverted, nobody says how long
        ({"EchoTime": 0.002, "RepetitionTime": 0.005, "ScanningSequence": "GR", "SequenceVariant": "SS"}, ""),
        ({"EchoTime": 0.045, "RepetitionTime": 2.5, **SE}, ""),
        ({"EchoTime": 0.011, "RepetitionTime": 3.0, **SE}, ""),
        ({"EchoTime": "0.1", "RepetitionTime": None}, ""),
        ({}, ""),
    ],
)
def test_header_without_a_word(fields: dict[str, Any], modality: str) -> None:
    naming = name_image(["Ax 4"], fields)
    assert (naming.modality, naming.reason, naming.conflict) == (modality, "", "")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**T1, "ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "a phase image"),
        ({**T1, "ImageType": "ORIGINAL\\PRIMARY\\R_FFE"}, "the real part of the signal"),
        ({**T1, "ComplexImageComponent": "PHASE"}, "a phase image"),
        ({**T1, "ImageType": ["DERIVED", "PRIMARY", "MPR"]}, "a reformatted image"),
        ({**T2, "ImageType": ["DERIVED", "SECONDARY"]}, "a derived image (image type SECONDARY)"),
        ({**MPRAGE, "AngioFlag": "Y"}, "angiography"),
        ({"Modality": "CT"}, "CT, not MR"),
        ({**T2, "ScanningSequence": "EP\\SE"}, "echo-planar (diffusion, perfusion or functional)"),
        ({"EchoTime": 0.025, "RepetitionTime": 0.6, "ScanningSequence": "GR"}, "susceptibility"),
        ({"EchoTime": 0.07, "RepetitionTime": 4.0, "InversionTime": 0.17, **SE}, "STIR"),
    ],
)
def test_header_that_rules_an_image_out(fields: dict[str, Any], reason: str) -> None:
    naming = name_image(["t1"], fields)
    assert (naming.modality, naming.reason) == ("", reason)


@pytest.mark.parametrize(
    ("texts", "fields", "conflict"),
    [
        (["t1"], T2, "its name says T1, its header TE 100 ms, TR 5000 ms"),
        (["t2"], FLAIR, "its name says T2, its header TE 110 ms, TR 9000 ms, TI 2500 ms"),
        (["flair"], T1, "its name says FLAIR, its header TE 11 ms, TR 550 ms"),
        (["T1 FLAIR"], {}, "its name says FLAIR and T1"),
        (["T1_to_T2"], {}, "its name says T1 and T2"),
        (["t1", "AX T2"], {}, "one name says T1, another T2"),
        (["t1 pre and post"], {}, "its name speaks of no contrast agent, and also of one"),
        (["t1n"], {"ContrastBolusIngredient": "Gd"}, "its name speaks of no contrast agent, and its header names 'Gd'"),
    ],
)
def test_contradictions_are_told_and_not_decided(texts: list[str], fields: dict[str, Any], conflict: str) -> None:
    naming = name_image(texts, fields)
    assert (naming.modality, naming.conflict) == ("", conflict)


def test_timings_decide_between_two_words_and_confirm_a_flair_without_inversion_time() -> None:
    assert name_image(["AX T1 FLAIR"], T1_FLAIR).modality == "t1n"
    assert name_image(["AX FLAIR"], {"EchoTime": 0.12, "RepetitionTime": 9.0, **SE}).modality == "t2f"


def test_mpr_in_the_name_of_an_original_is_an_mprage() -> None:
    assert name_image(["t1_mpr_ns_sag"], {**MPRAGE, "ImageType": ["ORIGINAL", "PRIMARY"]}).modality == "t1n"


@pytest.mark.parametrize(
    "visit", ["BRAIN W/WO CONTRAST", "Head with and without Gd", "BRAIN W WO", "brain w & w/o contrast"]
)
def test_a_visit_with_and_without_agent_tells_of_no_image(visit: str) -> None:
    assert meanings_of(visit) == set()


def test_only_words_tell_that_no_agent_was_given() -> None:
    assert not name_image(["t1"], {}).said
    assert name_image(["t1 native"], {}).said
