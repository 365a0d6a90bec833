"""PeRFlow's sampler behind the interface of a diffusers scheduler."""

from __future__ import annotations

import functools
from collections.abc import ItemsView, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.noise_schedule import alpha_at, make_alphas_cumprod
from ..core.parameterization import (
    PREDICTION_TYPES,
    Scalar,
    WindowAlpha,
    chord_marginal_coefficients,
    window_alpha,
    window_table,
)
from ..core.step_plan import (
    EarlierStep,
    StepPlan,
    apply_step,
    build_step_plan,
    second_order_step,
    select_row,
    truncated_timestep,
)
from ..core.windows import TimeWindows, require_positive_int, tile_windows

logger = logging.get_logger(__name__)

NOISE_SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""The settings that a PeRFlow student shares with the scheduler of the model it was distilled from."""

# Cached, since pipelines set the same schedule again at every call. The tensors are never written to.
_cached_alphas = functools.lru_cache(maxsize=32, typed=True)(make_alphas_cumprod)
_cached_plan = functools.lru_cache(maxsize=128)(build_step_plan)

NOISINGS = ("chord", "marginal")
"""How `noise_coefficients` noises an image."""

OWN_TYPE, BASE_TYPE = "_perflow_prediction_type", "_base_prediction_type"
"""Keys of the configuration: the scheduler's own `prediction_type`, and that of the base model if it is not `epsilon`.
Other classes keep keys with an underscore, so that `from_config` leads there and back."""

OWN_ORDER = "_perflow_solver_order"
"""The key for this class's `solver_order`, a name that multistep schedulers use for a setting of their own."""

STATE_FILE, STATE_VERSION = "scheduler_state.safetensors", 1


