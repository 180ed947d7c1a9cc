"""The configuration of a BaFT adapter, which PEFT saves beside its weights as `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from functools import cache, wraps
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from peft_baft.adapter.base_identity import to_sample
from peft_baft.adapter.kinds import KINDS, AdapterKind, find_kind
from peft_baft.adapter.parameters import GATE_NORMS, WEIGHTINGS
from peft_baft.adapter.plain import PLAIN
from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.adapter.weights import NEWER, UNNUMBERED, check_folder
from peft_baft.span import edited

LARGEST_INTEGER, LARGEST_OFFSET = 2**31 - 1, 1000.0
RANK = 12  # of plain BaFT, as in the paper


def _taking_kinds(config_class: Any) -> Any:
    """Let a config be made with the name of a kind as a keyword: `True`, the kind's settings, or these as a dictionary."""
    make: Any = config_class.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        for name in list(fields):
            kind = find_kind(name)
            if kind is None:
                continue
            settings = fields.pop(name)
            if settings is not None and settings is not False:
                fields["settings"] = _settings_of(kind, settings, fields)
        make(self, *args, **fields)

    config_class.__init__ = __init__
    return config_class


def _settings_of(kind: AdapterKind, given: Any, fields: Mapping[str, Any]) -> Any:
    """Return a kind's settings as an instance of its class.

    Args:
        fields: the other fields of the config, of which the format's number is looked at: a file of another format may have
            other settings.

    Raises:
        ValueError: the format is none of the kind's. TypeError: these are not its settings.
    """
    number = fields.get("baft_format")
    if isinstance(number, int) and number < kind.formats[0]:
        raise ValueError(
            f"This adapter has a {kind.name} in format {number}, which this version does not read; it reads "
            f"{kind.formats[0]} to {kind.formats[-1]}. Teach its facts again; `baft log` lists them."
        )
    if isinstance(number, int) and number > kind.formats[-1]:
        raise ValueError(f"This adapter was {NEWER.format(number, kind.formats[-1])}")
    if kind.settings is None:
        raise TypeError(f"{kind.name} is no keyword: leave it out for a plain adapter.")
    if given is True:
        return kind.settings()
    if isinstance(given, Mapping):
        known = {field.name for field in fields_of(kind.settings)}
        if unknown := sorted(given.keys() - known):
            raise TypeError(f"{kind.name} has no setting {unknown[0]!r}; it has {sorted(known)}.")
        return kind.settings(**given)
    if isinstance(given, kind.settings):
        return given
    raise TypeError(
        f"{kind.name} must be True, {kind.settings.__name__}(...) or False, not {given!r:.60}."
    )


