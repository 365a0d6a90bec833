"""Every message that `docs/troubleshooting.md` quotes is provoked, and must be as the page says."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, ModularPipeline
from diffusers.utils import logging as diffusers_logging

from perflow_blocks import PeRFlowModularPipeline, PeRFlowSDXLAutoBlocks, StepCallbackStep, insert_loop_block
from perflow_blocks import push_workflow
from perflow_blocks.testing import tiny_mask, tiny_picture
PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^```text\n(.+)\n```$", PAGE.read_text(), flags=re.MULTILINE)
