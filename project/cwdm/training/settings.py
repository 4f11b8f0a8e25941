"""Settings of a training run: a YAML file of ours or yours, then `key=value` overrides."""

from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, create_model, model_validator

from cwdm.blocks import UNetConfig, one_pass_outputs
from cwdm.checkpoint import ANY, Objective, Record, orthogonal_wavelet
from cwdm.diffusion import PUBLISHED, known_schedule
from cwdm.errors import SettingsError
from cwdm.files import is_file
from cwdm.images import PUBLISHED_WINDOW, ImageSettings, Range, Size
from cwdm.samplers import FLOW_SAMPLERS, OF_DIFFUSION, known_sampler
from cwdm.strict import Number, StrictSettings, read_settings
from cwdm.training.augment import AugmentSettings

Errors = Literal["gaussian", "laplace"]
Positive = Annotated[int, Field(ge=1)]
Folder = Annotated[Path, Field(strict=False)]
Sampler = Annotated[str, AfterValidator(known_sampler)]

PUBLISHED_SAMPLES = 1_200_000
"""What cWDM's networks saw: 1.2 million steps of one volume."""

FEW_STEPS = 10
"""Of a sampler, that a validation can afford."""


class DataSettings(StrictSettings):
    """What is trained on.

    Attributes:
        path: folder of the cases.
        validation_path: folder of held-out cases; None: no validation.
        layout: `brats` for case folders with the four modalities, `files` for images described one by one.
        target: for `brats`: the modality to synthesise.
        condition_on: what it is made from: the others; "any" for one network that makes each of the four from the
            others; "nothing" for an unconditional network.
        most_missing: with "any", how many of the four may be missing at once.
        images: for `files`: the target first, then the conditions.
        window: voxels that are kept of a volume, in its centre and, with conditions in the layout `brats`, moved or
            grown as inference does to hold the brain; or "brain" for the smallest box that holds it.
        downsample: edge in voxels of the cubes that are averaged, as WDM does for 128³.
        crop: size of the random part that is trained on; None: everything.
        incomplete: with "any", cases of two or three of the modalities are trained on too; what a case does not have
            is neither made nor given.
        repeat: pattern of cases' names, such as "MS-*", and how many times those come in an epoch; others come once.
            Of several patterns that fit a name the last counts.
        intensities: what of an image becomes 0 and 1, see `cwdm.images.clip_range`: its percentiles as `published`, or
            its `brain`.
        mirror: left and right change places at random.
        jitter: each condition, in [0, 1], is raised to a random power, whose logarithm has this standard deviation.
        augment: what is done to the images to make the network robust; nothing by default.
        cache: folder for the decoded volumes, which any number of runs can share; None: `cache` in the run's folder.
        workers: processes that read.
        skip_bad: cases that are damaged or incomplete are left out, each named, instead of ending the run's start.
    """

    path: Folder
    validation_path: Folder | None = None
    layout: Literal["brats", "files"] = "brats"
    target: Literal["t1n", "t1c", "t2w", "t2f"] | None = None
    condition_on: Literal["others", "any", "nothing"] = "others"
    most_missing: int = Field(default=1, ge=1, le=3)
    images: list[ImageSettings] | None = None
    window: Size | Literal["brain"] = Field(default=[224, 224, 160])
    downsample: int = Field(default=1, ge=1, le=8)
    crop: Size | None = None
    incomplete: bool = False
    repeat: dict[str, Positive] = Field(default_factory=dict)
    intensities: Literal["published", "brain"] = "published"
    mirror: bool = False
    jitter: Number = Field(default=0.0, ge=0, le=1)
    augment: AugmentSettings = AugmentSettings()
    cache: Folder | None = None
    workers: int = Field(default=4, ge=0, le=64)
    skip_bad: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if self.layout == "files":
            if not self.images or self.images[0].labels is not None:
                raise ValueError("layout 'files' needs 'images', the target (no label map) first")
            if self.condition_on == "any" or self.target is not None:
                raise ValueError("'target' and condition_on 'any' belong to layout 'brats'")
            if self.condition_on == "nothing" and self.images[1:]:
                raise ValueError("with condition_on 'nothing' only the target belongs into 'images'")
            if self.augment.happens:
                raise ValueError("'augment' belongs to layout 'brats': it takes what is 0 for background")
        elif (self.target is None) != (self.condition_on == "any"):
            raise ValueError("layout 'brats' needs a 'target', and with condition_on 'any' none")
        guided = self.layout == "brats" and self.condition_on != "nothing"
        if guided and self.downsample > 1:
            raise ValueError("'downsample' is for other data: inference gives a network of modalities all voxels")
        if self.window == "brain" and not guided:
            raise ValueError("window 'brain' needs layout 'brats' with conditions")
        if self.crop and isinstance(self.window, list):
            small = [size // self.downsample for size in self.window]
            if any(part > whole for part, whole in zip(self.crop, small, strict=True)):
                raise ValueError(f"crop {self.crop} does not fit into the window, {small} voxels after downsampling")
        if self.most_missing > 1 and self.condition_on != "any":
            raise ValueError("'most_missing' needs condition_on 'any'")
        if self.incomplete and self.condition_on != "any":
            raise ValueError("'incomplete' needs condition_on 'any'")
        if self.intensities == "brain" and not guided:
            raise ValueError("intensities 'brain' need layout 'brats' with conditions; images say their own")
        return self


_TYPES: dict[Any, Any] = {int: Positive, tuple[int, ...]: Annotated[tuple[Positive, ...], Field(strict=False)]}
_OF_UNET: Any = {
    field.name: (_TYPES.get(field.type, field.type), field.default)
    for field in fields(UNetConfig)
    if field.name not in ("in_channels", "out_channels", "targets", "given")
}


class NetworkSettings(create_model("_OfUNet", __base__=StrictSettings, **_OF_UNET)):  # type: ignore[misc]
    """Shape of the network: the fields of `cwdm.unet.UNetConfig` that do not follow from the data, and its wavelet.

    Attributes:
        wavelet: an orthogonal one of PyWavelets.
    """

    wavelet: Annotated[str, AfterValidator(orthogonal_wavelet)] = "haar"


class OptimiserSettings(StrictSettings):
    """AdamW, with what happens to its results.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled from the gradient (Loshchilov and Hutter, 2019).
        batch_size: volumes a step, over all devices together.
        accumulate: parts that a device's share of them is computed in.
        warmup_steps: steps in which the learning rate rises from 0.
        final_lr: share of the learning rate that is left at the last step, by a cosine; 1 keeps it constant.
        ema_decay: of the running mean of the weights, which is what is saved for inference, in `newest/` and `best/`.
            The published code reads such a rate and never uses it: its checkpoints are raw weights, as in `raw/`.
        clip_norm: longest gradient; None: any.
        sharded: each of several processes keeps a part of AdamW's moments, which take twice the memory of the weights
            (ZeRO stage 1, Rajbhandari et al., 2020); the saved state is whole, for any number of processes.
    """

    lr: Number = Field(default=1e-5, gt=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    batch_size: Positive = 1
    accumulate: Positive = 1
    warmup_steps: int = Field(default=0, ge=0)
    final_lr: Number = Field(default=1.0, ge=0, le=1)
    ema_decay: Number = Field(default=0.9999, ge=0, lt=1)
    clip_norm: Number | None = Field(default=None, gt=0)
    sharded: bool = False


class LossSettings(StrictSettings):
    """What is minimised.

    Attributes:
        objective: what the network learns to predict: the clean coefficients among noise (`diffusion`), or in
            `one-pass` their mean and variance, of each modality from whichever others are given; see `cwdm.onepass`;
            or the velocity of a `flow` from the conditions to the target; see `cwdm.flow`.
        errors, beta, structure: of one pass: how errors are distributed, how much the likely large ones count, and the
            weight of 1 − SSIM; see `cwdm.training.losses`.
        brightness: of one pass: how much of a sample's mean error counts. It is the same all over a sample and large,
            as one contrast says little of how bright another is on its scanner: with less of it, steps are steadier.
        over: `coefficients` gives each of the eight subbands the same weight, as published; `voxels` weights LLL,
            which is stored divided by 3, so that the sum is the squared error of the volume.
        timestep_power: timesteps are drawn as 1000 u^(1/power) with u uniform: 1 as published, more for noisier ones,
            which are what few steps of sampling see.
        schedule: noise schedule: `linear` as published, or `cosine` (Nichol and Dhariwal, 2021), which keeps more of
            the image at most timesteps.
    """

    objective: Objective = "diffusion"
    errors: Errors = "gaussian"
    beta: Number = Field(default=0.5, ge=0, le=1)
    structure: Number = Field(default=0.0, ge=0, le=10)
    brightness: Number = Field(default=1.0, ge=0, le=1)
    over: Literal["coefficients", "voxels"] = "coefficients"
    timestep_power: Number = Field(default=1.0, gt=0, le=100)
    schedule: Annotated[str, AfterValidator(known_schedule)] = PUBLISHED.name


class RecordSettings(StrictSettings):
    """What the weights will say about themselves.

    Attributes:
        sampler: recommended for inference.
        steps: of the sampler.
        notice: what every user of their images must know.
    """

    sampler: Sampler = "ddpm"
    steps: int = Field(default=1000, ge=1, le=1000)
    notice: str = Field(default="", max_length=500)


class TrainingSettings(StrictSettings):
    """A whole run.

    Attributes:
        data: what is trained on.
        out: folder of the run.
        network: its shape.
        optimiser: AdamW and the running mean.
        loss: what is minimised.
        record: what the weights will say about themselves.
        samples: volumes that the network sees, over all steps.
        steps: of the optimiser; by default as many as make up the samples.
        value_range: of the volumes that the network sees and makes.
        seed: of the first weights and of every sample.
        device: `auto` takes a GPU if there is one.
        devices: of each machine; what `torchrun` or Slurm started wins.
        nodes: machines; what `torchrun` or Slurm started wins.
        precision: `fp32` multiplies all 24 bits of float32; `tf32` leaves it to PyTorch, which as a rule rounds to 10
            bits in the convolutions on a GPU, as the published weights were trained; `bf16` keeps weights in float32
            and multiplies in bfloat16.
        noise: where a sample's noise is drawn, from its own seed: on the CPU, the same for every device, or on the
            device, which saves 32 MiB a full-size sample on the way there.
        recompute: activations of residual blocks are computed a second time instead of kept.
        log_every: steps between lines of the log.
        validate_every: steps between validations.
        save_minutes: between states from which the run can go on; they are written while it trains, one is written
            when it ends or is stopped, too.
        save_every: steps after which there is a state as well.
        validation_cases: at most so many are synthesised, shared among the processes, in bfloat16 with `bf16` and else
            in float32.
        validation_sampler: by default as `record` recommends if that takes at most ten steps, else dpmpp.
        validation_steps: of this sampler; by default as `record` recommends, at most ten.
    """

    data: DataSettings
    out: Folder
    network: NetworkSettings = NetworkSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    loss: LossSettings = LossSettings()
    record: RecordSettings = RecordSettings()
    samples: Positive = PUBLISHED_SAMPLES
    steps: Positive = Field(default_factory=lambda values: -(-values["samples"] // values["optimiser"].batch_size))
    value_range: Range = Field(default=[0.0, 1.0])
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Positive = 1
    nodes: Positive = 1
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    noise: Literal["cpu", "device"] = "cpu"
    recompute: bool = False
    log_every: Positive = 50
    validate_every: Positive = 10_000
    save_minutes: Number = Field(default=10.0, gt=0)
    save_every: Positive | None = None
    validation_cases: Positive = 4
    validation_sampler: Sampler | None = None
    validation_steps: int | None = Field(default=None, ge=1, le=1000)

    @model_validator(mode="after")
    def _buildable(self) -> "TrainingSettings":
        fits = self.data.condition_on == "any" and self.network.wavelet == "haar" and self.value_range[0] == 0
        if self.loss.objective == "one-pass" and (self.network.regression or not fits):
            raise ValueError(
                "loss.objective 'one-pass' needs data.condition_on 'any', the Haar wavelet and a value_range from 0, "
                "and no network.regression, as it has a prior of its own"
            )
        flow = self.loss.objective == "flow"
        if flow and (self.network.regression or not self.channels):
            raise ValueError("loss.objective 'flow' needs conditions to start at, and no network.regression")
        for name in (self.record.sampler, self.validation_sampler):
            if name is not None and name not in (FLOW_SAMPLERS if flow else OF_DIFFUSION):
                raise ValueError(f"sampler {name} does not go with loss.objective '{self.loss.objective}'")
        multiple = 2 * self.unet().size_multiple
        for name, size in (("data.window", self.data.window), ("data.crop", self.data.crop)):
            for edge in size if isinstance(size, list) else ():
                voxels, rest = divmod(edge, self.data.downsample if name == "data.window" else 1)
                if rest or voxels % multiple:
                    raise ValueError(f"{name} {size}: each must come to a multiple of {multiple} for this network")
        return self

    @property
    def validation_plan(self) -> tuple[str, int]:
        """Sampler and steps of validation."""
        record, other = self.record, "dpmpp" if self.loss.objective != "flow" else self.record.sampler
        sampler, steps = (record.sampler, record.steps) if record.steps <= FEW_STEPS else (other, FEW_STEPS)
        return self.validation_sampler or sampler, self.validation_steps or steps

    @property
    def channels(self) -> int:
        """Images that the network is given beside the noise."""
        data = self.data
        if data.layout == "brats":
            return {"others": 3, "any": 4, "nothing": 0}[data.condition_on]
        return sum(image.channels for image in (data.images or [])[1:])

    @property
    def dtype(self) -> torch.dtype:
        """What the network multiplies in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def to_record(self) -> Record:
        """What the weights say about themselves before anything is known of their training."""
        data = self.data
        window: Any = data.window if isinstance(data.window, str) else tuple(data.window)
        return Record(
            modality=ANY if data.condition_on == "any" else data.target,
            window="published" if window == PUBLISHED_WINDOW else window,
            wavelet=self.network.wavelet,
            value_range=(self.value_range[0], self.value_range[1]),
            schedule=self.loss.schedule,
            objective=self.loss.objective,
            sampler=self.record.sampler,
            steps=self.record.steps,
            notice=self.record.notice,
            most_missing=data.most_missing,
            intensities=data.intensities,
        )

    def unet(self) -> UNetConfig:
        """The network's configuration."""
        targets = 4 if self.data.condition_on == "any" else 0
        shape = self.network.model_dump(exclude={"wavelet"})
        if self.loss.objective == "one-pass":
            shape.update(out_channels=one_pass_outputs(targets), given=targets)
        return UNetConfig(in_channels=8 * (1 + self.channels), targets=targets, **shape)


_CONFIGURATIONS = files("cwdm.training") / "configs"


def ready_configurations() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _CONFIGURATIONS.iterdir() if entry.name.endswith(".yaml")
    )


def load_training_settings(config: str, overrides: list[str]) -> TrainingSettings:
    """Settings from one of the `ready_configurations` or a file, then overrides such as `optimiser.lr=1e-4`.

    Raises:
        SettingsError: no such configuration, or a key or value in it is wrong.
    """
    ready = ready_configurations()
    path = Path(str(_CONFIGURATIONS / f"{config}.yaml")) if config in ready else Path(config)
    if not is_file(path):
        raise SettingsError(f"no configuration '{config}': neither a file nor one of {', '.join(ready)}")
    return read_settings(TrainingSettings, path, overrides)
