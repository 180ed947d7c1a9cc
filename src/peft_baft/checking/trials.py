"""What a check of a model tries, one method for each finding.

Most findings compare two ways to the same numbers. Where they differ, the unedited model is asked the same: a difference that it
has as well is its own, as of a recurrent model that takes padding into its state.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from peft_baft.adapter import BaftLayer, baft_layers
from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.adapter.state import rolled_back, trainable, without_adapters
from peft_baft.checking.made_up_text import FACT, PROMPTS, NumberTokenizer, drawn_texts
from peft_baft.checking.report import Finding
from peft_baft.checking.tools import (
    changed_tokens,
    error_of,
    flags_kept,
    in_words,
    largest_difference,
    reasons_of_session,
    step_difference,
)
from peft_baft.data.batching import Tokens, collate, encode, encode_prompt, padding_id
from peft_baft.data.cases import Edit
from peft_baft.editing.acceleration.prefix_cache import CachedPrefix, open_forward
from peft_baft.editing.answers import AnswerForward, FullForward
from peft_baft.editing.baft import BaftEditor
from peft_baft.editing.train import DescentConfig

NEW_TOKENS = 5  # that are generated after each prompt
STEPS = 10  # of the edit that is tried
ROUNDINGS = 60  # so many spacings of the model's numbers, relative to the logits' deviation, may two ways differ
RELOADED = "baft_check_reloaded"  # name of the adapter that is saved and read again, while it is there

RUNS = "the edited model runs"
CONTROL = "an edit one token off would be seen"
PLACES = "the last prompt tokens and the answer are edited, nothing else"
CAUSAL = "later tokens change nothing before them"
CACHED = "cached generation = one full forward"
LEFT = "generating from a left-padded batch = each row alone"
RIGHT = "a right-padded batch = each row alone"
REACHED = "gradient reaches every edited block"
FAST = "fast edit path = plain path, loss and gradient"
LEARNS = "an edit's loss falls"
RELOADS = "saved and read again, the adapter is the same"
UNEDITED_CANNOT = "The unedited model cannot do it: {}"
CANNOT_TELL = (
    "Cannot tell: one edited token more or less changes the logits less than rounding, so the findings about places prove "
    "nothing. Check the base model without this adapter: it then gets a random one, whose edits are seen."
)


class Trials:
    """One PeftModel with its texts, and one method for each finding."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer or NumberTokenizer()
        prompts, fact = (PROMPTS, FACT) if tokenizer is not None else drawn_texts(model.get_base_model())
        self.fact = Edit(*fact)
        self.prompts = [list(encode_prompt(self.tokenizer, prompt).ids) for prompt in prompts]
        self.device, self.pad = input_device(model), padding_id(self.tokenizer)
        self.layers: list[BaftLayer] = baft_layers(model)
        self.adapter_name = model.active_adapters[0]
        self.positions = self.layers[0].configs[self.adapter_name].prompt_positions
        self.tolerance = max(1e-3, ROUNDINGS * torch.finfo(_computing_dtype(model.get_base_model())).eps)
        self.answer = self.prompts[0][:NEW_TOKENS]  # what follows the prompts where nothing is generated

    def findings(self) -> list[Finding]:
        """All findings; what goes wrong within one is that finding's detail, and the next one is tried."""
        runs = self._tried(RUNS, self._runs)
        if not runs.holds:
            return [runs]
        trials: dict[str, Callable[[], Finding]] = {
            CONTROL: self._control,
            PLACES: self._places,
            CAUSAL: partial(self._equal, CAUSAL, self._later_tokens),
            CACHED: partial(self._equal, CACHED, partial(self._generation, self.prompts[:1])),
            LEFT: partial(self._equal, LEFT, partial(self._generation, self.prompts)),
            RIGHT: partial(self._equal, RIGHT, self._right_padding),
            REACHED: self._reached,
            FAST: self._fast,
            LEARNS: self._learns,
            RELOADS: self._reloads,
        }
        return [runs, *(self._tried(name, trial) for name, trial in trials.items())]

    @staticmethod
    def _tried(name: str, trial: Callable[[], Finding]) -> Finding:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return trial()
        except Exception as error:  # of code that nobody here has seen: it is what the user wants to know
            return Finding(name, False, detail=in_words(error))

    def _equal(self, name: str, pairs: Callable[[], list[tuple[Tensor, Tensor]]]) -> Finding:
        """Whether two ways give the same logits; where they do not, whether they do in the unedited model."""
        error: Exception | None = None
        try:
            difference = largest_difference(pairs())
        except Exception as raised:
            difference, error = math.inf, raised
        if difference <= self.tolerance:
            return Finding(name, True, difference, self.tolerance)
        shown = None if error else difference
        with without_adapters(self.model):
            try:
                own = largest_difference(pairs())
            except Exception as raised:
                return Finding(name, None, shown, self.tolerance, UNEDITED_CANNOT.format(in_words(raised)))
        detail = in_words(error) if error else ""
        if own > self.tolerance and (error or difference < 10 * own):
            return Finding(
                name, None, shown, self.tolerance, f"The unedited model differs by {own:.2g}. {detail}".strip()
            )
        return Finding(name, False, shown, self.tolerance, detail or f"The unedited model differs by {own:.2g}.")

    def _runs(self) -> Finding:
        finite = bool(self._full(self.prompts[0], self.answer).isfinite().all())
        return Finding(RUNS, finite, detail="" if finite else "Its logits are not finite.")

    # ------------------------------------------------------------------------------------------- where is edited

    @torch.no_grad()
    def _full(self, prompt: Sequence[int], answer: Sequence[int], length: int | None = None) -> Tensor:
        """Logits (tokens, vocabulary) of one row in one forward, its prompt stated to have `length` tokens."""
        batch = self._tensors([[*prompt, *answer]], "right")
        return full_logits(self.model, **batch, prompt_lengths=[len(prompt) if length is None else length])[0].float()

    def _tensors(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        batch = collate([Tokens(tuple(row), len(row)) for row in rows], self.pad, side)
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _control(self) -> Finding:
        """Whether the comparisons could fail: an edit that begins one token earlier or later must be seen."""
        prompt = self.prompts[0]
        first = max(len(prompt) - self.positions - 1, 0)
        right = self._full(prompt, self.answer)[first:]
        differences = []
        for offset in (-1, 1):
            wrong = self._full(prompt, self.answer, len(prompt) + offset)[first:]
            differences.append(largest_difference([(wrong, right)]))
        if min(differences) > self.tolerance:
            return Finding(CONTROL, True, min(differences))
        return Finding(CONTROL, False, min(differences), detail=CANNOT_TELL)

    def _places(self) -> Finding:
        """Which tokens each edited block changes while an answer is generated, step by step.

        One row at a time: some models' own caches fail with several.
        """
        wrong: list[str] = []
        for prompt in self.prompts:
            batch = self._tensors([prompt], "left")
            try:
                with changed_tokens(self.layers) as changed:
                    self._generate(batch)
            except Exception:
                with without_adapters(self.model):
                    own = error_of(partial(self._generate, batch))
                if own is None:
                    raise
                return Finding(PLACES, None, detail=UNEDITED_CANNOT.format(own))
            for block, masks in changed.items():
                runs = len(masks) // NEW_TOKENS  # of the block in one forward
                if runs * NEW_TOKENS != len(masks) or not runs:
                    return Finding(PLACES, None, detail=f"{block} ran {len(masks)} times for {NEW_TOKENS} tokens.")
                for step in range(NEW_TOKENS):
                    end = len(prompt) + step  # tokens so far; the mask covers the last of them
                    for mask in masks[step * runs : (step + 1) * runs]:
                        expected = torch.arange(end - mask.shape[1], end) >= len(prompt) - self.positions
                        if not torch.equal(mask[0], expected):
                            wrong.append(f"{block}, new token {step + 1}")
        return Finding(PLACES, not wrong, detail=f"Other tokens at {'; '.join(wrong[:3])}." if wrong else "")

    def _later_tokens(self) -> list[tuple[Tensor, Tensor]]:
        prompt = self.prompts[0]
        return [(self._full(prompt, [])[:-1], self._full(prompt, self.answer)[: len(prompt) - 1])]

    # ------------------------------------------------------------------------------------------- batches and caches

    @torch.no_grad()
    def _generate(self, batch: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
        """Generated tokens of each row, and the logits (rows, new tokens, vocabulary) that they were chosen from."""
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=self.pad
        )
        out = self.model.generate(**batch, generation_config=settings, return_dict_in_generate=True, output_logits=True)
        return out.sequences[:, batch["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, 1).float()

    def _generation(self, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Of each row, the logits of generation and those of one full forward of that row alone."""
        answers, logits = self._generate(self._tensors(prompts, "left"))
        alone = [self._full(p, answer)[len(p) - 1 : -1] for p, answer in zip(prompts, answers, strict=True)]
        return list(zip(logits, alone, strict=True))

    @torch.no_grad()
    def _right_padding(self) -> list[tuple[Tensor, Tensor]]:
        """Of each row, the logits in a right-padded batch and those of that row alone."""
        batch = self._tensors([[*prompt, *self.answer] for prompt in self.prompts], "right")
        together = full_logits(self.model, **batch, prompt_lengths=[len(prompt) for prompt in self.prompts])
        alone = [self._full(prompt, self.answer) for prompt in self.prompts]
        return [(row[: len(one)].float(), one) for row, one in zip(together, alone, strict=True)]

    # ------------------------------------------------------------------------------------------- editing

    def _rows(self) -> list[Tokens]:
        """The fact, and a shorter text beside it, so that there is padding."""
        shorter = Tokens((*self.prompts[1], *self.answer[:2]), len(self.prompts[1]))
        return [encode(self.tokenizer, self.fact.prompt, self.fact.target), shorter]

    @torch.enable_grad()
    def _loss_and_gradients(self, session: AnswerForward) -> tuple[float, dict[str, Tensor]]:
        """The mean loss, and the gradient of each of the adapter's parameters in each block."""
        self.model.zero_grad()
        loss = session.losses().mean()
        loss.backward()
        gradients = {}
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{layer.name} {name}"] = parameter.grad.detach().float().cpu().clone()
        return loss.item(), gradients

    def _reached(self) -> Finding:
        with trainable(self.model):
            _, gradients = self._loss_and_gradients(FullForward(self.model, self._rows(), [0], self.pad, self.device))
        sizes = {layer.name: 0.0 for layer in self.layers}
        for name, gradient in gradients.items():
            block = name.partition(" ")[0]
            sizes[block] = max(sizes[block], gradient.norm().item())
        without = [name for name, size in sizes.items() if not 0 < size < math.inf]
        return Finding(REACHED, not without, detail=f"Not: {', '.join(without)}." if without else "")

    def _fast(self) -> Finding:
        given = (self.model, self._rows(), [0], self.pad)
        with trainable(self.model), reasons_of_session() as reasons:
            plain = self._loss_and_gradients(FullForward(*given, self.device))
            chosen = open_forward(*given, self.positions)
            try:
                cached = CachedPrefix.build(*given, self.device, self.positions)
                difference = max(step_difference(plain, self._loss_and_gradients(cached)) for _ in range(2))
                why = "loss or gradient would differ."
            except Exception as error:
                difference, why = math.inf, in_words(error)
        shown = None if math.isinf(difference) else difference
        if not isinstance(chosen, CachedPrefix):
            detail = f"Edits take the plain path, which is slower: {' '.join(reasons) or why}"
            return Finding(FAST, None, shown, self.tolerance, detail)
        if difference <= self.tolerance:
            return Finding(FAST, True, shown, self.tolerance)
        return Finding(FAST, False, shown, self.tolerance, f"Edits take the fast path, but {why}")

    def _learns(self) -> Finding:
        with rolled_back(self.model):
            editor = BaftEditor(self.model, self.tokenizer, descent=DescentConfig(max_steps=STEPS))
            with torch.no_grad():
                session = FullForward(self.model, self._rows()[:1], [0], self.pad, self.device)
                before = session.losses().mean().item()
            after = editor.edit([self.fact]).losses["teacher_forcing"]
        return Finding(LEARNS, after < before, detail=f"From {before:.3g} to {after:.3g} in {STEPS} steps.")

    def _reloads(self) -> Finding:
        expected = self._full(self.prompts[0], self.answer)
        with tempfile.TemporaryDirectory() as folder, flags_kept(self.model):
            self.model.save_pretrained(folder, selected_adapters=[self.adapter_name], save_embedding_layers=False)
            where = folder if self.adapter_name == "default" else f"{folder}/{self.adapter_name}"
            try:
                self.model.load_adapter(where, adapter_name=RELOADED)
                self.model.set_adapter(RELOADED)
                found = self._full(self.prompts[0], self.answer)
            finally:
                self.model.set_adapter(self.adapter_name)
                if RELOADED in self.model.peft_config:
                    self.model.delete_adapter(RELOADED)
        difference = largest_difference([(found, expected)])
        return Finding(RELOADS, bool(torch.equal(found, expected)), difference, 0.0)


def _computing_dtype(base: Any) -> torch.dtype:
    """The dtype that a model computes with: that of its first weights that are not quantised."""
    dtypes = (p.dtype for p in base.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(dtypes, torch.float32)
