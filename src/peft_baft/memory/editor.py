"""A memory of edits as an editor: learn codes side by side, keep them with the keys of their prompts, answer by route."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import configured_width, default_blocks, find_stack, stack_owner
from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.baselines.in_place import frozen, in_turn, require_raw
from peft_baft.baselines.locating import captured
from peft_baft.baselines.prompts import PromptWatch
from peft_baft.data.batching import (
    Tokens,
    collate,
    encode_fitting,
    encode_prompt,
    padding_id,
)
from peft_baft.data.cases import Edit, asked_words
from peft_baft.editing.acceleration.module_patches import no_logits, with_hidden
from peft_baft.editing.acceleration.prepared import PreparedModel
from peft_baft.editing.editor import EditResult, checked_edits, encode_edits
from peft_baft.editing.method import EditorSetup, MethodSettings
from peft_baft.editing.train import DescentConfig
from peft_baft.memory.codes import Basis, learn_codes
from peft_baft.memory.router import INT8, NONE, Key, Match, Router
from peft_baft.memory.statistics import key_statistics

LANES = 64  # edits that learn in the same forwards
KEY_BLOCK, KEY_DEPTH = 4, 30  # whose outputs are compared, of a model of so many blocks


@dataclass(frozen=True)
class Memory(MethodSettings):
    """Keep edits in a memory: each owns a code in a frozen basis, and a router picks one for a prompt, or none.

    Args:
        rank: r, numbers of an edit in each block. prompt_positions: P; the last P prompt tokens and all answer tokens are edited.
        key_dimensions: of a token's key.
        least_subject: above which a prompt is taken to be about the subject of an edit.
        strictness: above which it is taken to ask the same of it; larger lets fewer prompts in.
        descent: how a code is learned.

    Raises:
        ValueError: a value is out of its range.
    """

    rank: int = 64
    prompt_positions: int = 3
    key_dimensions: int = 64
    least_subject: float = 0.65
    strictness: float = 0.53
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(
            lr=4.0, max_steps=60, stop_loss=0.03, weight_decay=0.0
        )
    )
    seeded = False

    def __post_init__(self) -> None:
        for name in ("rank", "prompt_positions", "key_dimensions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"memory: {name} must be an integer of at least 1, not {value!r}.")
        for name in ("least_subject", "strictness"):
            if not -1 <= getattr(self, name) < 1:
                raise ValueError(
                    f"memory: {name} must be a similarity of -1 to 1, not be {getattr(self, name)!r}."
                )

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> MemoryEditor:
        """Make an editor of `base`, which takes no unrelated text and draws no random numbers.

        Raises:
            ValueError: facts are to be taught in a chat template.
        """
        require_raw("memory", (setup or EditorSetup()).template)
        return MemoryEditor(base, tokenizer, self, setup or EditorSetup())


class MemoryEditor:
    """Edits a model by a memory; an `Editor`. The edits of a batch are learned side by side, independently of each other."""

    def __init__(self, model: Any, tokenizer: Any, settings: Memory, setup: EditorSetup) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template, stack = setup.template, find_stack(model)
        blocks = model.get_submodule(stack)
        depth, width = len(blocks), configured_width(model, blocks[0])
        numbers = default_blocks(depth)
        # The route is known before the first edited block has run: no prompt is read twice.
        self._key_block = f"{stack}.{min(round(KEY_BLOCK * depth / KEY_DEPTH), numbers[0])}"
        edited = [f"{stack}.{number}" for number in numbers]
        self._basis = Basis(model, edited, settings.rank, width)
        prepared = setup.prepared or PreparedModel()
        known = (self._key_block, settings.key_dimensions)
        if known not in prepared.computed:
            prepared.computed[known] = key_statistics(model, tokenizer, *known)
        self.router = Router(prepared.computed[known], settings.least_subject, settings.strictness)
        device = input_device(model)
        # Of each edit (blocks, r) in int8, and (blocks,) by what they are multiplied.
        self._codes = torch.zeros(0, len(edited), settings.rank, dtype=torch.int8, device=device)
        self._scales = torch.zeros(0, len(edited), device=device)
        self._questions: list[str] = []  # of each edit, by which an edit replaces an earlier one
        self._learning = False
        self._routes = torch.zeros(0, dtype=torch.long)
        self._watch = PromptWatch(model, self._key_block)
        self._tokens: Tensor | None = None  # of the forward
        self._handles = [
            stack_owner(model, self._key_block).register_forward_pre_hook(
                self._read_tokens, with_kwargs=True
            ),
            model.get_submodule(self._key_block).register_forward_hook(self._route),
        ]
        for number, name in enumerate(edited):
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._adding(number)))

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Learn a code for each edit; an edit of a question that is in the memory replaces it. As `Editor.edit`."""
        facts = checked_edits(edits)
        encode_edits(self.model, self.tokenizer, facts, (self._template,))  # their check
        results = self.edit_independently(facts)
        losses = {
            name: sum(one.losses[name] for one in results) / len(results)
            for name in results[0].losses
        }
        return replace(in_turn(results), losses=losses)

    def edit_independently(self, edits: Sequence[Edit]) -> list[EditResult]:
        """Learn a code for each edit, side by side; as `IndependentEditor.edit_independently`."""
        facts, descent = checked_edits(edits), self.settings.descent
        require_raw("memory", self._template, facts)
        rows = [
            encode_fitting(
                self.model,
                self.tokenizer,
                fact.prompt,
                fact.target,
                template=self._template,
                end=descent.learn_end,
            )
            for fact in facts
        ]
        codes: list[Tensor] = []
        results: list[EditResult] = []
        self._learning = True
        try:
            with frozen(self.model):
                keys = self._keys(facts)
                for start in range(0, len(rows), LANES):
                    found, of_lanes = learn_codes(
                        self.model,
                        self.tokenizer,
                        rows[start : start + LANES],
                        self._basis,
                        self.settings.prompt_positions,
                        descent,
                    )
                    codes.append(found)
                    results += of_lanes
        finally:
            self._learning = False
        self._keep(facts, keys, torch.cat(codes))
        return results

    @torch.no_grad()
    def _keys(self, facts: Sequence[Edit]) -> list[Key]:
        """Make the keys of the edits' prompts."""
        keys: list[Key] = []
        for start in range(0, len(facts), LANES):
            part = facts[start : start + LANES]
            rows = [encode_prompt(self.tokenizer, f.prompt, template=self._template) for f in part]
            batch = collate(rows, padding_id(self.tokenizer))
            device = input_device(self.model)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            block = self.model.get_submodule(self._key_block)
            with captured(block, len(part)) as seen, no_logits(self.model):
                full_logits(self.model, **inputs)
            for number, row in enumerate(rows):
                keys.append(self._key(row, seen[0].output[number, : len(row.ids)]))
        return keys

    def _key(self, row: Tokens, states: Tensor) -> Key:
        ids = torch.tensor(row.ids, device=states.device)
        text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        return self.router.key(text, ids, states)

    def _keep(self, facts: Sequence[Edit], keys: Sequence[Key], codes: Tensor) -> None:
        """Put edits behind those that are there; of one question the last edit stays."""
        scales = codes.abs().amax(2).clamp(min=1e-12) / INT8
        rounded = (codes / scales[..., None]).round().to(torch.int8)
        self._codes = torch.cat([self._codes, rounded])
        self._scales = torch.cat([self._scales, scales])
        self._questions += [asked_words(fact.prompt) for fact in facts]
        last = {question: number for number, question in enumerate(self._questions)}
        self._keep_only(sorted(last.values()), [*self.router.keys, *keys])

    def _keep_only(self, numbers: Sequence[int], keys: Sequence[Key]) -> None:
        """Keep the edits of these numbers alone; keys: of all of them."""
        self._questions = [self._questions[number] for number in numbers]
        self._codes, self._scales = self._codes[list(numbers)], self._scales[list(numbers)]
        self.router.replace([keys[number] for number in numbers])

    def forget(self, number: int) -> None:
        """Take one edit out of the memory, by its number in the order of the edits that are there.

        Raises:
            ValueError: there is no such edit.
        """
        if not 0 <= number < len(self._questions):
            raise ValueError(
                f"There are edits 0 to {len(self._questions) - 1}, and none with the number {number}."
            )
        kept = [i for i in range(len(self._questions)) if i != number]
        self._keep_only(kept, self.router.keys)

    @torch.no_grad()
    def matches(self, prompt: str) -> Match:
        """Tell which edit answers a prompt, and how near it came."""
        self._learning = True
        try:
            (key,) = self._keys([Edit(prompt, "-")])
        finally:
            self._learning = False
        return self.router.match(key)

    def _read_tokens(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        self._tokens = given if isinstance(given, Tensor) else None

    def _route(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        """After the key block: find each row's edit, in the forward that holds its prompt."""
        if self._learning or not self._questions:
            return
        hidden = output if isinstance(output, Tensor) else output[0]

        def decide(prompts: Tensor) -> Tensor:
            if self._tokens is None:
                raise ValueError("memory reads prompts as tokens: call the model with input_ids.")
            routes = []
            for ids, states, mask in zip(self._tokens, hidden, prompts, strict=True):
                row = Tokens(tuple(ids[mask.to(ids.device)].tolist()), int(mask.sum()))
                routes.append(self.router.match(self._key(row, states[mask].detach())).edit)
            return torch.tensor(routes, device=hidden.device)

        self._routes = self._watch.decided(decide, hidden.device)

    def _adding(self, number: int) -> Any:
        """Make the hook that adds the chosen codes to what leaves a block."""

        def add(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if self._learning or not self._questions or (self._routes == NONE).all():
                return None

            def edited(hidden: Tensor) -> Tensor:
                routes = self._routes.to(hidden.device)
                place = routes.clamp(min=0).to(self._codes.device), number
                codes = self._codes[place].float() * self._scales[place][:, None]
                change = (codes @ self._basis.rows[number]).to(hidden.device)[:, None]
                positions = self._watch.positions(hidden.device)
                mask = (positions >= -self.settings.prompt_positions) & (routes != NONE)[:, None]
                return torch.where(mask[..., None], hidden + change.to(hidden.dtype), hidden)

            return with_hidden(output, edited)

        return add

    def state_dict(self) -> dict[str, Tensor]:
        """Give codes, keys and questions, one after the other.

        Codes are (edits, blocks, r) in int8, with scales (edits, blocks); keys are int8, with the tokens' ids, of all prompts in
        a row, and how many each has; texts and questions are a JSON text as bytes.
        """
        keys = self.router.keys
        dimensions = self.settings.key_dimensions
        device = self._codes.device
        empty = torch.zeros(0, dimensions, dtype=torch.int8, device=device)
        texts = json.dumps([[key.text for key in keys], self._questions], ensure_ascii=False)
        return {
            "codes": self._codes,
            "scales": self._scales,
            "states": torch.cat([empty, *(key.states for key in keys)]),
            "ids": torch.cat([empty[:, 0].int(), *(key.ids.int() for key in keys)]),
            "lengths": torch.tensor([len(key.ids) for key in keys], dtype=torch.int32),
            "texts": torch.tensor(list(texts.encode()), dtype=torch.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        device, lengths = self._codes.device, state["lengths"].tolist()
        self._codes, self._scales = state["codes"].to(device), state["scales"].to(device)
        texts, self._questions = json.loads(bytes(state["texts"].tolist()))
        states = state["states"].to(device).split(lengths) if lengths else ()
        ids = state["ids"].long().to(device).split(lengths) if lengths else ()
        parts = zip(texts, ids, states, strict=True)
        self.router.replace([Key(*part) for part in parts])

    def remove(self) -> None:
        """Take the memory off the model."""
        for handle in self._handles:
            handle.remove()
        self._watch.remove()
