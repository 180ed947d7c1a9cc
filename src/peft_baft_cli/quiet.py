"""Silence other libraries while a command runs. The package's own warnings and all errors are shown."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

OURS = "peft_baft"
OTHERS = (
    "torch",
    "transformers",
    "huggingface_hub",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torchao",
)


@contextmanager
def only_our_messages() -> Iterator[None]:
    """Disable warnings and progress bars of other libraries inside the block, including its imports.

    Their errors are shown, and so is everything that `peft_baft` logs at level WARNING or above. Warnings that the user enabled
    with `python -W` or PYTHONWARNINGS are shown as well. All settings are restored afterwards.
    """
    with warnings.catch_warnings(), _only_our_logging(), _no_other_progress_bars():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=rf"{OURS}(\.|$)")
        yield


def silence_imported() -> None:
    """Silence libraries that configure their own logging on import. Call this after importing them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in OTHERS:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.ERROR))


@contextmanager
def _only_our_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger(OURS)
    levels = {logger: logger.level for logger in (root, ours, *map(logging.getLogger, OTHERS))}
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.ERROR)  # for loggers without their own level
    ours.setLevel(logging.WARNING)
    _silence_torch_import()
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)


def _silence_torch_import() -> None:
    """Silence warnings about torchao's enumerations during the import of torch."""
    # On import, torch sets the level of its own logger, but not of this child.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


@contextmanager
def _no_other_progress_bars() -> Iterator[None]:
    """Make `disable=True` the default of tqdm, which our own bars override. Transformers has no switch for its GGUF bar.

    The Hub's download bars are shown on a terminal, since a download may take an hour.
    """
    from tqdm import tqdm

    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)  # type: ignore[method-assign]
    hub_bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    if hub_bars is None and not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]
        if hub_bars is None:
            os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
