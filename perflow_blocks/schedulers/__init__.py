"""Schedulers: PeRFlow's sampler and the teacher solver of the distillation."""

from .pfode_solver import PFODESolver, PFODESolverSDXL
from .scheduling_perflow import PeRFlowScheduler, PeRFlowSchedulerOutput

__all__ = ["PFODESolver", "PFODESolverSDXL", "PeRFlowScheduler", "PeRFlowSchedulerOutput"]
