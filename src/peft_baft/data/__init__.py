"""Facts as values, read from files: no model, no device."""

from peft_baft.data.cases import Case, Edit, Probe, Unrelated
from peft_baft.data.datasets import read_cases, read_unrelated

__all__ = ["Case", "Edit", "Probe", "Unrelated", "read_cases", "read_unrelated"]
