"""Keeps the libraries below from writing between the lines of a command; our own warnings and all errors are shown."""

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
    """Import the package, and run what is inside, with warnings and progress bars of other libraries switched off.

    Their errors are shown, and so is everything at level WARNING or above that `peft_baft` logs. Warnings that the user
    asked for with `python -W` or PYTHONWARNINGS are shown as well. Everything is as before afterwards.
    """
    with warnings.catch_warnings(), _logging_of_ours_alone(), _without_bars_of_others():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=rf"{OURS}(\.|$)")
        yield


def silence_imported() -> None:
    """Silence libraries that set up their own logging when they are imported; to be called after that."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in OTHERS:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.ERROR))


@contextmanager
def _logging_of_ours_alone() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger(OURS)
    levels = {logger: logger.level for logger in (root, ours, *map(logging.getLogger, OTHERS))}
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.ERROR)  # loggers without a level of their own take this one
    ours.setLevel(logging.WARNING)
    _silence_torch_while_it_imports()
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)


def _silence_torch_while_it_imports() -> None:
    """Torch gives its logger a level and a handler when it is imported; a child's own level stands above that."""
    logging.getLogger("torch.utils._pytree").setLevel(
        logging.ERROR
    )  # complains of torchao's enumerations


@contextmanager
def _without_bars_of_others() -> Iterator[None]:
    """Make `disable=True` the default of tqdm, which our own bars override; transformers has no switch for its GGUF bar.

    The Hub's bars of downloads decide for themselves: they are drawn on a terminal, where a download may take an hour.
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
