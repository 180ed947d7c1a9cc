"""Measure peak memory: of the CUDA device if the model is on one, otherwise of this process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # see `man 5 proc`


def reset_peak(device: torch.device) -> None:
    """Reset the peak. Does nothing where the peak is unknown: on a CPU outside Linux, and on other devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and CLEAR.exists():
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            return


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since `reset_peak` in bytes, model included; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else None
