"""`baft ask`."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps

from peft_baft.cli.common import adapter_config, attach_adapter, chosen_model, default_device, load_base, require_device
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft_cli.screen import doing, print_table


def ask(
    prompts: Sequence[str],
    adapter: str,
    *,
    adapter_revision: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_new_tokens: int = 16,
    json: bool = False,
) -> int:
    """Print the greedy answers to `prompts` without and with the edits; the exit code.

    Args:
        adapter: a folder or a Hub id. model: by default the one that the adapter was made for. json: print JSON.
    """
    device = default_device(device)
    require_device(device)
    name, revision = chosen_model(model, revision, adapter_config(adapter, adapter_revision))
    with doing(f"loading {name}"):
        base, tokenizer = load_base(name, revision, dtype, device)
    with doing("asking"):
        without = greedy_answers(base, tokenizer, prompts, max_new_tokens)
        edited = attach_adapter(base, adapter, adapter_revision)
        answers = greedy_answers(edited, tokenizer, prompts, max_new_tokens)
    rows = list(zip(prompts, without, answers, strict=True))
    if json:
        _print_json(name, adapter, rows)
    else:
        print_table(("prompt", "without the edits", "with the edits"), rows)
    return 0


def _print_json(model: str, adapter: str, rows: Sequence[tuple[str, str, str]]) -> None:
    answers = [{"prompt": prompt, "without": without, "with": edited} for prompt, without, edited in rows]
    print(dumps({"model": model, "adapter": adapter, "answers": answers}, indent=2))
