"""What a model computes after its last block, from hidden vectors to logits, as a function of arbitrary vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from transformers import PreTrainedModel

from peft_baft.adapter.blocks import text_config
from peft_baft.data.batching import context_window

TOKENS = 24  # of the text with which the modules after the last block are traced
TOLERANCE = 0.02  # by which a replay may differ, relative to the spread of the logits; low precision needs it
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # names in configs of a soft cap of logits
AT_ONCE = 64  # vectors whose logits are computed together
UNKNOWN_TAIL = (
    "The computation of {} after its last block could not be replayed, so a memory cannot store answers in closed form: {}. "
    "Use a plain adapter for this model."
)


@dataclass(frozen=True)
class Step:
    """A module after the last block.

    Attributes:
        name: its name in the model.
        scale: the factor between the previous module's output and its input.
    """

    name: str
    module: nn.Module
    scale: float


class Tail:
    """The modules after a model's last block, in order, and what turns the last one's output into logits.

    They are found by tracing one forward, and used only if they reproduce its logits.

    Attributes:
        typical: (d,), a typical output of the last block: that of median length.
        dtype, device: of such outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[Step],
        finish: Callable[[Tensor], Tensor],
        states: Tensor,
    ) -> None:
        self.steps = list(steps)
        self._model, self._finish = model, finish
        self.dtype, self.device = states.dtype, states.device
        norms = states.float().norm(dim=-1)
        self.typical = states[int(norms.argsort()[len(norms) // 2])].float()
        self._weights_mark = self._fingerprint()

    @classmethod
    def of(cls, model: PreTrainedModel, block: nn.Module, run: Callable[[Tensor], Tensor]) -> Tail:
        """Find what follows a model's last block.

        Args:
            run: calls the model without edits on ids (1, tokens), and returns its logits.

        Raises:
            NotImplementedError: it cannot be replayed.
        """
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.num_embeddings
        count = min(TOKENS, context_window(model) or TOKENS)
        ids = (torch.arange(1, count + 1) * max(1, vocabulary // (count + 2)) % vocabulary)[None]
        with _traced(block) as trace:
            logits = run(ids)
        if not trace.states or logits.shape[:-1] != trace.states[0].shape[:-1]:
            raise _unknown(model, "its last block does not return one vector per token")
        # The first token is left out: its vector is of a different magnitude.
        states, expected = trace.states[0][0, 1:], logits[0, 1:]
        names = {id(module): name for name, module in model.named_modules()}
        steps, x = [], trace.states[0]
        for module, given, output in trace.calls:
            scale = _scale(given, x)
            if scale is not None and id(module) in names:
                steps.append(Step(names[id(module)], module, scale))
                x = output
        finish = _finish(model, x[0, 1:], expected)
        if not steps or finish is None:
            raise _unknown(model, "its logits are not a known function of the outputs of modules")
        tail = cls(model, steps, finish, states.detach())
        error = (tail.logits(states) - expected.float()).abs().max()
        if not error <= TOLERANCE * expected.float().std().clamp(min=1e-6) + 1e-6:
            raise _unknown(model, f"replayed logits differ by {float(error):.3g}")
        return tail

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits (n, vocabulary) float32 of outputs (n, d) of the last block, in the model's own dtype."""
        return self._finish(self._run(self.steps, states)).float()

    def _run(self, steps: Sequence[Step], states: Tensor) -> Tensor:
        x = states.to(self.device, self.dtype)[None]
        for step in steps:
            x = _first(step.module(x if step.scale == 1 else x * step.scale))
        return x[0]

    def is_current(self) -> bool:
        """Return whether the model still has these modules, with unchanged weights."""
        return (
            all(_submodule(self._model, step.name) is step.module for step in self.steps)
            and self._weights_mark == self._fingerprint()
        )

    def _fingerprint(self) -> list[Any]:
        """Return values that change when a weight does, or when an adapter on these modules is switched."""
        marks: list[Any] = []
        for step in self.steps:
            for part in step.module.modules():
                marks += [
                    str(getattr(part, name))
                    for name in ("active_adapters", "disable_adapters")
                    if hasattr(part, name)
                ]
            for weight in step.module.parameters():
                # Tensors created in inference mode have no version counter.
                version = None if weight.is_inference() else weight._version
                marks += [weight.data_ptr(), version, tuple(weight.shape)]
                if (
                    not weight.is_meta
                    and weight.is_floating_point()
                    and type(weight) is nn.Parameter
                ):
                    values = weight.detach().flatten()
                    marks += values[:: max(1, len(values) // 16)][:16].tolist()
        return marks

    def head(self) -> Tensor | None:
        """Return the weight (vocabulary, d) of the last module if it is a plain linear layer after norms only; else None."""
        module = self.steps[-1].module
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or type(weight) is not nn.Parameter or weight.is_meta:
            return None
        if not weight.is_floating_point() or weight.shape[1] != len(self.typical):
            return None
        before = [p for step in self.steps[:-1] for p in step.module.parameters()]
        return weight.detach() if all(p.ndim < 2 for p in before) else None

    @torch.no_grad()
    def gain(self) -> Tensor:
        """Return the factor (d,) by which the modules before the last one scale each dimension, up to a common factor."""
        generator = torch.Generator().manual_seed(0)
        half = len(self.typical) // 2
        signs = torch.ones(len(self.typical), dtype=torch.float32)
        signs[torch.randperm(len(signs), generator=generator)[:half]] = -1
        # With vectors of both signs, a norm's bias cancels out.
        up, down = self._run(self.steps[:-1], torch.stack([signs, -signs])).float()
        gain: Tensor = (up - down) / 2 * signs.to(self.device)
        return gain

    def gradients(self, tokens: Sequence[int]) -> Tensor:
        """Return the gradients (n, d) of tokens' logits at a typical output of the last block. This works for any modules."""
        found = []
        for start in range(0, len(tokens), AT_ONCE):
            index = torch.tensor(list(tokens[start : start + AT_ONCE]), device=self.device)
            with torch.inference_mode(False), torch.enable_grad():
                states = (
                    self.typical.to(self.device, self.dtype).repeat(len(index), 1).requires_grad_()
                )
                logits = self.logits(states)
                (gradient,) = torch.autograd.grad(
                    logits[torch.arange(len(index)), index].sum(), states
                )
            found.append(gradient.float())
        return torch.cat(found)


class _Trace:
    """What one forward computed: outputs of the block, and calls of modules after it with input and output."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.calls: list[tuple[nn.Module, Tensor, Any]] = []


@contextmanager
def _traced(block: nn.Module) -> Iterator[_Trace]:
    """Record a block's output in this thread, and the calls of the outermost modules that run after it."""
    trace, begun, thread = _Trace(), [], threading.get_ident()
    # The block's own adapters run after it, in its hooks.
    inside = {id(module) for module in block.modules()}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        is_after = trace.states and id(module) not in inside
        if is_after and threading.get_ident() == thread:
            begun.append((module, args))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != thread:
            return
        if module is block:
            trace.states = [_first(output)]
            begun.clear()
            trace.calls.clear()
        elif begun and begun[-1][0] is module:
            begun.pop()
            found = _first(output)
            if not begun and args and isinstance(args[0], Tensor) and isinstance(found, Tensor):
                trace.calls.append((module, args[0], found))

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _scale(given: Tensor, before: Tensor) -> float | None:
    """Return the factor by which `before` was multiplied to get `given`; None if it was not."""
    if given.shape != before.shape:
        return None
    if torch.equal(given, before):
        return 1.0
    return _ratio(given, before)


def _ratio(one: Tensor, other: Tensor) -> float | None:
    """Return the positive factor from `other` to `one`; None if they are not proportional within the tolerance."""
    one, other = one.float(), other.float()
    ratio = float((one * other).sum() / other.square().sum().clamp(min=1e-30))
    close = torch.allclose(one, ratio * other, rtol=TOLERANCE, atol=float(TOLERANCE * one.std()))
    return ratio if close and ratio > 0 else None


def _finish(model: Any, output: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Find the function from the last module's output (tokens, ...) to logits: scaling, a soft cap, or a shift."""
    if output.shape[-1] < logits.shape[-1] or len(output) != len(logits):
        return None
    width = logits.shape[-1]
    output = output[:, :width].float()
    logits = logits.float()
    if torch.equal(output, logits):
        return lambda x: x[..., :width]
    config = text_config(model)
    caps = (getattr(config, name, None) for name in CAPS)
    found: list[Callable[[Tensor], Tensor]] = [partial(_capped, cap=cap) for cap in caps if cap]
    scale = _ratio(logits, output)
    if scale is not None:
        found.append(lambda x: x * scale)
    shift = (logits - output).mean(0)
    found.append(lambda x: x + shift)
    # For small logits a cap looks like a scale, so the candidate with the smallest error is taken.
    errors = [float((make(output) - logits).abs().max()) for make in found]
    best = found[errors.index(min(errors))]
    if not torch.allclose(
        best(output), logits, rtol=TOLERANCE, atol=float(TOLERANCE * logits.std())
    ):
        return None
    return lambda x: best(x[..., :width].float())


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _first(output: Any) -> Any:
    """Return the hidden vectors among a module's outputs."""
    return output[0] if isinstance(output, tuple | list) else output


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _unknown(model: nn.Module, why: str) -> NotImplementedError:
    return NotImplementedError(UNKNOWN_TAIL.format(type(model).__name__, why))
