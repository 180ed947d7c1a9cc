"""Asking a model: token match, agreement and greedy answers, on a toy model that knows facts."""

# mypy: disable-error-code="arg-type, union-attr"
from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import facts
from facts import CAPITALS, DESCENT, MEALS, OBJECTIVE, FactModel, adapted, edits, meals, questions
from peft_baft import NARROW, BaftEditor
from peft_baft.data.batching import encode
from peft_baft.data.templates import CHAT
from peft_baft.evaluation.scoring import (
    agreement,
    contains_new_not_old,
    exact_match,
    free_answers,
    greedy_answers,
    predicted_tokens,
    prefix_match,
    token_match,
)

fact_model = facts.fact_model
ALL = questions([*CAPITALS, *MEALS])


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> PeftModel:
    """The fact model with one fact edited."""
    model = adapted(fact_model.base)
    BaftEditor(model, fact_model.tokenizer, meals(0, 12), OBJECTIVE, DESCENT, scope=NARROW).edit(
        edits(0)
    )
    return model


def test_token_match_is_the_share_of_answer_tokens_that_the_model_would_say(
    fact_model: FactModel,
) -> None:
    one, two = CAPITALS[0], CAPITALS[3]
    assert (one.answer, two.answer) == ("Kasgrad", "Port Kasheim")
    worked = {
        (one.prompt, "Kasgrad"): 1.0,
        (one.prompt, "Kasburg"): 0.0,
        (two.prompt, "Port Kasheim"): 1.0,
        (two.prompt, "Port Loheim"): 0.5,  # a word it never met: the first of two tokens is right
        (
            two.prompt,
            "Kasgrad Kasheim",
        ): 0.0,  # after a wrong first token, whatever it would say is not asked
        (f" {two.prompt} ", "  Port Kasheim\n"): 1.0,  # white space around either is dropped
    }
    (after_kasgrad,) = predicted_tokens(*fact_model, [(two.prompt, "Kasgrad Kasheim")])
    worked[two.prompt, "Kasgrad Kasheim"] = (
        0.5 * (after_kasgrad[0][1] == after_kasgrad[1][1]).item()
    )
    assert token_match(*fact_model, list(worked)) == list(worked.values())


def test_predictions_equal_a_plain_reading_of_the_logits(
    edited: PeftModel, fact_model: FactModel
) -> None:
    tokenizer = fact_model.tokenizer
    for prompt, answer in ALL[:6]:
        row = encode(tokenizer, prompt, answer)
        labels = torch.tensor([[-100] * row.prompt_length + list(row.ids[row.prompt_length :])])
        with torch.no_grad():
            logits = edited(input_ids=torch.tensor([row.ids]), labels=labels).logits[0]
        wanted = [int(logits[t - 1].argmax()) for t in range(row.prompt_length, len(row.ids))]
        ((said, answered),) = predicted_tokens(edited, tokenizer, [(prompt, answer)])
        assert said.tolist() == wanted and answered.tolist() == list(row.ids[row.prompt_length :])


@pytest.mark.parametrize("batch_size", [1, 3, 48, 100])
def test_matches_depend_neither_on_the_batch_nor_on_its_padding(
    edited, fact_model, batch_size: int
) -> None:
    pairs = [*ALL, ("the", "capital of"), (" ".join(["the"] * 20), "food of a")]
    alone = [token_match(edited, fact_model.tokenizer, [pair])[0] for pair in pairs]
    assert token_match(edited, fact_model.tokenizer, pairs, batch_size) == alone
    assert token_match(edited, fact_model.tokenizer, pairs[::-1], batch_size)[::-1] == alone
    assert 0 < sum(alone) < len(alone)  # control: the edited fact is not matched


def test_padding_with_a_token_of_the_text_changes_nothing(
    edited: PeftModel, fact_model: FactModel
) -> None:
    other = facts.make_tokenizer()
    other.pad_token = " is"
    assert token_match(edited, other, ALL) == token_match(edited, fact_model.tokenizer, ALL)