@_taking_kinds
@dataclass
class BaftConfig(PeftConfig):
    """Configuration of a BaFT adapter (arXiv 2503.00306).

    Args:
        r: Rank of the edited subspace: rows of R, at most the hidden size. None takes the paper's 12.
        prompt_positions: P, how many of the last prompt tokens are edited, besides every answer token. The paper uses 3.
        answer_positions: How many of the first answer tokens are edited. None edits all of them, as the paper does; 0 edits
            prompts alone, as pyreft's LoReFT does.
        weighting: What weighs the update. `basis`: one gate per basis vector, BaFT. `subspace`: one gate for all, the
            paper's "ss-w". `product`: a gate per basis vector times one for all. `none`: no gate, which is ReFT.
        gate_norm: What a gate sees of the hidden vector h. `none`: h itself. `rms`: h at unit root mean square.
            `scale`: the same times a learned vector, as in RMSNorm. `center`: h minus a learned vector. With `scale` or
            `center` (or `product`) a block's gates count 13 d parameters at r = 12, the paper's figure; with `none` or
            `rms` they count 12 d.
        gate_bias: Whether each gate has a bias that is learned.
        gate_offset: A constant added to every gate's logit, so that gates start at σ(gate_offset): nearly closed, and what
            an edit does not open stays closed. 0 starts half open.
        layers_to_transform: Which decoder blocks are edited at their output, counted from 0. By default the paper's
            9;18;24;28 of 32 (which count from 1) scaled to the depth of the model.
        layers_pattern: Name of the `ModuleList` that holds the blocks (`layers`, `decoder.layers`), where it cannot be
            found alone.
        target_modules: Instead of the two above: names (suffixes), or one regular expression, of the modules whose
            output is edited, as elsewhere in PEFT. Filled with the blocks' full names once the adapter is attached. Modules
            inside blocks are edited if they are named one by one or by an expression, with a warning; a suffix that names
            such modules in several blocks, such as `q_proj`, is refused.
        exclude_modules: Names, or one regular expression, of modules that `target_modules` should pass over.
        modules_to_save: Modules besides the adapter that are trained and saved.
        settings: Settings of another kind of adapter than plain BaFT. They may also be given under the kind's name, and are
            saved under it (`peft_baft.adapter.kinds`).
        balance_weight: Weight of the gates' load balance in the loss that the model returns when it is called in training
            mode with labels, as by Trainer or a loop of your own; at most the loss times this is added. 0 adds nothing. A
            `BaftEditor` has an objective of its own and does not look at this. See docs/training.md.
        pack_ranks: Of an adapter that was combined from several (`add_weighted_adapter`), their ranks, which sum up to r: the
            rows of R are orthonormal within each. None for an adapter of its own.
        init_weights: True starts at Φ(h) = h exactly. False draws a random update, which is for tests alone.
        hidden_size: Width of the edited vectors, filled once the adapter is attached and checked when it is loaded;
            None where targets differ in width.
        template: The form in which the adapter's facts were taught, `raw`, `chat` or `both`, filled in by editors; None where
            that is not known. An editor's `template="auto"` and the commands that ask take it from here.
        template_hash: Identifies the chat template that they were taught in, filled in likewise.
        base_sample: Some values of the base model's embeddings, filled in when the adapter is made: loading it on another model
            is then noticed.
        requires: The package to import before an adapter of this type can be loaded.
        baft_format: Number of the saved format, that is of the names and shapes of the tensors and of the settings' meaning.
            Leave it empty for the one that this version writes, as `peft_version`. A folder whose number is missing or
            beyond this version's is refused.

    Raises:
        TypeError, ValueError: a value is not what its field holds, or out of its range; the message says which one it was
            and what is allowed.
    """

    # None until the config is made.
    r: int = field(default=None, metadata={"help": "Rank of the edited subspace."})  # type: ignore[assignment]
    prompt_positions: int = field(
        default=3, metadata={"help": "How many of the last prompt tokens are edited."}
    )
    answer_positions: int | None = field(
        default=None,
        metadata={"help": "How many of the first answer tokens are edited; default: all."},
    )
    weighting: str = field(default="basis", metadata={"help": f"One of {', '.join(WEIGHTINGS)}."})
    gate_norm: str = field(default="rms", metadata={"help": f"One of {', '.join(GATE_NORMS)}."})
    gate_bias: bool = field(default=False, metadata={"help": "Whether each gate has a bias."})
    gate_offset: float = field(
        default=-5.0, metadata={"help": "Constant of every gate's logit; 0 starts half open."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": "Blocks edited at their output, from 0; default: 9;18;24;28 of 32, scaled."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that holds the blocks."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regular expression of the modules whose output is edited."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to pass over."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapter that are trained and saved."}
    )
    settings: Any = field(
        default=None, metadata={"help": "Settings of another kind of adapter than plain BaFT."}
    )
    balance_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the gates' load balance in the loss that the model returns."},
    )
    pack_ranks: list[int] | None = field(
        default=None, metadata={"help": "Ranks of the adapters that were combined into this one."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts at the identity; False is for tests."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the edited vectors, filled in."}
    )
    template: str | None = field(
        default=None, metadata={"help": "Form in which facts were taught, filled in by editors."}
    )
    template_hash: str | None = field(
        default=None, metadata={"help": "Identifies the chat template of these, filled in."}
    )
    base_sample: str | None = field(
        default=None, metadata={"help": "Identifies the base model, filled in."}
    )
    requires: str = field(
        default="peft_baft", metadata={"help": "The package to import before loading."}
    )
    baft_format: int | None = field(
        default=None,
        metadata={"help": "Number of the saved format; leave empty for this version's."},
    )

    if TYPE_CHECKING:  # names of kinds are keywords as well

        def __init__(self, **fields: Any) -> None: ...

    def __post_init__(self) -> None:
        # PEFT fills `peft_version` in when a config is made, and writes it into every file: a config that comes with one was
        # saved. This is seen here, since transformers and PEFT read a file by `PeftConfig.from_pretrained`, not by ours.
        # This is no field: it is not saved.
        self.comes_from_a_file = self.peft_version is not None
        self.baft_format = _readable_format(
            self.baft_format,
            self.comes_from_a_file,
            self.kind,
            of_new=self.kind.saved_format(self),
        )
        super().__post_init__()
        self.peft_type = BAFT
        # Shapes of the tensors that are to be loaded, by name. This is no field: it is not saved.
        self.saved_shapes: dict[str, tuple[int, ...]] = {}
        # The same while transformers loads an adapter, which takes only tensors of the shapes that are there.
        self.room: dict[str, tuple[int, ...]] = {}
        # Nor is this: the modules that were chosen for the last model that a reused config was given to.
        self.chosen_targets: Any = None
        if self.r is None:
            self.r = RANK
        _positive_integer("r", self.r)
        _positive_integer("prompt_positions", self.prompt_positions)
        _require_one_of("weighting", self.weighting, WEIGHTINGS)
        _require_one_of("gate_norm", self.gate_norm, GATE_NORMS)
        if isinstance(self.base_sample, str):
            to_sample(self.base_sample)
        if self.template is not None:
            _require_one_of("template", self.template, ("raw", "chat", "both"))
        for name, type_ in _field_types().items():
            value = getattr(self, name, None)
            if not _is_of_type(value, type_):
                raise TypeError(f"{name} must hold {_in_words(type_)}, not {value!r:.60}.")
        self._require_values_in_range()
        self._require_pack_ranks()
        least = self.kind.saved_format(self)
        if self.baft_format < least:
            raise ValueError(
                f"An adapter with these settings has baft_format {least}, not {self.baft_format}: pack_ranks, answer_positions "
                "and other kinds of adapters came later than the first format."
            )
        self.kind.check_config(self)
        for name in ("target_modules", "exclude_modules"):
            _require_expression(name, getattr(self, name))
        for module in self.modules_to_save or ():
            if not re.fullmatch(r"[\w.-]+", module):  # PEFT makes a regular expression of it
                raise ValueError(f"modules_to_save must hold names of modules, not {module!r:.60}.")

    def _require_values_in_range(self) -> None:
        if not -LARGEST_OFFSET <= self.gate_offset <= LARGEST_OFFSET:
            raise ValueError(
                f"gate_offset must be between ±{LARGEST_OFFSET:g}, not {self.gate_offset}."
            )
        if self.answer_positions is not None and not 0 <= self.answer_positions <= LARGEST_INTEGER:
            raise ValueError(
                f"answer_positions must be None or from 0 to {LARGEST_INTEGER}, not {self.answer_positions}."
            )
        if not 0 <= self.balance_weight < float("inf"):
            raise ValueError(
                f"balance_weight must be a finite number of at least 0, not {self.balance_weight}."
            )
        if self.balance_weight and self.kind.trains and self.gate_count < 2:
            raise ValueError(
                f"balance_weight={self.balance_weight} balances several gates, but weighting={self.weighting!r} has "
                f"{self.gate_count}; use weighting='basis' or 'product' with r >= 2, or balance_weight=0."
            )

    def _require_pack_ranks(self) -> None:
        if self.pack_ranks is None:
            return
        ranks = self.pack_ranks = list(self.pack_ranks)
        for rank in ranks:
            _positive_integer("pack_ranks", rank)
        if sum(ranks) != self.r:
            raise ValueError(f"pack_ranks must sum up to r={self.r}, not {ranks!r:.60}.")
        if self.weighting not in ("basis", "none"):
            raise ValueError(
                f"An adapter with pack_ranks has weighting 'basis' or 'none', not {self.weighting!r}."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read a config as PEFT does, and check the weights beside it, so that damage is found before a model is touched.

        Raises:
            ValueError: the config or the weights are damaged, or cannot be had.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        try:
            config = super().from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder / CONFIG_NAME} cannot be used: {error}") from error
        if isinstance(config, cls):
            if not folder.is_dir():
                folder = cls._download_weights(pretrained_model_name_or_path, subfolder, kwargs)
            config.saved_shapes = check_folder(folder, config)
        return config

    @classmethod
    def _download_weights(cls, name: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
        """Download the weights of an adapter on the Hub, and return their folder; PEFT will find them there."""
        download_arguments = cls._split_kwargs(kwargs)[0]
        try:
            return Path(
                hf_hub_download(name, WEIGHTS, subfolder=subfolder, **download_arguments)
            ).parent
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{WEIGHTS} of {name}, the one format that is read, cannot be had: {error}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as they are saved: the settings of another kind under its name."""
        saved: dict[str, Any] = super().to_dict()
        settings = saved.pop("settings")
        if settings is not None:
            saved[self.kind.name] = settings
        if self.base_sample is None:
            saved.pop("base_sample")
        return saved

    @property
    def kind(self) -> AdapterKind:
        """What the adapter adds to hidden vectors, and what it saves."""
        settings = self.__dict__.get("settings")
        found = [kind for kind in KINDS.values() if kind.settings is type(settings)]
        return found[0] if settings is not None and found else PLAIN

    def __getattr__(self, name: str) -> Any:
        """Return the settings under the name of a kind; None for the kinds that this adapter is not of."""
        kind = find_kind(name)
        if kind is not None:
            return self.settings if self.kind is kind else None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def edits(self, relative_positions: Tensor) -> Tensor:
        """Return which tokens the adapter edits, from their relative positions (rows, tokens): bool of that shape."""
        return edited(relative_positions, self.prompt_positions, self.answer_positions)

    @property
    def gate_count(self) -> int:
        """The number of gates that weigh the update: the width of w(h)."""
        return WEIGHTINGS[self.weighting].gate_count(self.r) if self.kind.trains else 0

    @property
    def forward_settings(self) -> tuple:
        """All settings that a forward depends on: adapters that agree in these can be computed together."""
        return (
            self.r,
            self.prompt_positions,
            self.answer_positions,
            self.weighting,
            self.gate_norm,
            self.gate_bias,
            self.gate_offset,
            None if self.pack_ranks is None else tuple(self.pack_ranks),
        )


def _readable_format(
    number: object, comes_from_a_file: bool, kind: AdapterKind, of_new: int
) -> int:
    """Return the number of a config's format, this version's for a new config without one.

    Raises:
        TypeError, ValueError: it is no number of a format, belongs to a later version, or is missing from a saved config.
    """
    if number is None:
        if comes_from_a_file:
            raise ValueError(f"This adapter was {UNNUMBERED}.")
        return of_new
    number = _positive_integer("baft_format", number)
    if number > kind.formats[-1]:
        raise ValueError(f"This adapter was {NEWER.format(number, kind.formats[-1])}")
    return number


def _positive_integer(name: str, value: object) -> int:
    """Return `value`, or raise a TypeError or ValueError if it is no integer from 1 to `LARGEST_INTEGER`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}.")
    if value > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, not {value!r:.60}.")
    return value