@dataclass
class PeRFlowSchedulerOutput(BaseOutput):
    """The sample at the end of a step, and the clean sample predicted there; both (batch, channels, height, width)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def is_perflow_scheduler(scheduler: object) -> bool:
    """Whether it is a `PeRFlowScheduler`, also one of a self-contained workflow, whose class is another object."""
    return any(kind.__name__ == "PeRFlowScheduler" for kind in type(scheduler).__mro__)


class _ConfigOfOtherBase(FrozenDict):
    """The configuration of a scheduler whose base model does not predict `epsilon`.

    `from_config` of other classes reads `items`, which give the base's `prediction_type`. Indexing, attributes, copies
    and `dict(config)` give PeRFlow's.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "_use_default_values": []})
        object.__setattr__(self, "prediction_type", self["prediction_type"])  # FrozenDict takes it from `items`

    def items(self) -> ItemsView[str, Any]:
        return {**self, "prediction_type": self[BASE_TYPE]}.items()

    __repr__ = dict.__repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class PeRFlowScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampler of piecewise rectified flow (arXiv 2405.07510) for text-to-image and image-to-image pipelines.

    `step` moves no counter, so a run may start at any timestep. With `solver_order=1` it is a pure function of its
    arguments and of the plan that `set_timesteps` made. `make_plan` and `plan_from` change nothing, so threads may
    share a scheduler through them.

    `from_config(scheduler.config)` of another class takes over the noise schedule and the other settings of the
    scheduler which this one was made from, with its `prediction_type`, such as `v_prediction`, else `epsilon`.

    Args:
        num_train_timesteps: training timesteps T; the timestep T is pure noise.
        beta_start, beta_end: the first and the last beta, in (0, 1).
        beta_schedule: `linear`, `scaled_linear` or `squaredcos_cap_v2`.
        trained_betas: T betas that replace the schedule above.
        set_alpha_to_one: end the last window at abar = 1 instead of `alphas_cumprod[0]`, which published models use.
        prediction_type: what the UNet predicts: `ddim_eps` (SDXL), `diff_eps` (SD 1.5) or `velocity` (SD 2.1).
        num_time_windows: number of equal windows the model was distilled with.
        window_boundaries: descending times from `t_noise` to `t_clean` for unequal windows. They decide the number of
            windows, and `config.num_time_windows` follows them.
        t_noise, t_clean: continuous times where sampling starts, in (0, 1], and ends, in [0, 1).
        solver_order: 1 for Euler steps, as published, or 2, which improves runs of more steps than windows at no cost:
            each step but the first of its window builds on the one before (Adams-Bashforth).
        theta: (num_time_windows, 2), relative corrections of each window's steps: `z' = (1 + theta_0) A z +
            (1 + theta_1) B output`. None is no correction. `calibrate_theta` fits it.

    Raises:
        ValueError: unknown types or schedules, betas outside (0, 1), windows that do not tile (t_clean, t_noise], or
            a theta that is not finite or not of this shape.
    """

    config_name = SCHEDULER_CONFIG_NAME
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012  (SchedulerMixin declares it this way)
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        set_alpha_to_one: bool = False,
        prediction_type: str = "ddim_eps",
        num_time_windows: int = 4,
        window_boundaries: Sequence[float] | None = None,
        t_noise: float = 1.0,
        t_clean: float = 0.0,
        solver_order: int = 1,
        theta: Sequence[Sequence[float]] | Tensor | None = None,
    ) -> None:
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order={solver_order!r} must be 1 or 2.")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}, "
                f'for example PeRFlowScheduler.from_config(config, prediction_type="{PREDICTION_TYPES[0]}").'
            )
        boundaries = None if window_boundaries is None else tuple(map(float, window_boundaries))
        self.windows: TimeWindows = tile_windows(
            num_windows=num_time_windows,
            boundaries=boundaries,
            t_noise=t_noise,
            t_clean=t_clean,
            num_train_timesteps=num_train_timesteps,
        )
        with torch.device("cpu"):
            self._alphas = _cached_alphas(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=None if trained_betas is None else tuple(map(float, trained_betas)),
            )
        self.alphas_cumprod: Tensor = self._alphas.float()
        self.final_alpha_cumprod: float = 1.0 if set_alpha_to_one else float(self._alphas[0])
        self._rows = window_table(self.windows, self._alphas, final_alpha_cumprod=self.final_alpha_cumprod)
        if boundaries is not None:  # a list and a matching count, so that the saved JSON reads back as it is
            self.register_to_config(window_boundaries=list(boundaries), num_time_windows=len(boundaries) - 1)
        self.set_theta(theta)
        # `from_config` of another class skips the keys listed here, and so gets its own defaults.
        own = {OWN_TYPE: prediction_type, OWN_ORDER: solver_order}
        self.register_to_config(**{"_use_default_values": ["prediction_type", "solver_order"], **own})
        self.plan: StepPlan | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = torch.arange(num_train_timesteps, 0, -1)
        self._coefficients: Tensor = torch.empty(0, 5)
        self._earlier: EarlierStep | None = None

    @property
    def config(self) -> Any:
        """The settings, also as attributes; `config.prediction_type` is what the distilled UNet predicts."""
        own = self._internal_dict
        return _ConfigOfOtherBase(own) if BASE_TYPE in own else own

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; this class's `prediction_type` and `solver_order` come back from what another class kept.

        A `solver_order` of another class is not taken over.
        """
        if isinstance(config, Mapping):
            known = [kind for kind in map(config.get, ("prediction_type", OWN_TYPE)) if kind in PREDICTION_TYPES]
            if known:
                kwargs.setdefault("prediction_type", known[0])
            # Of another class it would be that of a multistep method.
            own = "solver_order" if config.get("prediction_type") in PREDICTION_TYPES else OWN_ORDER
            kwargs.setdefault("solver_order", config.get(own, 1))
            kept = {key: config[key] for key in config if key not in (OWN_TYPE, BASE_TYPE, OWN_ORDER)}
            config = {**kept, **_base_type(config)}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_scheduler(
        cls, scheduler: ConfigMixin | Mapping[str, Any] | None = None, **overrides: Any
    ) -> PeRFlowScheduler:
        """A PeRFlow scheduler with the noise schedule of another scheduler, or of its config.

        Unlike `from_config` it neither inherits a foreign `prediction_type` nor drops values that were defaults of the
        other class. That type and other settings that this class does not have, such as `timestep_spacing`, are kept
        in the configuration, unused, for the way back. `rescale_betas_zero_snr` is ignored, with a warning: abar = 0
        makes a window singular.

        Args:
            scheduler: any diffusers scheduler with betas, its config, or None for the defaults of this class.
            overrides: settings of this class; they replace those taken over.

        Raises:
            ValueError: the source has no betas (a flow-matching scheduler), or the settings are invalid.
        """
        config: Mapping[str, Any] = scheduler.config if isinstance(scheduler, ConfigMixin) else scheduler or {}
        taken = {key: config[key] for key in NOISE_SCHEDULE_KEYS if key in config}
        if scheduler is not None and not {"beta_schedule", "trained_betas"} & {*taken, *overrides}:
            name = config.get("_class_name", type(scheduler).__name__)
            raise ValueError(f"scheduler={name} has no betas to take over; add beta_schedule=, or use scheduler=None.")
        if config.get("rescale_betas_zero_snr"):
            logger.warning("rescale_betas_zero_snr is not supported by PeRFlow and is ignored.")
        made = cls(**{**taken, **overrides})
        made.register_to_config(**settings_of_others(config))
        return made

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers. Theta is in the configuration, and if it is set also in `scheduler_state.safetensors`."""
        file = Path(save_directory) / STATE_FILE
        if self._theta is None:
            file.unlink(missing_ok=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({f"perflow.{k}": torch.as_tensor(v) for k, v in self.state_dict()["perflow"].items()}, file)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in diffusers. Theta that the configuration lacks comes from `scheduler_state.safetensors` beside it."""
        made = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        file = Path(pretrained_model_name_or_path, subfolder or "", STATE_FILE)
        scheduler = made[0] if isinstance(made, tuple) else made
        if file.is_file() and scheduler.config.theta is None and "theta" not in kwargs:
            state = {name.removeprefix("perflow."): value for name, value in load_file(file).items()}
            scheduler.load_state_dict({"perflow": state})
        return made

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """`{"perflow": {...}}` with the corrections and the windows that they are for.

        `theta` (num_time_windows, 2), zeros where none is set, and `segment_boundaries` (num_time_windows + 1,) are
        float64 tensors, `segments` (the number of windows) and `version` integers.
        """
        theta = torch.tensor(self._theta or ((0.0, 0.0),) * self.windows.num_windows, dtype=torch.float64)
        boundaries = torch.tensor(self.windows.boundaries, dtype=torch.float64)
        windows = {"segments": self.windows.num_windows, "segment_boundaries": boundaries}
        return {"perflow": {"theta": theta, **windows, "version": STATE_VERSION}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], strict: bool = True) -> list[str]:
        """Sets theta from what `state_dict` returned, for plans made after this call. Zeros unset it.

        For pipelines of this package, whose blocks make the scheduler, use `pipe.update_components(theta=...)`.

        Args:
            state: of a scheduler with the same windows, which are compared, not loaded.
            strict: whether anything that does not fit is an error. If not, a theta of the right shape is loaded.

        Returns:
            The names of the entries that are missing, unknown, of another shape, or of other windows.

        Raises:
            ValueError: a theta that is not finite, or with `strict` any such entry. The scheduler is then as it was.
        """
        own, given = self.state_dict()["perflow"], dict(state.get("perflow") or {})
        wrong = own.keys() ^ given.keys()
        for name in own.keys() & given.keys():
            mine, other = torch.as_tensor(own[name]), _as_tensor(given[name])
            same = mine.shape == other.shape and (name == "theta" or torch.allclose(mine.double(), other.double()))
            wrong |= set() if same else {name}
        if wrong and strict:
            raise ValueError(
                f"{', '.join(sorted(wrong))} of the state are missing, unknown, or of other windows than "
                f"{self.windows.boundaries}; load a state of the same windows, or pass strict=False."
            )
        if "theta" not in wrong:
            self.set_theta(given["theta"] if bool(_as_tensor(given["theta"]).any()) else None)
        return sorted(wrong)

    def set_theta(self, theta: Sequence[Sequence[float]] | Tensor | None) -> None:
        """Replaces theta, for plans made after this call. After a ValueError it is as it was."""
        if theta is not None:
            count = self.windows.num_windows
            given = _as_tensor(theta)
            if given.shape != (count, 2) or not bool(given.isfinite().all()):
                shown = " ".join(str(theta).split())
                raise ValueError(f"theta={shown} must hold 2 finite numbers for each of {count} windows.")
            theta = given.tolist()  # lists of numbers, as JSON has them
        self._theta = None if theta is None else tuple(map(tuple, theta))
        self.register_to_config(theta=theta)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def make_plan(
        self, num_inference_steps: int | None = None, timesteps: Sequence[int] | Tensor | None = None
    ) -> StepPlan:
        """The steps of a run with their coefficients, on the host. The scheduler stays as it is.

        Args:
            num_inference_steps: at least 1. Fewer than the windows are raised to one per window, with a warning.
            timesteps: instead of a number: descending integers in [1, num_train_timesteps] that include the start of
                every window below the first of them.

        Raises:
            ValueError: both or neither given, or a number or timesteps that make no schedule.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(f"pass exactly one of {num_inference_steps=} and {timesteps=}.")
        windows = self.windows
        if timesteps is not None:
            times = tuple(timestep / windows.num_train_timesteps for timestep in _integers(timesteps))
        else:
            if type(num_inference_steps) is not int:  # which can be looked up
                num_inference_steps = require_positive_int("num_inference_steps", num_inference_steps)
            times = _even_times(windows, num_inference_steps)
            if num_inference_steps < (count := len(times)):
                logger.warning(f"{num_inference_steps=} is below num_time_windows={count}; {count} steps run.")
        config = self._internal_dict
        more = {"solver_order": config["solver_order"], "theta": self._theta}
        return _cached_plan(windows, self._rows, config["prediction_type"], times, **more)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Keeps the plan that `make_plan` gives for `step`, with its `timesteps` on the device."""
        plan = self.make_plan(num_inference_steps, timesteps)
        self.keep_plan(plan, torch.tensor(plan.timesteps, dtype=torch.long).to(device), plan.coefficients(device))

    def keep_plan(self, plan: StepPlan, timesteps: Tensor, coefficients: Tensor) -> None:
        """Has `step` follow a plan, with its timesteps (num_steps,) and coefficients (num_steps, 4) on the device."""
        self.plan, self.num_inference_steps = plan, len(plan)
        self.timesteps, self._coefficients, self._earlier = timesteps, coefficients, None
        if any(plan.step_ratio):
            ratios = torch.tensor(plan.step_ratio, dtype=coefficients.dtype).to(coefficients.device)
            self._coefficients = torch.cat([coefficients, ratios[:, None]], dim=1)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: the UNet of a PeRFlow model takes it unscaled."""
        return sample

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step along the window's straight line, from `timestep` to the next one of the schedule.

        With `solver_order=2` the scheduler remembers the last step until `set_timesteps` is called. If a step starts
        from a sample other than the one the last step returned, it is an Euler step. So threads must not share a
        scheduler's `step` at order 2.

        Args:
            model_output: the UNet's (guided) prediction, (batch, channels, height, width).
            timestep: one of `timesteps`, as a number or a tensor of one element. A tensor on an accelerator is
                compared there, without reading it back; if the schedule does not hold it, the result is nan.
            sample: the sample at `timestep`, of the prediction's shape and any floating type.
            return_dict: return a `PeRFlowSchedulerOutput`, else the tuple of its two fields.

        Raises:
            ValueError: no schedule yet, or a timestep (readable on the host) that is not in it.
        """
        a, b, c, d, *ratio = self._step_coefficients(timestep)
        if ratio:
            prev_sample, self._earlier = second_order_step(sample, model_output, a, b, ratio[0], self._earlier)
        else:
            prev_sample = apply_step(sample, model_output, a, b)
        pred_original_sample = apply_step(sample, model_output, c, d)
        if not return_dict:
            return prev_sample, pred_original_sample
        return PeRFlowSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The diffusion marginal sqrt(abar) x0 + sqrt(1 - abar) noise: right at window starts, off the path inside.

        Args:
            original_samples, noise: (batch, channels, height, width).
            timesteps: integers in [1, num_train_timesteps], one per row or one for all, on any device; 0 counts as 1.
        """
        index = (torch.as_tensor(timesteps).long() - 1).clamp(0, len(self) - 1)
        alpha = self.alphas_cumprod.to(index.device)[index].to(original_samples.device)
        return apply_step(original_samples, noise, alpha**0.5, (1.0 - alpha) ** 0.5)

    def add_noise_chord(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A sample on the student's path at any timestep: the chord between the marginals at its window's two ends.

        Arguments as for `add_noise`, except that 0 is the end of the last window.
        """
        t = torch.as_tensor(timesteps).to(original_samples.device, torch.float32) / len(self)
        return apply_step(original_samples, noise, *chord_marginal_coefficients(self.get_window_alpha(t), t))

    def noise_coefficients(self, plan: StepPlan, noising: str = "chord") -> Tensor:
        """(P, Q) of `P x0 + Q noise` where each step of a plan starts and where the last one ends.

        `chord` is the student's path, the straight line between the marginals at a window's ends; `marginal` is the
        diffusion marginal at the time itself. At the end of the last window the image stays as it is: (1, 0).
        The result is (len(plan) + 1, 2), float64 on the host.
        """
        if noising not in NOISINGS:
            raise ValueError(f"noising={noising!r} must be one of {', '.join(NOISINGS)}.")
        rows, pairs = self._rows, list[Sequence[Scalar]]()
        times = (*plan.times, plan.next_times[-1])
        for t, k in zip(times, (*plan.window_index, plan.window_index[-1]), strict=True):
            if t <= rows[-1].end:
                pairs.append((1.0, 0.0))
            elif noising == "chord":
                pairs.append(chord_marginal_coefficients(rows[k], t))
            else:
                alpha = alpha_at(self._alphas, t)
                pairs.append((alpha**0.5, (1.0 - alpha) ** 0.5))
        return torch.tensor(pairs, dtype=torch.float64)

    def plan_from(self, t: float, plan: StepPlan) -> StepPlan:
        """The plan of a run that begins at time t in (0, 1]: a step from t, then the steps of `plan` below it."""
        first = max(1, truncated_timestep(t, len(self)))
        below = (timestep for timestep in plan.timesteps if timestep < first)
        return self.make_plan(timesteps=[first, *below])

    def get_window_alpha(self, t: Scalar) -> WindowAlpha:
        """The window of each continuous time in [0, 1]: numbers for a number, tensors like t for a floating tensor."""
        return window_alpha(self.windows, self._rows, t)

    def _step_coefficients(self, timestep: float | Tensor) -> Sequence[Scalar]:
        """A, B, C, D of a timestep, and the ratio in a plan of second order: numbers, or tensors of its device."""
        plan = self.plan
        if plan is None:
            raise ValueError("The scheduler has no schedule yet; call set_timesteps before step.")
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            table, timesteps = self._coefficients.to(timestep.device), self.timesteps.to(timestep.device)
            return select_row(table, timesteps, timestep).unbind()
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep of shape {tuple(timestep.shape)} must be one timestep for the whole batch.")
        value = timestep.reshape(1).tolist()[0] if isinstance(timestep, Tensor) else timestep
        if value not in plan.timesteps:
            raise ValueError(f"timestep={value} must be in {list(plan.timesteps)}; call set_timesteps for others.")
        i = plan.timesteps.index(value)
        euler = (plan.sample_coeff[i], plan.output_coeff[i], plan.x0_sample_coeff[i], plan.x0_output_coeff[i])
        return (*euler, plan.step_ratio[i]) if any(plan.step_ratio) else euler


def _as_tensor(values: Any) -> Tensor:
    """Numbers in any form as float64; an empty tensor where they are none."""
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0)


@functools.lru_cache(maxsize=128)
def _even_times(windows: TimeWindows, wanted: int) -> tuple[float, ...]:
    return windows.distribute_steps(max(require_positive_int("num_inference_steps", wanted), windows.num_windows))


def settings_of_others(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a scheduler's configuration that PeRFlow does not use, but for its class's defaults.

    The base's `prediction_type` is among them, under `BASE_TYPE`, if it is not `epsilon`.
    """
    own = {*PeRFlowScheduler._get_init_keys(PeRFlowScheduler), *config.get("_use_default_values", ())}
    others = {key: config[key] for key in config if key not in own and not key.startswith("_")}
    return {**others, **_base_type(config)}


def _base_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the base model predicts, as an entry for the configuration, where that is not `epsilon`."""
    kind = config.get("prediction_type")
    base = config.get(BASE_TYPE) if kind in PREDICTION_TYPES else kind
    return {} if base in (None, "epsilon") else {BASE_TYPE: base}


def _integers(timesteps: Sequence[int] | Tensor) -> tuple[int, ...]:
    try:
        values = torch.as_tensor(timesteps).tolist()
    except (RuntimeError, TypeError, ValueError):
        values = None
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ValueError(f"timesteps={timesteps!r} must be a list of integers, such as [1000, 750, 500, 250].")
    return tuple(values)
