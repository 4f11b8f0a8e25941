"""The record of a network: what the header of our safetensors says about it."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import safetensors
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    field_validator,
    model_serializer,
)
from torch import Tensor

from cwdm.errors import WeightsError, listed
from cwdm.files import open_file, parse_json
from cwdm.unet import UNetConfig

if TYPE_CHECKING:
    from cwdm.diffusion import Schedule

HEADER_KEY = "cwdm"
FORMAT = 1
"""Number of the header's format, which grows when an older version would misread a file; the first files have none."""

ANY = "any"


def orthogonal_wavelet(name: str) -> str:
    """The name, if it is one of an orthogonal wavelet of PyWavelets; raises ValueError."""
    if name == "haar":
        return name
    import pywt  # here, as Haar, which nearly all networks have, needs none of it

    if name not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(name).orthogonal:
        raise ValueError(f"{name!r} is no orthogonal wavelet of PyWavelets")
    return name


Objective = Literal["diffusion", "one-pass", "flow"]
Contrast = Annotated[str, Field(pattern="^(t1n|t1c|t2w|t2f)$")]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Edge = Annotated[int, Field(ge=2, le=1024)]


class Record(BaseModel):
    """What a network is for and how it came about; the header of our safetensors.

    Attributes:
        modality: what a conditional network synthesises, `ANY` for one that is told which of the four;
            None where the file does not say.
        window: voxels that the network was trained on: `published`, a size, or `brain` for the box around the brain.
        orientation: voxel order of an unconditional network's volumes: LPS, to which our training brings every file,
            or LAS, in which WDM's authors store CT.
        value_range: range that the predicted volume is clamped to at every step.
        schedule: noise schedule that the network was trained with, one of `cwdm.diffusion.SCHEDULES`.
        objective: what the network was trained to predict: clean coefficients among noise (`diffusion`), their mean and
            variance in `one-pass`, or the velocity of a `flow`.
        sampler, steps: what the makers of the weights recommend.
        notice: what every user of the outputs must know, such as "trained on phantoms, not for clinical use".
        most_missing: how many of the four modalities may be missing at once, the target included.
        intensities: what of an image becomes 0 and 1 for the network, see `cwdm.images.clip_range`.
        intended_use: what the weights are for and what not, in a sentence; empty if nobody said.
        licence: of the weights, such as "CC-BY-4.0"; empty if nobody said.
        calibration: by what the standard deviation that a network of one pass predicts of a modality is multiplied, so
            that errors of patients it was not trained on are as large; 1 where nothing stands.
        training: free-form record of the training run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    modality: str | None = Field(default=None, max_length=64)
    window: Literal["published", "brain"] | tuple[Edge, Edge, Edge] = "published"
    wavelet: str = "haar"
    orientation: Literal["LPS", "LAS"] = "LPS"
    value_range: tuple[float, float] = (0.0, 1.0)
    schedule: str = "linear"
    objective: Objective = "diffusion"
    sampler: str = "ddpm"
    steps: int = Field(default=1000, ge=1, le=1000)
    notice: str = Field(default="", max_length=500)
    most_missing: int = Field(default=1, ge=1, le=3)
    intensities: Literal["published", "brain"] = "published"
    intended_use: str = Field(default="", max_length=500)
    licence: str = Field(default="", max_length=100)
    calibration: dict[Contrast, Factor] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def trained_on(self) -> dict[str, Any]:
        """The `data` settings of our training run; empty if the file does not say."""
        settings = self.training.get("settings")
        data = settings.get("data") if isinstance(settings, dict) else None
        return data if isinstance(data, dict) else {}

    @property
    def one_pass(self) -> bool:
        """Whether the network predicts mean and variance in one pass, so that there is nothing to sample."""
        return self.objective == "one-pass"

    @property
    def noise_schedule(self) -> "Schedule":
        """What `schedule` names."""
        from cwdm.diffusion import SCHEDULES  # here and below, as networks of one pass know no noise

        return SCHEDULES[self.schedule]

    def to_range(self, unit: Tensor) -> Tensor:
        """Volumes in [0, 1], in the `value_range` that the network sees and makes."""
        low, high = self.value_range
        return unit * (high - low) + low

    def from_range(self, values: Tensor) -> Tensor:
        """The inverse of `to_range`."""
        low, high = self.value_range
        return (values - low) / (high - low)

    @model_serializer(mode="wrap")
    def _without_the_unsaid(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        unsaid: dict[str, Any] = {"intended_use": "", "licence": "", "objective": "diffusion"}
        unsaid |= {"intensities": "published", "calibration": {}}
        return {name: value for name, value in values.items() if value != unsaid.get(name, ...)}

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        if name == "linear":
            return name
        from cwdm.diffusion import known_schedule

        return known_schedule(name)

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str) -> str:
        if name == "ddpm":
            return name
        from cwdm.samplers import known_sampler

        return known_sampler(name)

    @field_validator("value_range")
    @classmethod
    def _rising(cls, value_range: tuple[float, float]) -> tuple[float, float]:
        if not -1e6 < value_range[0] < value_range[1] < 1e6:
            raise ValueError(f"not a range of values: {value_range}")
        return value_range

    @field_validator("wavelet")
    @classmethod
    def _orthogonal(cls, name: str) -> str:
        return orthogonal_wavelet(name)


def read_record(path: Path) -> Record:
    """What a file of weights says about itself, without its weights; of other formats than ours, what holds for all.

    Raises:
        WeightsError: the file is damaged.
    """
    if path.suffix != ".safetensors":
        return Record()
    try:
        open_file(path).close()  # a pipe would make the library wait for ever
        with safetensors.safe_open(path, framework="pt") as file:
            return parse_header((file.metadata() or {}).get(HEADER_KEY))[1]
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def parse_header(text: str | None) -> tuple[UNetConfig, Record]:
    if text is None:
        raise WeightsError(
            f"the header has no '{HEADER_KEY}' entry, so the architecture is unknown; "
            "make such files with 'cwdm weights convert' or 'cwdm train'"
        )
    try:
        header = parse_json(text)
        _check_format(header)
        config, record = _config_type.validate_python(header["config"]), Record.model_validate(header["record"])
        if record.one_pass != (config.given > 0):
            raise ValueError(f"a network for {config.given} given images, and the objective {record.objective}")
        if record.objective == "flow" and (config.regression or config.in_channels <= config.out_channels):
            raise ValueError("a flow starts at conditions, and has no regression")
        if record.one_pass and record.wavelet != "haar":
            raise ValueError("a network of one pass needs the Haar wavelet")
        if record.calibration and not record.one_pass:
            raise ValueError("a network of several passes predicts no standard deviation that could be calibrated")
        return config, record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"the header of the file cannot be understood: {error}") from error


def _check_format(header: Any) -> None:
    """Refuse what a newer version wrote and this one would misread."""
    number, found = header.get("format", 0), ""
    if number > FORMAT:
        found = f"format {number}, this version reads up to {FORMAT}"
    elif unknown := [*(set(header["config"]) - _CONFIG_FIELDS), *(set(header["record"]) - set(Record.model_fields))]:
        found = f"its header has {listed(sorted(unknown), 'unknown fields')}"
    elif (objective := header["record"].get("objective", "diffusion")) not in get_args(Objective):
        found = f"trained by an unknown objective, {objective!r}"
    if found:
        raise WeightsError(f"written by a newer cwdm ({found}); pip install --upgrade cwdm")


_config_type = TypeAdapter(UNetConfig)
_CONFIG_FIELDS = {field.name for field in fields(UNetConfig)}
