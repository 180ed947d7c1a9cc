"""Prove on a user's own model that edits are trained, kept and applied at the right tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_baft.adapter import BaftConfig, baft_layers
from peft_baft.adapter.blocks import text_config
from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.state import evaluating, is_baft_peft_model
from peft_baft.tools.check.findings import CheckReport, Finding, installed_versions
from peft_baft.tools.check.tools import flags_kept, in_words
from peft_baft.tools.check.trials import findings_of
from peft_baft.tools.check.tried_model import TriedModel

# Of the adapter that is tried: its rank, and how much of a hidden vector it changes.
RANK, UPDATE = (
    12,
    0.5,
)
ATTACHED = "an adapter can be attached"
UNLOADS = "taken off, it leaves the model as it was"


def check(
    model: Any,
    tokenizer: Any = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> CheckReport:
    """Try on a model everything that an edit needs, in about a minute; the model is left as it was.

    Args:
        model: a causal language model, which gets a random adapter for as long as the check takes; or a PeftModel whose
            active adapter is a BaFT adapter, which is used as it is.
        tokenizer: the model's own, a fast one; without one, token ids are drawn from the vocabulary.
        adapter: a BaFT adapter's folder or Hub id, to try that one on `model` instead of a random one.
        adapter_revision: branch, tag or commit of an adapter on the Hub.

    Raises:
        ValueError: `model` is a PeftModel without exactly one active BaFT adapter, or carries one and `adapter` names
            another; or the adapter's files are damaged.
    """
    if isinstance(model, PeftModel) or baft_layers(model):
        _require_one_baft_adapter(model, adapter)
    elif (
        adapter is not None
        and PeftConfig.from_pretrained(adapter, revision=adapter_revision).peft_type != BAFT
    ):
        raise ValueError(f"{adapter} is no BaFT adapter.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with _left_as_it_was(base), evaluating(base):
        if isinstance(model, PeftModel):
            findings, blocks = _tried_as_it_is(model, tokenizer)
        else:
            findings, blocks = _tried_with_an_adapter(base, tokenizer, adapter, adapter_revision)
    dtype = next(
        (str(p.dtype) for p in base.parameters() if p.is_floating_point()), "unknown dtype"
    )
    return CheckReport(
        model=type(base).__name__,
        architecture=getattr(getattr(base, "config", None), "model_type", ""),
        dtype=dtype.removeprefix("torch."),
        blocks=blocks,
        findings=tuple(findings),
        versions=installed_versions(),
    )


def _tried_as_it_is(model: PeftModel, tokenizer: Any) -> tuple[list[Finding], tuple[str, ...]]:
    """Try a model with the adapter that it came with; the findings, and the names of the edited blocks."""
    findings = findings_of(TriedModel(model, tokenizer))
    findings.append(
        Finding(UNLOADS, None, detail="The model came with its adapter, which stays on it.")
    )
    return findings, _edited_blocks(model)


def _tried_with_an_adapter(
    base: Any, tokenizer: Any, adapter: str | None, adapter_revision: str | None
) -> tuple[list[Finding], tuple[str, ...]]:
    """Put an adapter on a model, try it, and take the adapter off; as `_tried_as_it_is`."""
    before = _contents(base)
    try:
        adapted = _attach(base, adapter, adapter_revision)
    except Exception as error:  # the reason, whatever it is, is what the user asked for
        return [Finding(ATTACHED, False, detail=in_words(error))], ()
    try:
        findings = [Finding(ATTACHED, True), *findings_of(TriedModel(adapted, tokenizer))]
        blocks = _edited_blocks(adapted)
    finally:
        adapted.unload()
    changed = sorted(
        name for name, content in _contents(base).items() if before.get(name) != content
    )
    detail = f"Changed: {', '.join(changed[:3])}" if changed else ""
    return [*findings, Finding(UNLOADS, not changed, detail=detail)], blocks


def _edited_blocks(model: nn.Module) -> tuple[str, ...]:
    return tuple(layer.name for layer in baft_layers(model))


def _require_one_baft_adapter(model: Any, adapter: str | None) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            "The model carries a BaFT adapter, but is no PeftModel; pass it as PeftModel.from_pretrained gave it."
        )
    if adapter is not None:
        raise ValueError("Pass either a PeftModel, or a base model and `adapter`, not both.")
    active = list(model.active_adapters)
    if len(active) != 1 or not is_baft_peft_model(model):
        raise ValueError(
            f"A check takes a base model, or a PeftModel whose one active adapter is a BaFT adapter; active is {active}. "
            "Use set_adapter, or pass model.unload()."
        )


def _attach(base: Any, adapter: str | None, revision: str | None) -> PeftModel:
    """Put the adapter of a folder on the base model, or one that visibly changes every edited token."""
    if adapter is not None:
        chosen: dict[str, Any] = {} if revision is None else {"revision": revision}
        return PeftModel.from_pretrained(base, adapter, **chosen)
    width = getattr(text_config(base), "hidden_size", RANK)
    config = BaftConfig(r=min(RANK, width), gate_offset=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Rows of unit length would change a vector by about its own length.
            if ".baft_source." in name:
                noise = (
                    torch.randn(parameter.shape, generator=generator)
                    * UPDATE
                    * 2
                    / math.sqrt(config.r)
                )
                parameter.add_(noise.to(parameter))
    return model


@contextmanager
def _left_as_it_was(base: Any) -> Iterator[None]:
    """Put back what PEFT leaves on a base model, its parameters' flags and gradients, and the random state."""
    attributes = set(vars(base))
    gradients = {parameter: parameter.grad for parameter in base.parameters()}
    try:
        with torch.random.fork_rng(), flags_kept(base):
            yield
    finally:
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _contents(model: nn.Module) -> dict[str, Any]:
    """List, by name, the sum of the bits of every tensor of a model, and the hooks of every module."""
    contents: dict[str, Any] = {}
    for name, module in model.named_modules():
        contents[f"hooks of {name or 'the model'}"] = (
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(module._modules),
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        contents[name] = (tuple(tensor.shape), tensor.dtype, _sum_of_bits(tensor))
    return contents


def _sum_of_bits(tensor: Tensor) -> int | None:
    """Compute a number that any one changed byte changes; None where the values are elsewhere, or of no plain kind."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return int(tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
