"""PIQA: determine which of two ways to reach a goal a model finds more probable."""

from __future__ import annotations

from itertools import product

from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.likelihood import log_probabilities
from peft_baft_bench.tasks.formats import PiqaItem

QUESTION = "Question: {}\nAnswer:"  # the prompt of lm-evaluation-harness


def right_choices(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, item: PiqaItem, template: Template = RAW
) -> dict[str, bool]:
    """Judge by four rules whether the model prefers the right solution.

    An adapter acts on the end of the prompt and on the solution. Ties count as the first solution, NaN as
    wrong.

    Args:
        template: the prompt format of goal and question; in a chat, the solution is the model's reply.

    Returns:
        accuracy: the solution with lower perplexity after the goal, as in the paper's Table 8.
        accuracy_sum: the more probable solution after the goal, which disadvantages longer ones.
        lm_eval_acc: the more probable solution after `QUESTION`, which is `acc` of lm-evaluation-harness.
        lm_eval_acc_norm: the same by log-probability per character, its `acc_norm`. It keeps white space
            around solutions, which is removed here.
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
    # Comparisons with NaN are false, so NaN counts as wrong.
    return {
        name: second > first if item.label else first >= second
        for name, (first, second) in values.items()
    }
