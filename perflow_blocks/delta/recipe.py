"""The sampling settings that a delta was distilled for, as they travel in a file's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from ..core.noise_schedule import make_alphas_cumprod
from ..core.parameterization import PREDICTION_TYPES
from ..core.windows import tile_windows
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS

PREFIX = "perflow."
_TEXT = ("prediction_type", "base_model")


def require_guidance(value: object) -> None:
    """Raises ValueError unless a guidance scale is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"guidance_scale={value!r} must be a finite number of at least 0; 1 means no guidance.")


def noise_schedule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's configuration about betas and training timesteps."""
    return {key: config[key] for key in NOISE_SCHEDULE_KEYS if config.get(key) is not None}


@dataclass(frozen=True)
class DeltaRecipe:
    """What to sample with. None means that the delta does not say, so the pipeline's default holds.

    Attributes:
        prediction_type: "ddim_eps", "diff_eps" or "velocity".
        num_time_windows: the number K of windows, at most the number of training timesteps.
        window_boundaries: K + 1 descending times from 1 to 0, where the windows are not equal.
        num_inference_steps: recommended steps, at most the number of training timesteps.
        guidance_scale: recommended classifier-free guidance, 1 for none; at least 0.
        base_model: repository or description of the model that dW was taken from.
        scheduler_config: the noise schedule it was distilled on, as a scheduler's configuration: beta_start, beta_end,
            beta_schedule, num_train_timesteps, trained_betas. Other keys are ignored.
        solver_order: 1 or 2, the scheduler's.
        theta: (K, 2) finite numbers, the scheduler's corrections. A file holds them as the tensor `perflow.theta`.

    Raises:
        ValueError: a value outside its range, or boundaries and a number of windows that disagree.
    """

    prediction_type: str | None = None
    num_time_windows: int | None = None
    window_boundaries: tuple[float, ...] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    base_model: str | None = None
    scheduler_config: dict[str, Any] | None = None
    solver_order: int | None = None
    theta: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.prediction_type is not None and self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}.")
        if self.guidance_scale is not None:
            require_guidance(self.guidance_scale)
        try:
            schedule = self.noise_schedule()
            timesteps = len(make_alphas_cumprod(**schedule)) if schedule else 1000
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"scheduler_config={self.scheduler_config!r} is not a noise schedule: {error}") from error
        for name in ("num_time_windows", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= timesteps):
                raise ValueError(f"{name}={value!r} must be an integer from 1 to {timesteps}, the training timesteps.")
        if self.solver_order not in (None, 1, 2):
            raise ValueError(f"solver_order={self.solver_order!r} must be 1 or 2.")
        if self.theta is not None:
            try:
                rows = tuple((float(a), float(b)) for a, b in self.theta)
            except (TypeError, ValueError):
                rows = ()
            boundaries = self.window_boundaries
            count = (self.num_time_windows or 4) if boundaries is None else len(boundaries) - 1
            if len(rows) != count or not all(map(math.isfinite, sum(rows, ()))):
                raise ValueError(f"theta={self.theta} must hold 2 finite numbers for each of {count} windows.")
            object.__setattr__(self, "theta", rows)
        if self.window_boundaries is None:
            return
        windows = tile_windows(num_windows=1, boundaries=self.window_boundaries, num_train_timesteps=timesteps)
        object.__setattr__(self, "window_boundaries", windows.boundaries)
        if self.num_time_windows not in (None, windows.num_windows):
            raise ValueError(
                f"num_time_windows={self.num_time_windows} disagrees with the {windows.num_windows} windows of "
                f"window_boundaries={list(windows.boundaries)}; give one of the two."
            )

    def noise_schedule(self) -> dict[str, Any]:
        """What `scheduler_config` says about betas and training timesteps, as settings of a `PeRFlowScheduler`."""
        return noise_schedule_of(self.scheduler_config or {})

    def scheduler_settings(self) -> dict[str, Any]:
        """Settings of the `PeRFlowScheduler` to sample with: `from_scheduler(pipe.scheduler, **settings)`."""
        names = ("prediction_type", "num_time_windows", "window_boundaries", "solver_order", "theta")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**self.noise_schedule(), **given}

    def to_metadata(self) -> dict[str, str]:
        """The settings that are not None, as strings under "perflow." keys: text as it is, the others in JSON."""
        given = {PREFIX + name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> DeltaRecipe:
        """The inverse of `to_metadata`; other keys are ignored.

        Raises:
            ValueError: a value that cannot be read or is out of range.
        """
        values: dict[str, Any] = {}
        try:
            for name in (field.name for field in fields(cls)):
                if (value := metadata.get(PREFIX + name)) is not None:
                    values[name] = value if name in _TEXT else json.loads(value)
            return cls(**values)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON ({error}); save the delta again.") from error
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{values} holds a value of the wrong type ({error}); save the delta again.") from error
