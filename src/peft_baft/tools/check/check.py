"""Check on a user's own model that edits are trained, saved and applied at the right tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter import BaftConfig, baft_layers
from peft_baft.adapter.blocks import text_config
from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.state import evaluating, is_baft_peft_model
from peft_baft.tools.check.findings import CheckReport, Finding, installed_versions
from peft_baft.tools.check.tools import base_model_of, describe, requires_grad_restored
from peft_baft.tools.check.trials import run_trials
from peft_baft.tools.check.tried_model import TriedModel

# The random adapter's rank, and the norm of its updates relative to hidden vectors.
RANK, UPDATE = 12, 0.5
ATTACHED = "an adapter can be attached"
UNLOADS = "unloading it restores the model"


def check(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> CheckReport:
    """Test on a model everything that edits need, in about a minute. The model is left unchanged.

    Args:
        model: a causal language model, which gets a random adapter during the check; or a PeftModel whose active adapter is a
            BaFT adapter, which is used as it is.
        tokenizer: the model's fast tokenizer; without one, random token ids are used as text.
        adapter: a BaFT adapter's folder or Hub id, to test on `model` instead of a random adapter.
        adapter_revision: branch, tag or commit of an adapter on the Hub.

    Raises:
        ValueError: `model` is a PeftModel without exactly one active BaFT adapter, or has an adapter while `adapter` names
            another; or the adapter's files are damaged.
    """
    if isinstance(model, PeftModel) or baft_layers(model):
        _require_one_baft_adapter(model, adapter)
    elif (
        adapter is not None
        and PeftConfig.from_pretrained(adapter, revision=adapter_revision).peft_type != BAFT
    ):
        raise ValueError(f"{adapter} is not a BaFT adapter.")
    base = base_model_of(model)
    with _restored(base), evaluating(base):
        if isinstance(model, PeftModel):
            findings, blocks = _check_with_own_adapter(model, tokenizer)
        else:
            findings, blocks = _check_with_new_adapter(base, tokenizer, adapter, adapter_revision)
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


def _check_with_own_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[Finding], tuple[str, ...]]:
    """Test a model with the adapter that it already has; return the findings and the names of the edited blocks."""
    findings = run_trials(TriedModel(model, tokenizer))
    findings.append(
        Finding(UNLOADS, None, detail="The adapter was on the model already, and stays there.")
    )
    return findings, _edited_blocks(model)


def _check_with_new_adapter(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: str | None,
    adapter_revision: str | None,
) -> tuple[list[Finding], tuple[str, ...]]:
    """Attach an adapter, test the model, and unload the adapter; returns the same as `_check_with_own_adapter`."""
    before = _contents(base)
    try:
        adapted = _attach(base, adapter, adapter_revision)
    except Exception as error:  # any error is a result of the check
        return [Finding(ATTACHED, False, detail=describe(error))], ()
    try:
        findings = [Finding(ATTACHED, True), *run_trials(TriedModel(adapted, tokenizer))]
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


def _require_one_baft_adapter(model: nn.Module, adapter: str | None) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            "The model has a BaFT adapter but is not a PeftModel; pass the model that PeftModel.from_pretrained returned."
        )
    if adapter is not None:
        raise ValueError("Pass either a PeftModel, or a base model and `adapter`, not both.")
    active = list(model.active_adapters)
    if len(active) != 1 or not is_baft_peft_model(model):
        raise ValueError(
            f"A check needs a base model, or a PeftModel whose only active adapter is a BaFT adapter; active is {active}. "
            "Use set_adapter, or pass model.unload()."
        )


def _attach(base: PreTrainedModel, adapter: str | None, revision: str | None) -> PeftModel:
    """Load an adapter onto the base model, or attach a random one that changes every edited token noticeably."""
    if adapter is not None:
        chosen: dict[str, Any] = {} if revision is None else {"revision": revision}
        return PeftModel.from_pretrained(base, adapter, **chosen)
    width = getattr(text_config(base), "hidden_size", RANK)
    config = BaftConfig(r=min(RANK, width), gate_offset=0.0, task_type="CAUSAL_LM")
    model = cast(PeftModel, get_peft_model(base, config))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Rows of unit length would change a vector by about its own length.
            if ".baft_source." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * UPDATE * 2 / math.sqrt(config.r)).to(parameter))
    return model


@contextmanager
def _restored(base: PreTrainedModel) -> Iterator[None]:
    """Restore a base model on exit: attributes that PEFT adds, `requires_grad`, gradients, and the global random state."""
    attributes = set(vars(base))
    gradients = {parameter: parameter.grad for parameter in base.parameters()}
    try:
        with torch.random.fork_rng(), requires_grad_restored(base):
            yield
    finally:
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _contents(model: nn.Module) -> dict[str, Any]:
    """Return a checksum of each tensor of a model, and the type, hooks and children of each module, by name."""
    contents: dict[str, Any] = {}
    for name, module in model.named_modules():
        contents[f"hooks of {name or 'the model'}"] = (
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(module._modules),
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        contents[name] = (tuple(tensor.shape), tensor.dtype, _checksum(tensor))
    return contents


def _checksum(tensor: Tensor) -> int | None:
    """Return the sum of a tensor's bytes; None for tensors of other classes and for those whose values are offloaded."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return int(tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
