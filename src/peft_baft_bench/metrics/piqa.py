"""PIQA: find out which of two ways to reach a goal a model finds more probable."""

from __future__ import annotations

from itertools import product
from typing import Any

from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.likelihood import log_probabilities
from peft_baft_bench.tasks.formats import PiqaItem

QUESTION = "Question: {}\nAnswer:"  # as lm-evaluation-harness asks


def right_choices(
    model: Any, tokenizer: Any, item: PiqaItem, template: Template = RAW
) -> dict[str, bool]:
    """Judge by four rules whether the model prefers the right solution.

    An adapter acts on the end of the prompt and on the solution. Equal values count as the first solution; values that
    are not numbers as the wrong one.

    Args:
        template: the form in which goal and question are put to the model; in a chat the solution is its reply.

    Returns:
        accuracy: the solution of lower perplexity after the goal, as in the paper's Table 8.
        accuracy_sum: the more probable solution after the goal, longer ones having it harder.
        lm_eval_acc: the more probable solution after `QUESTION`, which is `acc` of lm-evaluation-harness.
        lm_eval_acc_norm: the same by log-probability per character, its `acc_norm`. It keeps white space around
            solutions, which is dropped here.
    """
    solutions = (item.sol1, item.sol2)
    prompts = (item.goal, QUESTION.format(item.goal))
    pairs = list(product(prompts, solutions))
    by_token = log_probabilities(model, tokenizer, pairs, template=template)
    after_goal, after_question = by_token[:2], by_token[2:]
    characters = [len(solution.strip()) for solution in solutions]
    values = {
        "accuracy": [tokens.mean().item() for tokens in after_goal],
        "accuracy_sum": [tokens.sum().item() for tokens in after_goal],
        "lm_eval_acc": [tokens.sum().item() for tokens in after_question],
        "lm_eval_acc_norm": [
            tokens.sum().item() / count
            for tokens, count in zip(after_question, characters, strict=True)
        ],
    }
    # Comparisons with NaN are false, so that values which are not numbers count as wrong.
    return {
        name: second > first if item.label else first >= second
        for name, (first, second) in values.items()
    }
