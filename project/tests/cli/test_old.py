"""Command lines as they used to be, which are understood and not shown."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cwdm import checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.cli.app import app, said
from cwdm.cli.old import first_of
from cwdm.errors import SettingsError
from cwdm.images import find_cases, output_name, read_case, write_volume
from cwdm.unet import UNetConfig
from cwdm.weights.untrained import untrained_state


def cwdm(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "name", "old", "new"),
    [
        ("sample", "num_samples", ["-n", "3"], ["--num-samples=3"]),
        ("sample", "num_samples", ["--count=3"], ["-n3"]),
        ("sample", "output_path", ["--out", "o"], ["--output_path=o"]),
        ("evaluate", "num_workers", ["--workers=2"], ["--num-workers=2"]),
        ("evaluate", "output_path", ["--out", "o"], ["-o", "o"]),
        ("evaluate-samples", "num_pairs", ["--pairs", "7"], ["--num_pairs=7"]),
        ("evaluate-samples", "output_path", ["--out=o"], ["--output-path=o"]),
        ("phantom", "num_cases", ["--cases", "4"], ["--num-cases", "4"]),
        ("demo", "num_cases", ["--cases", "4"], ["--num-cases", "4"]),
        ("report", "num_cases", ["r", "--cases=0"], ["r", "--num-cases=0"]),
    ],
)
def test_options(command: str, name: str, old: list[str], new: list[str]) -> None:
    assert said(command, old)[name] == said(command, new)[name]
    assert said(command, old)[name] not in (None, said(command, [])[name])


def test_folders_of_drop_and_complete(phantoms: Path, tmp_path: Path) -> None:
    cwdm("drop", phantoms, tmp_path / "old", "--seed=3")
    cwdm("drop", phantoms, "--output_path", tmp_path / "new", "--seed=3")
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    (tmp_path / "made").mkdir()
    for case in map(read_case, find_cases(tmp_path / "old")):
        write_volume(tmp_path / "made" / output_name(case.name, case.target), case.volumes[case.nearest] / 2, case)
    told = cwdm("complete", tmp_path / "old", tmp_path / "all-old", "--synthesised", tmp_path / "made").stderr
    cwdm("complete", tmp_path / "old", "-o", tmp_path / "all-new", "--synthesised", tmp_path / "made")
    assert contents(tmp_path / "all-old") == contents(tmp_path / "all-new")
    assert f"3 of 3 cases are in {tmp_path / 'all-old'}" in told


@pytest.mark.parametrize("command", ["phantom", "demo"])
def test_folders_of_phantom_and_demo(command: str) -> None:
    assert said(command, ["folder"])["out"] == Path("folder")
    assert said(command, ["--out", "folder"])["output_path"] == Path("folder")


def test_places_of_weights(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    cwdm("weights", "untrained", old, "--width=32")
    cwdm("weights", "untrained", "--output_path", new, "--width=32")
    assert contents(old) == contents(new)
    file = next(old.glob("*t2f*"))
    (tmp_path / "a").mkdir()
    cwdm("weights", "convert", file, tmp_path / "a" / "t2f.safetensors")
    cwdm("weights", "convert", file, "-o", tmp_path / "b")
    made = [checkpoint.load(tmp_path / place / "t2f.safetensors") for place in "ab"]
    assert made[0].sha256 == made[1].sha256
    for words in (["list", "bundled"], ["list", "--weights", "bundled"], ["verify", "bundled"]):
        assert "any.safetensors" in cwdm("weights", *words).output


def test_weights_among_the_words() -> None:
    assert first_of(None, ["w=1.pt", "seed=1"]) == (Path("w=1.pt"), ["seed=1"])
    assert first_of(Path("w.pt"), ["seed=1"]) == (Path("w.pt"), ["seed=1"])
    with pytest.raises(SettingsError, match="expected --weights, found none"):
        first_of(None, [])


def test_weights_of_sample_and_translate(tmp_path: Path) -> None:
    config = UNetConfig(in_channels=8, model_channels=32, channel_mult=(1, 1))
    weights = tmp_path / "unconditional.safetensors"
    checkpoint.save(weights, load_published(untrained_state(config), config), Record())
    more = ["--size", "16", "12", "8", "sampler.steps=1", "seed=2"]
    cwdm("sample", weights, "--out", tmp_path / "old", *more)
    cwdm("sample", "--weights", weights, "--output_path", tmp_path / "new", *more)
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


def test_folders_of_train_as_mlcube_names_them(phantoms: Path, tmp_path: Path) -> None:
    config = tmp_path / "training.yaml"
    config.write_text(
        "data: {layout: files, images: [{file: '{case}/{case}-t2w.nii.gz'}, {file: '{case}/{case}-t1n.nii.gz'}], "
        "window: [32, 32, 32], crop: [16, 16, 16], workers: 0}\n"
        "network: {model_channels: 16, channel_mult: [1, 2], num_res_blocks: 1, groups: 8}\n"
        "device: cpu\nsteps: 1\n"
    )
    folders = [f"data.path={phantoms}", f"out={tmp_path / 'old'}"]
    cwdm("train", config, *folders, "noise=cpu")
    cwdm("train", config, "--data_path", phantoms, "-o", tmp_path / "new", "noise=cpu", "--resume")
    named = [f"--data_path={phantoms}", f"--parameters_file={config}", f"--output_path={tmp_path / 'mlcube'}"]
    cwdm("train", *named, "--resume")
    made = [
        checkpoint.load(next((tmp_path / run / "newest").glob("*.safetensors"))) for run in ("old", "new", "mlcube")
    ]
    first = made[0].model.state_dict()
    for other in made[1:]:
        assert all(tensor.equal(first[name]) for name, tensor in other.model.state_dict().items())


def test_report_goes_into_a_folder_or_a_file(phantoms: Path, tmp_path: Path) -> None:
    cwdm("drop", phantoms, "-o", tmp_path / "in")
    folders = ["--data_path", tmp_path / "in", "--output_path", tmp_path / "out", "--report_path", tmp_path / "report"]
    cwdm("infer", *folders, "--weights=bundled", "--no-page", "--device=cpu")
    cwdm("report", tmp_path / "report", "--out", tmp_path / "old.html", "--output_path", tmp_path / "out", "--cases", 0)
    told = cwdm(
        "report", tmp_path / "report", "-o", tmp_path / "new", "--synthesised", tmp_path / "out", "--num-cases=0"
    )
    assert (tmp_path / "old.html").read_bytes() == (tmp_path / "new" / "report.html").read_bytes()
    assert str(tmp_path / "new" / "report.html") in told.stdout.replace("\n", "")
