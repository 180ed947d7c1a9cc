"""The evaluation harness scores an edited model as generation would have it, and an unedited one as it always did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("lm_eval", reason="needs the extra `harness`")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # the harness and what it imports warn of their own

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import facts  # noqa: E402
from conftest import randomise  # noqa: E402
from facts import CAPITALS, MEALS, FactModel  # noqa: E402
from peft_baft import NARROW, BaftEditor  # noqa: E402
from peft_baft.adapter import prompt_lengths  # noqa: E402
from peft_baft.integrations.lm_eval import BaftLM  # noqa: E402

fact_model = facts.fact_model
# Contexts and continuations of unequal length; two that are equal as texts, but split elsewhere; choices of one token.
PAIRS = [
    (CAPITALS[0].prompt, f" {CAPITALS[1].answer}"),
    (CAPITALS[3].rephrase, f" {CAPITALS[3].answer}"),
    ("the capital", f" of {facts.COUNTRIES[0]} is {CAPITALS[1].answer}"),
    (MEALS[2].prompt, f" {MEALS[2].answer}"),
    (MEALS[2].prompt, f" {MEALS[5].answer}"),
]


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> Any:
    model = facts.adapted(fact_model.base, gate_offset=0.0)
    randomise(model, 0.5)
    return model.eval()


def harness(model: Any, fact_model: FactModel, kind: Any = BaftLM, size: int = 3) -> Any:
    return kind(
        pretrained=model, tokenizer=fact_model.tokenizer, batch_size=size, max_length=facts.WINDOW
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def one_by_one(model: Any, fact_model: FactModel, context: str, text: str) -> tuple[float, bool]:
    """Score a continuation alone, its place stated by labels."""
    tokenizer = fact_model.tokenizer
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer(context + text, add_special_tokens=False)["input_ids"]])
    labels = ids.clone()
    labels[:, : len(before)] = -100
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels).logits[0, len(before) - 1 : -1]
    wanted = ids[0, len(before) :]
    scored = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
    return scored, bool((logits.argmax(-1) == wanted).all())


def test_batches_give_what_each_request_alone_gives(edited: Any, fact_model: FactModel) -> None:
    for model in (edited, fact_model.base):
        found = harness(model, fact_model).loglikelihood(requests("loglikelihood", PAIRS))
        for (context, text), (score, greedy) in zip(PAIRS, found, strict=True):
            expected, expected_greedy = one_by_one(model, fact_model, context, text)
            assert score == pytest.approx(expected, abs=1e-4)
            assert greedy == expected_greedy


def test_the_harness_s_own_class_would_be_far_off(edited: Any, fact_model: FactModel) -> None:
    asked = requests("loglikelihood", PAIRS)
    right = [score for score, _ in harness(edited, fact_model).loglikelihood(asked)]
    silent = [score for score, _ in harness(edited, fact_model, HFLM).loglikelihood(asked)]
    assert max(abs(a - b) for a, b in zip(right, silent, strict=True)) > 0.5


def test_an_unedited_model_and_one_of_another_method_score_as_ever(fact_model: FactModel) -> None:
    lora = get_peft_model(
        deepcopy(fact_model.base),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    # The harness answers two requests that are equal but for their last token from one forward, and (0.4.13) takes the first
    # of its logits for a continuation of one token where the other's is longer: so without the third pair.
    asked = requests("loglikelihood", PAIRS[:2] + PAIRS[3:])
    for model in (fact_model.base, lora.eval()):
        ours = harness(model, fact_model).loglikelihood(asked)
        theirs = harness(model, fact_model, HFLM).loglikelihood(asked)
        for (a, greedy_a), (b, greedy_b) in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b


def test_a_text_that_is_scored_whole_is_an_answer_from_its_first_token(
    edited: Any, fact_model: FactModel
) -> None:
    short = f"{CAPITALS[0].prompt} {CAPITALS[1].answer}"
    long = " ".join([short] * 9)  # longer than the model's window
    found = harness(edited, fact_model).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(short,), (long,)])
    )
    tokenizer = fact_model.tokenizer
    ids = torch.tensor([[1, *tokenizer(short)["input_ids"]]])
    with torch.no_grad(), prompt_lengths(edited, [1]):
        logits = edited(input_ids=ids[:, :-1]).logits[0]
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    assert found[0] == pytest.approx(expected, abs=1e-4)
    # Behind the first window every token is an answer's: no prompt comes back in the middle of a text.
    words = tokenizer(long)["input_ids"]
    assert len(words) > facts.WINDOW + 1
    total, stop = 0.0, 0
    while stop < len(words):
        start, first = stop, stop == 0
        stop = min(stop + facts.WINDOW, len(words))
        begin = start if first else max(0, stop - facts.WINDOW - 1)
        text = ([1] if first else []) + words[begin:stop]
        with torch.no_grad(), prompt_lengths(edited, [1 if first else 0]):
            logits = edited(input_ids=torch.tensor([text[:-1]])).logits[0]
        wanted = torch.tensor(words[start:stop])
        likely = logits[-len(wanted) :].log_softmax(-1)
        total += likely.gather(1, wanted[:, None]).sum().item()
    assert found[1] == pytest.approx(total, abs=1e-3)


def test_generation_in_batches_gives_each_answer_alone(edited: Any, fact_model: FactModel) -> None:
    settings = {"max_gen_toks": 3, "until": ["\n"]}
    prompts = [CAPITALS[0].prompt, f"{CAPITALS[3].rephrase} and {MEALS[2].prompt}", "the food"]
    found = harness(edited, fact_model).generate_until(
        requests("generate_until", [(prompt, settings) for prompt in prompts])
    )
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([fact_model.tokenizer(prompt)["input_ids"]])
        alone = edited.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        assert answer == fact_model.tokenizer.decode(alone)


def task_folder(folder: Path) -> Path:
    """A multiple-choice task in the harness's own format: six capitals, of three cities each."""
    rows = [
        {
            "question": CAPITALS[i].prompt,
            "choices": [CAPITALS[(i + step) % 24].answer for step in (0, 8, 16)],
            "answer": 0,
        }
        for i in range(6)
    ]
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "capitals.yaml").write_text(
        f"""task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "capitals.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
    )
    return folder


def test_a_task_s_figures_change_only_where_the_edit_does(
    fact_model: FactModel, tmp_path: Path
) -> None:
    model = facts.adapted(fact_model.base)
    editor = BaftEditor(
        model,
        fact_model.tokenizer,
        facts.meals(0, 4),
        facts.OBJECTIVE,
        facts.DESCENT,
        template="raw",
        scope=NARROW,
    )
    assert editor.edit(facts.edits(0)).learned
    manager = TaskManager(include_path=str(task_folder(tmp_path)), include_defaults=False)

    def answers(model: Any) -> list[Any]:
        result = simple_evaluate(
            harness(model, fact_model), tasks=["capitals"], task_manager=manager, bootstrap_iters=0
        )
        samples = sorted(result["samples"]["capitals"], key=lambda sample: sample["doc_id"])
        return [sample["acc"] for sample in samples]

    before, after = answers(fact_model.base), answers(model.eval())
    assert before == [1.0] * 6
    assert after[0] == 0.0 and sum(after[1:]) >= 4
    with model.disable_adapter():
        assert answers(model) == before


@pytest.mark.slow
def test_the_launcher_runs_the_harness_on_a_saved_adapter(
    edited: Any, fact_model: FactModel, tmp_path: Path
) -> None:
    facts.saved(fact_model, tmp_path)
    edited.save_pretrained(str(tmp_path / "edits"))
    task_folder(tmp_path)
    words = ["-m", "peft_baft.run", "lm_eval", "--model", "baft-hf", "--device", "cpu"]
    words += ["--model_args", f"pretrained={tmp_path / 'model'},peft={tmp_path / 'edits'}"]
    words += ["--tasks", "capitals", "--include_path", str(tmp_path), "--batch_size", "4"]
    words += ["--output_path", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["capitals"]["acc,none"]
    found = harness(edited, fact_model).loglikelihood(
        requests(
            "loglikelihood",
            [
                (CAPITALS[i].prompt, f" {CAPITALS[(i + step) % 24].answer}")
                for i in range(6)
                for step in (0, 8, 16)
            ],
        )
    )
    scores = torch.tensor([score for score, _ in found]).view(6, 3)
    assert accuracy == pytest.approx((scores.argmax(1) == 0).float().mean().item())
