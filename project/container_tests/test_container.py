"""The image as those who run it do: every row of the runners' contracts, with real clients on a real engine."""

import json
import os
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from clients import CWDM, REAL, Clients, assert_same_images, fingerprint, infer_bare, names, readable
from engine import ROOT, Engine, build_image

from cwdm import __version__
from cwdm.images.cases import CaseFolder, find_cases
from cwdm.prepare.drop import drop_modalities

ORGANISER = ("--network=none", "--memory=16G", "--shm-size=4G")


def run(engine: Engine, image: str, *arguments: str, options: tuple[str, ...] = (), **mounts: Path) -> str:
    """`docker run` that must succeed; `_` in the name of a mount stands for `/`, output for a writable one."""
    done = attempt(engine, image, *arguments, options=options, **mounts)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def attempt(
    engine: Engine, image: str, *arguments: str, options: tuple[str, ...] = (), **mounts: Path
) -> subprocess.CompletedProcess[str]:
    volumes = [
        f"--volume={path}:/{name.replace('_', '/')}:{'rw' if name.endswith('output') else 'ro'}"
        for name, path in mounts.items()
    ]
    return engine.docker("run", "--rm", *ORGANISER, *options, *volumes, image, *arguments)


# ---------------------------------------------------------------------------------------------------------- Docker


def test_plain_docker_as_organisers_run_it(engine: Engine, shipped: str, cases: Path, expected: Path, output: Path):
    before = fingerprint(cases)
    options = ("--read-only", "--user=12345:12345", "--tmpfs=/tmp")
    said = run(engine, shipped, options=options, input=cases, output=output)
    assert_same_images(output, expected)
    assert fingerprint(cases) == before
    assert "synthetic brains" in said


def test_without_writable_tmp_and_as_the_images_own_user(
    engine: Engine, image: str, cases: Path, expected: Path, output: Path
):
    run(engine, image, options=("--read-only",), input=cases, output=output)
    assert_same_images(output, expected)
    assert {path.stat().st_uid for path in output.iterdir()} == {10001}


