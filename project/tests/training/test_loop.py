import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file
from support import SHAPE, link_case
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cwdm import Synthesizer, checkpoint, progress
from cwdm.checkpoint import ANY
from cwdm.diffusion import SCHEDULES, subband_losses
from cwdm.errors import CwdmError, InputError, OutputError, SettingsError
from cwdm.images.image import write_nifti
from cwdm.inference.generate import Generator
from cwdm.refused import _leaves
from cwdm.safetensors_file import write_tensors
from cwdm.settings import load_settings
from cwdm.training import TrainingError, loop, saving, train, validate
from cwdm.training.launch import launch, results_of_all
from cwdm.training.loader import batches_of_steps
from cwdm.training.settings import (
    DataSettings,
    NetworkSettings,
    RecordSettings,
    TrainingSettings,
    load_training_settings,
    ready_configurations,
)
from cwdm.training.start import bf16_gradients_are_right
from cwdm.training.start import start as start_run
from cwdm.training.state import Run, load_state
from cwdm.unet import UNet, UNetConfig

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cwdm"]

IMPATIENT = {("cwdm.training.launch", "PATIENCE_MIN"): 0.1}
"""Processes wait six seconds for each other."""

SMALL = """
data: {condition_on: any, window: brain, crop: [16, 16, 16], mirror: true, jitter: 0.1, workers: 0}
network: {model_channels: 16, channel_mult: [1, 2], num_res_blocks: 1, groups: 8}
optimiser: {lr: 1e-3, batch_size: 2, ema_decay: 0.9, warmup_steps: 2, final_lr: 0.1}
loss: {over: voxels, timestep_power: 2}
record: {sampler: dpmpp, steps: 2, notice: for tests}
device: cpu
steps: 6
save_every: 2
log_every: 2
"""


@pytest.fixture
def small(tmp_path: Path, phantoms: Path) -> Path:
    """A configuration that lacks `out` alone."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("data: {", f"data: {{path: {phantoms}, cache: {tmp_path / 'cache'}, "))
    return path


def settings(config: Path, out: Path, *overrides: str) -> TrainingSettings:
    return load_training_settings(str(config), [f"out={out}", *overrides])


def losses(folder: Path) -> list[float]:
    """What TensorBoard would show as the loss."""
    return scalars(folder, "loss")


def scalars(folder: Path, tag: str) -> list[float]:
    """What TensorBoard would show."""
    found: dict[int, float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            found = {step: value for step, value in found.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == tag:
                found[event.step] = value.simple_value
    return list(found.values())


def events(folder: Path) -> Iterator[Event]:
    """What stands in TensorBoard's files."""
    for path in sorted((folder / "log").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_forgets_the_steps_that_a_killed_run_lost(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(small, out))
    max((out / "states").iterdir()).unlink()  # as if it had been killed before
    time.sleep(1.1)  # the files are named by the second
    train(settings(small, out), resume=True)
    assert [event.step for event in events(out) if event.session_log.status == SessionLog.START] == [5]
    assert len(losses(out)) == 3


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "states").glob("*.safetensors"))[-1])


def newest_state(folder: Path) -> str:
    return max((path.name for path in folder.glob("states/*.safetensors")), default="")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ready_configurations())
def test_ready_configurations_are_whole_and_describe_their_network(name: str) -> None:
    found = load_training_settings(name, ["data.path=in", "out=out"])
    unet = found.unet()
    if name.startswith("cwdm"):
        assert (unet.model_channels, unet.channel_mult, unet.skips) == (64, (1, 2, 2, 4, 4), "concat")
        assert unet.in_channels == (40 if name.endswith(("any", "one")) else 32)
    if name.startswith("wdm"):
        assert unet.in_channels == 8
        assert unet.skips == ("wavelet" if "wav" in name else "additive")
        assert found.value_range == [-1, 1]


