"""Weights on disk: the published `.pt` files and our safetensors, both checked before any of them is trusted.

Our files carry everything needed to use them in their header: the network's configuration, the modality, the
wavelet, the recommended sampler and the training record. The published files carry nothing, so the architecture
is read off the names and shapes of their tensors (`cwdm.published`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import safetensors
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    field_validator,
    model_serializer,
)
from torch import Tensor

from cwdm.diffusion import PUBLISHED, SCHEDULES, Schedule, known_schedule
from cwdm.errors import WeightsError, listed
from cwdm.files import open_file, parse_json, sha256
from cwdm.samplers import known_sampler
from cwdm.unet import UNet, UNetConfig

HEADER_KEY = "cwdm"
FORMAT = 1
"""Number of the header's format, which grows when an older version would misread a file; the first files have none."""

ANY = "any"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    schedule: Annotated[str, AfterValidator(known_schedule)] = PUBLISHED.name
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

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
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


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode with its record, where it came from, and what its users must be told."""

    model: UNet
    record: Record
    path: Path = Path()
    sha256: str = ""
    warnings: tuple[str, ...] = ()


def load_published(state_dict: Mapping[str, Tensor], config: UNetConfig | None = None) -> UNet:
    """Network with the weights of a published state dict.

    Args:
        config: None to read it off names and shapes, which do not tell the GroupNorms' groups: 32, as published.

    Raises:
        WeightsError: tensors are missing, left over or of the wrong shape; the message lists them.
    """
    # Here and for files of theirs alone, as our own need none of it.
    from cwdm.published import published_config, published_names

    if unnamed := [repr(name) for name in state_dict if not isinstance(name, str)]:
        raise WeightsError(f"expected a plain state dict of names and tensors, found {listed(unnamed)}")
    bad = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if bad:
        raise WeightsError(f"expected a plain state dict of tensors, found other objects under {listed(bad)}")
    config = config or published_config({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    model = _empty(config)
    names = published_names(model)
    _check_tensors(
        expected={name: tuple(model.get_parameter(ours).shape) for name, ours in names.items()},
        found={name: tuple(tensor.shape) for name, tensor in state_dict.items()},
    )
    return _fill(model, {ours: state_dict[name] for name, ours in names.items()})


def new_network(config: UNetConfig, schedule: Schedule = PUBLISHED) -> UNet:
    """The network of a configuration, with its first weights."""
    if config.given:  # here, as other networks need none of it
        from cwdm.onepass import OnePassUNet

        return OnePassUNet(config)
    return UNet(config, schedule)


def _empty(config: UNetConfig, schedule: Schedule = PUBLISHED) -> UNet:
    """The network without memory for its weights, so that a crafted file can't make us allocate any."""
    with torch.device("meta"):
        return new_network(config, schedule)


def _fill(model: UNet, tensors: Mapping[str, Tensor]) -> UNet:
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if odd:
        raise WeightsError(f"expected floating-point numbers, found others in {listed(odd)}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"NaN or infinity in {listed(broken)}; the file is damaged or its training diverged")
    # Copies, because the file behind a memory map may be replaced while the weights are in use.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval().requires_grad_(False)


def _check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {"missing": missing, "left over": left_over, "of the wrong shape": wrong}
    if any(faults.values()):
        raise WeightsError("; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names))


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint, `.safetensors` or published `.pt`.

    Raises:
        WeightsError: not readable, damaged, of another architecture, or a pickle that holds more than tensors.
    """
    path = Path(path)
    try:
        _check_regular(path)
        model, record = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
        return Checkpoint(model, record, path, sha256(path))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_regular(path: Path) -> None:
    """Raise WeightsError where there is no file, OSError where it is none that the libraries can read to its end."""
    try:
        open_file(path).close()
    except FileNotFoundError as error:
        raise WeightsError("no such weights file") from error


def save(
    path: Path | str,
    model: UNet,
    record: Record,
    dtype: torch.dtype = torch.float32,
    before: Callable[[str], None] | None = None,
) -> None:
    """Write our safetensors, whole or not at all; `dtype` may be float16 or bfloat16 to halve the size.

    Args:
        before: told the file's sha256 before it has its name.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_tensors(Path(path), tensors, model.config, record, before)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: UNetConfig,
    record: Record,
    before: Callable[[str], None] | None = None,
) -> None:
    """Write our safetensors like `save`, of a network's tensors by name."""
    from cwdm.safetensors_file import write_tensors  # here, as whoever reads weights needs none of it

    shape = asdict(config)
    for name in ("given", "products"):
        if not shape[name]:
            del shape[name]  # unknown to older versions, which read all other networks
    header = {"format": FORMAT, "config": shape, "record": record.model_dump(mode="json")}
    write_tensors(path, tensors, {"format": "pt", HEADER_KEY: json.dumps(header)}, before)


def _load_safetensors(path: Path) -> tuple[UNet, Record]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config, record = _parse_header((file.metadata() or {}).get(HEADER_KEY))
            model = _empty(config, SCHEDULES[record.schedule])
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            _check_tensors(expected, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
            return _fill(model, {name: file.get_tensor(name) for name in expected}), record
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({error}); copy or download it again") from error


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


def _load_pickle(path: Path) -> tuple[UNet, Record]:
    from cwdm.published import PUBLISHED_CT, read_tensors

    model = load_published(read_tensors(path))
    if model.config.in_channels > model.config.out_channels:
        return model, Record()
    return model, Record(value_range=(-1.0, 1.0), orientation="LAS" if path.name.startswith(PUBLISHED_CT) else "LPS")


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
            return _parse_header((file.metadata() or {}).get(HEADER_KEY))[1]
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def _parse_header(text: str | None) -> tuple[UNetConfig, Record]:
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


_config_type = TypeAdapter(UNetConfig)
_CONFIG_FIELDS = {field.name for field in fields(UNetConfig)}
