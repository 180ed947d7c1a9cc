"""Prove on a user's own model that edits are trained, kept and applied at the right tokens.

Every finding compares two ways to the same numbers. Where they differ, the unedited model is asked the same: a difference that
it has as well is its own, as of a recurrent model that takes padding into its state.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from peft_baft.adapter import BaftConfig, BaftLayer, baft_layers
from peft_baft.adapter.blocks import text_config
from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.data.batching import Tokens, collate, encode, encode_prompt, padding_id
from peft_baft.data.cases import Edit
from peft_baft.editing.baft import BaftEditor
from peft_baft.editing.descent import DescentConfig
from peft_baft.editing.editor import evaluating, rolled_back, trainable, without_adapters
from peft_baft.editing.session import CachedSession, Session, open_session
from peft_baft.editing.session import logger as session_logger
from peft_baft.evaluation.check_report import CheckReport, Finding, installed_versions
from peft_baft.evaluation.made_up_text import FACT, PROMPTS, NumberTokenizer, drawn_texts

NEW_TOKENS = 5  # that are generated after each prompt
STEPS = 10  # of the edit that is tried
ROUNDINGS = 30  # so many spacings of the model's numbers, relative to the logits' deviation, may two ways differ
RANK, UPDATE = 12, 0.5  # of the adapter that is tried: its rank, and how much of a hidden vector it changes
RELOADED = "baft_check_reloaded"  # name of the adapter that is saved and read again, while it is there

ATTACHED = "an adapter can be attached"
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
UNLOADS = "taken off, it leaves the model as it was"
CANNOT_TELL = "Cannot tell: {} changes the logits less than rounding, so the findings about places prove nothing. {}"


def check(model: Any, tokenizer: Any = None, adapter: str | None = None) -> CheckReport:
    """Try on a model everything that an edit needs, in about a minute; the model is left as it was.

    Args:
        model: a causal language model, which gets a random adapter for as long as the check takes; or a PeftModel whose
            active adapter is a BaFT adapter, which is used as it is.
        tokenizer: the model's own, a fast one; without one, token ids are drawn from the vocabulary.
        adapter: a BaFT adapter's folder or Hub id, to try that one on `model` instead of a random one.

    Raises:
        ValueError: `model` is a PeftModel without exactly one active BaFT adapter, or carries one and `adapter` names
            another.
    """
    if isinstance(model, PeftModel) or baft_layers(model):
        _require_one_baft_adapter(model, adapter)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    findings: list[Finding] = []
    blocks: tuple[str, ...] = ()
    with _left_as_it_was(base), evaluating(base):
        if isinstance(model, PeftModel):
            findings += _Trial(model, tokenizer).findings()
            blocks = tuple(layer.name for layer in baft_layers(model))
            findings.append(Finding(UNLOADS, None, detail="The model came with its adapter, which stays on it."))
        else:
            before = _contents(base)
            try:
                adapted = _attach(base, adapter)
            except Exception as error:  # the reason, whatever it is, is what the user asked for
                findings.append(Finding(ATTACHED, False, detail=_in_words(error)))
            else:
                try:
                    findings += [Finding(ATTACHED, True), *_Trial(adapted, tokenizer).findings()]
                    blocks = tuple(layer.name for layer in baft_layers(adapted))
                finally:
                    adapted.unload()
                changed = sorted(name for name, content in _contents(base).items() if before.get(name) != content)
                detail = f"Changed: {', '.join(changed[:3])}" if changed else ""
                findings.append(Finding(UNLOADS, not changed, detail=detail))
    dtype = next((str(p.dtype) for p in base.parameters() if p.is_floating_point()), "unknown dtype")
    return CheckReport(
        model=type(base).__name__,
        architecture=getattr(getattr(base, "config", None), "model_type", ""),
        dtype=dtype.removeprefix("torch."),
        blocks=blocks,
        findings=tuple(findings),
        versions=installed_versions(),
    )


def _require_one_baft_adapter(model: Any, adapter: str | None) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            "The model carries a BaFT adapter, but is no PeftModel; pass it as PeftModel.from_pretrained gave it."
        )
    if adapter is not None:
        raise ValueError("Pass either a PeftModel, or a base model and `adapter`, not both.")
    active = list(model.active_adapters)
    if len(active) != 1 or not any(active[0] in layer.configs for layer in baft_layers(model)):
        raise ValueError(
            f"A check takes a base model, or a PeftModel whose one active adapter is a BaFT adapter; active is {active}. "
            "Use set_adapter, or pass model.unload()."
        )


def _attach(base: Any, adapter: str | None) -> PeftModel:
    """The base model with the adapter of a folder, or with one that visibly changes every edited token."""
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter)
    width = getattr(text_config(base), "hidden_size", RANK)
    config = BaftConfig(r=min(RANK, width), gate_offset=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".baft_source." in name:  # rows of unit length would change a vector by about its own length
                noise = torch.randn(parameter.shape, generator=generator) * UPDATE * 2 / math.sqrt(config.r)
                parameter.add_(noise.to(parameter))
    return model


class _Trial:
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
        dtype = next(p.dtype for p in model.get_base_model().parameters() if p.is_floating_point())
        self.tolerance = max(1e-3, ROUNDINGS * torch.finfo(dtype).eps)
        self.answer = self.prompts[0][:NEW_TOKENS]  # what follows the prompts where nothing is generated

    def findings(self) -> list[Finding]:
        """All findings; what goes wrong within one is that finding's detail."""
        compared = {
            CAUSAL: self._later_tokens,
            CACHED: lambda: self._generation(self.prompts[:1]),
            LEFT: lambda: self._generation(self.prompts),
            RIGHT: self._right_padding,
        }
        runs = self._tried(RUNS, lambda: Finding(RUNS, self._full(self.prompts[0], self.answer).ndim == 2))
        if not runs.holds:
            return [runs]
        found = [runs, self._tried(CONTROL, self._control), self._tried(PLACES, self._edited_places)]
        found += [
            self._tried(name, lambda pair=pair, name=name: self._equal(name, pair)) for name, pair in compared.items()
        ]
        others = {REACHED: self._reached, FAST: self._fast, LEARNS: self._learns, RELOADS: self._reloads}
        return found + [self._tried(name, trial) for name, trial in others.items()]

    @staticmethod
    def _tried(name: str, trial: Callable[[], Finding]) -> Finding:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return trial()
        except Exception as error:  # of code that nobody here has seen: it is reported, and the next finding is tried
            return Finding(name, False, detail=_in_words(error))

    def _equal(self, name: str, pair: Callable[[], list[tuple[Tensor, Tensor]]]) -> Finding:
        """Whether two ways give the same logits; where they do not, whether they do in the unedited model."""
        try:
            difference, why = _largest_difference(pair()), "They differ."
        except Exception as error:
            difference, why = math.inf, _in_words(error)
        if difference <= self.tolerance:
            return Finding(name, True, difference, self.tolerance)
        with without_adapters(self.model):
            try:
                own = _largest_difference(pair())
            except Exception as error:
                return Finding(name, None, detail=f"The unedited model cannot do it: {_in_words(error)}")
        shown = None if math.isinf(difference) else difference
        if own <= self.tolerance:
            return Finding(name, False, shown, self.tolerance, why)
        return Finding(name, None, shown, self.tolerance, f"The unedited model differs by {own:.2g} as well.")

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
        """Whether the comparisons could fail: edits that begin one token earlier or later must be seen."""
        prompt = self.prompts[0]
        right = self._full(prompt, self.answer)[len(prompt) - 1 :]
        wrong = [self._full(prompt, self.answer, len(prompt) + off)[len(prompt) - 1 :] for off in (-1, 1)]
        smallest = min(_largest_difference([(right, other)]) for other in wrong)
        if smallest > self.tolerance:
            return Finding(CONTROL, True, smallest, detail="")
        advice = "Check the base model without this adapter, which takes a random one."
        return Finding(CONTROL, False, smallest, detail=CANNOT_TELL.format("one edited token more or less", advice))

    def _edited_places(self) -> Finding:
        """Which tokens each edited block changes while an answer is generated, step by step.

        One row at a time: some models' own caches fail with several.
        """
        wrong = []
        for prompt in self.prompts:
            seen: dict[str, list[Tensor]] = {layer.name: [] for layer in self.layers}
            with _watching(self.layers, seen):
                self._generate(self._tensors([prompt], "left"))
            for name, masks in seen.items():
                runs = len(masks) / NEW_TOKENS  # of the block in one forward
                if runs != int(runs) or not runs:
                    return Finding(PLACES, None, detail=f"{name} ran {len(masks)} times for {NEW_TOKENS} tokens.")
                for number, mask in enumerate(masks):
                    end = len(prompt) + int(number / runs)
                    expected = torch.arange(end - mask.shape[1], end) >= len(prompt) - self.positions
                    if not torch.equal(mask[0], expected):
                        wrong.append(f"{name}, new token {int(number / runs) + 1}")
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
    def _loss_and_gradients(self, session: Session) -> tuple[float, dict[str, Tensor]]:
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
            _, gradients = self._loss_and_gradients(Session(self.model, self._rows(), [0], self.pad, self.device))
        sizes = {layer.name: 0.0 for layer in self.layers}
        for name, gradient in gradients.items():
            block = name.partition(" ")[0]
            sizes[block] = max(sizes[block], gradient.norm().item())
        without = [name for name, size in sizes.items() if not 0 < size < math.inf]
        return Finding(REACHED, not without, detail=f"Not: {', '.join(without)}." if without else "")

    def _fast(self) -> Finding:
        given = (self.model, self._rows(), [0], self.pad)
        with trainable(self.model), _reasons_of_session() as reasons:
            plain = self._loss_and_gradients(Session(*given, self.device))
            chosen = open_session(*given, self.positions)
            try:
                cached = CachedSession(*given, self.device, self.positions)
                difference = max(_step_difference(plain, self._loss_and_gradients(cached)) for _ in range(2))
                why = "loss or gradient would differ."
            except Exception as error:
                difference, why = math.inf, _in_words(error)
        shown = None if math.isinf(difference) else difference
        if not isinstance(chosen, CachedSession):
            detail = f"Edits take the plain path, which is slower: {' '.join(reasons) or why}"
            return Finding(FAST, None, shown, self.tolerance, detail)
        if difference <= self.tolerance:
            return Finding(FAST, True, shown, self.tolerance)
        return Finding(FAST, False, shown, self.tolerance, f"Edits take the fast path, but {why}")

    def _learns(self) -> Finding:
        with rolled_back(self.model):
            editor = BaftEditor(self.model, self.tokenizer, descent=DescentConfig(max_steps=STEPS))
            with torch.no_grad():
                session = Session(self.model, self._rows()[:1], [0], self.pad, self.device)
                before = session.losses().mean().item()
            after = editor.edit([self.fact]).losses["teacher_forcing"]
        return Finding(LEARNS, after < before, detail=f"From {before:.3g} to {after:.3g} in {STEPS} steps.")

    def _reloads(self) -> Finding:
        expected = self._full(self.prompts[0], self.answer)
        with tempfile.TemporaryDirectory() as folder, _flags_kept(self.model):
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
        difference = _largest_difference([(found, expected)])
        return Finding(RELOADS, bool(torch.equal(found, expected)), difference, 0.0)


