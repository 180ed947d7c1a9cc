"""Arguments that several commands share, and what a value must be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

# Names that stand in tables of peft_baft, repeated here since importing those takes seconds; a test compares them.
PRESETS = ("default", "llama-2-7b", "llama-3-8b", "gemma-7b")
METHODS = ("none", "reft", "ss-w", "ba-w", "ss-w-lr", "baft", "lora", "adalora", "table4")
METRICS = ("fluency", "redundancy", "gates", "sentiment")
TEMPLATES = ("raw", "chat")
SCHEDULES = ("single", "continual", "batched")
WHEN = ("after_all", "immediate")
SPLITS = ("blocks", "facts")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_SEED = 2**63 - 1  # torch takes no more


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of argument: a whole number from `least` to `most`."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"wanted a whole number {bounds}, not {text!r}")
        return value

    return convert


def number_above_zero(text: str) -> float:
    """A type of argument: a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, such as 0.002, not {text!r}")
    return value


def share(text: str) -> float:
    """A type of argument: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, such as 0.95, not {text!r}")
    return value


def measures(text: str) -> list[str]:
    """A type of argument: names of further metrics, with commas."""
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    return chosen


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_model_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Which base model, and how it is loaded."""
    group = parser.add_argument_group("the model")
    hint = "" if required else "; by default the one that the adapter was made for"
    group.add_argument("--model", required=required, help=f"Hub id, local folder, GGUF file, or smollm2{hint}")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model's weights; default: auto")
    group.add_argument("--device", help="such as cpu or cuda:1, or auto for all; by default cuda where there is one")


def add_adapter_arguments(parser: Any, required: bool, text: str) -> None:
    """An adapter that exists."""
    parser.add_argument("--adapter", required=required, help=text)
    parser.add_argument("--adapter-revision", metavar="REV", help="branch, tag or commit of an adapter on the Hub")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """How an edit is trained."""
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=PRESETS, default="default", help="settings by name")
    group.add_argument("--r", type=whole_number(1), help="rank of a new adapter")
    group.add_argument("--lr", type=number_above_zero, help="learning rate")
    group.add_argument("--max-steps", type=whole_number(1), help="at most so many steps an edit")
    group.add_argument(
        "--unrelated", metavar="FILE", help="text to leave alone while training: a file, `general` or `none`"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes share the work."""
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        metavar="N",
        help="fail unless N processes run; start them with torchrun --nproc_per_node N -m peft_baft.cli ...",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Machine-readable output."""
    parser.add_argument("--json", action="store_true", help="write one JSON object to standard output, nothing else")
