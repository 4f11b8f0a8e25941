"""Settings of a run, from a `parameters.yaml` and `key=value` overrides."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cwdm.strict import StrictSettings, read_settings
from cwdm.wavelet import BANDS

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"name": "ddpm", "steps": 1000},  # what the published code does
    "balanced": {"name": "dpmpp", "steps": 20},
    "fast": {"name": "dpmpp", "steps": 5},
    "mean": {"name": "mean"},
    "texture": {"name": "texture"},
}


TAU, TEXTURE_STEPS = 300, 5
"""What `texture` does unless it is told."""


def _known_sampler(name: str) -> str:
    from cwdm.samplers import known_sampler  # here and below, as networks of one pass need no samplers

    return known_sampler(name)


def _falling(timesteps: list[int]) -> list[int]:
    from cwdm.samplers import falling_timesteps

    return falling_timesteps(timesteps)


class SamplerSettings(StrictSettings):
    """How noise becomes an image; None leaves it to what the checkpoint recommends.

    In place of `name` and `steps`, `preset` may name one of `PRESETS`.

    Attributes:
        name: ddpm (published), ddim or dpmpp, or their shortcuts mean and texture; euler or heun for flows.
        steps: network evaluations, spread evenly over the schedule; of texture, those below `tau`.
        timesteps: an explicit falling list within 999 to 0, overrides `steps`.
        tau: of texture: the timestep that the mean is noised to; None: `TAU`.
        bands: of texture: the subbands that get it; None: all but LLL.
    """

    name: Annotated[str, AfterValidator(_known_sampler)] | None = None
    steps: int | None = Field(default=None, ge=1, le=1000)
    timesteps: Annotated[list[int], AfterValidator(_falling)] | None = None
    tau: int | None = Field(default=None, ge=1, le=998)
    bands: list[Literal[BANDS]] | None = Field(default=None, min_length=1)  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "preset" not in values:
            return values
        preset, others = values["preset"], {key: value for key, value in values.items() if key != "preset"}
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}")
        if others:
            raise ValueError(f"preset {preset} says name and steps itself; leave out {', '.join(map(str, others))}")
        return PRESETS[preset]

    @model_validator(mode="after")
    def _of_one_sampler(self) -> "SamplerSettings":
        if self.name != "texture" and (self.tau or self.bands):
            raise ValueError("tau and bands belong to name: texture")
        if self.name == "mean" and (self.steps or self.timesteps):
            raise ValueError("mean takes neither steps nor timesteps")
        if self.tau and self.timesteps:
            raise ValueError("timesteps say tau themselves: it is their second")
        return self


class OutputSettings(StrictSettings):
    """What is written.

    Attributes:
        intensity: "native" maps the result onto the nearest contrast's clipping range; "unit" leaves [0, 1].
        background: "mask" zeroes what is outside the brain of the conditions, "threshold" what is at or below
            `threshold` (of the unit range), "none" nothing.
        orient: bring cases stored in another orientation to the one the weights know, and back.
    """

    intensity: Literal["native", "unit"] = "native"
    background: Literal["mask", "threshold", "none"] = "mask"
    threshold: float = Field(default=0.04, ge=0, le=1)
    orient: bool = True


class Settings(StrictSettings):
    """Everything that decides what a case's output looks like.

    Attributes:
        seed: of the one generator that each case gets, so results depend on neither order nor sharding.
        precision: auto is bf16 on a GPU that has it and float32 elsewhere.
        noise: "cpu" draws the same noise for a seed whatever the device; "device" draws it on the GPU, which saves time
            with ddpm, as that draws at every step, and gives other samples.
        samples: more than one writes their mean; the spread goes to the report folder.
    """

    seed: int = Field(default=42, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    noise: Literal["cpu", "device"] = "cpu"
    samples: int = Field(default=1, ge=1, le=1000)
    sampler: SamplerSettings = SamplerSettings()
    output: OutputSettings = OutputSettings()


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings from a YAML file (may be empty, every key optional), then overrides such as `sampler.steps=10`.

    Raises:
        SettingsError: not readable, not YAML, an unknown key, or a value of the wrong type or range.
    """
    return read_settings(Settings, path, overrides)
