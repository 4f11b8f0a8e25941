"""How a run starts: its cases, its network, and the state that it goes on from."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import default_collate

from cwdm.blocks import ResBlock
from cwdm.checkpoint import new_network
from cwdm.device import device_name
from cwdm.diffusion import SCHEDULES
from cwdm.errors import SettingsError, listed
from cwdm.files import write_json
from cwdm.onepass import OnePassUNet
from cwdm.precision import warn_of_precision
from cwdm.training import saving
from cwdm.training.cache import CachedSubject
from cwdm.training.cases import decode_all, find_all
from cwdm.training.data import Samples, assemble
from cwdm.training.launch import on_all_ranks
from cwdm.training.log import TrainingLog
from cwdm.training.priors import fit_prior, fit_regression
from cwdm.training.settings import TrainingSettings
from cwdm.training.state import Run
from cwdm.unet import UNet
from cwdm.wavelet import dwt

REGRESSION_SAMPLES = 480


def start(settings: TrainingSettings, fabric: Fabric, resume: bool) -> Run:
    """A run before its first step, or after the step of the newest state; raises what `train` does."""
    out = settings.out
    found = on_all_ranks(fabric, lambda: find_all(settings))
    if not resume and saving.states(out):
        raise SettingsError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    samples, held_out = decode_all(settings, fabric, *found)
    _check_arithmetic(settings, fabric.device, samples)
    log = on_all_ranks(fabric, lambda: TrainingLog(out / "log", fabric.is_global_zero))
    _say_what_it_is(settings, fabric, log, samples, held_out)
    state = saving.newest_whole_state(out, log.say) if resume else None
    if not saving.states(out) and (weights := saving.kept_weights(out)):
        raise SettingsError(
            f"{weights} is of a run whose states are gone, so that nothing can go on from it and a new run would "
            "replace it; move it away, or train into another folder"
        )
    torch.manual_seed(settings.seed)
    model = new_network(settings.unet(), SCHEDULES[settings.loss.schedule])
    if state is None:
        _fit_its_prior(model, samples)
    layout = torch.channels_last_3d if fabric.device.type == "cuda" else torch.contiguous_format
    # Before the optimiser: a sharded one takes the device of its processes' messages from its parameters.
    model.to(fabric.device, memory_format=layout)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if settings.recompute:
        _recompute_activations(model)
    wrapped, optimiser = fabric.setup(model, _optimiser(settings, model, fabric.world_size))
    run = Run(settings, fabric, log, samples, held_out, model, wrapped, ema, optimiser)
    if resume:
        saving.resume(run, state)
    if fabric.is_global_zero:
        write_json(out / "settings.json", settings.model_dump(mode="json"))
    return run


def _fit_its_prior(model: UNet, samples: Samples) -> None:
    """Fit what the network has for a prior, if it has one."""
    if isinstance(model, OnePassUNet):
        fit_prior(model.prior, _examples(samples))
    elif model.config.regression:
        fit_regression(model.regression, _examples(samples))


def _check_arithmetic(settings: TrainingSettings, device: torch.device, samples: Samples) -> None:
    """Raise SettingsError where the processor would train on gradients that are wrong."""
    if settings.dtype == torch.float32 or device.type != "cpu":
        return
    levels = range(1, len(settings.unet().channel_mult) + 1)
    shapes = [settings.data.crop] if settings.data.crop else [subject.shape for subject in samples.subjects]
    deep = {tuple(edge >> level for edge in shape) for shape in shapes for level in levels}
    for sizes in sorted(sizes for sizes in deep if min(sizes) <= 4):  # where libraries have code of their own
        if not bf16_gradients_are_right(sizes):
            x, y, z = sizes
            raise SettingsError(
                f"precision=bf16: this processor computes wrong gradients of a convolution of {x}×{y}×{z} voxels, "
                "which this network comes to; give precision=fp32, which is faster on most processors too, or another "
                "data.crop"
            )


def bf16_gradients_are_right(sizes: Sequence[int]) -> bool:
    """Whether this processor's bfloat16 convolutions give the gradients that float32 ones do.

    With AVX-512 BF16, oneDNN's of the weights are anything up to infinity where the first axis has two voxels.

    Args:
        sizes: voxels (X, Y, Z) of what is convolved.
    """
    noise = torch.Generator().manual_seed(0)
    x, outer = (torch.randn((1, 16, *sizes), generator=noise).bfloat16() for _ in range(2))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros((16, 16, 3, 3, 3), dtype=dtype, requires_grad=True)
        made = F.conv3d(x.to(dtype), weight, padding=1)
        gradients.append(torch.autograd.grad(made, weight, outer.to(dtype))[0].float())
    exact, found = gradients
    return bool((found - exact).norm() < 0.1 * exact.norm())  # nor where it is NaN


def _say_what_it_is(
    settings: TrainingSettings, fabric: Fabric, log: TrainingLog, samples: Samples, held_out: Sequence[CachedSubject]
) -> None:
    """What a person who looks in a week later wants to know, and what they should hear at once."""
    names = [subject.name for subject in samples.subjects]
    log.say(
        f"training on {fabric.world_size} × {device_name(fabric.device)} in {settings.precision}: {len(names)} cases, "
        f"{len(held_out)} held out, {settings.steps} steps of {settings.optimiser.batch_size} volumes"
    )
    if fabric.device.type == "cpu" and settings.device == "auto":
        log.say("warning: no GPU was found; give device=cuda to be refused instead, or device=cpu to read this no more")
    warn_of_precision(settings.dtype, fabric.device, log.say)
    learnt = {digest for subject in samples.subjects for digest in subject.digests}
    if both := [subject.name for subject in held_out if learnt & set(subject.digests)]:
        log.say(f"warning: {listed(both, 'held-out cases')} are trained on too, so their scores say nothing of others")
    if settings.data.validation_path and not held_out:
        log.say(f"warning: no case in {settings.data.validation_path} can be used, so nothing is validated")


def _examples(samples: Samples) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Coefficients of conditions and target of the run's first samples, for the network's prior.

    Learned from are those whose eight voxels all lie in the brain: at its rim every modality falls to 0 at once, which
    says much of the rim and nothing of how one modality follows from the others.
    """
    settings = samples.settings
    wavelet, background = settings.network.wavelet, settings.value_range[0]
    for n in range(REGRESSION_SAMPLES):
        sample = assemble(default_collate([samples[n]]), settings, torch.device("cpu"))
        conditions = sample["conditions"]
        outside = (conditions == background).all(1).float()
        inside = F.max_pool3d(outside, 2)[0] == 0
        yield dwt(conditions, wavelet)[0], dwt(sample["volume"], wavelet)[0], inside, int(sample["target"])


def _recompute_activations(model: UNet) -> None:
    """Residual blocks compute their activations again for the gradients, instead of keeping them."""
    for block in model.modules():
        if isinstance(block, ResBlock):
            block.forward = partial(recompute, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def _optimiser(settings: TrainingSettings, model: UNet, processes: int) -> torch.optim.Optimizer:
    """AdamW, whose moments each process keeps whole or, `sharded`, its part of."""
    options: dict[str, Any] = {"lr": settings.optimiser.lr, "weight_decay": settings.optimiser.weight_decay}
    if next(model.parameters()).device.type == "cuda":
        options["fused"] = True  # one pass over the memory; not on the CPU, where runs keep their bits
    if settings.optimiser.sharded and processes > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles optimisers when imported

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    return torch.optim.AdamW(model.parameters(), **options)
