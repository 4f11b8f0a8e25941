import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import nibabel as nib
import numpy as np
import pytest
import torch
from support import link_case
from typer.testing import CliRunner, Result

from cwdm import Synthesizer, checkpoint
from cwdm.checkpoint import ANY, Record, new_network
from cwdm.cli.app import app, main
from cwdm.errors import CaseError, DeviceLostError
from cwdm.files import sha256
from cwdm.images import cases as brats
from cwdm.images.cases import find_cases, read_case, write_volume
from cwdm.inference.cohort import device_works, synthesise_cohort
from cwdm.inference.provenance import read_provenance
from cwdm.precision import choose_dtype
from cwdm.report.data import ReportPaths, read_records, read_volumes
from cwdm.settings import load_settings
from cwdm.unet import UNet, UNetConfig

CWDM = [sys.executable, "-m", "cwdm"]
FAST = ["sampler.timesteps=[1, 0]", "--device", "cpu"]


def infer(data: Path, out: Path, weights: Path, *more: str) -> Result:
    return CliRunner().invoke(
        app, ["infer", "--data_path", str(data), "--output_path", str(out), "--weights", str(weights), *FAST, *more]
    )


def shell(data: Path, out: Path, weights: Path, *more: str) -> subprocess.CompletedProcess[str]:
    paths = ["--data_path", str(data), "--output_path", str(out), "--weights", str(weights)]
    return command("infer", *paths, *FAST, *more)


def in_a_process(data: Path, out: Path, weights: Path) -> subprocess.CompletedProcess[str]:
    """For what pytest's own log would catch."""
    paths = ["--data_path", str(data), "--output_path", str(out), "--weights", str(weights)]
    words = [sys.executable, "-P", "-m", "cwdm", "infer", *paths, *FAST]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What the `cwdm` command does, without the seconds that a new process takes to import PyTorch."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["cwdm", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