@pytest.mark.skipif(not REAL.is_dir(), reason="real cases stand beside the repository in development and CI only")
def test_real_cases(engine: Engine, image: str, output: Path, tmp_path: Path):
    cases, complete = tmp_path / "real", tmp_path / "complete"
    complete.mkdir()
    for name in ("BraTS-GLI-00001-000", "MS-07"):  # one of each grid, orientation and type
        (complete / name).symlink_to(REAL / name)
    drop_modalities(complete, cases, seed=3, copy=True)
    readable(cases)
    run(engine, image, options=("--user=12345:12345",), input=cases, output=output)
    assert_same_images(output, infer_bare(cases, tmp_path / "expected"))
    assert len(names(output)) == len(find_cases(cases))


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "--data_path=/mlcube_io0", "--output_path=/mlcube_io2"),
        ("infer", "--data_path", "/mlcube_io0", "--output_path", "/mlcube_io2"),
        ("infer", "--data-path=/mlcube_io0", "--output-path=/mlcube_io2", "--parameters-file=/mlcube_io3/dummy.yml"),
        ("infer", "--data_path=/mlcube_io0", "--output_path=/mlcube_io2", "--parameters_file=/mlcube_io3/dummy.yml"),
        ("infer", "--data_path=/mlcube_io0", "--output_path=/mlcube_io2", "--weights=/mlcube_io1"),
        ("--data_path=/mlcube_io0", "--output_path=/mlcube_io2", "seed=42"),
    ],
    ids=["orchestrator", "two words", "hyphens", "empty parameters", "empty weights", "no command"],
)
def test_argument_forms(
    engine: Engine, image: str, cases: Path, expected: Path, tmp_path: Path, arguments: tuple[str, ...]
):
    (empty := tmp_path / "empty").mkdir()
    (parameters := tmp_path / "parameters").mkdir()
    (parameters / "dummy.yml").touch()
    (output := tmp_path / "output").mkdir()
    volumes = [f"--volume={path}:/mlcube_io{i}" for i, path in enumerate((cases, empty, output, parameters))]
    user = f"--user={os.getuid()}:{os.getgid()}"
    done = engine.docker("run", "--rm", *ORGANISER, user, *volumes, image, *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_images(output, expected)


def test_kubernetes_arguments_and_shards(engine: Engine, image: str, cases: Path, expected: Path, output: Path):
    job = yaml.safe_load((ROOT / "mlcube/kubernetes/job.yaml").read_text())["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["env"] == [{"name": "JOB_COMPLETIONS", "value": str(job["completions"])}]
    for index in range(2):
        environment = ("--env=JOB_COMPLETIONS=2", f"--env=JOB_COMPLETION_INDEX={index}")
        options = ("--read-only", "--cap-drop=ALL", "--user=10001:10001", *environment)
        run(engine, image, *container["args"], options=options, input=cases, output=output)
    assert_same_images(output, expected)


def test_kubernetes_orchestrator_form(engine: Engine, image: str, cases: Path, expected: Path, output: Path):
    arguments = ("infer", "--data_path=/data/input", "--output_path=/data/output")
    run(engine, image, *arguments, data_input=cases, data_output=output)
    assert_same_images(output, expected)


def test_help_and_version(engine: Engine, image: str):
    told = run(engine, image, "--help")
    assert "/input" in told
    assert "infer" in told
    assert "--data_path" in run(engine, image, "infer", "--help")
    assert run(engine, image, "--version").split() == ["cwdm", __version__]


# --------------------------------------------------------------------------------------------------------- MedPerf


def test_medperf_container_config(
    engine: Engine, image: str, cases: Path, expected_tiny: Path, tiny_weights: Path, output: Path, tmp_path: Path
):
    config = yaml.safe_load((ROOT / "mlcube/medperf/container_config.yaml").read_text())
    task = config["tasks"]["infer"]
    (additional := tmp_path / "additional_files").mkdir()
    shutil.copytree(tiny_weights, additional / "weights")
    here = {
        "data_path": cases,
        "parameters_file": ROOT / "mlcube/medperf-mlcube/workspace/parameters.yaml",
        "additional_files": readable(additional),
    }
    assert set(task["input_volumes"]) == set(here)
    volumes = [f"--volume={here[name]}:{volume['mount_path']}:ro" for name, volume in task["input_volumes"].items()]
    (out,) = task["output_volumes"].values()
    arguments = task["run_args"]["command"].split()
    shm = f"--shm-size={task['run_args']['shm_size']}"
    command = ("run", "--rm", "--network=none", "--user=4321:4321", shm, *volumes)
    done = engine.docker(*command, f"--volume={output}:{out['mount_path']}", image, *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_images(output, expected_tiny)


# ---------------------------------------------------------------------------------------------------------- MLCube


def mlcube_root(folder: Path, cases: Path, inputs: str = "input") -> Path:
    """A checkout as MLCube sees it, with cases in its workspace."""
    for name in ("mlcube.yaml", "Dockerfile"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "workspace", folder / "workspace", ignore=shutil.ignore_patterns("*.nii.gz", "*.pt"))
    shutil.copytree(cases, folder / "workspace" / inputs, dirs_exist_ok=True)
    for kept in folder.glob("workspace/*/.gitkeep"):
        kept.unlink()
    return folder


def test_mlcube(clients: Clients, image: str, cases: Path, expected: Path, tmp_path: Path):
    root = mlcube_root(tmp_path, cases)
    before = fingerprint(root / "workspace/input")
    options = (f"-Pdocker.image={image}", "-Pplatform.accelerator_count=0")
    done = clients.mlcube("run", "--mlcube=.", "--task=infer", *options, cwd=root)
    assert done.returncode == 0, done.stderr
    assert_same_images(root / "workspace/output", expected)
    assert fingerprint(root / "workspace/input") == before


def test_mlcube_with_mounted_weights_and_its_defaults(
    clients: Clients, image: str, cases: Path, expected_tiny: Path, tiny_weights: Path, tmp_path: Path
):
    root = mlcube_root(tmp_path, cases)
    shutil.copytree(tiny_weights, root / "workspace/weights", dirs_exist_ok=True)
    text = (root / "mlcube.yaml").read_text().replace("accelerator_count: 1", "accelerator_count: 0")
    (root / "mlcube.yaml").write_text(text.replace("cwdm:latest", image))
    done = clients.mlcube("run", "--task", "infer", cwd=root)
    assert done.returncode == 0, done.stderr
    assert_same_images(root / "workspace/output", expected_tiny)


def test_mlcube_as_medperf_packages_it(
    clients: Clients, image: str, cases: Path, expected_tiny: Path, tiny_weights: Path, tmp_path: Path, output: Path
):
    root = tmp_path / "mlcube"
    shutil.copytree(ROOT / "mlcube/medperf-mlcube", root)
    shutil.copytree(tiny_weights, root / "workspace/additional_files/weights", dirs_exist_ok=True)
    paths = (f"data_path={cases}", f"output_path={output}")
    options = (f"-Pdocker.image={image}", "-Pplatform.accelerator_count=0", "-Pdocker.cpu_args=-u=4321:4321")
    done = clients.mlcube("run", "--mlcube=.", "--task=infer", "--network=none", *options, *paths, cwd=root)
    assert done.returncode == 0, done.stderr
    assert_same_images(output, expected_tiny)


def test_mlcube_trains(clients: Clients, image: str, cases: Path, tmp_path: Path, complete: Path):
    root = mlcube_root(tmp_path, complete, "training")
    settings = yaml.safe_load((root / "workspace/training.yaml").read_text())
    settings |= {"steps": 2, "precision": "fp32", "network": {"model_channels": 32, "channel_mult": [1, 1]}}
    settings["data"] |= {"window": "brain", "crop": [16, 16, 16], "workers": 0}
    (root / "workspace/training.yaml").write_text(yaml.safe_dump(settings))
    options = (f"-Pdocker.image={image}", "-Pplatform.accelerator_count=0")
    done = clients.mlcube("run", "--mlcube=.", "--task=train", *options, cwd=root)
    assert done.returncode == 0, done.stderr
    assert (root / "workspace/run/newest/any.safetensors").is_file()


def test_mlcube_evaluates(clients: Clients, image: str, cases: Path, expected: Path, complete: Path, tmp_path: Path):
    root = mlcube_root(tmp_path, complete, "truth")
    shutil.copytree(expected, root / "workspace/output", dirs_exist_ok=True)
    options = (f"-Pdocker.image={image}", "-Pplatform.accelerator_count=0")
    done = clients.mlcube("run", "--mlcube=.", "--task=evaluate", *options, cwd=root)
    assert done.returncode == 0, done.stderr
    scores = json.loads((root / "workspace/scores/evaluation.json").read_text())
    assert "psnr" in json.dumps(scores)
    assert len((root / "workspace/scores/evaluation.csv").read_text().splitlines()) > len(names(expected))


@pytest.fixture
def complete(cases: Path) -> Path:
    """Complete phantoms, small."""
    return next(cases.parent.glob("complete*"))


# ------------------------------------------------------------------------------------------------ BraTS orchestrator


def registration(image: str, year: int, weights: bool) -> str:
    """How the organisers enter an image in the orchestrator's list."""
    entry = {
        "meta": {
            "authors": "cwdm",
            "paper": "N/A",
            "challenge": "BraSyn",
            "challenge_manuscript": "N/A",
            "rank": "1st",
            "year": year,
        },
        "run_args": {
            "docker_image": f"{image}:latest",
            "input_name_schema": "BraTS-GLI-{id:05d}-000",
            "parameters_file": year <= 2024,
            "cpu_compatible": True,
        },
        **({"additional_files": {"record_id": "424242"}} if weights else {}),
    }
    return yaml.safe_dump({"algorithms": {"ours": entry}})


@pytest.mark.parametrize(("year", "weights"), [(2024, False), (2024, True), (2025, False)])
def test_brats_orchestrator(
    clients: Clients,
    image: str,
    cases: Path,
    expected: Path,
    expected_tiny: Path,
    tiny_weights: Path,
    tmp_path: Path,
    year: int,
    weights: bool,
):
    (tmp_path / "ours.yml").write_text(registration(image, year, weights))
    # All cases of a batch lack the same contrast, as in the challenge's own use of it.
    one: CaseFolder = find_cases(cases)[0]
    (tmp_path / "batch").mkdir()
    shutil.copytree(one.folder, tmp_path / "batch" / one.name)
    inputs = {name: str(path) for name, path in one.files.items()}
    script = f"""
        from pathlib import Path
        from brats import MissingMRI
        from brats.utils import zenodo
        from brats.utils.algorithm_config import load_algorithms
        import shutil

        if {weights}:  # as if downloaded before: there is no network here
            folder = zenodo.ADDITIONAL_FILES_FOLDER / "424242_v1.0.0"
            shutil.copytree({str(tiny_weights)!r}, folder, dirs_exist_ok=True)
        runner = MissingMRI(force_cpu=True)
        runner.algorithm = load_algorithms(Path("ours.yml"))["ours"]
        runner.infer_batch("batch", "out-batch")
        runner.infer_single("out-single/image.nii.gz", **{inputs!r})
    """
    done = clients.brats(textwrap.dedent(script), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "want").mkdir()
    name = f"{one.name}-{one.missing[0]}.nii.gz"
    shutil.copy((expected_tiny if weights else expected) / name, tmp_path / "want")
    assert_same_images(tmp_path / "out-batch", tmp_path / "want")
    (tmp_path / "out-single/image.nii.gz").replace(tmp_path / "out-single" / name)
    assert_same_images(tmp_path / "out-single", tmp_path / "want")


THRESHOLDS = """
import nibabel
from pathlib import Path
for folder in Path("/input").iterdir():
    image = nibabel.load(next(folder.glob("*-t2f.nii.gz")))
    voxels = image.get_fdata()
    labels = (voxels > voxels.max() * 0.5).astype("uint8") * 2
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), f"/output/{folder.name}.nii.gz")
"""


def test_an_algorithm_of_the_brats_package_segments_what_is_synthesised(
    engine: Engine, image: str, clients: Clients, cases: Path, expected: Path, tmp_path: Path
):
    # The orchestrator's own images are not at hand: one that thresholds t2f takes the place of one of them.
    (tmp_path / "image").mkdir()
    (tmp_path / "image/segment.py").write_text(THRESHOLDS)
    (tmp_path / "image/Dockerfile").write_text(
        f'FROM {image}\nCOPY --chmod=644 segment.py /segment.py\nENTRYPOINT ["python3", "/segment.py"]\n'
    )
    built = engine.docker("build", "--tag=brainles/brats25_gli_ecnu:latest", tmp_path / "image")
    assert built.returncode == 0, built.stderr
    completed = [CWDM, "complete", cases, tmp_path / "completed", "--synthesised", expected]
    assert subprocess.run(completed, capture_output=True).returncode == 0
    one = min(path for path in (tmp_path / "completed").iterdir() if path.is_dir())
    output = tmp_path / f"{one.name}-seg.nii.gz"
    done = clients.brats_segmenter(one, output, "--algorithm=BraTS25_2", "--force-cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    t2f, labels = (nib.load(path) for path in (one / f"{one.name}-t2f.nii.gz", output))
    np.testing.assert_array_equal(labels.get_fdata() == 2, t2f.get_fdata() > t2f.get_fdata().max() * 0.5)
    np.testing.assert_array_equal(labels.affine, t2f.affine)
    wrong = clients.brats_segmenter(one, output, "--algorithm=BraTS99_1")
    assert wrong.returncode == 1
    assert "BraTS25_2" in wrong.stderr


# ---------------------------------------------------------------------------------------------------- when it fails


def test_a_bad_case_among_good_ones(
    engine: Engine, image: str, cases: Path, expected: Path, output: Path, tmp_path: Path
):
    shutil.copytree(cases, tmp_path / "input")
    (bad := tmp_path / "input/BraTS-BAD-00000-000").mkdir()
    (bad / "BraTS-BAD-00000-000-t1n.nii.gz").write_bytes(b"no image")
    done = attempt(engine, image, input=readable(tmp_path / "input"), output=output)
    assert done.returncode == 1
    assert "BraTS-BAD-00000-000" in done.stderr
    assert_same_images(output, expected)


def test_weights_for_another_contrast_only(
    engine: Engine, image: str, cases: Path, output: Path, tiny_weights: Path, tmp_path: Path
):
    (weights := tmp_path / "weights").mkdir()
    missing = find_cases(cases)[0].missing[0]
    shutil.copy(tiny_weights / f"{missing}.safetensors", weights)
    done = attempt(engine, image, input=cases, output=output, weights=readable(weights))
    assert done.returncode == 1
    assert "no weights for" in done.stderr
    assert {name.split("-")[-1] for name in names(output)} == {f"{missing}.nii.gz"}


def test_weights_that_are_not_there(engine: Engine, image: str, cases: Path, output: Path):
    done = attempt(engine, image, "infer", "--weights=/mnt/weights", input=cases, output=output)
    assert done.returncode == 2
    assert "no weights at /mnt/weights" in done.stderr
    assert not names(output)


def test_output_that_cannot_be_written(engine: Engine, image: str, cases: Path, tmp_path: Path):
    (output := tmp_path / "output").mkdir(mode=0o755)
    done = attempt(engine, image, options=("--user=12345:12345",), input=cases, output=output)
    assert done.returncode == 2
    assert "cannot write to /output" in done.stderr
    assert "--user" in done.stderr


def test_no_input_mounted(engine: Engine, image: str, output: Path):
    done = attempt(engine, image, output=output)
    assert done.returncode == 2
    assert "/input" in done.stderr


def test_killed_half_way_and_started_again(engine: Engine, image: str, cases: Path, tiny_weights: Path, output: Path):
    slow = ("infer", "sampler.name=ddpm", "sampler.steps=30")
    volumes = (f"--volume={cases}:/input:ro", f"--volume={output}:/output", f"--volume={tiny_weights}:/weights:ro")
    started = engine.docker("run", "--detach", "--network=none", *volumes, image, *slow)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    deadline = time.monotonic() + 120
    while not names(output) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.docker("kill", container).returncode == 0
    engine.docker("rm", container)
    first = {name: (output / name).stat().st_mtime_ns for name in names(output)}
    assert 0 < len(first) < 3
    for name in first:
        nib.load(output / name).get_fdata()
    run(engine, image, *slow, input=cases, output=output, weights=tiny_weights)
    assert len(names(output)) == len(find_cases(cases))
    assert {name: (output / name).stat().st_mtime_ns for name in first} == first


def test_stopped_politely(engine: Engine, image: str, cases: Path, tiny_weights: Path, output: Path):
    volumes = (f"--volume={cases}:/input:ro", f"--volume={output}:/output", f"--volume={tiny_weights}:/weights:ro")
    started = engine.docker("run", "--detach", "--network=none", *volumes, image, "infer", "sampler.steps=1000")
    container = started.stdout.strip()
    time.sleep(6)
    engine.docker("stop", "--time=20", container)
    state = json.loads(engine.docker("inspect", container).stdout)[0]["State"]
    engine.docker("rm", container)
    assert state["ExitCode"] == 143


# --------------------------------------------------------------------------------------------------------- building


def test_image_says_what_it_is(engine: Engine, shipped: str):
    config = json.loads(engine.docker("image", "inspect", shipped).stdout)[0]
    labels = config["Config"]["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert config["Config"]["User"] == "10001:10001"
    licence = engine.docker("run", "--rm", "--entrypoint=cat", shipped, "/licenses/cwdm/LICENSE")
    assert licence.stdout == (ROOT / "LICENSE").read_text()
    assert "mlcube" not in engine.docker("run", "--rm", "--entrypoint=ls", shipped, "/opt/cwdm/bin").stdout
    # What Triton needs on a GPU.
    headers = "python3 -c 'import sysconfig; print(sysconfig.get_path(\"include\"))'"
    compiler = f"echo '#include <Python.h>' | cc -fsyntax-only -x c -I$({headers}) -"
    compiled = engine.docker("run", "--rm", "--entrypoint=sh", shipped, "-c", compiler)
    assert compiled.returncode == 0, compiled.stderr


def test_own_weights_are_built_in(
    engine: Engine, shipped: str, context: Path, cases: Path, expected_tiny: Path, tiny_weights: Path, output: Path
):
    with_weights(context, tiny_weights)
    try:
        built = build_image(engine, context, f"{shipped}-own", WEIGHTS="own")
    finally:
        with_weights(context, None)
    assert built.returncode == 0, built.stderr
    said = run(engine, f"{shipped}-own", input=cases, output=output)
    assert_same_images(output, expected_tiny)
    assert "synthetic brains" not in said


@pytest.mark.parametrize("fault", ["none there", "damaged", "a contrast short", "no such choice"])
def test_no_image_without_usable_weights(
    engine: Engine, shipped: str, context: Path, tiny_weights: Path, tmp_path: Path, fault: str
):
    weights = tmp_path / "weights"
    shutil.copytree(tiny_weights, weights)
    if fault == "damaged":
        path = weights / "t2f.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == "a contrast short":
        (weights / "t2f.safetensors").unlink()
    with_weights(context, None if fault == "none there" else weights)
    try:
        built = build_image(engine, context, f"{shipped}-bad", WEIGHTS="my" if fault == "no such choice" else "own")
    finally:
        with_weights(context, None)
    assert built.returncode != 0
    reason = {
        "none there": "nothing in workspace/weights",
        "damaged": "t2f.safetensors",
        "a contrast short": "no weights for t2f",
        "no such choice": "WEIGHTS=my",
    }
    assert reason[fault] in built.stdout + built.stderr


def with_weights(context: Path, weights: Path | None) -> None:
    """Put weights into the workspace that is built from, or none."""
    target = context / "workspace/weights"
    shutil.rmtree(target)
    target.mkdir()
    (target / ".gitkeep").touch()
    if weights:
        shutil.copytree(weights, target, dirs_exist_ok=True)


# ---------------------------------------------------------------------------------- what needs more than this machine


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="runner with --gpus all: no GPU here")
def test_gpu(engine: Engine, image: str, cases: Path, output: Path):
    said = run(engine, image, "infer", "--device=cuda", options=("--gpus=all",), input=cases, output=output)
    assert len(names(output)) == 3
    assert "on the CPU" not in said


@pytest.mark.skipif(not shutil.which("apptainer"), reason="Singularity, Apptainer and Slurm runners: none here")
def test_apptainer(engine: Engine, image: str, cases: Path, expected: Path, output: Path, tmp_path: Path):
    archive = tmp_path / "cwdm.tar"
    assert engine.docker("save", image, "-o", archive).returncode == 0
    subprocess.run(["apptainer", "build", tmp_path / "cwdm.sif", f"docker-archive:{archive}"], check=True)
    binds = ["--bind", f"{cases}:/input:ro", "--bind", f"{output}:/output"]
    subprocess.run(["apptainer", "run", "--containall", *binds, tmp_path / "cwdm.sif"], check=True)
    assert_same_images(output, expected)


def test_singularity_sandbox(engine: Engine, image: str, cases: Path, expected: Path, output: Path):
    """What the orchestrator's Singularity backend does, as far as an engine can: read-only root, the caller's user."""
    options = ("--read-only", f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/nowhere", "--workdir=/")
    run(engine, image, options=options, input=cases, output=output)
    assert_same_images(output, expected)


def test_kubernetes_cluster_takes_the_job():
    if not shutil.which("kubectl") or subprocess.run(["kubectl", "version"], capture_output=True).returncode:
        pytest.skip("Kubernetes runner: no cluster here")
    subprocess.run(["kubectl", "apply", "--dry-run=server", "-f", ROOT / "mlcube/kubernetes/job.yaml"], check=True)


def test_job_script_is_sound():
    subprocess.run(["bash", "-n", ROOT / "mlcube/slurm/job.sh"], check=True)
