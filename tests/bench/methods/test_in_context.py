"""Retrieval without training: which fact is found, what the model gets, and what it gives back."""

from __future__ import annotations

import pytest
import torch

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import Edit
from peft_baft.data.batching import special_ids
from peft_baft.data.templates import Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.running import generate_greedily
from peft_baft_bench.methods.in_context import InContext, InContextEditor
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.word_index import WordIndex

fact_model = facts.fact_model
FORM = "{prompt} {target} "


@pytest.fixture
def editor(fact_model: FactModel) -> InContextEditor:
    return InContext(form=FORM).start(fact_model.base, fact_model.tokenizer)


def test_the_likest_prompt_is_found_and_neutral_texts_match_nothing() -> None:
    prompts = [
        "What university did Watts Humphrey attend?",
        "Which family does Ramalinaceae belong to?",
        "What role does Denny Herzig play in football?",
    ]
    index = WordIndex(prompts)
    assert index.match("Which university was attended by Watts Humphrey?") == 0
    assert index.match("what position does Denny Herzig play?") == 2
    assert all(index.match(str(text.prompt)) is None for text in GENERAL)
    assert index.cosines(prompts[1])[1] == pytest.approx(1.0)
    assert WordIndex([]).match(prompts[0]) is None


def test_the_model_gets_the_fact_and_gives_back_its_own_tokens_alone(
    fact_model: FactModel, editor: InContextEditor
) -> None:
    base, tokenizer = fact_model
    (edit,) = edits(0)
    editor.edit([edit])
    texts = [str(edit.prompt), MEALS[5].prompt]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    (start,) = tokenizer(edit.prompt, return_tensors="pt")["input_ids"]
    begin = int(
        start[0] in special_ids(tokenizer)
    )  # behind the token that begins a text, if there is one
    fact = tokenizer(FORM.format(prompt=edit.prompt, target=edit.target), add_special_tokens=False)
    spelled = torch.tensor([[*start[:begin], *fact["input_ids"], *start[begin:]]])
    with torch.no_grad():
        found = editor.model(**batch).logits
        expected = base(spelled).logits[0]
        behind = expected[begin + len(fact["input_ids"]) :]
        real = batch["attention_mask"][0].bool()
        torch.testing.assert_close(found[0, real][begin:], behind, atol=1e-4, rtol=1e-4)
        plain = base(**batch).logits
        assert not torch.allclose(found[0, real][begin:], plain[0, real][begin:], atol=1e-2)
        mask = batch["attention_mask"][1].bool()
        torch.testing.assert_close(found[1, mask], plain[1, mask], atol=1e-4, rtol=1e-4)
    said = generate_greedily(editor.model, *_left(tokenizer, texts), 0, 3)
    alone = generate_greedily(base, spelled, torch.ones_like(spelled), 0, 3)
    assert torch.equal(said[0], alone[0])


def test_without_a_match_the_model_computes_what_it_computes_without_edits(
    fact_model: FactModel, editor: InContextEditor
) -> None:
    ids, mask = _left(fact_model.tokenizer, [CAPITALS[3].prompt])
    editor.edit([Edit("which colour has the quux of zork", "green")])
    with torch.no_grad():
        found = editor.model(ids, attention_mask=mask).logits
        assert torch.equal(found, fact_model.base(ids, attention_mask=mask).logits)


def test_an_edit_replaces_an_earlier_one_and_state_goes_on(
    fact_model: FactModel, editor: InContextEditor
) -> None:
    (edit,) = edits(0)
    editor.edit([edit])
    editor.edit([Edit(edit.prompt, "Kasgrad")])
    again = InContext(form=FORM).start(fact_model.base, fact_model.tokenizer)
    again.load_state_dict(editor.state_dict())
    assert again.model.facts == {edit.prompt: "Kasgrad"}
    editor.remove()
    assert not editor.model.facts


def test_a_text_too_long_for_the_model_and_a_chat_are_refused(
    fact_model: FactModel, editor: InContextEditor
) -> None:
    long = " ".join([CAPITALS[0].prompt] * 6)
    with pytest.raises(ValueError, match="context window has"):
        editor.edit([Edit(long, "Kasgrad")])
    assert not editor.model.facts
    setup = EditorSetup(template=Template(True))
    with pytest.raises(ValueError, match="use --template raw"):
        InContext().start(fact_model.base, fact_model.tokenizer, setup)
    with pytest.raises(ValueError, match="form must contain"):
        InContext(form="{prompt}")


def _left(tokenizer: object, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(texts, return_tensors="pt", padding=True)  # type: ignore[operator]
    return batch["input_ids"], batch["attention_mask"]
