"""The most memory that a stretch of work holds: of a CUDA device where the model lies on one, else of this process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # see `man 5 proc`


def begin_peak(device: torch.device) -> None:
    """Forget what was held before. Nothing happens where a peak cannot be known: outside Linux, on other devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and CLEAR.exists():
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            return


def peak(device: torch.device) -> int | None:
    """Tell how many bytes were held at most since `begin_peak`, the model's own included; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else None
