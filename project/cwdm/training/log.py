"""What a person sees of a training run: TensorBoard's scalars and pictures, and lines beside the progress bar."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from cwdm.errors import OutputError
from cwdm.files import output_errors
from cwdm.progress import printable, to_stderr
from cwdm.wavelet import BANDS


class TrainingLog:
    """TensorBoard's scalars and pictures, and the line beside the progress bar."""

    def __init__(self, folder: Path, active: bool) -> None:
        # The queue holds more than one call of `write` puts in: a full one would block, were its thread dead.
        self.folder = folder
        self.writer: Any = None
        if active:
            with output_errors(folder):
                self.writer = SummaryWriter(str(folder), max_queue=1000)
        self.console = to_stderr()
        self.console.quiet = not active
        self.line = ""
        self.bad_in_a_row = 0
        self._start_window()

    def _start_window(self) -> None:
        """Forget the steps that were written."""
        self._waited = 0.0
        self._bands: list[Tensor] = []
        self._t: list[Tensor] = []
        self._norms: list[float] = []
        self._bad = self._volumes = 0
        self._since = time.perf_counter()

    def go_on_after(self, step: int) -> None:
        """Have TensorBoard forget what a run that was killed logged of the steps that come now."""
        if self._alive():
            self.writer.file_writer.add_event(
                Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))  # as its own `purge_step` does
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside the block is spent on waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def say(self, line: str) -> None:
        """Show a line above the progress bar."""
        self.console.print(printable(line), markup=False, soft_wrap=True)

    def add(self, bands: Tensor, t: Tensor, norm: float, finite: bool) -> None:
        """Errors (B, 8) at timesteps (B,) of one step, and its gradient's norm; what is not finite only counts."""
        self._volumes += len(bands)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if not finite:
            self._bad += 1
            return
        self._bands.append(bands)
        self._t.append(t)
        self._norms.append(norm)

    def write(self, step: int, steps: int, lr: float) -> None:
        """Means since the last call, over the steps that were finite.

        Args:
            step: the last one.
            steps: of the whole run.
        """
        elapsed = time.perf_counter() - self._since
        rate, waiting = self._volumes / elapsed, self._waited / elapsed
        memory_gib = (
            torch.cuda.max_memory_allocated() / 2**30 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
        scalars = {"lr": lr, "volumes a second": rate, "share of time waiting": waiting, "memory GiB": memory_gib}
        scalars.update({"steps not finite": self._bad}, **self._means())
        if self._alive():
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        self.line = f"loss {scalars['loss']:.4g}" if self._bands else "no finite loss"
        self.line += f", {self._bad} of {self._bad + len(self._bands)} steps not finite" if self._bad else ""
        left_s = (steps - step) * elapsed / (self._bad + len(self._bands))
        if not self.console.is_terminal:
            self.say(
                f"step {step}: {self.line}, {rate:.3g} volumes a second, waiting {waiting:.0%}, {memory_gib:.1f} GiB, "
                f"{timedelta(seconds=round(left_s))} to go"
            )
        self._start_window()

    def _means(self) -> dict[str, float]:
        """Losses and the gradient's norm; nothing where no step was finite."""
        if not self._bands:
            return {}
        bands, t = torch.cat(self._bands), torch.cat(self._t)
        means = {"loss": float(bands.mean()), "gradient norm": float(np.mean(self._norms))}
        means.update(
            {f"loss by subband/{name}": float(value) for name, value in zip(BANDS, bands.mean(0), strict=True)}
        )
        for start in range(0, 1000, 250):
            inside = (t >= start) & (t < start + 250)
            if inside.any():
                means[f"loss by timestep/{start} to {start + 249}"] = float(bands[inside].mean())
        return means

    def scores(self, step: int, mean_psnr: float, mean_ssim: float) -> None:
        """Means of a validation."""
        if self._alive():
            self.writer.add_scalar("validation/PSNR dB", mean_psnr, step)
            self.writer.add_scalar("validation/SSIM", mean_ssim, step)
        self.say(f"step {step}: validation PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.4f}")

    def picture(self, step: int, name: str, truth: Any, synthesis: Any) -> None:
        """Middle slices: truth, synthesis, difference."""
        if not self._alive():
            return
        middle = truth.shape[2] // 2
        slices = [volume[:, :, middle].T for volume in (truth, synthesis, np.abs(truth - synthesis))]
        self.writer.add_image(f"validation/{name}", np.clip(np.concatenate(slices, axis=1), 0, 1)[None], step)

    def _alive(self) -> bool:
        """Whether there is a file to write to; raises OutputError if its thread died, of a full disk most likely."""
        if self.writer and not self.writer._get_file_writer().event_writer._worker.is_alive():
            raise OutputError(f"cannot write to {self.folder}; is the disk full? Free some space and resume")
        return self.writer is not None

    def close(self) -> None:
        """Write what is left."""
        with suppress(OSError, OutputError):  # what went wrong before is what should be heard
            if self._alive():
                self.writer.close()
