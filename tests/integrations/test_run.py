"""The launcher runs a script or a module to which BaFT adapters are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_baft import run

SCRIPT = """
import json, sys
from peft import PeftType
import beside
print(json.dumps([sys.argv[1:], "BAFT" in PeftType.__members__, beside.NAME, __name__]))
"""


def test_a_script_gets_its_arguments_and_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    words = [str(tmp_path / "script.py"), "--model", "x"]
    done = subprocess.run(
        [sys.executable, "-m", "peft_baft.run", *words], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [["--model", "x"], True, "beside", "__main__"]


def test_a_module_runs_as_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit) as ended:
        run.main(["json.tool", "--help"])
    assert not ended.value.code and "json" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["no_such_module", "--model", "x"]])
def test_what_is_not_there_is_said(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="usage: python -m"):
        run.main(words)
