"""`python -m peft_baft.run MODULE …`: run a module or script after registering the BaFT adapter type with PEFT.

Software that loads adapters by name, such as evaluation harnesses and servers, does not import this package, and would fail with
`KeyError: 'BAFT'`.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import peft_baft  # noqa: F401  (registers the adapter type with PEFT)

HARNESS = "lm_eval"
USAGE = "usage: python -m peft_baft.run MODULE-or-SCRIPT.py [ARGUMENT ...]   (for example: lm_eval --model baft-hf ...)"


def main(arguments: list[str]) -> None:
    """Run the module or script named by the first argument, and pass it the other arguments.

    Raises:
        SystemExit: if the module raises it, or with a message if there is no such module.
    """
    if not arguments:
        raise SystemExit(USAGE)
    name = arguments[0]
    sys.argv = arguments
    if name.endswith(".py") and Path(name).is_file():
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")
        return
    if find_spec(name.partition(".")[0]) is None:
        raise SystemExit(f"There is no module {name} here; {USAGE}")
    if name.partition(".")[0] == HARNESS:
        import peft_baft.integrations.lm_eval  # noqa: F401  (registers the model baft-hf)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
