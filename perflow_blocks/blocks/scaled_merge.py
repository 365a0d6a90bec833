"""The step that merges a delta, at another scale where a call names none."""

from __future__ import annotations

from dataclasses import replace

from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from .merge_delta import PeRFlowMergeDeltaStep


class PeRFlowScaledMergeDeltaStep(PeRFlowMergeDeltaStep):
    """The step that merges a delta, with another default of `delta_scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    @property
    def inputs(self) -> list[InputParam]:
        return [
            replace(given, default=self.scale) if given.name == "delta_scale" else given for given in super().inputs
        ]
