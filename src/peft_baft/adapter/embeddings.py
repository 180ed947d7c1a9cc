"""A model's embeddings in an adapter's file: PEFT saves them with the adapter if they were resized, or on request.

It does so under up to three names per tensor, if an adapter also trains a copy of the module (`modules_to_save`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import Tensor, nn

ORIGINAL, COPIES = "original_module", "modules_to_save"  # parts of PEFT's wrapper of a saved module


def plain_name(name: str) -> str:
    """Return the name of a tensor of a saved module as if the module were not wrapped."""
    return name.replace(f".{ORIGINAL}.", ".").replace(f".{COPIES}.", ".")


def may_be_embeddings(names: Iterable[str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors could be a model's input and output embeddings, by their names, dtypes and dimensions."""
    modules = set()
    for name in names:
        module, _, part = plain_name(name).rpartition(".")
        fits = (part, tensors[name].ndim) in (("weight", 2), ("bias", 1))
        if not (module and fits and tensors[name].is_floating_point()):
            return False
        modules.add(module)
    return len(modules) <= 2


def embedding_modules(model: nn.Module) -> set[str]:
    """Return the names of a model's input and output embeddings, as far as it has them."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    return {name for name, module in model.named_modules() if any(module is one for one in found)}


def require_embeddings(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless tensors of these names and shapes can be loaded into a model's embeddings."""
    modules, own = embedding_modules(model), own_shapes(model)
    for name, shape in shapes.items():
        module = plain_name(name).rpartition(".")[0]
        present = own.get(plain_name(name))
        if module not in modules or present is None:
            raise ValueError(
                f"The adapter's file holds {name}, which is not part of its adapter, nor of the embeddings of "
                f"{type(model).__name__}. Modules that are saved with an adapter must be named in modules_to_save."
            )
        if present != shape:
            raise ValueError(
                f"The adapter's file holds {name} of shape {shape}, and that of {type(model).__name__} is {present}: the "
                f"embeddings had been resized when it was saved. Call model.resize_token_embeddings({shape[0]}) before loading "
                "it, or load it on the model that it was made for."
            )


def own_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's own tensors, by their names as if no module were wrapped."""
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {
        name.replace(f".{ORIGINAL}.", "."): tuple(tensor.shape)
        for name, tensor in tensors
        if f".{COPIES}." not in name
    }


def rename_for_model(
    state: Mapping[str, Tensor], known: Iterable[str], prefix: str
) -> dict[str, Tensor]:
    """Rename tensors from a file to their names in a model, in which other modules may be wrapped.

    Args:
        state: by the names in the file, but with the adapter's name in those of a saved module's copy.
        known: the names of the model's tensors. prefix: the beginning of the file's names, but not always of the model's.
    """
    names = {name.removeprefix(prefix) for name in known}
    renamed = {}
    for name, tensor in state.items():
        own = name.removeprefix(prefix)
        module, _, part = plain_name(own).rpartition(".")
        places = [own, f"{module}.{part}", f"{module}.{ORIGINAL}.{part}"]
        if f".{COPIES}." in own and own not in names:
            continue  # a duplicate: the file also has it under the module's plain name
        found = next((place for place in places if place in names), own)
        renamed[name.removesuffix(own) + found] = tensor
    return renamed
