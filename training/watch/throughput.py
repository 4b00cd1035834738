"""How fast a run is, where its time goes, and when it will be done, without waiting for the device at every step."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAKS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, None),
    "H100": (989.4e12, 66.9e12),
    "H200 NVL": (835e12, None),
    "H200": (989.4e12, 66.9e12),
    "B200": (2250e12, None),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, None),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165.2e12, 82.6e12),
}
"""Dense floating-point operations per second in bfloat16 or float16, and in float32 without TF32, by a part of the
card's name, special ones first. Data sheets double the former for sparse matrices. Source: torchtitan,
tools/utils.py, and Lightning, fabric/utilities/throughput.py, which cite the data sheets; of the RTX 4090, NVIDIA Ada
GPU architecture, appendix A."""
OTHER_CARDS = re.compile(r"\b(MIG|Laptop|D)\b")
"""Parts and slower variants of cards with the same names."""

SMOOTHING = 0.3
"""Weight of the newest step time in the average from which the remaining time is computed."""


def peak_flops(name: str, precision: str) -> float | None:
    """Peak floating-point operations per second of a card as CUDA names it; None if unknown.

    The precision is accelerate's `mixed_precision`: "no", "bf16" or "fp16".
    """
    known = next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    if known is None or OTHER_CARDS.search(name):
        return None
    if precision in ("bf16", "fp16"):
        return known[0]
    return known[1] if precision == "no" and torch.get_float32_matmul_precision() == "highest" else None


class Throughput:
    """Measures speed between one reading and the next, in images of a `batch_size` over all processes.

    It does not wait for the device at every step. Times are right if the caller has just waited for it, as reading a
    loss does. The first step is left out because it compiles, tunes and fills caches. The device's `peak`, in
    floating-point operations per second, is looked up by its name and accelerate's `mixed_precision`, unless given.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        device: torch.device,
        precision: str = "no",
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if peak is None and device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), precision)
        self._batch_size, self._device, self._peak, self._clock = batch_size, device, peak, clock
        self._flops = 0
        self._step_seconds: float | None = None
        self._since: float | None = None  # until the first step is done
        self._steps, self._waited = 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """To be put around the wait for the next batch."""
        begin = self._clock()
        yield
        self._waited += self._clock() - begin

    @contextmanager
    def counting(self) -> Iterator[None]:
        """To be put around the forward and backward passes of every part of a step.

        Counts the operations of the run's first step, if the device's peak is known. In that step compiled modules run
        uncompiled, because compiled code cannot be counted. Passes that checkpointing repeats count as well.
        """
        if self._peak is None or self._since is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops += counter.get_total_flops()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """To be put around what is not part of a step: evaluations and checkpoints."""
        begin = self._clock()
        yield
        if self._since is not None:
            self._since += self._clock() - begin

    def step_done(self) -> None:
        """Must be called after every step."""
        if self._since is None:
            self._restart()
        else:
            self._steps += 1

    def read(self, *, left: int = 0) -> dict[str, float]:
        """What was measured since the last reading; after the first step only memory.

        Args:
            left: Steps that remain.

        Returns:
            `images_per_second`; `data_wait`, share of the time in [0, 1]; `eta_seconds` of the steps that are left,
            without evaluations; `memory_gib`, the most in use so far (tensors on the GPU, or else the process's
            resident memory); and on a known GPU `mfu`, share of its peak in [0, 1].
        """
        measures = {"memory_gib": self._memory() / 2**30}
        if self._since is None or not self._steps:
            return measures
        seconds = max(self._clock() - self._since, 1e-9)
        step_seconds = seconds / self._steps
        old = step_seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = old + SMOOTHING * (step_seconds - old)
        measures["images_per_second"] = self._batch_size / step_seconds
        measures["data_wait"] = self._waited / seconds
        measures["eta_seconds"] = left * self._step_seconds
        if self._flops and self._peak:
            measures["mfu"] = self._flops / step_seconds / self._peak
        self._restart()
        return measures

    def _restart(self) -> None:
        self._since, self._steps, self._waited = self._clock(), 0, 0.0

    def _memory(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