@cache
def _field_types() -> dict[str, Any]:
    """Return the annotations of all fields, PEFT's included, as types."""
    return get_type_hints(BaftConfig)


def _is_of_type(value: object, type_: Any) -> bool:
    """Tell whether a field annotated as `type_` may hold `value`; a tuple or a set will do for a list."""
    if type_ is Any:
        return True
    if get_origin(type_) in (Union, UnionType):
        return any(_is_of_type(value, option) for option in get_args(type_))
    if get_origin(type_) is list:
        (type_of_items,) = get_args(type_)
        return isinstance(value, (list, tuple, set)) and all(
            _is_of_type(item, type_of_items) for item in value
        )
    if get_origin(type_) is dict:
        of_key, of_value = get_args(type_)
        return isinstance(value, dict) and all(
            _is_of_type(key, of_key) and _is_of_type(item, of_value) for key, item in value.items()
        )
    if isinstance(value, bool):  # to Python, a bool is an int
        return type_ is bool
    return isinstance(value, (int, float) if type_ is float else type_)


def _in_words(type_: Any) -> str:
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(_in_words(option) for option in get_args(type_))
    if get_origin(type_) is list:
        return f"a list of {_in_words(get_args(type_)[0])}s"
    words = {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "None"}
    return words.get(type_, type_.__name__)


def _require_expression(name: str, value: object) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} is no regular expression ({error}): {value!r:.60}.") from None


def _require_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in list(allowed):  # a value out of a file need not be hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")
