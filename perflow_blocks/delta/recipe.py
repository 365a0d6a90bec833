"""The sampling settings that a delta was distilled for, as they travel in a file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..core.parameterization import PREDICTION_TYPES
from ..core.windows import require_positive_int, tile_windows
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS, PeRFlowScheduler

PREFIX = "perflow."

ARCHITECTURE_KEY = PREFIX + "architecture"
"""In a file's metadata: `architecture_of` the model that the delta was extracted from."""


def require_guidance(value: object) -> None:
    """Raises the ValueError for a guidance scale that is no finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"guidance_scale={value!r} is no finite number of at least 0; pass 1 for no guidance.")


def noise_schedule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's configuration says about betas and training timesteps; the rest of it is left out."""
    return {key: config[key] for key in NOISE_SCHEDULE_KEYS if config.get(key) is not None}


@dataclass(frozen=True)
class DeltaRecipe:
    """What to sample with. None means that the delta does not say, so that the pipeline's own default holds.

    Attributes:
        prediction_type: "ddim_eps", "diff_eps" or "velocity".
        num_time_windows: the number K of windows.
        window_boundaries: K + 1 descending times from 1 to 0, where the windows are not equal.
        num_inference_steps: recommended steps.
        guidance_scale: recommended classifier-free guidance, 1 for none; at least 0.
        base_model: repository or description of the model that dW was taken from.
        base_sha256: SHA-256 of that model's file, 64 hexadecimal digits.
        scheduler_config: the noise schedule it was distilled on, as a scheduler's configuration: beta_start, beta_end,
            beta_schedule, num_train_timesteps, trained_betas; other keys are left alone.

    Raises:
        ValueError: a value outside its range, or boundaries and a number of windows that disagree.
    """

    prediction_type: str | None = None
    num_time_windows: int | None = None
    window_boundaries: tuple[float, ...] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    base_model: str | None = None
    base_sha256: str | None = None
    scheduler_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.prediction_type is not None and self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={self.prediction_type!r} is unknown; pass one of {', '.join(PREDICTION_TYPES)}."
            )
        for name in ("num_time_windows", "num_inference_steps"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        if self.guidance_scale is not None:
            require_guidance(self.guidance_scale)
        if self.base_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.base_sha256):
            raise ValueError(f"base_sha256={self.base_sha256!r} is no SHA-256; pass 64 hexadecimal digits, or None.")
        if self.scheduler_config is not None:
            self._require_noise_schedule()
        if self.window_boundaries is not None:
            windows = tile_windows(num_windows=1, boundaries=self.window_boundaries)
            object.__setattr__(self, "window_boundaries", windows.boundaries)
            if self.num_time_windows not in (None, windows.num_windows):
                raise ValueError(
                    f"num_time_windows={self.num_time_windows} disagrees with the {windows.num_windows} windows of "
                    f"window_boundaries={list(windows.boundaries)}; name one of them."
                )

    def _require_noise_schedule(self) -> None:
        if not isinstance(self.scheduler_config, dict):
            raise ValueError(f"scheduler_config={self.scheduler_config!r} is no mapping; pass a scheduler's config.")
        try:
            PeRFlowScheduler(**self.noise_schedule())
        except (TypeError, ValueError) as error:
            raise ValueError(f"scheduler_config={self.scheduler_config!r} is no noise schedule: {error}") from error

    def noise_schedule(self) -> dict[str, Any]:
        """What `scheduler_config` says about betas and training timesteps, as settings of a `PeRFlowScheduler`."""
        return noise_schedule_of(self.scheduler_config or {})

    def to_metadata(self) -> dict[str, str]:
        """The settings that are not None, as strings under "perflow." keys: text as it is, the others in JSON."""
        return {
            PREFIX + name: value if isinstance(value, str) else json.dumps(value)
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> DeltaRecipe:
        """The inverse of `to_metadata`; keys that are no setting are left alone.

        Raises:
            ValueError: a value that cannot be read or is out of range.
        """
        known = {field.name for field in fields(cls)}
        values = {name: metadata[PREFIX + name] for name in known if PREFIX + name in metadata}
        text = {"prediction_type", "base_model", "base_sha256"}
        parsed: dict[str, Any] = {n: value if n in text else _number(n, value) for n, value in values.items()}
        return cls(**parsed)


def _number(name: str, value: str) -> Any:
    """A number, or a tuple of numbers, from JSON; its other values are refused where the recipe checks its fields."""
    try:
        parsed = json.loads(value)
        return tuple(float(entry) for entry in parsed) if name == "window_boundaries" else parsed
    except (ValueError, TypeError) as error:
        raise ValueError(f"{PREFIX}{name}={value!r} is no number or list of numbers; save the delta again.") from error
