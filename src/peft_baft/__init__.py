"""BaFT for PEFT: an adapter that changes what a language model knows (arXiv 2503.00306).

Importing this package makes PEFT know the adapter type `BAFT`. For models that have such an adapter, `PeftModel` writes a card of
this package's own (`integrations/peft_methods.py`), and loads and saves all of an adapter or nothing (`adapter/peft_model.py`);
transformers' `load_adapter` checks such an adapter before it changes the model (`adapter/native.py`).
"""

from importlib.util import find_spec

from peft_baft.adapter import BaftConfig, BaftModel, prompt_lengths
from peft_baft.adapter.state import rolled_back
from peft_baft.data.cases import Case, Edit, Probe, Unrelated
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.baft import BaftEditor, Objective
from peft_baft.editing.choice import editor_for
from peft_baft.editing.continual import EditRecord, edit_continually
from peft_baft.editing.editor import Editor, EditResult
from peft_baft.editing.journal import Journal
from peft_baft.editing.presets import PRESETS, Preset
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import DescentConfig
from peft_baft.evaluation.guard import canary_check
from peft_baft.integrations.hub import push
from peft_baft.integrations.peft_methods import install
from peft_baft.loading import load_model
from peft_baft.tools.check.check import check
from peft_baft.tools.check.findings import CheckReport, Finding

__version__ = "0.1.0"
install()

__all__ = [
    "GENERAL",
    "NARROW",
    "PRESETS",
    "AdapterEditor",
    "BaftConfig",
    "BaftEditor",
    "BaftModel",
    "Case",
    "CheckReport",
    "DescentConfig",
    "Edit",
    "EditRecord",
    "EditResult",
    "Editor",
    "Finding",
    "Journal",
    "Objective",
    "Preset",
    "Probe",
    "Scope",
    "Unrelated",
    "canary_check",
    "check",
    "edit_continually",
    "editor_for",
    "load_model",
    "prompt_lengths",
    "push",
    "read_cases",
    "read_unrelated",
    "rolled_back",
]

# Kinds of adapters besides plain BaFT, each a folder that can be deleted.
if find_spec("peft_baft.memory"):
    from peft_baft.memory import MemoryConfig, MemoryEditor

    __all__ += ["MemoryConfig", "MemoryEditor"]
