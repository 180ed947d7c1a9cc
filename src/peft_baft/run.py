"""`python -m peft_baft.run MODULE …`: run any module or script with BaFT adapters known to PEFT.

Software that loads adapters by name, such as evaluation harnesses and servers, does not import this package, and would end in
`KeyError: 'BAFT'`.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import peft_baft  # noqa: F401  (it makes PEFT know the type)

HARNESS = "lm_eval"
USAGE = "usage: python -m peft_baft.run MODULE-or-SCRIPT.py [ARGUMENT ...]   (for example: lm_eval --model baft-hf ...)"


def main(words: list[str]) -> None:
    """Run what the first word names, with the others as its arguments.

    Raises:
        SystemExit: as the module does; with a message where there is no such module.
    """
    if not words:
        raise SystemExit(USAGE)
    name = words[0]
    sys.argv = words
    if name.endswith(".py") and Path(name).is_file():
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")
        return
    if find_spec(name.partition(".")[0]) is None:
        raise SystemExit(f"There is no module {name} here; {USAGE}")
    if name.partition(".")[0] == HARNESS:
        import peft_baft.integrations.lm_eval  # noqa: F401  (it registers the model baft-hf)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
