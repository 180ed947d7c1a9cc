"""BaFT for PEFT: an adapter that changes what a language model knows (arXiv 2503.00306).

Importing this package makes PEFT know the adapter type `BAFT`, and imports what loading an adapter needs; everything else is
imported when it is first used. For models that have such an adapter, `PeftModel` writes this package's model card
(`integrations/peft_methods.py`), and loads and saves all of an adapter or nothing (`adapter/peft_model.py`); transformers'
`load_adapter` checks such an adapter before it changes the model (`adapter/native.py`).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peft_baft.adapter import BaftConfig, BaftModel, prompt_lengths
from peft_baft.adapter.kinds import register_module
from peft_baft.adapter.state import rolled_back
from peft_baft.integrations.peft_methods import install

if TYPE_CHECKING:
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
    from peft_baft.loading import load_model
    from peft_baft.memory import MemoryConfig, MemoryEditor
    from peft_baft.tools.check.check import check
    from peft_baft.tools.check.findings import CheckReport, Finding

__version__ = "0.1.0"

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

# Modules of the public names that are imported when they are first used (PEP 562).
_LAZY = {
    "GENERAL": "data.unrelated",
    "NARROW": "editing.scope",
    "PRESETS": "editing.presets",
    "AdapterEditor": "editing.adapter_editor",
    "BaftEditor": "editing.baft",
    "Case": "data.cases",
    "CheckReport": "tools.check.findings",
    "DescentConfig": "editing.train",
    "Edit": "data.cases",
    "EditRecord": "editing.continual",
    "EditResult": "editing.editor",
    "Editor": "editing.editor",
    "Finding": "tools.check.findings",
    "Journal": "editing.journal",
    "Objective": "editing.baft",
    "Preset": "editing.presets",
    "Probe": "data.cases",
    "Scope": "editing.scope",
    "Unrelated": "data.cases",
    "canary_check": "evaluation.guard",
    "check": "tools.check.check",
    "edit_continually": "editing.continual",
    "editor_for": "editing.choice",
    "load_model": "loading",
    "push": "integrations.hub",
    "read_cases": "data.datasets",
    "read_unrelated": "data.datasets",
}

# Kinds of adapters other than plain BaFT, each a folder that can be deleted.
if find_spec("peft_baft.memory"):
    register_module("memory", "peft_baft.memory")
    _LAZY |= {"MemoryConfig": "memory", "MemoryEditor": "memory"}
    __all__ += ["MemoryConfig", "MemoryEditor"]


install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
