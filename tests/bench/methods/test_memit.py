"""MEMIT and AlphaEdit: their closed forms against dense solutions, second moments, and facts that are learned together."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import facts
from facts import CAPITALS, FactModel
from facts import edits_with_subjects as edits
from peft_baft.editing.edit_cache import EditCache
from peft_baft.loading import fingerprint
from peft_baft_bench.methods import memit
from peft_baft_bench.methods.locating import Search, keys_and_outputs, locate_fact
from peft_baft_bench.methods.memit import (
    Memit,
    MemitEditor,
    alpha_edit_keys,
    memit_keys,
    null_space,
)
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.second_moments import second_moments

fact_model = facts.fact_model
# The toy model's vectors are short, and it never saw a text before its prompts.
SEARCH = Search(max_steps=60, stop_loss=0.05, clamp=50.0, kl=0.0, weight_decay=0.0)
TOY: dict[str, Any] = {
    "layers": (0,),
    "contexts": 0,
    "moment_tokens": 300,
    "moment_weight": 1e-4,
    "threshold": 0.5,
    "ridge": 1e-6,
    "search": SEARCH,
}
DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> MemitEditor:
    return Memit(**(TOY | settings)).start(toy.base, toy.tokenizer)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_memits_change_solves_its_normal_equations() -> None:
    keys, missing, text = drawn(0, 4, 9), drawn(1, 4, 6), drawn(2, 200, 9)
    moments = 3.0 * text.mT @ text / 200
    change = missing.mT @ memit_keys(keys, moments)  # (d, f)
    # Eq. 14: Δ (λ C + K Kᵀ) = R Kᵀ, where the sum of squares of what is kept and what is wanted is least.
    torch.testing.assert_close(change @ (moments + keys.mT @ keys), missing.mT @ keys)

    def cost(delta: torch.Tensor) -> torch.Tensor:
        return (delta @ keys.mT - missing.mT).square().sum() + torch.trace(
            delta @ moments @ delta.mT
        )

    for seed in range(3, 8):
        assert cost(change) < cost(change + 1e-3 * drawn(seed, 6, 9))


def test_alphaedits_change_leaves_keys_outside_its_space_alone() -> None:
    text = drawn(0, 300, 9)
    text[:, 5:] *= 1e-3  # four directions that keys seldom have
    moments = text.mT @ text / 300
    projection = null_space(moments, 0.02)
    torch.testing.assert_close(projection @ projection, projection)
    assert round(torch.trace(projection).item()) == 4
    keys, past, missing = drawn(1, 2, 9), drawn(2, 1, 9), drawn(3, 2, 6)
    change = missing.mT @ alpha_edit_keys(keys, past, projection, 1e-8)
    kept = drawn(4, 5, 9) @ (torch.eye(9, dtype=torch.float64) - projection)
    assert (change @ kept.mT).abs().max() < 1e-6 < (change @ keys.mT).abs().max()
    # With directions enough for all of them, the new keys give what is wanted, and those of earlier edits what they gave.
    torch.testing.assert_close(change @ keys.mT, missing.mT, atol=1e-5, rtol=0)
    assert (change @ past.mT).abs().max() < 1e-5
    # The control: without the cache of earlier edits they are changed.
    forgetful = missing.mT @ alpha_edit_keys(keys, past[:0], projection, 1e-8)
    assert (forgetful @ past.mT).abs().max() > 1e-2
    with pytest.raises(ValueError, match="no direction of the keys has a second moment below"):
        null_space(torch.eye(3, dtype=torch.float64), 0.02)


@pytest.mark.parametrize("kind", [False, True], ids=["memit", "alphaedit"])
def test_facts_are_written_together_and_plain_peft_loads_them(
    toy: FactModel, tmp_path: Path, kind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unedited = deepcopy(toy.base)
    searched: list[Any] = []
    search = memit.search_target

    def kept(*given: Any) -> Any:
        searched.append(search(*given))
        return searched[-1]

    monkeypatch.setattr(memit, "search_target", kept)
    editor, together = editor_of(toy, null_space=kind), edits(0, 5)

    def far_from_wanted(model: Any) -> list[float]:
        """How far what leaves the block at each subject is from what was searched for."""
        found = []
        for edit, one in zip(together, searched, strict=True):
            located = locate_fact(model, toy.tokenizer, edit, [], "memit")
            block = model.model.layers[0]
            output = keys_and_outputs(model, toy.tokenizer, block, block, located)[1]
            found.append((output - one.target).norm().item())
        return found

    assert editor.edit(together).learned
    assert max(far_from_wanted(toy.base)) < 1e-2 < 1 < min(far_from_wanted(unedited))
    editor.edit(edits(9))
    assert editor.changes.left[DOWN.format(0)].shape[0] == 3  # rank 1 a fact
    editor.save_lora(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(unedited, str(tmp_path / "lora")).eval()
    ids = torch.tensor([toy.tokenizer(CAPITALS[0].prompt)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, toy.base(ids).logits, atol=1e-3, rtol=1e-3)


def test_blocks_share_what_is_missing(toy: FactModel) -> None:
    editor = editor_of(toy, layers=(0, 1))
    assert editor.module_names == [DOWN.format(0), DOWN.format(1)]
    editor.edit(edits(0))
    assert all(len(rows) == 1 for rows in editor.changes.left.values())
    # EasyEdit's 4 to 8 of 32 in a model of four blocks.
    assert editor_of(toy, layers=None).module_names == [DOWN.format(0), DOWN.format(1)]


def test_second_moments_are_those_of_the_keys_and_change_little_with_more_text(
    toy: FactModel, tmp_path: Path
) -> None:
    name, torch_state = DOWN.format(1), torch.random.get_rng_state()
    given = (toy.base, toy.tokenizer, [name])
    tiny, few = (second_moments(*given, n, progress=False)[name] for n in (300, 8000))
    many = second_moments(*given, 16000, seed=1, progress=False)[name]  # of other texts
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    torch.testing.assert_close(few, few.mT)
    assert torch.linalg.eigvalsh(few.double()).min() > -1e-6
    assert (few - many).norm() / many.norm() < 0.25
    assert (tiny - many).norm() > 2 * (few - many).norm()  # the control
    kept = second_moments(*given, 400, folder=tmp_path, progress=False)[name]
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(second_moments(*given, 400, folder=tmp_path)[name], kept)
    assert file.stat().st_mtime_ns == written
    before = fingerprint(toy.base)
    with torch.no_grad():
        toy.base.model.layers[2].mlp.up_proj.weight.add_(0.01)
    assert fingerprint(toy.base) != before  # another model's are not taken
    second_moments(*given, 400, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2
    before = fingerprint(toy.base)
    toy.base.model.layers[2].mlp.up_proj.weight.data[1, 1] += 0.5  # a single value is enough
    assert fingerprint(toy.base) == before
    second_moments(*given, 400, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        second_moments(*given, 0)


def test_a_model_that_writes_nothing_is_said(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be asked for ever."""
    monkeypatch.setattr(
        "peft_baft.editing.written_texts.generate_sampled",
        lambda _model, ids, *_: torch.zeros(len(ids), 1, dtype=torch.long),
    )
    with pytest.raises(ValueError, match="generates no text"):
        second_moments(toy.base, toy.tokenizer, [DOWN.format(1)], 5000, progress=False)


