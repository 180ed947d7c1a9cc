"""Facts and the probes that test them, as plain values and as read from files. Nothing here needs a model."""

from peft_baft.data.cases import Case, Edit, Probe, Unrelated
from peft_baft.data.datasets import read_cases, read_unrelated

__all__ = ["Case", "Edit", "Probe", "Unrelated", "read_cases", "read_unrelated"]