def _largest_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of pairs of logits, in standard deviations of the second ones; infinite where one is NaN."""
    found = 0.0
    for one, other in pairs:
        if not len(other):
            continue
        difference = ((one - other.to(one.device)).abs().max() / other.std().clamp(min=1e-30)).item()
        found = max(found, math.inf if math.isnan(difference) else difference)
    return found


def _step_difference(plain: tuple[float, dict[str, Tensor]], cached: tuple[float, dict[str, Tensor]]) -> float:
    """How far loss and gradient of two ways differ, relative to the loss and to the whole gradient's length."""
    (loss, gradients), (other_loss, others) = plain, cached
    missing = gradients.keys() ^ others.keys()
    squares = [(others[name] - gradient).square().sum() for name, gradient in gradients.items() if name not in missing]
    length = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    difference = max(abs(other_loss - loss) / (1 + abs(loss)), (torch.stack(squares).sum().sqrt() / length).item())
    return math.inf if missing or math.isnan(difference) else difference


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _watching(layers: Sequence[BaftLayer], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Note at every run of the edited blocks which tokens (rows, tokens) their BaftLayers change."""
    with ExitStack() as hooks:
        for layer in layers:

            def note(_module: nn.Module, given: tuple, out: Tensor, masks: list[Tensor] = seen[layer.name]) -> None:
                masks.append((given[0] != out).any(-1).cpu())

            hooks.enter_context(layer.register_forward_hook(note))
        yield


@contextmanager
def _reasons_of_session() -> Iterator[list[str]]:
    """Collect why a session does without a cache, instead of letting it be logged."""
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.args[-1] if isinstance(record.args, tuple) and record.args else record.msg
        reasons.append(_in_words(error) if isinstance(error, Exception) else str(error))
        return False

    session_logger.addFilter(keep)
    level = session_logger.level
    session_logger.setLevel(logging.INFO)
    try:
        yield reasons
    finally:
        session_logger.setLevel(level)
        session_logger.removeFilter(keep)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Put back which parameters are trained: PEFT changes that when adapters come and go."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _left_as_it_was(base: Any) -> Iterator[None]:
    """Put back what PEFT leaves on a base model, its parameters' flags and gradients, and the random state."""
    attributes = set(vars(base))
    gradients = {parameter: parameter.grad for parameter in base.parameters()}
    try:
        with torch.random.fork_rng(), _flags_kept(base):
            yield
    finally:
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _contents(model: nn.Module) -> dict[str, Any]:
    """Sums of the bits of every tensor of a model, and the hooks of every module, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"hooks of {name or 'the model'}"] = (
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(module._modules),
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (tuple(tensor.shape), tensor.dtype, _sum_of_bits(tensor))
    return found


def _sum_of_bits(tensor: Tensor) -> int | None:
    """A number that changes with any one bit; None where the values are elsewhere, or of no plain kind."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))
