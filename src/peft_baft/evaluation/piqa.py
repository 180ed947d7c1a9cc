"""PIQA: which of two ways to reach a goal a model finds more probable."""

from __future__ import annotations

from typing import Any

from peft_baft.data.formats import PiqaItem
from peft_baft.evaluation.likelihood import log_probabilities

QUESTION = "Question: {}\nAnswer:"  # as lm-evaluation-harness asks


def right_choices(model: Any, tokenizer: Any, item: PiqaItem) -> dict[str, bool]:
    """Whether the model prefers the right solution, by four rules.

    An adapter acts on the end of the prompt and on the solution. Equal values count as the first solution; values that
    are not numbers as the wrong one.

    Returns:
        accuracy: the solution of lower perplexity after the goal, as in the paper's Table 8.
        accuracy_sum: the more probable solution after the goal, longer ones having it harder.
        lm_eval_acc: the more probable solution after `QUESTION`, which is `acc` of lm-evaluation-harness.
        lm_eval_acc_norm: the same by log-probability per character, its `acc_norm`. It keeps white space around
            solutions, which is dropped here.
    """
    solutions = (item.sol1, item.sol2)
    prompts = (item.goal, QUESTION.format(item.goal))
    found = log_probabilities(model, tokenizer, [(prompt, solution) for prompt in prompts for solution in solutions])
    plain, asked = found[:2], found[2:]
    values = {
        "accuracy": [x.mean().item() for x in plain],
        "accuracy_sum": [x.sum().item() for x in plain],
        "lm_eval_acc": [x.sum().item() for x in asked],
        "lm_eval_acc_norm": [x.sum().item() / len(text.strip()) for x, text in zip(asked, solutions, strict=True)],
    }
    return {name: second > first if item.label else first >= second for name, (first, second) in values.items()}
