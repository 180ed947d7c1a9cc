"""Methods by name, and what the protocol promises of every editor: it edits, goes on from its state, and can be removed."""

from __future__ import annotations

import ast
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import facts
import peft_baft
from facts import FactModel
from facts import edits_with_subjects as edits
from peft_baft import Edit
from peft_baft.editing.editor import CURSOR, Editor
from peft_baft.editing.presets import PRESETS
from peft_baft.evaluation.scoring import token_match
from peft_baft.storage import load_with_header, save_with_header
from peft_baft_bench.methods.ft_m import FineTuning
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.methods import GROUPS, METHODS, parse_method, parse_methods
from peft_baft_bench.run.plan import plan_runs
from peft_baft_bench.run.saved import load_edits, save_edits
from peft_baft_bench.run.schedule import Schedule

fact_model = facts.fact_model
PEFT_METHODS = ("reft", "ss-w", "ba-w", "ss-w-lr", "baft", "lora", "adalora", "memory")


def start(name: str, toy: FactModel) -> Editor:
    settings = parse_method(facts.quick(name), PRESETS["plain"]).settings
    return settings.start(toy.base, toy.tokenizer, EditorSetup(facts.meals(0, 12), seed=3))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


@pytest.mark.parametrize("name", facts.LEARNING)
def test_a_removed_editor_gives_the_base_model_back_bit_for_bit(toy: FactModel, name: str) -> None:
    before, flags = weights(toy.base), [p.requires_grad for p in toy.base.parameters()]
    editor = start(name, toy)
    (fact,) = edits(0)
    assert editor.edit([fact]).learned
    assert token_match(editor.model, toy.tokenizer, [(fact.prompt, fact.target)]) == [1.0]
    editor.remove()
    after = weights(toy.base)
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    assert token_match(toy.base, toy.tokenizer, [(fact.prompt, fact.target)]) == [0.0]
    if name not in PEFT_METHODS:  # PEFT freezes a base model for good
        assert [p.requires_grad for p in toy.base.parameters()] == flags


@pytest.mark.parametrize("name", facts.LEARNING)
def test_a_fresh_editor_goes_on_from_the_state_of_another(toy: FactModel, name: str) -> None:
    editor = start(name, toy)
    editor.edit(edits(0))
    state = {key: tensor.clone() for key, tensor in editor.state_dict().items()}
    second = editor.edit(edits(3))
    expected = {key: tensor.clone() for key, tensor in editor.state_dict().items()}
    editor.remove()
    again = start(name, toy)
    again.load_state_dict(state)
    result = again.edit(edits(3))
    assert (result.steps, result.losses) == (second.steps, second.losses)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    # The control: the second edit changed it.
    assert not all(torch.equal(state[key], expected[key]) for key in state)
    again.remove()


@pytest.mark.parametrize("name", ["baft", "lora", "reft"])
def test_a_state_of_another_adapter_is_refused_and_changes_nothing(
    toy: FactModel, name: str
) -> None:
    editor = start(name, toy)
    editor.edit(edits(0))
    state = {key: tensor.clone() for key, tensor in editor.state_dict().items()}
    weights_alone = {key: tensor for key, tensor in state.items() if not key.startswith(CURSOR)}
    renamed = {key.replace("layers.1", "layers.9"): tensor for key, tensor in state.items()}
    fewer = {key: tensor for key, tensor in state.items() if "layers.1" not in key}
    for wrong in (renamed, fewer):
        zeros = {key: torch.zeros_like(tensor) for key, tensor in wrong.items()}
        with pytest.raises(ValueError, match=r"not a state of the adapter 'default'.*layers"):
            editor.load_state_dict(zeros)
    if name != "lora":
        with pytest.raises(
            ValueError, match=r"'editor\.unrelated_used'; this state has only the adapter"
        ):
            editor.load_state_dict(weights_alone)
    assert all(torch.equal(tensor, state[key]) for key, tensor in editor.state_dict().items())
    editor.load_state_dict(state)
    editor.remove()


@pytest.mark.parametrize("name", ["baft", "lora", "ft-m", "grace"])
def test_every_method_refuses_a_batch_that_contradicts_itself(toy: FactModel, name: str) -> None:
    editor, (fact,) = start(name, toy), edits(0)
    with pytest.raises(ValueError, match="is edited to"):
        editor.edit([fact, Edit(fact.prompt, "Kasburg")])
    editor.remove()


def test_settings_of_any_method_are_set_by_name() -> None:
    settings = parse_method("ft-m:layer=2;lr=0.001", PRESETS["plain"], {"max_steps": 7}).settings
    assert isinstance(settings, FineTuning)
    assert (settings.layer, settings.descent.lr, settings.descent.max_steps) == (2, 0.001, 7)
    assert settings.describe() == {
        "objective": "answer",
        "layer": 2,
        "descent": settings.describe()["descent"],
    }
    with pytest.raises(
        ValueError,
        match=r"ft-m:gamma=1: unknown setting 'gamma'; known are clip_norm, layer, learn_end, lr",
    ):
        parse_method("ft-m:gamma=1", PRESETS["plain"])