def test_a_network_for_any_modality_is_trained_and_synthesises_each_of_them(
    small: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    newest = train(settings(small, out, f"data.validation_path={phantoms}", "validate_every=3", "validation_cases=2"))
    assert newest == out / "newest" / "any.safetensors"
    assert (out / "best" / "any.safetensors").exists()
    record = checkpoint.load(newest).record
    assert (record.modality, record.window, record.notice) == (ANY, "brain", "for tests")
    assert record.training["steps"] == 6
    assert [path.name for path in sorted((out / "states").iterdir())] == [
        "000000004.safetensors",
        "000000006.safetensors",
    ]
    assert len(losses(out)) == 3
    assert record.training["weights"].startswith("running mean")
    raw = checkpoint.load(out / "raw" / "any.safetensors")
    assert raw.record.training["weights"].startswith("raw")
    saved = weights_of(out)
    for prefix, model in (("model.", raw.model), ("ema.", checkpoint.load(newest).model)):
        assert all(torch.equal(saved[prefix + name], tensor) for name, tensor in model.named_parameters())
    synthesizer = Synthesizer(out / "newest", device="cpu")
    volumes = []
    for modality in ("t1n", "t1c", "t2w", "t2f"):
        case = link_case(sorted(phantoms.iterdir())[0], tmp_path / modality, modality)
        result = synthesizer(case)
        assert "for tests" in result.warnings
        assert result.volume.shape == SHAPE
        volumes.append(result.volume)
    assert len({volume.tobytes() for volume in volumes}) == 4


def models_of(settings: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield settings
    for field in settings.model_fields.values():
        for kind in _leaves(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from models_of(kind)


def test_every_setting_is_explained() -> None:
    for model in models_of(TrainingSettings):
        told = f"{model.__doc__} {UNetConfig.__doc__ if model is NetworkSettings else ''}"
        missing = [name for name in model.model_fields if f" {name}: " not in told.replace(", ", ": ")]
        assert not missing, (model, missing)


def test_the_network_s_settings_are_those_of_the_network() -> None:
    config = TrainingSettings(data=DataSettings(path=Path(), target="t1n"), out=Path()).unet()
    assert config == UNetConfig(in_channels=32)
    with pytest.raises(SettingsError, match=r"network.channel_mult.1: .*greater than or equal to 1, found 0"):
        load_training_settings("cwdm-t1n", ["data.path=in", "out=out", "network.channel_mult=[1, 0]"])
    with pytest.raises(SettingsError, match="did you mean 'groups'"):
        load_training_settings("cwdm-t1n", ["data.path=in", "out=out", "network.group=8"])


def test_a_network_of_conditions_is_not_called_unconditional(small: Path, tmp_path: Path) -> None:
    images = 'data.images=[{file: "{case}/a.nii"}, {file: "{case}/b.nii"}]'
    with pytest.raises(SettingsError, match="only the target belongs into 'images'"):
        settings(small, tmp_path, "data.layout=files", "data.condition_on=nothing", images)


def test_bigger_batches_take_fewer_steps_for_the_published_number_of_samples() -> None:
    def steps(config: str, *overrides: str) -> int:
        return load_training_settings(config, ["data.path=in", "out=out", *overrides]).steps

    assert steps("cwdm-t1n") == steps("wdm-unet-256") == 1_200_000
    assert steps("wdm-unet-128") == 1_200_000  # of ten volumes
    assert steps("cwdm-any", "optimiser.batch_size=8") == 150_000
    assert steps("cwdm-any", "optimiser.batch_size=7") == 171_429
    assert steps("cwdm-any", "optimiser.batch_size=8", "samples=80") == 10
    assert steps("cwdm-any", "optimiser.batch_size=8", "steps=1200000") == 1_200_000
    assert steps("bundled") == 1_900
    with pytest.raises(SettingsError) as error:
        steps("cwdm-any", "optimiser.batch_size=0")
    assert "\n" not in str(error.value)  # and not of the steps too


def test_training_lowers_the_loss(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "run", "steps=60", "log_every=15", "save_every=60"))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_that_is_logged_is_the_published_one(schedule: str, small: Path, tmp_path: Path) -> None:
    """Computed again by `subband_losses`, which the golden losses hold, from the first weights and samples."""
    from cwdm.training.cache import Cache
    from cwdm.training.cases import find_subjects
    from cwdm.training.data import Samples, assemble

    chosen = ("steps=1", "log_every=1", "loss.over=coefficients", f"loss.schedule={schedule}")
    config = settings(small, tmp_path / "run", *chosen)
    assert checkpoint.load(train(config)).record.schedule == schedule
    torch.manual_seed(config.seed)
    model = UNet(config.unet())
    cache = Cache(tmp_path / "cache", config.data, 4)
    subjects = find_subjects(config.data.path, config.data).subjects
    samples = Samples([cache.prepare(subject, {}) for subject in subjects], cache, config)
    expected = []
    for n in range(2):
        s = assemble({name: tensor[None] for name, tensor in samples[n].items()}, config, torch.device("cpu"))
        bands = subband_losses(
            lambda x, t, s=s: model(x, t, s["target"]),
            s["volume"],
            s["conditions"],
            s["t"],
            s["noise"],
            schedule=SCHEDULES[schedule],
        )
        expected.append(float(bands.mean()))
    assert losses(tmp_path / "run") == pytest.approx([np.mean(expected)], rel=1e-6)


def test_another_schedule_is_trained_validated_and_not_resumed_with_another(
    small: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    held_out = [f"data.validation_path={phantoms}", "validate_every=2", "validation_cases=1"]
    train(settings(small, out, "steps=2", "network.regression=true", "loss.schedule=cosine", *held_out))
    best = checkpoint.load(out / "best" / "any.safetensors")
    assert best.record.schedule == "cosine"
    assert best.model.regression.schedule is SCHEDULES["cosine"]
    with pytest.raises(SettingsError, match="other settings"):
        train(settings(small, out, "steps=3", "network.regression=true"), resume=True)


def test_one_pass_is_trained_validated_and_resumed(small: Path, phantoms: Path, tmp_path: Path) -> None:
    changes = ["loss.objective=one-pass", "data.most_missing=3", "loss.structure=0.1", "precision=bf16"]
    # Few steps: bfloat16 is slow on processors that do not multiply it.
    held_out = [f"data.validation_path={phantoms}", "validate_every=3", "validation_cases=2", "steps=3", "log_every=1"]
    out = tmp_path / "run"
    newest = checkpoint.load(train(settings(small, out, *changes, *held_out)))
    assert newest.record.objective == "one-pass"
    assert (newest.model.prior.deviation[0, 2:16:2] != 1).all()  # every set of images without the target
    assert (newest.model.prior.deviation[0, 1::2] == 1).all()
    assert checkpoint.load(out / "best" / "any.safetensors").record.training["best_psnr_db"] > 10
    assert len(losses(out)) == 3
    changes += ["optimiser.final_lr=1", "steps=2"]
    train(settings(small, tmp_path / "parts", *changes, "steps=1"))
    train(settings(small, tmp_path / "whole", *changes))
    train(settings(small, tmp_path / "parts", *changes), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(SettingsError, match="other settings"):
        train(settings(small, tmp_path / "parts", *changes, "loss.beta=1"), resume=True)


def test_a_flow_is_trained_validated_and_used(small: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = ["loss.objective=flow", "record.sampler=euler", "record.steps=2", f"data.validation_path={phantoms}"]
    newest = train(settings(small, out, *told, "validate_every=6", "validation_cases=1"))
    assert checkpoint.load(newest).record.objective == "flow"
    assert (out / "best" / "any.safetensors").exists()
    run = settings(small, tmp_path / "other", *told)
    assert run.validation_plan == ("euler", 2)
    drawn = [float(start_run(run, launch(run), resume=False).samples[n]["t"]) for n in range(3)]
    assert all(0 <= t < 1000 and t != int(t) for t in drawn)


@pytest.mark.parametrize("change", ["record.sampler=ddpm", "record.sampler=euler network.regression=true"])
def test_settings_that_a_flow_cannot_have_are_refused(small: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(SettingsError, match="'flow'"):
        settings(small, tmp_path, "loss.objective=flow", *change.split())


@pytest.mark.parametrize(
    "change",
    [
        "data.condition_on=others data.target=t1n",
        "network.wavelet=db2",
        "value_range=[-1,1]",
        "network.regression=true",
    ],
)
def test_settings_that_one_pass_cannot_have_are_refused(small: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(SettingsError, match="'one-pass' needs"):
        settings(small, tmp_path, "loss.objective=one-pass", *change.split())


def test_a_state_from_before_there_was_a_setting_goes_on_where_it_has_its_default(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(small, out, "steps=2"))
    (path,) = (out / "states").iterdir()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cwdm"])
    del header["settings"]["optimiser"]["clip_norm"], header["settings"]["network"]["wavelet"]
    del header["settings"]["loss"]["schedule"]
    write_tensors(path, load_file(path), {"cwdm": json.dumps(header)})
    with pytest.raises(SettingsError, match=r'network.wavelet="db2" instead of "haar"\.'):
        train(settings(small, out, "steps=4", "network.wavelet=db2"), resume=True)
    train(settings(small, out, "steps=4"), resume=True)


def test_stopped_killed_and_resumed_run_ends_with_the_same_weights(small: Path, tmp_path: Path) -> None:
    changes = ["steps=30", "save_every=5", "network.regression=true"]
    train(settings(small, tmp_path / "whole", *changes))
    out = tmp_path / "stopped"
    for kind in (signal.SIGTERM, signal.SIGKILL):
        before = newest_state(out)
        process = forked.start("train", small, f"out={out}", *changes, "data.workers=1", "--resume")
        while process.poll() is None and newest_state(out) == before:
            time.sleep(0.005)
        os.killpg(process.pid, kind)  # as schedulers do, the reading processes too
        process.communicate(timeout=60)
        assert process.returncode == (128 + kind if kind == signal.SIGTERM else -kind)
    assert newest_state(out) < "000000030"
    train(settings(small, out, *changes), resume=True)
    assert_same_weights(tmp_path / "whole", out)
    deviation = weights_of(out)["model.regression.deviation"]
    assert (deviation != 1).all()  # fitted although the first start was a --resume


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_slurms_warning_and_a_closed_terminal_save_and_leave(
    number: signal.Signals, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    long = ("steps=100000", "save_every=100000", "data.workers=1", "log_every=1")
    process = forked.start("train", small, f"out={out}", *long, heard=(number,))
    for line in process.stderr:
        if "step 3:" in line:
            break
    os.killpg(process.pid, number)  # reaches the reading processes too
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert newest_state(out) >= "000000003"


def test_a_run_goes_on_when_nobody_reads_its_log(small: Path, tmp_path: Path) -> None:
    process = forked.start("train", small, f"out={tmp_path / 'run'}", "log_every=1")
    assert any("step 1: loss" in line for line in process.stderr)
    process.stderr.close()
    assert process.wait(60) == 0
    assert newest_state(tmp_path / "run") == "000000006.safetensors"


def test_what_is_trained_on_what_is_said(
    small: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(small, tmp_path / "run", "steps=2", f"data.validation_path={phantoms}", "validation_cases=2"))
    said = capsys.readouterr().err
    assert "training on 1 × cpu in fp32: 3 cases, 2 held out, 2 steps of 2 volumes\n" in said
    assert "warning: 2 held-out cases (" in said
    assert "), 0:00:00 to go\n" not in said
    assert "step 2: loss" in said


def test_bfloat16_is_refused_where_the_processor_s_gradients_are_wrong(small: Path, tmp_path: Path) -> None:
    deep = ["precision=bf16", "data.crop=[16, 16, 16]", "network.channel_mult=[1, 1, 1]", "steps=2", "save_every=2"]
    if bf16_gradients_are_right((2, 2, 2)):
        train(settings(small, tmp_path / "run", *deep))
        assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())
    else:
        with pytest.raises(SettingsError, match=r"precision=bf16: .* of a convolution of 2×2×2 .* give precision=fp32"):
            train(settings(small, tmp_path / "run", *deep))


def test_a_validation_that_the_run_was_stopped_in_is_made_up(small: Path, phantoms: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "run", [f"data.validation_path={phantoms}", "steps=2", "data.window=[32, 48, 32]"]
    long = ("validation_sampler=ddpm", "validation_steps=1000")
    process = forked.start("train", small, f"out={out}", *changes, *long)
    for line in process.stderr:
        if "step 2:" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list((out / "best").iterdir())
    train(settings(small, out, *changes), resume=True)
    (best,) = (out / "best").iterdir()
    assert checkpoint.load(best).record.window == (32, 48, 32)


def test_a_best_score_counts_only_among_the_same_held_out_cases(
    small: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = tmp_path / "run", [f"data.validation_path={phantoms}", "validate_every=2"]
    train(settings(small, out, "steps=2", "validation_cases=2", *held_out))
    state = max((out / "states").iterdir())
    with safe_open(state, "pt") as file:
        header = json.loads(file.metadata()["cwdm"])
    # A score that no later one can reach.
    write_tensors(state, load_file(state), {"cwdm": json.dumps({**header, "best": 90.0})})
    best = (out / "best" / "any.safetensors").read_bytes()
    train(settings(small, out, "steps=4", "validation_cases=2", *held_out), resume=True)
    assert (out / "best" / "any.safetensors").read_bytes() == best
    train(settings(small, out, "steps=6", "validation_cases=1", *held_out), resume=True)
    assert (out / "best" / "any.safetensors").read_bytes() != best
    assert "the 90.00 dB before count no more" in capsys.readouterr().err


def test_validation_takes_few_steps_whatever_the_weights_recommend() -> None:
    def plan(config: str, *overrides: str) -> tuple[str, int]:
        return load_training_settings(config, ["data.path=in", "out=out", *overrides]).validation_plan

    assert plan("cwdm-t1n") == ("dpmpp", 10)
    assert load_training_settings("cwdm-t1n", ["data.path=in", "out=out"]).record == RecordSettings()  # ddpm, 1000
    assert plan("wfm") == ("euler", 1)
    assert plan("cwdm-t1n", "validation_sampler=ddpm", "validation_steps=1000") == ("ddpm", 1000)
    assert plan("wfm", "validation_steps=5") == ("euler", 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_computes_in_the_precision_of_training(
    precision: str, small: Path, phantoms: Path, tmp_path: Path
) -> None:
    changes = [f"precision={precision}", f"data.validation_path={phantoms}", "steps=1", "validation_cases=1"]
    run = start(settings(small, tmp_path / "run", *changes))
    validate.validate(run)
    network = validate._network(run)
    assert {parameter.dtype for parameter in run.ema.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in network.model.parameters()} == {
        {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    }
    assert math.isfinite(run.best)


def test_a_batch_script_of_slurm_waits_for_no_tasks(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "8", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    train(settings(small, tmp_path / "run", "steps=2"))


def lose(data_folder: Path, cache: Path) -> Path:
    """Take the originals away, and what was decoded of them."""
    lost = data_folder.rename(data_folder.with_name("lost"))
    shutil.rmtree(cache)
    return lost


def test_steps_are_saved_when_the_data_are_lost(small: Path, phantoms: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "whole"))
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    config = settings(
        small, tmp_path / "run", f"data.path={folder}", f"data.cache={tmp_path / 'copies'}", "save_every=9"
    )
    run = start(config)
    for _, parts in zip(range(3), steps_of(run), strict=False):
        loop.step(run, parts)
    lost = lose(folder, tmp_path / "copies")
    with pytest.raises((OSError, CwdmError)):
        loop.go_on(run)
    assert newest_state(tmp_path / "run") == "000000003.safetensors"
    lost.rename(folder)
    train(config, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_steps_are_saved_when_a_step_fails_before_it_changes_the_weights(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        if run.step == 2:
            raise MemoryError("no memory left")

    train(settings(small, tmp_path / "whole"))
    config = settings(small, tmp_path / "run", "save_every=9")
    run = start(config)
    handle = run.model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        loop.go_on(run)
    handle.remove()
    assert newest_state(tmp_path / "run") == "000000002.safetensors"
    train(config, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")

    run = start(settings(small, tmp_path / "half", "save_every=9"))
    run.optimiser.optimizer.register_step_post_hook(fail)
    with pytest.raises(MemoryError):
        loop.go_on(run)
    assert newest_state(tmp_path / "half") == ""
    assert "step 2 could not be saved: the weights were being changed" in capsys.readouterr().err


def test_a_run_that_fails_at_its_first_step_leaves_no_state(small: Path, tmp_path: Path) -> None:
    run = start(settings(small, tmp_path / "run"))
    run.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.go_on(run)
    assert newest_state(tmp_path / "run") == ""


def test_several_processes_save_together_when_the_data_of_one_are_lost(
    small: Path, phantoms: Path, tmp_path: Path
) -> None:
    folder, out = Path(shutil.copytree(phantoms, tmp_path / "data")), tmp_path / "run"
    changes = [f"data.path={folder}", f"data.cache={tmp_path / 'copies'}", "optimiser.sharded=true", "log_every=1"]
    command = [*TWO_PROCESSES, "train", str(small), f"out={out}", *changes, "steps=100000", "save_every=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr or ():
        if "step 3:" in line:
            break
    lose(folder, tmp_path / "copies")
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert newest_state(out) >= "000000003"
    weights_of(out)


@pytest.mark.parametrize(("rank", "end"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_hangs_is_told_and_its_steps_are_saved(
    rank: int, end: signal.Signals, small: Path, tmp_path: Path
) -> None:
    """The other process leaves by itself; a launcher may be slow, or none of ours."""
    out = tmp_path / "run"
    words = [str(small), f"out={out}", "steps=100000", "save_every=100000"]
    started = start_two_processes(*words, changes=IMPATIENT)
    dying, other = started[rank], started[1 - rank]
    assert any("step 2: loss" in line for line in started[0].stderr)
    dying.send_signal(end)
    said = other.communicate(timeout=60)
    dying.kill()
    dying.communicate()
    assert other.returncode == 2, said
    assert "error: another process of this run died or hangs" in said
    assert "could not be saved" not in said
    assert len(list((out / "states").iterdir())) == (rank == 1)


def start_two_processes(*words: str, changes: Mapping[tuple[str, str], object] | None = None) -> list[forked.Forked]:
    """What torchrun starts, without torchrun."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return [
        forked.start(
            "train", *words, "devices=2", environment={**place, "RANK": rank, "LOCAL_RANK": rank}, changes=changes
        )
        for rank in ("0", "1")
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_processes_meet_while_each_does_long_work(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = launch(settings(small, tmp_path / "run"))
    monkeypatch.setattr("cwdm.training.launch.BETWEEN_MEETINGS_S", 0)
    met: list[int] = []

    def work() -> Iterator[int]:
        for number in range(3):
            met.append(number)
            yield number

    results = work()
    assert results_of_all(fabric, results) == [0, 1, 2]
    with pytest.raises(OutputError):
        results_of_all(fabric, (fail() for _ in range(3)))


def fail() -> int:
    raise OutputError("full")


def test_states_are_kept_by_time_without_being_asked_for(small: Path, tmp_path: Path) -> None:
    text = small.read_text().replace("save_every: 2\n", "")
    small.write_text(text)
    train(settings(small, tmp_path / "usual"))
    assert [path.stem for path in sorted((tmp_path / "usual" / "states").iterdir())] == ["000000006"]
    train(settings(small, tmp_path / "often", "save_minutes=1e-9"))
    assert [path.stem for path in sorted((tmp_path / "often" / "states").iterdir())] == ["000000005", "000000006"]
    assert_same_weights(tmp_path / "usual", tmp_path / "often")


def test_a_state_is_that_of_its_step_though_training_goes_on_meanwhile(small: Path, tmp_path: Path) -> None:
    run = start(settings(small, tmp_path / "run"))
    batches = steps_of(run)
    loop.step(run, next(batches))
    expected = {f"model.{name}": parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    expected |= {f"ema.{name}": parameter.clone() for name, parameter in run.ema.named_parameters()}
    write = saving._writing(run, run.optimiser.state_dict()["state"])
    loop.step(run, next(batches))
    write()
    saved = weights_of(tmp_path / "run")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_damaged_state_is_passed_over(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(small, out))
    newest = sorted((out / "states").iterdir())[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-100])
    train(settings(small, out), resume=True)
    assert newest.read_bytes() == whole


def test_a_run_whose_states_are_all_damaged_is_not_replaced_by_a_new_one(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    weights = train(settings(small, out))
    for path in (out / "states").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in (*(out / "states").iterdir(), weights)}
    with pytest.raises(SettingsError, match=r"none of the states .* is whole \(000000004.*000000006.*move .* away"):
        train(settings(small, out), resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_was_killed_between_its_last_state_and_weights_writes_them(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    weights = train(settings(small, out))
    last = weights.read_bytes()
    shutil.rmtree(out / "newest")
    shutil.rmtree(out / "raw")
    assert train(settings(small, out), resume=True).read_bytes() == last
    assert (out / "raw" / weights.name).is_file()


def test_weights_whose_states_are_gone_are_not_replaced(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    weights = train(settings(small, out))
    kept = weights.read_bytes()
    for state in (out / "states").iterdir():
        state.unlink()
    for resume in (False, True):
        with pytest.raises(SettingsError, match="states are gone"):
            train(settings(small, out), resume)
    assert weights.read_bytes() == kept


def test_a_state_that_cannot_be_opened_is_not_taken_for_damaged(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(small, out))
    newest = sorted((out / "states").iterdir())[-1]
    newest.unlink()
    newest.symlink_to(newest)  # goes in a circle, for root too
    with pytest.raises(SettingsError, match="cannot be read"):
        train(settings(small, out), resume=True)


def test_states_later_than_the_one_resumed_from_are_damaged_and_go(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(small, out))
    max((out / "states").iterdir()).write_bytes(b"damaged")
    (copy := out / "states" / "before-change.safetensors").write_bytes(b"the user's own")
    train(settings(small, out), resume=True)
    assert copy.read_bytes() == b"the user's own"
    copy.unlink()
    assert sorted(path.stem for path in (out / "states").iterdir()) == ["000000004", "000000006"]
    weights_of(out)


def test_resumed_moments_lie_in_memory_like_their_weights(small: Path, tmp_path: Path) -> None:
    """As on a GPU, where the weights are channels_last."""
    train(settings(small, tmp_path / "run"))
    run = start(settings(small, tmp_path / "other"))
    run.model.to(memory_format=torch.channels_last_3d)
    found = saving.newest_whole_state(tmp_path / "run", print)
    assert found is not None
    load_state(run, found.tensors)
    last = 0
    for name, parameter in run.model.named_parameters():
        moments = run.optimiser.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            assert moments[key].stride() == parameter.stride()
            assert torch.equal(moments[key], found.tensors[f"optimiser.{key}.{name}"])
        last += parameter.is_contiguous(memory_format=torch.channels_last_3d) if parameter.ndim == 5 else 0
    assert last > 10


def test_the_running_mean_is_the_exponential_one(small: Path, tmp_path: Path) -> None:
    run = start(settings(small, tmp_path / "run", "optimiser.ema_decay=0.25"))
    expected = [parameter.clone() for parameter in run.ema.parameters()]
    for parts, decay in zip(steps_of(run), (1 / 10, 2 / 11, 0.25, 0.25), strict=False):
        loop.step(run, parts)
        for mean, value in zip(expected, run.model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        assert all(torch.equal(a, b) for a, b in zip(expected, run.ema.parameters(), strict=True))


def test_accumulated_parts_are_the_same_batch(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "one"))
    train(settings(small, tmp_path / "parts", "optimiser.accumulate=2"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)


def test_recomputed_activations_change_nothing(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "kept"))
    train(settings(small, tmp_path / "recomputed", "recompute=true"))
    assert_same_weights(tmp_path / "kept", tmp_path / "recomputed")


def test_bfloat16_multiplies_and_float32_keeps(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "fp32"))
    train(settings(small, tmp_path / "bf16", "precision=bf16"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "exact"), [("fp32", True), ("tf32", False), ("bf16", True)])
def test_float32_is_rounded_to_tf32_only_where_it_was_asked_for(
    precision: str, exact: bool, small: Path, tmp_path: Path
) -> None:
    def look(*_: object) -> None:
        seen.append(torch._C._get_fp32_precision_getter("cuda", "conv"))

    seen: list[str] = []
    before = torch._C._get_fp32_precision_getter("cuda", "conv")
    run = start(settings(small, tmp_path / "run", "steps=1", f"precision={precision}"))
    run.model.register_forward_hook(look)
    loop.go_on(run)
    assert seen == ["ieee" if exact else before]
    assert before != "ieee"
    assert torch._C._get_fp32_precision_getter("cuda", "conv") == before


def test_unconditional_training_makes_weights_that_sample(small: Path, phantoms: Path, tmp_path: Path) -> None:
    changes = ["data.condition_on=nothing", "data.target=t1n", "value_range=[-1, 1]", "data.window=[32, 32, 32]"]
    more = ["data.downsample=2", "data.crop=null", "network.skips=wavelet"]
    more += ["network.num_res_blocks=2"]
    validation = [f"data.validation_path={phantoms}", "validate_every=6", "validation_cases=1"]
    newest = train(settings(small, tmp_path / "run", *changes, *more, *validation))
    generator = Generator(newest, load_settings(None, ["sampler.steps=2"]), device="cpu")
    assert generator.size == (16, 16, 16)
    assert np.isfinite(generator(0)).all()


def train_in_two_processes(config: Path, *arguments: str) -> None:
    for process in start_two_processes(str(config), *arguments):
        said = process.communicate(timeout=100)
        assert process.returncode == 0, said


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_see_the_losses_of_one(sharded: bool, small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "one"))
    train_in_two_processes(small, f"out={tmp_path / 'two'}", f"optimiser.sharded={sharded}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)


def test_sharded_states_are_saved_whole_and_taken_up_again(small: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    train_in_two_processes(small, out, "optimiser.sharded=true", "save_every=2")
    whole = weights_of(tmp_path / "run")
    newest = max((tmp_path / "run" / "states").iterdir())
    state = load_file(newest)
    trained = [name for name in state if name.startswith("optimiser.exp_avg_sq.")]
    assert len(trained) == len([name for name in state if name.startswith("model.")])
    newest.unlink()  # back to the state before
    train_in_two_processes(small, out, "optimiser.sharded=true", "save_every=2", "--resume")
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, whole[name])
    newest.unlink()
    train(settings(small, tmp_path / "run", "save_every=2"), resume=True)  # one process
    for name, tensor in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(tensor, whole[name], atol=2e-4, rtol=1e-3)


def test_two_runs_at_once_do_not_share_a_folder(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cwdm.training.folder.PATIENCE_S", 0)
    process = forked.start("train", small, f"out={tmp_path / 'run'}", "steps=100000", "log_every=1")
    assert any("step 1: loss" in line for line in process.stderr)
    with pytest.raises(SettingsError, match=rf"process {process.pid} on .* is at work in .*run"):
        train(settings(small, tmp_path / "run"), resume=True)
    process.kill()
    process.communicate()
    train(settings(small, tmp_path / "run"), resume=True)  # the killed one is in nobody's way


def test_another_run_in_the_folder_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "run", "steps=2"))
    with pytest.raises(SettingsError, match="--resume"):
        train(settings(small, tmp_path / "run", "steps=2"))
    with pytest.raises(
        SettingsError, match=r"other settings: optimiser.batch_size=4 instead of 2; seed=1 instead of 0\."
    ):
        train(settings(small, tmp_path / "run", "steps=2", "optimiser.batch_size=4", "seed=1"), resume=True)


def test_a_run_may_go_on_with_another_learning_rate_and_says_so(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(small, tmp_path / "run", "steps=2"))
    capsys.readouterr()
    other = settings(small, tmp_path / "run", "steps=4", "optimiser.lr=1e-4", "optimiser.accumulate=2")
    train(other, resume=True)
    said = capsys.readouterr().err
    assert "going on with optimiser.lr=0.0001 instead of 0.001\n" in said
    assert "going on with optimiser.accumulate=2 instead of 1\n" in said
    assert "the last step is 4 instead of 2\n" in said
    assert load_file(max((tmp_path / "run" / "states").iterdir())).keys()


def test_cases_that_came_or_went_are_named_when_a_run_goes_on(small: Path, tmp_path: Path, phantoms: Path) -> None:
    shutil.copytree(phantoms, tmp_path / "data")
    data = f"data.path={tmp_path / 'data'}"
    train(settings(small, tmp_path / "run", "steps=2", data))
    gone = sorted((tmp_path / "data").iterdir())[0]
    gone.rename(tmp_path / gone.name)
    with pytest.raises(SettingsError, match=rf"other cases: 1 cases are gone \({gone.name}\)\. Go on"):
        train(settings(small, tmp_path / "run", "steps=4", data), resume=True)


def test_a_run_that_is_past_its_last_step_is_not_taken_for_finished(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "run"))
    with pytest.raises(SettingsError, match=r"000000006.* after the last step, 4, .* give steps=N"):
        train(settings(small, tmp_path / "run", "steps=4"), resume=True)
    train(settings(small, tmp_path / "run"), resume=True)  # finished: nothing is left to do


def test_a_loss_that_stays_infinite_ends_the_run(small: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite for 20 steps.* the last with "):
        train(settings(small, tmp_path / "run", "steps=40", "optimiser.lr=1e38"))
    assert not list((tmp_path / "run" / "states").iterdir())


def steps_of(run: Run) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The parts of each step that is left."""
    batches = batches_of_steps(run.samples, run.fabric, range(run.step, run.settings.steps))
    while True:
        yield loop.next_parts(run, batches)


def start(config: TrainingSettings) -> Run:
    """A run whose steps a test takes itself."""
    return start_run(config, launch(config), resume=False)


def test_a_step_that_is_not_finite_is_counted_and_named_and_changes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(settings(small, tmp_path / "run", "log_every=3"))
    before = [parameter.clone() for parameter in run.model.parameters()]
    for number, parts in zip(range(3), steps_of(run), strict=False):
        if number == 0:
            parts[0]["noise"][1] = math.inf  # the second of the batch of two
        loop.step(run, parts)
        if number == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    run.log.close()
    said = capsys.readouterr().err
    assert f"step 1 passed over, loss or gradient not finite; its cases: {run.samples.subject(1).name}\n" in said
    assert "step 3: loss" in said
    assert ", 1 of 3 steps not finite, " in said
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert scalars(tmp_path / "run", "steps_not_finite") == [1]
    assert 0 < scalars(tmp_path / "run", "gradient_norm")[0] < math.inf
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk_while_saving_leaves_whole_states(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="disk is full"):
            train(settings(small, out))
        for path in (out / "states").iterdir():
            load_file(path)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_what_is_wrong_with_the_data_or_settings_is_said(small: Path, tmp_path: Path, phantoms: Path) -> None:
    link_case(sorted(phantoms.iterdir())[0], tmp_path / "data", "t2w")
    with pytest.raises(InputError, match="t2w missing"):
        train(settings(small, tmp_path / "run", f"data.path={tmp_path / 'data'}"))
    with pytest.raises(SettingsError, match="did you mean 'batch_size'"):
        settings(small, tmp_path / "run", "optimiser.batchsize=2")
    with pytest.raises(SettingsError, match=r"shared evenly .* give optimiser.batch_size=4"):
        train(settings(small, tmp_path / "run", "optimiser.batch_size=3", "optimiser.accumulate=2"))
    with pytest.raises(SettingsError, match=r"give data.crop, or optimiser.accumulate=2"):
        train(settings(small, tmp_path / "run", "data.crop=null"))
    assert settings(small, tmp_path / "run", "optimiser.weight_decay=1e-2").optimiser.weight_decay == 0.01
    for wrong, message in (
        ("value_range=[1, 0]", "rising"),
        ("network.wavelet=bior2.2", "no orthogonal wavelet"),
        ("data.downsample=2", "is for other data"),
    ):
        with pytest.raises(SettingsError, match=message):
            settings(small, tmp_path / "run", wrong)
    with pytest.raises(SettingsError, match="multiple of 4"):
        settings(small, tmp_path / "run", "data.crop=[16, 16, 18]")
    with pytest.raises(SettingsError, match="neither a file nor one of"):
        load_training_settings("cwdm-t9", [])
    with pytest.raises(SettingsError, match="data is needed"):
        load_training_settings(str(tmp_path / "small.yaml"), ["data=null", "out=x"])


def cases_with_faults(phantoms: Path, folder: Path) -> tuple[str, str, str]:
    """A sound case, one that lacks a modality, one with a damaged file; and "other", whose files differ in shape."""
    sound, incomplete, damaged = (path.name for path in sorted(phantoms.iterdir()))
    shutil.copytree(phantoms, folder)
    (folder / incomplete / f"{incomplete}-t1c.nii.gz").unlink()
    file = folder / damaged / f"{damaged}-t2f.nii.gz"
    file.write_bytes(file.read_bytes()[:-20])
    shutil.copytree(folder / sound, folder / "other")
    write_nifti(folder / "other" / f"{sound}-t2w.nii.gz", np.ones((9, 8, 7), np.int16).cumsum(0, np.int16), np.eye(4))
    return sound, incomplete, damaged


def test_all_bad_cases_are_named_at_once_and_left_out_if_wanted(
    small: Path, tmp_path: Path, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, incomplete, damaged = cases_with_faults(phantoms, tmp_path / "data")
    changes = [f"data.path={tmp_path / 'data'}", "steps=2", "optimiser.batch_size=1"]
    with pytest.raises(InputError, match=r"^3 of 4 cases cannot be used:\n(.*\n){3}.*data.skip_bad=true") as caught:
        train(settings(small, tmp_path / "run", *changes))
    for fault in (
        f"{incomplete}: t1c missing",
        f"{damaged}: .*t2f.*end too early",
        "other: expected volumes of one sh",
    ):
        assert re.search(f"\n{fault}", str(caught.value))
    capsys.readouterr()
    newest = train(settings(small, tmp_path / "run", *changes, "data.skip_bad=true"))
    said = capsys.readouterr().err
    assert all(f"left out: {name}: " in said for name in (incomplete, damaged, "other"))
    assert f"left out: {sound}" not in said
    assert checkpoint.load(newest).record.training["cases"] == 1
    for name in (sound, "other"):
        shutil.rmtree(tmp_path / "data" / name)
    with pytest.raises(InputError, match="2 of 2 cases cannot be used"):
        train(settings(small, tmp_path / "none", *changes, "data.skip_bad=true"))


def test_two_processes_leave_the_same_cases_out(small: Path, tmp_path: Path, phantoms: Path) -> None:
    cases_with_faults(phantoms, tmp_path / "data")
    changes = [f"data.path={tmp_path / 'data'}", "data.skip_bad=true", "steps=2"]
    train_in_two_processes(small, f"out={tmp_path / 'two'}", *changes)
    train(settings(small, tmp_path / "one", *changes))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_how_far_decoding_is_and_what_it_takes_is_said_without_a_terminal(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    train(settings(small, tmp_path / "run", "steps=2"))
    said = capsys.readouterr().err
    assert f"decoding 12 files of 3 cases into {tmp_path / 'cache'}: about 1 MiB, " in said
    assert re.search(r"\ndecoding cases: 2 of 3, \d+ min to go\n", said)


def test_a_run_goes_on_after_its_data_moved(small: Path, tmp_path: Path, phantoms: Path) -> None:
    shutil.copytree(phantoms, tmp_path / "here")
    train(settings(small, tmp_path / "whole"))
    decoded = sorted(path.name for path in (tmp_path / "cache").iterdir())
    out = tmp_path / "run"
    train(settings(small, out, f"data.path={tmp_path / 'here'}"))
    for path in sorted((out / "states").iterdir())[1:]:
        path.unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    train(settings(small, out, f"data.path={tmp_path / 'there'}"), resume=True)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == decoded
    assert_same_weights(tmp_path / "whole", out)


def test_reading_ahead_must_fit_into_shared_memory(small: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--shm-size=\d+m or more, or give .*data.workers=0"):
        train(settings(small, tmp_path / "run", "data.workers=64", "optimiser.batch_size=1000000000"))


def test_noise_drawn_on_the_device_is_another_place_for_the_same_numbers(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "there", "noise=device"))
    train(settings(small, tmp_path / "here"))
    assert_same_weights(tmp_path / "there", tmp_path / "here")


def test_settings_of_the_run_are_kept_beside_it(small: Path, tmp_path: Path) -> None:
    train(settings(small, tmp_path / "run", "steps=2", "seed=5"))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 5
