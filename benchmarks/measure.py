"""Time, measured in turns so that a drift of the machine meets every contender alike; and peak memory."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

Run = Callable[[], object]
Name = TypeVar("Name")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the parts are run.

    Attributes:
        device: what is measured on.
        quick: a dry run: tiny models and two rounds, whose figures say nothing.
        seconds: the time budget of the part `sdxl`.
    """

    device: torch.device
    quick: bool = False
    seconds: float = 240.0

    def rounds(self, full: int) -> int:
        return 2 if self.quick else full


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, two at least."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def milliseconds(self) -> str:
        """The median and the quartiles in ms, for a table."""
        first, third = (_digits(1000 * value) for value in self.quartiles)
        return f"{_digits(1000 * self.median)} ({first} to {third})"


def time_in_turns(
    contenders: Mapping[Name, Run],
    setting: Setting,
    *,
    rounds: int,
    label: str,
    warm_up: int = 2,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timing]:
    """Runs every contender once a round, each round beginning with another one.

    Args:
        contenders: what is timed, by name.
        setting: the device whose queued work is waited for, and whether this is a dry run.
        rounds: of a full run.
        label: of the progress bar.
        warm_up: untimed calls of each before the first round.
        now: the clock that is read, in seconds.
    """
    rounds, names = setting.rounds(rounds), list(contenders)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for _, name in itertools.product(range(min(warm_up, rounds)), names):
        contenders[name]()
    with _few_objects_to_collect():
        for turn in tqdm(range(rounds), desc=label, unit="round", dynamic_ncols=True):
            gc.collect()
            for k in range(len(names)):
                name = names[(turn + k) % len(names)]
                seconds[name].append(clock(contenders[name], setting.device, now))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@contextmanager
def _few_objects_to_collect() -> Iterator[None]:
    """Spares the garbage collector all that lives already, so that it takes no time between the rounds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def rounds_within(
    seconds: float, contenders: Mapping[Any, Run], device: torch.device, *, fewest: int, most: int
) -> int:
    """How many rounds of all contenders fit into the time, judged by one call of each."""
    a_round = sum(clock(run, device) for run in contenders.values())
    return min(max(fewest, int(seconds / max(a_round, 1e-9))), most)


def clock(run: Run, device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, with all that it queued on the device, and without Python's garbage collection."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        _wait(device)
        began = now()
        run()
        _wait(device)
        return now() - began
    finally:
        if collecting:
            gc.enable()


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes of tensors that were live at once during the call, above those live before it.

    On CUDA the allocator's own count. On the CPU the sum over the allocations and releases that torch's profiler sees,
    scratch memory inside operators among them; buffers that a kernel library keeps for itself are not seen.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