def test_editors_of_one_model_write_texts_and_take_moments_once(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    def counted(*given: Any, **more: Any) -> dict[str, torch.Tensor]:
        taken.append(given)
        return second_moments(*given, **more)

    monkeypatch.setattr(memit, "second_moments", counted)
    setup = EditorSetup(prepared=EditCache())
    state = []
    for _ in range(2):
        editor = Memit(**TOY).start(toy.base, toy.tokenizer, setup)
        editor.edit(edits(0))
        state.append({name: rows.clone() for name, rows in editor.state_dict().items()})
        editor.remove()
    assert len(taken) == 1 and all(
        torch.equal(rows, state[1][name]) for name, rows in state[0].items()
    )
    Memit(**(TOY | {"moment_tokens": 200})).start(toy.base, toy.tokenizer, setup).edit(edits(0))
    assert len(taken) == 2  # the control


def test_an_edit_that_breaks_off_leaves_the_weights_as_they_were(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(toy, layers=(0, 1), null_space=True)
    editor.edit(edits(0))
    before = {name: tensor.clone() for name, tensor in toy.base.state_dict().items()}
    add = editor.changes.add

    def broken(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        add(name, left * (float("nan") if name == DOWN.format(1) else 1.0), right)

    monkeypatch.setattr(editor.changes, "add", broken)
    with pytest.raises(FloatingPointError, match=r"layers.1.mlp.down_proj.weight is not finite"):
        editor.edit(edits(5))
    assert all(torch.equal(t, before[k]) for k, t in toy.base.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"layers": ("last",)}, TypeError, "layers must be a list of integers"),
        ({"layers": ()}, TypeError, "layers must be a list of integers"),
        ({"threshold": 0.0}, ValueError, "threshold must be above 0"),
        ({"contexts": -1}, ValueError, "contexts must be an integer of at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Memit(**settings)
