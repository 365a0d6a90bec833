"""Deterministic DDIM (eta = 0, arXiv 2010.02502, eq. 12), the teacher's solver, as one linear map."""

from __future__ import annotations

from typing import Literal, get_args

from .parameterization import Scalar, window_coefficients

TeacherPredictionType = Literal["epsilon", "v_prediction"]
TEACHER_PREDICTION_TYPES: tuple[str, ...] = get_args(TeacherPredictionType)


def ddim_coefficients(alpha: Scalar, alpha_next: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(a, b) of the step `z_next = a z + b output` from the noise level abar = `alpha` to the cleaner `alpha_next`.

    `v_prediction` is v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv 2202.00512, appendix D).

    Raises:
        ValueError: an unknown teacher prediction type.
    """
    match prediction_type:
        case "epsilon":
            return window_coefficients(alpha, alpha_next, "ddim_eps")
        case "v_prediction":
            signal, sigma = alpha**0.5, (1.0 - alpha) ** 0.5
            signal_next, sigma_next = alpha_next**0.5, (1.0 - alpha_next) ** 0.5
            return signal_next * signal + sigma_next * sigma, sigma_next * signal - signal_next * sigma
        case _:
            raise ValueError(
                f"prediction_type={prediction_type!r} is no teacher type; pass a scheduler with one of "
                f"{', '.join(TEACHER_PREDICTION_TYPES)}."
            )