def test_no_pairs_give_no_matches(fact_model: FactModel) -> None:
    assert token_match(*fact_model, []) == [] and greedy_answers(*fact_model, []) == []


def test_agreement_is_about_the_same_words_right_or_wrong(
    edited: PeftModel, fact_model: FactModel
) -> None:
    wrong = [(fact.prompt, "Kasburg") for fact in CAPITALS[:4]]
    before, after = (
        predicted_tokens(*fact_model, wrong),
        predicted_tokens(edited, fact_model.tokenizer, wrong),
    )
    assert token_match(*fact_model, wrong)[0] == 0
    assert agreement(before, before) == [1, 1, 1, 1]
    assert agreement(before, after)[0] == 0  # it was edited
    one, two = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])
    assert agreement([(one, one)], [(two, one)]) == [0.5]


def test_greedy_answers_are_the_likeliest_tokens_one_by_one(
    edited: PeftModel, fact_model: FactModel
) -> None:
    tokenizer, prompts = (
        fact_model.tokenizer,
        [CAPITALS[0].prompt, CAPITALS[3].rephrase, MEALS[5].prompt],
    )
    for prompt, answer in zip(
        prompts, greedy_answers(edited, tokenizer, prompts, max_new_tokens=4), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(4):
            with torch.no_grad():  # the whole sequence anew, without a cache
                logits = edited(
                    input_ids=ids, prompt_lengths=torch.tensor([length]), use_cache=False
                ).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert answer == tokenizer.decode(ids[0, length:]).strip()


def test_an_edit_is_said_and_the_base_says_the_old_answer(
    edited: PeftModel, fact_model: FactModel
) -> None:
    (fact,) = edits(0)
    assert greedy_answers(edited, fact_model.tokenizer, [fact.prompt], 1) == [fact.target]
    with edited.disable_adapter():
        assert greedy_answers(edited, fact_model.tokenizer, [fact.prompt], 1) == [
            CAPITALS[0].answer
        ]


@dataclass
class Scripted:
    """A stand-in that answers every prompt with the same tokens."""

    answer: list[int]
    config: SimpleNamespace = field(default_factory=SimpleNamespace)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(1, 1)

    def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.answer])], 1)


def test_a_greedy_answer_ends_at_its_first_line_break(fact_model: FactModel) -> None:
    ids = fact_model.tokenizer.convert_tokens_to_ids(
        ["\n", " Port", " Kasheim", "\n", " is", "</s>"]
    )
    assert greedy_answers(Scripted(ids), fact_model.tokenizer, ["the"]) == ["Port Kasheim"]


# free answers


def test_free_answers_depend_neither_on_the_batch_nor_on_their_neighbours(
    edited: PeftModel, fact_model
) -> None:
    prompts = [prompt for prompt, _ in ALL] + [" ".join(["the"] * 20)]
    lengths = [1 + i % 4 for i in range(len(prompts))]
    alone = [
        free_answers(edited, fact_model.tokenizer, [p], [n])[0]
        for p, n in zip(prompts, lengths, strict=True)
    ]
    for size in (2, 7, 100):
        assert free_answers(edited, fact_model.tokenizer, prompts, lengths, size) == alone
    assert len({len(answer.split()) for answer in alone}) > 1


def test_few_long_texts_do_not_hold_up_the_short_ones(fact_model: FactModel, monkeypatch) -> None:
    shapes: list[tuple[int, int]] = []
    forward = LlamaForCausalLM.forward

    def watched(self: LlamaForCausalLM, input_ids: torch.Tensor, **more: object) -> object:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    prompts = ["the", " ".join(["the"] * 9), "the", "the"]
    predicted_tokens(*fact_model, [(prompt, "Port") for prompt in prompts], 2)
    assert shapes == [(2, 2), (2, 10)]  # not (2, 10), (2, 2): the two longest are asked together
    shapes.clear()
    fact_model.base.generation_config.eos_token_id, eos = (
        None,
        fact_model.base.generation_config.eos_token_id,
    )
    try:
        free_answers(*fact_model, prompts, [2, 7, 6, 2])
    finally:
        fact_model.base.generation_config.eos_token_id = eos
    assert [rows for rows, _ in shapes] == [3] * 6 + [
        1
    ] * 7  # within three times the shortest, and beyond it


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_padding_side_does_not_matter(
    edited: PeftModel, fact_model: FactModel, side: str
) -> None:
    tokenizer = deepcopy(fact_model.tokenizer)
    tokenizer.padding_side = side
    prompts = [prompt for prompt, _ in ALL]
    assert greedy_answers(edited, tokenizer, prompts, 2) == greedy_answers(
        edited, fact_model.tokenizer, prompts, 2
    )
    assert token_match(edited, tokenizer, ALL) == token_match(edited, fact_model.tokenizer, ALL)


