"""What the `perflow` command takes to answer a wrong option: fresh processes, which never import torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from .measure import Setting, time_in_turns
from .report import Report, table

ROUNDS = 10
NOTHING = "`python -c pass`"
WRONG = (
    "generate star --steps 0",
    "generate star --size 67",
    "generate star --device tpu",
    "compare star --out sheet.xyz",
    "merge nowhere nowhere -o unet",
    "--help",
)
TEXT = """Wall time of a fresh process of `python -m perflow_blocks.cli` that answers a wrong option or shows the help,
beside one of Python that does nothing. {rounds} rounds in turns."""


def run(setting: Setting) -> Iterator[Report]:
    command = [sys.executable, "-m", "perflow_blocks.cli"]
    calls = {NOTHING: [sys.executable, "-c", "pass"]} | {
        f"`perflow {wrong}`": [*command, *wrong.split()] for wrong in WRONG
    }
    timings = time_in_turns(
        {name: partial(subprocess.run, call, capture_output=True) for name, call in calls.items()},
        setting,
        rounds=ROUNDS,
        label="command",
        warm_up=1,
    )
    rows = ((name, timing.milliseconds()) for name, timing in timings.items())
    text = TEXT.format(rounds=setting.rounds(ROUNDS))
    yield Report(title="A wrong option", parts=(text, table(("process", "median ms (quartiles)"), rows)))
