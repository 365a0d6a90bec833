"""Quantized UNets of the embedded model on a CPU: accuracy, memory and time, in both orders of delta and quantizing.

    python -m benchmarks.quantized --prompts 512

torchao and bitsandbytes have to be installed (`pip install perflow-blocks[quant]`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes
import torch
import torchao.quantization as torchao
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from perflow_blocks import delta_to_lora, merge_delta
from perflow_blocks.delta.lora import save_lora, save_residual
from perflow_blocks.demo import perflow_pipeline, weights_directory
from perflow_blocks.demo.judge import BATCH, make_demo_set
from perflow_blocks.evaluation.measure import Row, evaluate_samplers, mean_and_error, plus_minus
from perflow_blocks.evaluation.samplers import Sampler, perflow_sampler

from .measure import Setting, time_in_turns
from .report import describe_machine, megabytes, table, write

RESULT = Path(__file__).parent / "results" / "quantized.md"
CPU = torch.device("cpu")
DELTA = weights_directory() / "perflow_delta.safetensors"
RANK = 64
STEPS = 4
SHOWN = ("accuracy %", "strict %", "PSNR dB")
ROUNDS = 20
EXACT = "float32"


def in_bitsandbytes(unet: nn.Module, make: Callable[[int, int, bool], nn.Module]) -> None:
    """Replaces the linear layers. diffusers does the same, but not without a GPU."""
    for name, layer in list(unet.named_modules()):
        if type(layer) is nn.Linear:
            quantized = make(layer.in_features, layer.out_features, layer.bias is not None)
            quantized.load_state_dict(layer.state_dict())
            unet.set_submodule(name, quantized.requires_grad_(False).to(CPU))  # which quantizes


METHODS: dict[str, Callable[[Any], object]] = {
    EXACT: lambda unet: None,
    "torchao int8": partial(torchao.quantize_, config=torchao.Int8WeightOnlyConfig()),
    "torchao int8, activations too": partial(
        torchao.quantize_, config=torchao.Int8DynamicActivationInt8WeightConfig()
    ),
    "torchao int4, groups of 32": partial(
        torchao.quantize_,
        config=torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=torchao.PerGroup(32),
        ),
    ),
    "bitsandbytes int8": partial(in_bitsandbytes, make=partial(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False)),
    "bitsandbytes nf4": partial(
        in_bitsandbytes,
        make=partial(bitsandbytes.nn.Linear4bit, quant_type="nf4", compute_dtype=torch.float32),
    ),
}


def pipeline(quantize: Callable[[Any], object], lora: Path | None) -> Any:
    """The embedded pipeline with its delta merged and then quantized, or quantized and then with the delta as LoRA."""
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if lora is None:
        merge_delta(pipe, DELTA)
    quantize(pipe.unet)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def weight_bytes(module: nn.Module) -> int:
    """Of all weights as they are held, with scales, codes and adapters."""
    return sum(map(_bytes, filter(torch.is_tensor, module.state_dict().values())))


def _bytes(tensor: Any) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def report(prompts: int, rounds: int = ROUNDS) -> str:
    """The table, and how it was made."""
    with TemporaryDirectory() as folder:
        lora, rest = Path(folder, "lora.safetensors"), Path(folder, "rest.safetensors")
        converted = delta_to_lora(DELTA, rank=RANK, keep_embeddings=False)
        save_lora(converted, lora)
        save_residual(converted, rest)
        labels, samplers, sizes = list[tuple[str, str]](), list[Sampler](), list[int]()
        for name, quantize in METHODS.items():
            for how, file, delta in (("merged", None, None), ("LoRA", lora, rest)):
                pipe = pipeline(quantize, file)
                sizes.append(weight_bytes(pipe.unet))
                samplers.append(perflow_sampler(pipe, STEPS, delta=delta, model=f"{name}, {how}"))
                labels.append((name, how))
        data = make_demo_set(prompts, references=2)
        rows = evaluate_samplers(samplers[1:], data, teacher=samplers[0], batch_size=BATCH)
        few, latents = data.prompts[:BATCH], data.latents[:BATCH]
        draws = {sampler.model: partial(_draw, sampler, few, latents) for sampler in samplers}
        times = time_in_turns(draws, Setting(device=CPU), rounds=rounds, label="time")
    exact = times[samplers[0].model]
    lines = [
        (*label, *_scores(row), megabytes(size), f"{times[sampler.model].median / exact.median:.2f}")
        for label, sampler, size, row in zip(labels, samplers, sizes, rows, strict=True)
    ]
    head = (
        f"{describe_machine(CPU)}. The embedded model in {STEPS} steps on {prompts} prompts; PSNR is to the images "
        f"of float32 with the delta merged. The delta is merged before quantizing, or goes as a LoRA of rank {RANK} "
        "onto the quantized UNet, with a residual of norms and biases. Memory is that of the UNet's weights, LoRA "
        "included; convolutions are not quantized. torchao holds 4-bit values in 8 bits on a CPU. Time is the median "
        f"over {rounds} turns of {len(few)} images at once, over that of float32, which took "
        f"{1000 * exact.median / len(few):.1f} ms an image."
    )
    return f"{head}\n\n{table(['weights', 'delta', *SHOWN, 'UNet, MB', 'time'], lines)}"


def _draw(sampler: Sampler, prompts: Sequence[str], latents: Tensor) -> Tensor:
    return sampler.draw(prompts, latents)


def _scores(row: Row) -> list[str]:
    return [plus_minus(*mean_and_error(row.scores[name])) if name in row.scores else "" for name in SHOWN]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--prompts", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of the timing (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    text = f"# Quantized UNets\n\n{report(options.prompts, options.rounds)}\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(text, options.out)
    sys.stdout.write(text)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
