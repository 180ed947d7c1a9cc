"""What the commands share: arguments and tables."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig

from peft_baft import Unrelated
from peft_baft.data.datasets import read_unrelated
from peft_baft.data.unrelated import GENERAL
from peft_baft.presets import PRESETS, Preset
from peft_baft.processes import Processes


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], model_required: bool = True
) -> argparse.ArgumentParser:
    """One command that works on a model, with the arguments that all of these share."""
    parser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    parser.set_defaults(run=run)
    hint = "" if model_required else "; by default the one that --adapter was made for"
    parser.add_argument("--model", required=model_required, help=f"Hub id, local folder, GGUF file, or smollm2{hint}")
    parser.add_argument("--dtype", default="auto", help="of the base model: float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a device, or auto")
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """How an edit is trained."""
    parser.add_argument(
        "--unrelated", default="general", help="text to leave alone: a file, `general` (default) or `none`"
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="settings by name")
    parser.add_argument("--r", type=int, help="rank of a new adapter")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--max-steps", type=int, help="at most so many steps an edit")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes share the work."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="fail unless N processes run; start them with torchrun --nproc_per_node N -m peft_baft.cli ...",
    )


def described(processes: Processes, device: str, split: str) -> str:
    """Which of the ways to use several processes or devices is taken."""
    if processes.count == 1:
        return "1 process" + (": one model over all devices" if device == "auto" else "")
    if device == "auto":
        raise ValueError("--device auto spreads one model over all devices, which several processes cannot share.")
    return f"{processes.count} processes: {split} split over them"


def model_name(args: argparse.Namespace) -> str:
    """The model of the command line, or the one that the adapter was made for."""
    if args.model:
        return args.model
    name = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path if args.adapter else None
    if not name:
        raise ValueError("Say which model with --model: a Hub id, a local folder, a GGUF file, or smollm2.")
    return name


def chosen_preset(args: argparse.Namespace) -> Preset:
    """The chosen preset with what the command line overrides."""
    preset = PRESETS[args.preset]
    chosen = {name: getattr(args, name) for name in ("lr", "max_steps") if getattr(args, name) is not None}
    return replace(
        preset,
        config=preset.config | ({} if args.r is None else {"r": args.r}),
        descent=replace(preset.descent, **chosen),
        batch_descent=replace(preset.batch_descent, **chosen),
    )


def chosen_unrelated(choice: str) -> Sequence[Unrelated]:
    """The text that edits should leave alone: the package's own, none, or a file's."""
    return {"general": GENERAL, "none": ()}[choice] if choice in ("general", "none") else read_unrelated(choice)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table as wide as the terminal; longer cells are cut."""
    room = max(12, (shutil.get_terminal_size((120, 24)).columns - 3 * len(header)) // len(header) + 8)
    cells = [[cell if len(cell) <= room else cell[: room - 1] + "…" for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    print("\n" + "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n")