def test_nothing_is_generated_beyond_the_context_window(fact_model: FactModel) -> None:
    full, nearly = " ".join(["the"] * facts.WINDOW), " ".join(["the"] * (facts.WINDOW - 2))
    short = CAPITALS[0]
    said = free_answers(*fact_model, [full, short.prompt, nearly], [5, 5, 5])
    assert said[0] == "" and said[1].startswith(short.answer) and len(said[2].split()) == 2


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "prefix"),
    [
        ("Paris", "Paris", True, True),
        ("the PARIS.", "Paris", True, True),
        ("Paris, the city of light", "Paris", False, True),
        ("Parisian", "Paris", False, False),
        ("in Paris", "Paris", False, False),
        ("New York", "New York City", False, False),
        ("", "Paris", False, False),
        ("The", "The The", False, False),
        ("U.S. Senate", "u s senate", True, True),
        ("北京", "北京", True, True),
        ("!", "?", False, False),
    ],
)
def test_exact_and_prefix_match_on_hand_worked_answers(
    said: str, wanted: str, exact: bool, prefix: bool
) -> None:
    assert exact_match(said, wanted) is exact
    assert prefix_match(said, wanted) is prefix


@pytest.mark.parametrize(
    ("said", "new", "old", "right"),
    [
        ("Lyon", "Lyon", "Paris", True),
        ("Lyon, France, is the capital.", "Lyon", "Paris", True),
        ("The capital of France is LYON", "Lyon", None, True),
        ("It is Paris, not Lyon.", "Lyon", "Paris", False),  # both
        ("Paris", "Lyon", "Paris", False),
        ("Lyons", "Lyon", None, False),  # another word
        ("", "Lyon", None, False),
        ("the New\n York City", "New York", "York", True),  # the new one holds the old one
        ("York", "New York", "York", False),
        ("a Mahan-class destroyer", "destroyer", "Mahan-class destroyer", False),
        ("a destroyer", "destroyer", "Mahan-class destroyer", True),
        ("She was female.", "female", "male", True),  # words are compared, not letters
        ("New, or old York", "New York", None, False),  # words next to each other
        ("It is the U.S. Senate", "u s senate", None, True),
        ("a “Lyon” – or so", "Lyon", None, True),
        ("首都是北京。", "北京", "南京", True),  # no spaces between words
        ("首都是南京,北京", "北京", "南京", False),
        ("! ?", "?", None, True),
        ("?", "?", None, True),
        ("!", "?", None, False),
    ],
)
def test_contains_new_not_old_on_hand_worked_answers(
    said: str, new: str, old: str | None, right: bool
) -> None:
    assert contains_new_not_old(said, new, old) is right


CHAT_TEXT = "<s>{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"


def test_the_chat_template_is_used_where_it_is_asked_for(fact_model: FactModel) -> None:
    tokenizer = deepcopy(fact_model.tokenizer)
    tokenizer.chat_template = CHAT_TEXT
    row = encode(tokenizer, "the capital of Arvia", "Kasgrad", template=CHAT)
    assert tokenizer.convert_ids_to_tokens(row.ids)[: row.prompt_length][:1] == ["<s>"]
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "Kasgrad"
    with pytest.raises(ValueError, match="no chat template"):
        encode(fact_model.tokenizer, "the", "Kasgrad", template=CHAT)
