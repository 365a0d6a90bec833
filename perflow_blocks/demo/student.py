"""The student of the demo: the package's trainer with the demo's settings, as a stage that can be broken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..atomic_files import atomic_path
from ..training.checkpoints import REPORT
from ..training.config import load_config
from ..training.distillation import distill, require_possible
from ..training.loop import Observer, Progress, Session

SETTINGS = Path(__file__).parent / "distill.toml"
SETTINGS_NAME = "settings.json"


def distil_student(base: Path, run: Path, settings: Path = SETTINGS) -> None:
    """Distils the model in `base` into `run`, from the last checkpoint there; does nothing where that is finished.

    Args:
        base: the teacher, a folder for each part; its weights are taken as they are stored.
        run: directory of the student, its delta, checkpoints and report.
        settings: a file as `perflow distill` takes it; teacher, directory and resumption do not count.

    Raises:
        ValueError: `run` is of other settings.
        ConfigError: with everything that stands in the way, before anything is written.
    """
    given = load_config(settings)
    kept = run / SETTINGS_NAME
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != given.model_dump(mode="json"):
        raise ValueError(f"{run} was distilled with other settings; remove it, or pass another --out.")
    if (run / REPORT).exists():  # what is written last
        return
    config = given.changed({"model.teacher": str(base), "output.directory": str(run), "output.resume": "latest"})
    require_possible(config)
    with atomic_path(kept) as temporary:
        temporary.write_text(json.dumps(given.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    with tqdm(desc="student", unit="step", total=config.optimizer.max_steps) as bar:
        distill(config, [_Bar(bar)])


class _Bar(Observer):
    """Shows how far the training is, like the bars of the other stages."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def started(self, session: Session, step: int) -> None:
        self._bar.initial = step
        self._bar.update(step)

    def updated(self, session: Session, step: int) -> None:
        self._bar.update()

    def read(self, progress: Progress) -> None:
        self._bar.set_postfix(loss=f"{progress.loss:.4f}")