def test_adalora_has_the_papers_settings_learns_a_fact_and_stops_early(toy: FactModel) -> None:
    published = parse_method("adalora", PRESETS["plain"]).settings.describe()
    config, descent, batch = (published[part] for part in ("config", "descent", "batch_descent"))
    assert (config["init_r"], config["r"], config["lora_alpha"]) == (12, 8, 32)
    assert (descent["lr"], descent["max_steps"], descent["stop_loss"]) == (5e-3, 70, 0.01)
    assert batch["max_steps"] == 200
    editor, (fact,) = start("adalora", toy), edits(0)
    assert token_match(editor.model, toy.tokenizer, [(fact.prompt, fact.target)]) == [0.0]
    result = editor.edit([fact])
    assert result.learned and 0 < result.steps < 60
    assert token_match(editor.model, toy.tokenizer, [(fact.prompt, fact.target)]) == [1.0]
    editor.remove()


def test_groups_name_methods_and_all_holds_each_of_them() -> None:
    for names in GROUPS.values():
        assert set(names) <= set(METHODS) and len(set(names)) == len(names)
    assert {*GROUPS["paper"], *GROUPS["leaders"]} <= set(GROUPS["all"])
    chosen = parse_methods("none,paper,leaders", PRESETS["plain"])
    assert chosen[0] is None and len(chosen) == 1 + len({*GROUPS["paper"], *GROUPS["leaders"]})


def test_what_depends_on_no_seed_is_planned_once() -> None:
    chosen = parse_methods("ft-m,grace", PRESETS["plain"])
    common: dict[str, Any] = {name: {} for name in ("model", "data", "protocol", "versions")}
    runs = plan_runs({"benchmark": "facts", **common}, chosen, [Schedule()], range(3))
    planned = [(run.head.method, run.head.seed) for run in runs]
    assert sorted(planned) == [("ft-m", 0), ("grace", 0), ("grace", 1), ("grace", 2)]


@pytest.mark.parametrize("name", facts.LEARNING)
def test_saved_edits_answer_as_before_on_a_fresh_model(
    toy: FactModel, fact_model: FactModel, tmp_path: Path, name: str
) -> None:
    editor, file = start(name, toy), tmp_path / "edits.safetensors"
    editor.edit(edits(0))
    ids = torch.tensor([toy.tokenizer(edits(0)[0].prompt)["input_ids"]])
    with torch.no_grad():
        expected = editor.model(input_ids=ids, logits_to_keep=1).logits
        save_edits(file, editor, facts.quick(name), seed=3)
        fresh = FactModel(deepcopy(fact_model.base), toy.tokenizer)
        unedited = fresh.base(input_ids=ids, logits_to_keep=1).logits
        loaded = load_edits(file, *fresh)
        assert torch.equal(loaded.model(input_ids=ids, logits_to_keep=1).logits, expected)
    assert not torch.allclose(unedited, expected, atol=1e-2)  # the control
    loaded.remove()


def test_a_file_of_edits_that_does_not_fit_is_refused(toy: FactModel, tmp_path: Path) -> None:
    editor, file = start("grace", toy), tmp_path / "edits.safetensors"
    editor.edit(edits(0))
    with pytest.raises(ValueError, match="Unknown method"):
        save_edits(file, editor, "graze")
    save_edits(file, editor, facts.quick("grace"))
    editor.remove()
    _, header = load_with_header(file)
    another = deepcopy(toy.base)
    another.get_input_embeddings().weight.data.mul_(1.01)
    with pytest.raises(ValueError, match=r"on another model: its embeddings are"):
        load_edits(file, another, toy.tokenizer)
    save_with_header(file, {}, header)
    with pytest.raises(ValueError, match="does not contain edits of grace"):
        load_edits(file, *toy)
    save_with_header(file, {}, header | {"format": 9})
    with pytest.raises(ValueError, match="not a file of edits of format 1"):
        load_edits(file, *toy)


def test_a_methods_name_stands_in_the_table_of_methods_alone() -> None:
    packages = Path(peft_baft.__file__).parents[1]
    methods = packages / "peft_baft_bench" / "methods"
    sources = [path for path in packages.glob("peft_baft*/**/*.py") if path.parent != methods]
    # What the package is about, what PEFT has, and words that name other things too.
    names = set(METHODS) - {"baft", "reft", "lora", "adalora", "memory"}
    for path in sources:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not constants & names, path
    table = ast.walk(ast.parse((methods / "methods.py").read_text(encoding="utf-8")))
    assert names <= {node.value for node in table if isinstance(node, ast.Constant)}  # the control
