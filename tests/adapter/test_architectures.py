"""docs/architectures.md says of each architecture what `peft_baft.check` finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers as tr

import peft_baft
from peft_baft.checking.check import ATTACHED
from peft_baft.checking.trials import FAST
from tiny_models import model_types, tiny_model

TABLE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| (?P<model>\w+) \| (?P<result>[\w ]+) \| (?P<fast>[^|]*) \|", re.M
)
ROWS = {row["name"]: row for row in ROW.finditer(TABLE) if row["name"] != "architecture"}
# Of each kind some: plain, window, experts, several classes of blocks, recurrent, encoder's decoder, picture, both directions.
SAMPLE = [
    "llama", "gemma3_text", "mixtral", "deepseek_v3", "gpt_neox", "jamba", "zamba2", "qwen3_next", "mamba", "rwkv", "bart",
    "mllama", "bert", "bert (is_decoder=True)", "gemma3n_text", "xlnet",
]  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of other libraries' rarer models
@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_a_check_finds(name: str) -> None:
    architecture, _, decoder = name.partition(" ")
    model = tiny_model(architecture, **({"is_decoder": True} if decoder else {}))
    report = peft_baft.check(model)
    row = ROWS[name]
    assert row["model"] == type(model).__name__
    if row["result"] == "refused":
        assert [finding.name for finding in report.findings] == [ATTACHED] and not report.ok
    else:
        assert row["result"] == "whole" and report.ok, str(report)
    if f"transformers {tr.__version__}," in TABLE and report.ok:
        assert (report[FAST].holds is True) == (row["fast"].strip() == "yes"), str(report)


def test_no_architecture_of_the_table_fails() -> None:
    assert len(ROWS) > 180 and {row["result"] for row in ROWS.values()} == {
        "whole",
        "refused",
        "not tried",
    }


@pytest.mark.skipif(
    f"transformers {tr.__version__}," not in TABLE, reason="the table is of another transformers"
)
def test_the_table_has_every_architecture_of_the_installed_transformers() -> None:
    assert set(model_types()) <= set(ROWS)
