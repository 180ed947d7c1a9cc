"""docs/architectures.md says of each architecture what `peft_baft.check` finds."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers as tr

import peft_baft
from peft_baft.tools.check.check import ATTACHED
from peft_baft.tools.check.trials import FAST
from tiny_models import model_types, tiny_model
from tiny_tokenizer import REPLY, default_edit, default_edit_lowers_its_loss, tiny_tokenizer

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


# Plain ones, with windows, with experts, with recurrent states, without max_position_embeddings.
EDITED = [
    "llama", "gpt2", "gemma3_text", "gpt_neox", "opt", "mixtral", "deepseek_v3", "qwen3_5", "jamba", "bamba", "minimax", "mamba",
    "qwen3_next", "zamba2", "mpt",
]  # fmt: skip
# Their contrast texts are answered one by one; Dory runs a block several times in each forward.
WITHOUT_LEFT_PADDING = ["bart", "rwkv", "whisper", "dory"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_LEFT_PADDING]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # as above
@pytest.mark.parametrize("name", [*EDITED, *SLOW])
def test_an_edit_with_default_settings_lowers_its_loss(name: str) -> None:
    assert default_edit_lowers_its_loss(tiny_model(name))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # as above
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "jamba", "bamba", "minimax"])
def test_a_token_whose_hidden_vector_is_zero_stops_no_edit(name: str) -> None:
    """A recurrent block maps the embedding of a padding token, which is zero, to zero; an attention block does not."""
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    reply = tokenizer(REPLY)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[reply] = 0
    result = default_edit(model)
    assert all(math.isfinite(loss) for loss in result.losses.values()), result


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
