from pathlib import Path

import pytest

from cwdm.cli.app import said
from cwdm.container import arguments


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in files:
        (path / name).touch()
    return path


def test_no_arguments_mean_input_output_and_what_weights_there_are(tmp_path: Path) -> None:
    folder(tmp_path / "input")
    paths = [f"--data_path={tmp_path}/input", f"--output_path={tmp_path}/output"]
    folder(tmp_path / "weights", "t1n.safetensors")
    built_in = f"--weights={tmp_path}/weights"
    for given in ([], ["infer"], ["seed=1"], ["--device=cpu"]):
        command, *options = arguments(given, tmp_path)
        assert command == "infer"
        assert set(options) == {*paths, built_in, *(given if given != ["infer"] else [])}


def test_what_is_named_stays(tmp_path: Path) -> None:
    weights = folder(tmp_path / "mine", "any.safetensors")
    given = ["infer", "--data_path=/a", "--output-path", "/b", f"--weights={weights}", "--parameters_file=/c/d.yml"]
    assert arguments(given, tmp_path) == given


def test_an_empty_folder_of_weights_means_those_of_the_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = folder(tmp_path / "mine", ".gitkeep")
    folder(tmp_path / "weights", "t1n_gen.pt")
    given = ["infer", "--data_path=/a", "--output_path=/b", f"--weights={empty}"]
    command, *options = arguments(given, tmp_path)
    assert said(command, options)["weights"] == tmp_path / "weights"
    assert [command, *options][: len(given)] == given
    assert "empty" in capsys.readouterr().err


def test_a_folder_of_weights_that_is_not_there_is_an_error_of_the_command(tmp_path: Path) -> None:
    given = ["infer", "--data_path=/a", "--output_path=/b", "--weights=/nowhere"]
    assert arguments(given, tmp_path) == given


def test_without_any_weights_the_bundled_ones_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert arguments(["infer"], tmp_path)[-1] == "--weights=bundled"
    assert "synthetic brains" in capsys.readouterr().err


def test_medperf_mounts_are_found(tmp_path: Path) -> None:
    volumes = tmp_path / "mlcommons/volumes"
    folder(volumes / "data")
    folder(volumes / "parameters", "parameters.yaml")
    folder(volumes / "additional_files/weights", "any.safetensors")
    folder(tmp_path / "weights", "any.safetensors")
    assert set(arguments(["infer"], tmp_path)[1:]) == {
        f"--data_path={volumes}/data",
        f"--output_path={volumes}/predictions",
        f"--parameters_file={volumes}/parameters/parameters.yaml",
        f"--weights={volumes}/additional_files/weights",
    }


def test_medperfs_empty_folders_mean_the_weights_of_the_image(tmp_path: Path) -> None:
    folder(tmp_path / "mlcommons/volumes/additional_files/weights", ".gitkeep")
    folder(tmp_path / "mlcommons/volumes/additional_files", "README.md")
    folder(tmp_path / "weights", "t1n.safetensors")
    assert f"--weights={tmp_path}/weights" in arguments(["infer"], tmp_path)
    (tmp_path / "mlcommons/volumes/additional_files/t1n").mkdir()
    (tmp_path / "mlcommons/volumes/additional_files/t1n/brats_1200000.pt").touch()
    assert f"--weights={tmp_path}/mlcommons/volumes/additional_files" in arguments(["infer"], tmp_path)


def test_linked_and_hidden_folders_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder(tmp_path / "elsewhere", "brats_1200000.pt")
    folder(tmp_path / "weights")
    (tmp_path / "weights/t1n").symlink_to(tmp_path / "elsewhere")
    assert f"--weights={tmp_path}/weights" in arguments(["infer"], tmp_path)
    named = f"--weights={tmp_path}/weights"
    assert named in arguments(["infer", named], tmp_path)
    assert "empty" not in capsys.readouterr().err
    folder(tmp_path / "cloned/.git", "HEAD")
    assert named in arguments(["infer", f"--weights={tmp_path}/cloned"], tmp_path)
    (tmp_path / "weights/round").symlink_to(tmp_path / "weights")
    assert named in arguments(["infer", named], tmp_path)


def test_a_training_run_of_mlcube_goes_on(tmp_path: Path) -> None:
    given = ["train", "--data_path=/io0", "--parameters_file=/io1/training.yaml", "--output_path=/io2"]
    assert arguments(given, tmp_path) == [*given, "--resume"]
    assert arguments(["train", "bundled", "out=/io2"], tmp_path) == ["train", "bundled", "out=/io2"]


def test_mlcubes_segmentations_lie_beside_the_true_images(tmp_path: Path) -> None:
    given = ["evaluate", "--predictions=/io0", "--data_path=/io1", "--output_path=/io2"]
    command, *options = arguments(given, tmp_path)
    assert said(command, options)["seg"] == Path("/io1")
    assert {*given} < {command, *options}
    assert arguments(["evaluate", "/a", "/b"], tmp_path) == ["evaluate", "/a", "/b"]


@pytest.mark.parametrize("given", [["--help"], ["--version"], ["weights", "list"], ["infer", "--help"]])
def test_other_commands_pass(given: list[str], tmp_path: Path) -> None:
    assert arguments(given, tmp_path) == given


def test_short_names_of_options_count_too(tmp_path: Path) -> None:
    weights = folder(tmp_path / "mine", "any.safetensors")
    given = ["infer", "--data-path", "/a", "-o", "/b", "--weights", str(weights), "seed=1"]
    assert arguments(given, tmp_path) == given