EXPECTED = [
    "BraTS-PHANTOM-00000-000-t1n.nii.gz",
    "BraTS-PHANTOM-00001-000-t2f.nii.gz",
    "BraTS-PHANTOM-00002-000-t1n.nii.gz",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_case_gets_what_it_lacks_and_nothing_else(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    out = tmp_path / "out"
    result = infer(cohort, out, weights_folder)
    assert result.exit_code == 0, result.output
    assert names(out) == EXPECTED
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before
    for name in EXPECTED:
        written = nib.load(out / name)
        condition = nib.load(cohort / name[:23] / f"{name[:23]}-t2w.nii.gz")
        np.testing.assert_array_equal(written.affine, condition.affine)
        assert written.shape == condition.shape
        assert written.get_fdata().any()
        assert b"synthesised by cwdm" in written.header["descrip"].tobytes()


def test_order_and_company_do_not_change_a_result(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    infer(cohort, tmp_path / "all", weights_folder)
    for name in names(cohort)[:2]:
        shutil.rmtree(cohort / name)
    infer(cohort, tmp_path / "one", weights_folder)
    assert (tmp_path / "one" / EXPECTED[2]).read_bytes() == (tmp_path / "all" / EXPECTED[2]).read_bytes()


def test_a_second_run_does_what_is_left(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    infer(cohort, out, weights_folder)
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / EXPECTED[1]).unlink()
    result = infer(cohort, out, weights_folder)
    assert result.exit_code == 0
    second = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert [name for name in second if second[name] != first[name]] == [EXPECTED[1]]
    infer(cohort, out, weights_folder, "--overwrite")
    assert all(path.stat().st_mtime_ns > second[path.name] for path in out.iterdir())


def test_report_says_what_was_done(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    result = infer(cohort, tmp_path / "out", weights_folder, "--report_path", str(report), "samples=2", "seed=9")
    assert names(tmp_path / "out") == EXPECTED
    (run_file,) = report.glob("run-*.json")
    run = json.loads(run_file.read_text())
    assert [case["status"] for case in run["cases"]] == ["written"] * 3
    record = json.loads((report / "BraTS-PHANTOM-00001-000-t2f.json").read_text())
    assert record["synthesised"] is True
    assert record["settings"]["seed"] == 9
    assert record["weights"]["file"].endswith("flair_gen.pt")
    assert len(record["weights"]["sha256"]) == 64
    assert record["seconds"] > 0
    assert any("instead of the 1 mm" in warning for warning in record["warnings"])
    quality = record["quality"]
    assert quality["verdict"] in ("look", "reject")  # what untrained weights make is noise
    assert all(reason in result.output for reason in quality["reasons"])
    assert quality["figures"]["spread"] > 0
    assert (report / "report.html").is_file()
    assert Path(record["output"]) == tmp_path / "out" / EXPECTED[1]
    spread = nib.load(report / "BraTS-PHANTOM-00001-000-t2f-spread.nii.gz")
    assert spread.get_fdata().max() > 0


def test_a_finished_case_made_with_other_settings_is_said(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    report = ["--report_path", str(tmp_path / "report")]
    infer(cohort, tmp_path / "out", weights_folder, *report, "seed=1")
    same = infer(cohort, tmp_path / "out", weights_folder, *report, "seed=1")
    other = infer(cohort, tmp_path / "out", weights_folder, *report, "seed=2")
    assert "other settings" not in same.output
    assert other.output.count("made with other settings") == 3
    assert "3 of 3 cases" in other.output
    assert "3 of them from before" in other.output
    assert len(list((tmp_path / "report").glob("run-*.json"))) == 3


def test_a_finished_case_made_with_other_weights_is_said(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    shutil.copytree(weights_folder, others)
    state = torch.load(others / "t1_gen.pt")
    torch.save({name: tensor * 1.01 for name, tensor in state.items()}, others / "t1_gen.pt")
    infer(cohort, tmp_path / "out", weights_folder)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = infer(cohort, tmp_path / "out", others)
    assert other.exit_code == 0
    assert other.output.count("made with other weights") == 2  # t2f's are the same
    assert "--overwrite makes it again" in other.output
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    steps = infer(cohort, tmp_path / "out", weights_folder, "sampler.timesteps=[2, 0]")
    assert steps.output.count("made with other settings") == 3
    precision = infer(cohort, tmp_path / "out", weights_folder, f"precision={other_precision()}")
    assert precision.output.count("made with other settings") == 3
    image = nib.load(tmp_path / "out" / EXPECTED[0])
    image.header["descrip"] = "synthesised by cwdm 0.0.9 (t1n)"
    nib.save(nib.Nifti1Image(image.get_fdata(), image.affine, image.header), tmp_path / "out" / EXPECTED[0])
    assert "does not say what it was made with" in infer(cohort, tmp_path / "out", weights_folder).output


def other_precision() -> str:
    return "fp32" if choose_dtype("auto", torch.device("cpu")) == torch.bfloat16 else "bf16"


def test_the_header_has_room_for_what_an_image_was_made_with(
    cohort: Path, weights_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brats, "__version__", "12.10.3.post4.dev123+gabcdef0123.d20300101")
    infer(cohort, tmp_path, weights_folder)
    made = read_provenance(tmp_path / EXPECTED[0])
    assert made is not None
    assert sha256(weights_folder / "t1_gen.pt").startswith(made.weights)


@pytest.fixture
def unlabelled(weights_folder: Path, tmp_path: Path) -> Path:
    """Weights that say nowhere which modality they synthesise."""
    (tmp_path / "unlabelled").mkdir()
    return Path(shutil.copy(weights_folder / "t1_gen.pt", tmp_path / "unlabelled" / "brats_1200000.pt")).parent


@pytest.mark.parametrize(
    "how", [[], ["--devices=2"], ["--shard=0/3"], ["--shard=1/3"], ["--shard=2/3"], ["--ray=local"]]
)
def test_unlabelled_weights_serve_one_modality_only(
    how: list[str], cohort: Path, unlabelled: Path, tmp_path: Path
) -> None:
    result = shell(cohort, tmp_path / "out", unlabelled, *how)
    assert result.returncode == 2
    assert "brats_1200000.pt does not record which modality it synthesises, and cases miss t1n and t2f" in result.stderr
    assert not (tmp_path / "out").exists()


def test_unlabelled_weights_serve_one_modality_only_in_a_second_run_too(
    cohort: Path, unlabelled: Path, tmp_path: Path
) -> None:
    later = tmp_path / "later" / EXPECTED[1][:23]
    later.parent.mkdir()
    (cohort / later.name).rename(later)  # the case without t2f
    assert shell(cohort, tmp_path / "out", unlabelled).returncode == 0
    result = shell(later.parent, tmp_path / "out", unlabelled)
    assert result.returncode == 2
    assert f"it has made {tmp_path / 'out' / EXPECTED[0]}" in result.stderr
    assert names(tmp_path / "out") == [EXPECTED[0], EXPECTED[2]]
    (tmp_path / "out" / EXPECTED[2]).unlink()
    again = shell(cohort, tmp_path / "out", unlabelled)  # of the same modality
    assert again.returncode == 0
    assert names(tmp_path / "out") == [EXPECTED[0], EXPECTED[2]]
    (unlabelled / "t1n").mkdir()
    (unlabelled / "brats_1200000.pt").rename(unlabelled / "t1n" / "brats_1200000.pt")  # as the message advises
    assert shell(cohort, tmp_path / "out", unlabelled).returncode == 0


def test_no_uncertainty_of_an_earlier_run_stands_beside_a_new_image(
    cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    report = ["--report_path", str(tmp_path / "report"), "--overwrite"]
    infer(cohort, tmp_path / "out", weights_folder, *report, "samples=2")
    assert len(list((tmp_path / "report").glob("*-spread.nii.gz"))) == 3
    shutil.rmtree(cohort / EXPECTED[1][:23])
    infer(cohort, tmp_path / "out", weights_folder, *report)
    assert [path.name for path in (tmp_path / "report").glob("*-spread.nii.gz")] == [
        EXPECTED[1].replace(".nii.gz", "-spread.nii.gz")
    ]


@pytest.mark.parametrize("there", ["empty", "folder", "five bytes", "original"])
def test_only_a_file_with_something_in_it_counts_as_finished(
    there: str, cohort: Path, phantoms: Path, weights_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if there == "folder":
        (out / EXPECTED[0]).mkdir()
    else:
        original = (phantoms / EXPECTED[0][:23] / EXPECTED[0]).read_bytes()
        content = {"empty": b"", "five bytes": b"bytes", "original": original}[there]
        (out / EXPECTED[0]).write_bytes(content)
    result = shell(cohort, out, weights_folder)
    assert result.returncode == (0 if there == "empty" else 1)
    assert "Traceback" not in result.stderr
    assert there == "empty" or f"{out / EXPECTED[0]} is there and was not made by cwdm" in result.stderr
    assert names(out) == EXPECTED
    assert all((out / name).is_file() for name in EXPECTED[1:])
    assert there in ("empty", "folder") or (out / EXPECTED[0]).read_bytes() == content


def test_a_folder_named_like_a_record_is_that_cases_fault(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "report" / f"{EXPECTED[0].split('.')[0]}.json"
    record.mkdir(parents=True)
    result = shell(cohort, tmp_path / "out", weights_folder, "--report_path", str(tmp_path / "report"))
    assert result.returncode == 1
    assert f"{record} is there and is no record of cwdm's" in result.stderr
    assert names(tmp_path / "out") == EXPECTED[1:]


@pytest.mark.parametrize("ending", ["-spread.nii.gz", "-std.nii.gz"])
def test_a_file_of_ones_own_in_the_report_folder_stays(
    cohort: Path, weights_folder: Path, tmp_path: Path, ending: str
) -> None:
    """One named like a record, one like a standard deviation of either kind; the case between them is written."""
    report, options = tmp_path / "report", ["--report_path", str(tmp_path / "report"), "--overwrite"]
    content = '{"mine": 1}'
    record, std = (EXPECTED[i].replace(".nii.gz", end) for i, end in ((0, ".json"), (2, ending)))
    report.mkdir()
    for name in (record, std):
        (report / name).write_text(content)
    for samples in (1, 2):
        result = infer(cohort, tmp_path / "out", weights_folder, *options, f"samples={samples}")
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert f"{report / record} is there and is no record of cwdm's" in said
        assert f"{report / std} is there and was not made by cwdm" in said
        assert [(report / name).read_text() for name in (record, std)] == [content] * 2
        assert names(tmp_path / "out") == [EXPECTED[1]]
    assert (report / EXPECTED[1].replace(".nii.gz", "-spread.nii.gz")).is_file()


def test_no_image_that_it_did_not_make_is_replaced(
    cohort: Path, phantoms: Path, weights_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(phantoms / EXPECTED[0][:23] / EXPECTED[0], out)
    before = (out / EXPECTED[0]).read_bytes()
    for _ in range(2):
        result = shell(cohort, out, weights_folder, "--overwrite")
        assert result.returncode == 1
        assert f"{out / EXPECTED[0]} is there and was not made by cwdm" in result.stderr
        assert names(out) == EXPECTED
    assert (out / EXPECTED[0]).read_bytes() == before


def test_originals_that_the_input_links_to_are_no_place_for_outputs(
    phantoms: Path, weights_folder: Path, tmp_path: Path
) -> None:
    flat, source = tmp_path / "flat", sorted(phantoms.iterdir())[0]
    flat.mkdir()
    for path in source.iterdir():
        shutil.copy(path, flat)
    link_case(source, tmp_path / "in", "t1n", "one")
    link = tmp_path / "in" / "one" / "one-t2w.nii.gz"
    link.unlink()
    link.symlink_to(flat / f"{source.name}-t2w.nii.gz")
    result = shell(tmp_path / "in", flat, weights_folder)
    assert result.returncode == 2
    assert "links to a file in" in result.stderr


def test_a_flat_folder_of_cases_and_what_it_holds_besides(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    flat, report = tmp_path / "flat", tmp_path / "report"
    (flat / "stray").mkdir(parents=True)
    for path in cohort.glob("*/*"):
        path.rename(flat / path.name)
    result = shell(flat, tmp_path / "out", weights_folder, "--report_path", str(report))
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "out") == EXPECTED
    for entry in read_records(report).entries:
        for places in (ReportPaths(report), ReportPaths(report, flat)):
            assert len(read_volumes(entry, places).conditions) == 3


def test_folders_without_images_are_named_and_those_with_other_names_fail(
    cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    (cohort / "empty\x1b[31m").mkdir()
    result = in_a_process(cohort, tmp_path / "out", weights_folder)
    assert result.returncode == 0
    assert "no folders of a case: empty\\x1b[31m\n" in result.stderr
    (cohort / "other").mkdir()
    (cohort / "other" / "other_0000.nii.gz").touch()
    result = in_a_process(cohort, tmp_path / "out", weights_folder)
    assert result.returncode == 1
    assert "other: expected files like other-t1n.nii.gz" in result.stderr
    assert "found other_0000.nii.gz" in result.stderr


def test_stopped_run_leaves_a_record_and_no_one_writes_into_a_linked_case(
    cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    name = names(cohort)[0]
    (linked / name).symlink_to(cohort / name)
    result = shell(linked, cohort / name, weights_folder)
    assert result.returncode == 2
    assert "choose another folder" in result.stderr


def test_out_of_memory_is_one_cases_fault(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    calls = []

    def greedy(denoise, noise, timesteps, generator):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(noise, 0)

    outcomes = synthesise_cohort(
        find_cases(cohort), Synthesizer(weights_folder, device="cpu", sampler=greedy), tmp_path / "out"
    )
    assert [(outcome.status, outcome.reason) for outcome in outcomes if outcome.reason] == [
        ("failed", "not enough memory")
    ]
    assert len(names(tmp_path / "out")) == 2


def broken(denoise, noise, timesteps, generator):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_lost_device_ends_the_run_and_blames_no_case(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    synthesizer = Synthesizer(weights_folder, device="cpu", sampler=broken)
    arguments = (find_cases(cohort), synthesizer, tmp_path / "out")
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        synthesise_cohort(*arguments, report=tmp_path / "report", works=lambda device: False)
    (run,) = (tmp_path / "report").glob("run-*.json")
    assert json.loads(run.read_text())["cases"] == []
    outcomes = synthesise_cohort(*arguments, works=lambda device: True)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 3


def test_a_device_is_tested_by_computing_on_it() -> None:
    assert device_works(torch.device("cpu"))
    assert device_works(torch.device("cuda")) == torch.cuda.is_available()


@pytest.mark.parametrize("name", ["caf\udce9", "red\x1b[31m", "new\nline", "[bold]x"])
def test_odd_names_of_cases_work(name: str, phantoms: Path, weights_folder: Path, tmp_path: Path) -> None:
    link_case(sorted(phantoms.iterdir())[0], tmp_path / "input", "t1n", name)
    result = shell(tmp_path / "input", tmp_path / "out", weights_folder, "--report_path", str(tmp_path / "report"))
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "out") == [f"{name}-t1n.nii.gz"]
    assert "\x1b" not in result.stderr


def test_a_name_too_long_for_its_output_is_that_cases_fault(
    phantoms: Path, cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    source = sorted(phantoms.iterdir())[0]
    long = cohort / ("a" * 238)
    long.mkdir()
    for modality in ("t1n", "t1c", "t2w"):
        (long / f"{modality}.nii.gz").symlink_to(source / f"{source.name}-{modality}.nii.gz")
    result = shell(cohort, tmp_path / "out", weights_folder)
    assert result.returncode == 1
    assert "name is too long" in result.stderr
    assert names(tmp_path / "out") == EXPECTED


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def for_two_missing(tmp_path: Path) -> Path:
    """A network for any contrast of which two may be missing; its image is the mean of what it is given."""
    config = UNetConfig(40, model_channels=8, channel_mult=(1, 1), groups=4, targets=4, regression=True)
    path = tmp_path / "any.safetensors"
    checkpoint.save(path, UNet(config), Record(modality=ANY, most_missing=2, sampler="ddim", steps=2))
    return path


def test_several_missing_modalities_are_each_made_from_the_others(
    phantoms: Path, for_two_missing: Path, weights_folder: Path, tmp_path: Path
) -> None:
    source = sorted(phantoms.iterdir())[0]
    (link_case(source, tmp_path / "in", "t1n", "two") / "two-t2f.nii.gz").unlink()
    out, report = tmp_path / "out", tmp_path / "report"
    result = shell(tmp_path / "in", out, for_two_missing, "--report_path", str(report))
    assert result.returncode == 0, result.stderr
    assert names(out) == ["two-t1n.nii.gz", "two-t2f.nii.gz"]
    assert {"two-t1n.json", "two-t2f.json", "report.html"} <= set(names(report))
    folder = find_cases(tmp_path / "in")[0]
    synthesizer = Synthesizer(for_two_missing, load_settings(None, FAST[:1]), device="cpu")
    for modality in folder.missing:
        alone = synthesizer(folder, target=modality)
        np.testing.assert_array_equal(nib.load(out / f"two-{modality}.nii.gz").get_fdata(), np.rint(alone.volume))
    link_case(source, tmp_path / "complete", "", "two")  # by the time of the report more contrasts may be there
    shown = read_volumes(read_records(report).entries[0], ReportPaths(report, tmp_path / "complete", out))
    assert set(shown.conditions) == {"t1c", "t2w"}
    again = shell(tmp_path / "in", out, for_two_missing)
    assert again.stderr.count("is there already") == 2
    with pytest.raises(CaseError, match="2 modalities are missing, the weights were trained for 1"):
        Synthesizer(weights_folder, device="cpu")(folder, target="t1n")


def test_weights_of_one_pass_make_all_that_is_missing_with_their_std(phantoms: Path, tmp_path: Path) -> None:
    shape = {"model_channels": 8, "channel_mult": (1, 1), "norm": "voxel", "targets": 4, "given": 4}
    path = tmp_path / "any.safetensors"
    checkpoint.save(
        path, new_network(UNetConfig(40, 24, **shape)), Record(modality=ANY, objective="one-pass", most_missing=3)
    )
    source = sorted(phantoms.iterdir())[0]
    three = link_case(source, tmp_path / "in", "t1n", "three")
    for modality in ("t1c", "t2w"):
        (three / f"three-{modality}.nii.gz").unlink()
    out, report = tmp_path / "out", tmp_path / "report"
    report.mkdir()
    left = report / "three-t1n-spread.nii.gz"  # by samples of an earlier run
    case = read_case(replace(find_cases(tmp_path / "in")[0], chosen="t1n"))
    write_volume(left, case.volumes["t2f"], case)
    result = shell(tmp_path / "in", out, path, "--report_path", str(report))
    assert result.returncode == 0, result.stderr
    assert not left.exists()
    made = [f"three-{modality}" for modality in ("t1c", "t1n", "t2w")]
    assert names(out) == [f"{name}.nii.gz" for name in made]
    given = nib.load(three / "three-t2f.nii.gz")
    for name in made:
        # A new network predicts its prior: the mean of what is given, each coefficient with a standard deviation of 1,
        # LLL divided by 3: √((9 + 7) / 8) of a voxel.
        std = nib.load(report / f"{name}-std.nii.gz").get_fdata()
        assert np.array_equal(std > 0, given.get_fdata() != 0)
        record = json.loads((report / f"{name}.json").read_text())
        assert (record["sampler"], record["timesteps"], record["given"]) == ("one-pass", [0], ["t2f"])
        assert (record["quality"]["figures"]["std"], record["quality"]["figures"]["std_share"]) == (1.414, 1)
        assert "half of the brain is predicted to be off by 141%" in " ".join(record["quality"]["reasons"])
        assert "spread" not in record["quality"]["figures"]
    twice = shell(tmp_path / "in", tmp_path / "twice", path, "samples=2")
    assert twice.returncode == 1
    assert "nothing to average" in twice.stderr


def test_more_missing_than_the_weights_know_fails_alone(phantoms: Path, for_two_missing: Path, tmp_path: Path) -> None:
    source = sorted(phantoms.iterdir())[0]
    one = link_case(source, tmp_path / "in", "t1n", "one")
    three = link_case(source, tmp_path / "in", "t1n", "three")
    for modality in ("t1c", "t2w"):
        (three / f"three-{modality}.nii.gz").unlink()
    result = shell(tmp_path / "in", tmp_path / "out", for_two_missing)
    assert result.returncode == 1
    assert "three: expected exactly one missing modality, found t2f" in result.stderr
    assert names(tmp_path / "out") == [f"{one.name}-t1n.nii.gz"]


def test_one_bad_case_does_not_take_the_others_down(
    cohort: Path, phantoms: Path, weights_folder: Path, tmp_path: Path
) -> None:
    source = sorted(phantoms.iterdir())[0]
    link_case(source, cohort, "none", "complete")
    two = link_case(source, cohort, "t1n", "two-missing")
    (two / "two-missing-t2f.nii.gz").unlink()
    truncate(link_case(source, cohort, "t1n", "truncated") / "truncated-t2f.nii.gz")
    out = tmp_path / "out"
    result = shell(cohort, out, weights_folder, "--report_path", str(tmp_path / "report"))
    assert result.returncode == 1
    assert names(out) == EXPECTED
    assert "complete: expected exactly one missing modality" in result.stderr
    assert "two-missing: expected exactly one missing modality" in result.stderr
    assert "truncated: truncated-t2f.nii.gz: " in result.stderr
    assert "3 of 6 cases" in result.stderr
    assert "Traceback" not in result.stderr
    (run_file,) = (tmp_path / "report").glob("run-*.json")
    run = json.loads(run_file.read_text())
    assert sorted(case["status"] for case in run["cases"]) == ["failed"] * 3 + ["written"] * 3


def test_missing_weights_of_one_contrast_leave_the_others(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(weights_folder / "t1_gen.pt", some)
    result = infer(cohort, tmp_path / "out", some)
    assert result.exit_code == 1
    assert names(tmp_path / "out") == [EXPECTED[0], EXPECTED[2]]
    assert "no weights for t2f" in result.output


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("auto", False), ("fp32", False)])
def test_emulated_bfloat16_is_said_before_the_first_case(
    precision: str,
    warned: bool,
    cohort: Path,
    weights_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    # One step, as what emulates it takes a minute for a few.
    result = infer(cohort, tmp_path / "out", weights_folder, f"precision={precision}", "sampler.timesteps=[0]")
    assert result.exit_code == 0
    before, _, _ = " ".join(result.output.split()).partition("written after")
    assert ("does not multiply bfloat16" in before) == warned
    assert ("precision=fp32" in before) == warned


def test_a_share_without_usable_weights_tells_of_its_cases_alone(
    cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "some").mkdir()
    shutil.copy(weights_folder / "t1_gen.pt", tmp_path / "some")
    result = infer(cohort, tmp_path / "out", tmp_path / "some", "--shard", "0/2")  # the case without t2f, by its name
    assert result.exit_code == 1, result.output
    assert "no weights for t2f" in result.output


def test_damaged_cases_are_no_fault_of_the_weights(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    for file in cohort.glob("*/*.nii.gz"):
        file.unlink()
        file.write_bytes(b"damaged")
    assert infer(cohort, tmp_path / "out", weights_folder).exit_code == 1


@pytest.mark.parametrize("fault", ["missing", "truncated", "other", "code"])
def test_unusable_weights_are_one_clear_message(fault: str, cohort: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    if fault != "missing":
        weights.mkdir()
        data = {"truncated": b"PK\x03\x04", "other": b"hello", "code": b"cos\nsystem\n(S'touch /tmp/ran'\ntR."}[fault]
        for name in ("t1_gen.pt", "flair_gen.pt"):
            (weights / name).write_bytes(data)
    result = shell(cohort, tmp_path / "out", weights)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"--data_path": "none"}, "does not exist"),
        ({"--data_path": "empty"}, "no case found"),
        ({"--output_path": "input/out"}, "choose another folder"),
        ({"--report_path": "out/report"}, "choose another folder"),
        ({"--output_path": "a_file"}, "that is a file"),
        ({"--parameters_file": "wrong.yaml"}, "unknown key 'stepz'"),
        ({"--device": "gpu"}, "gpu"),
    ],
)
def test_wrong_arguments_are_one_clear_message(
    change: dict[str, str],
    match: str,
    cohort: Path,
    weights_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    (tmp_path / "wrong.yaml").write_text("stepz: 3")
    arguments = {"--data_path": "input", "--output_path": "out", "--weights": str(weights_folder), **change}
    monkeypatch.chdir(tmp_path)
    result = command("infer", *(text for pair in arguments.items() for text in pair))
    assert result.returncode == 2
    assert match in result.stderr
    assert "Traceback" not in result.stderr


def test_empty_parameters_and_hyphens(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yml").touch()
    (tmp_path / "fast.yaml").write_text("sampler: {timesteps: [0]}\n")
    out, weights = str(tmp_path / "out"), str(weights_folder)
    arguments = [f"--data-path={cohort}", f"--output-path={out}", f"--weights={weights}"]
    for file in ("empty.yml", "fast.yaml"):
        more = [] if file == "fast.yaml" else ["sampler.timesteps=[0]"]
        result = CliRunner().invoke(app, ["infer", *arguments, f"--parameters-file={tmp_path / file}", *more])
        assert result.exit_code == 0, result.output
    assert names(tmp_path / "out") == EXPECTED


def test_bars_on_a_terminal(cohort: Path, phantoms: Path, weights_folder: Path, tmp_path: Path) -> None:
    link_case(sorted(phantoms.iterdir())[0], cohort, "t1n", "title\x1b]0;taken\x07")
    main, terminal = pty.openpty()
    paths = ["--data_path", str(cohort), "--output_path", str(tmp_path / "out"), "--weights", str(weights_folder)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([*CWDM, "infer", *paths, *FAST], stderr=terminal, stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while data := os.read(main, 4096):
            shown += data
    assert process.wait() == 0
    assert b"cases" in shown
    assert b"0/4" in shown
    assert b"title\\x1b]0;taken\\x07" in shown
    assert b"\x1b]0;" not in shown
    assert "━".encode() in shown
    assert b"4 of 4 cases" in shown


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk_stops_the_run_and_leaves_no_piece(cohort: Path, weights_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(out)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        result = shell(cohort, out, weights_folder)
        assert result.returncode == 2
        assert "the disk is full" in result.stderr
        assert "Traceback" not in result.stderr
        assert all(name in EXPECTED for name in names(out))
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_then_run_again(
    kind: signal.Signals, cohort: Path, weights_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    paths = ["--data_path", str(cohort), "--output_path", str(out), "--weights", str(weights_folder)]
    more = ["--device", "cpu", "sampler.timesteps=[3, 2, 1, 0]"]
    process = forked.start("infer", *paths, *more, heard=(signal.SIGINT,))
    while not (out.is_dir() and names(out)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(kind)
    stderr = process.communicate(timeout=60)
    if kind != signal.SIGKILL:
        assert process.returncode == 128 + kind
        assert "run the same command again" in stderr
    done = names(out)
    assert set(done) <= set(EXPECTED)
    for name in done:
        nib.load(out / name).get_fdata()
    assert command("infer", *paths, *more).returncode == 0
    assert names(out) == EXPECTED
