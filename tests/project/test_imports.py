"""What `import peft_baft` and loading an adapter import: an adapter's user does not load editors, tools or a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import peft_baft
from conftest import make_model

SOURCE = Path(__file__).parents[2] / "src"
MOST_LINES = 6800  # may only fall
COUNT = """
import json, sys
from pathlib import Path
{code}
modules = [m for n, m in sys.modules.items() if n.split(".")[0].startswith("peft_baft") and getattr(m, "__file__", None)]
print(json.dumps({{m.__name__: len(Path(m.__file__).read_text("utf-8").splitlines()) for m in modules}}))
"""


def imported(code: str) -> dict[str, int]:
    """The modules of this project that some code imports, in a process of its own, with their numbers of lines."""
    run = [sys.executable, "-W", "ignore", "-c", COUNT.format(code=code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model, and an adapter on it."""
    folder = tmp_path_factory.mktemp("adapter")
    base = make_model()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = peft_baft.BaftConfig(task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


def test_loading_an_adapter_imports_the_adapter_only(folder: Path) -> None:
    found = imported(
        "from transformers import AutoModelForCausalLM\n"
        "import peft_baft\n"
        "from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(folder / 'base')!r})\n"
        f"PeftModel.from_pretrained(base, {str(folder / 'adapter')!r})"
    )
    assert "peft_baft.adapter.model" in found
    assert sum(found.values()) <= MOST_LINES
    rooms = {".".join(name.split(".")[:2]) for name in found}
    for room in ("data", "editing", "evaluation", "memory", "tools"):
        assert f"peft_baft.{room}" not in rooms
    assert not [name for name in found if name.startswith(("peft_baft_bench", "peft_baft_cli"))]


def test_the_count_would_notice_what_is_imported() -> None:
    found = imported("import peft_baft\npeft_baft.editor_for")
    assert "peft_baft.editing.baft" not in imported("import peft_baft")
    assert "peft_baft.editing.choice" in found


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    source = (SOURCE / "peft_baft" / "__init__.py").read_text("utf-8")
    checked = source[source.index("if TYPE_CHECKING") : source.index("__version__")]
    for name, module in peft_baft._LAZY.items():
        assert f"from peft_baft.{module} import " in checked
        assert name in checked and name in dir(peft_baft) and name in peft_baft.__all__
        assert getattr(peft_baft, name).__class__ is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        peft_baft.nothing  # noqa: B018
