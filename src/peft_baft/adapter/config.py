"""The configuration of a BaFT adapter, which PEFT saves with its weights as `adapter_config.json`."""

# ruff: noqa: RUF009  `_field` is `dataclasses.field`
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


def _field(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


def _accepting_kinds(config_class: Any) -> Any:
    """Accept the name of a kind as a keyword of a config: `True`, the kind's settings, or these as a dictionary."""
    original: Any = config_class.__init__

    @wraps(original)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        for name in list(fields):
            kind = find_kind(name)
            if kind is None:
                continue
            settings = fields.pop(name)
            if settings is not None and settings is not False:
                fields["settings"] = _settings_of(kind, settings, fields)
        original(self, *args, **fields)

    config_class.__init__ = __init__
    return config_class


def _settings_of(kind: AdapterKind, given: Any, fields: Mapping[str, Any]) -> Any:
    """Return a kind's settings as an instance of its class.

    Args:
        fields: the other fields of the config. Their format is checked first: another format may have other settings.

    Raises:
        ValueError: the kind does not read this format. TypeError: these are not its settings.
    """
    number = fields.get("baft_format")
    if isinstance(number, int) and number < kind.formats[0]:
        raise ValueError(
            f"This adapter has a {kind.name} in format {number}, which this version cannot read; it reads "
            f"{kind.formats[0]} to {kind.formats[-1]}. Teach its facts again; `baft log` lists them."
        )
    if isinstance(number, int) and number > kind.formats[-1]:
        raise ValueError(f"This adapter was {NEWER.format(number, kind.formats[-1])}")
    if kind.settings is None:
        raise TypeError(f"{kind.name} is not a keyword: leave it out for a plain adapter.")
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


@_accepting_kinds
@dataclass
class BaftConfig(PeftConfig):
    """Configuration of a BaFT adapter (arXiv 2503.00306).

    Args:
        r: Rank of the edited subspace, the number of rows of R; at most the hidden size. None means the paper's 12.
        prompt_positions: P, the number of last prompt tokens that are edited, in addition to the answer tokens. The paper
            uses 3.
        answer_positions: The number of first answer tokens that are edited. None edits all of them, as the paper does; 0 edits
            prompts only, as pyreft's LoReFT does.
        weighting: What weights the update. `basis`: one gate per basis vector, BaFT. `subspace`: one gate for all, the
            paper's "ss-w". `product`: a gate per basis vector times one for all. `none`: no gate, which is ReFT.
        gate_norm: The gates' input, computed from the hidden vector h. `none`: h itself. `rms`: h scaled to unit root mean
            square. `scale`: the same times a learned vector, as in RMSNorm. `center`: h minus a learned vector. With `scale`
            or `center` (or `product`), a block's gates have 13 d parameters at r = 12, the paper's figure; with `none` or
            `rms` they have 12 d.
        gate_bias: Whether each gate has a learned bias.
        gate_offset: A constant added to every gate's logit. Gates start at σ(gate_offset): nearly closed by default, and a
            gate that no edit opens stays closed. 0 starts half open.
        layers_to_transform: The decoder blocks whose output is edited, counted from 0. The default is the paper's
            9;18;24;28 of 32 (counted from 1), scaled to the model's depth.
        layers_pattern: Name of the `ModuleList` that holds the blocks (`layers`, `decoder.layers`), if it is not found
            automatically.
        target_modules: Instead of the two above: names (suffixes), or one regular expression, of the modules whose
            output is edited, as elsewhere in PEFT. Replaced by the blocks' full names when the adapter is attached. Modules
            inside blocks are edited, with a warning, if they are named individually or by an expression; a suffix that
            matches such modules in several blocks, such as `q_proj`, is refused.
        exclude_modules: Names, or one regular expression, of modules that `target_modules` should skip.
        modules_to_save: Modules that are trained and saved in addition to the adapter.
        settings: Settings of a kind of adapter other than plain BaFT. They can also be passed under the kind's name, and are
            saved under it (`peft_baft.adapter.kinds`).
        balance_weight: Weight of the gates' load balance in the loss that the model returns when it is called in training
            mode with labels, as by Trainer or a custom loop; at most this times the loss is added. 0 adds nothing.
            `BaftEditor` has its own objective and ignores this field. See docs/training.md.
        pack_ranks: For an adapter combined from several (`add_weighted_adapter`), their ranks, which sum to r: the
            rows of R are orthonormal within each. None for any other adapter.
        init_weights: True starts exactly at Φ(h) = h. False draws a random update, for tests only.
        hidden_size: Width of the edited vectors, filled in when the adapter is attached and checked when it is loaded;
            None if targets differ in width.
        template: The prompt format that the adapter was trained on, `raw`, `chat` or `both`, filled in by editors; None if
            unknown. An editor's `template="auto"` and the commands that ask questions use it.
        template_hash: Identifies the chat template that the adapter was trained on, filled in likewise.
        base_sample: Some values of the base model's embeddings, filled in when the adapter is created, so that loading it on
            another model is noticed.
        requires: The package to import before an adapter of this type can be loaded.
        baft_format: Version of the saved format: the names and shapes of the tensors and the meaning of the settings. Leave it
            empty, like `peft_version`, for the one that this version writes. A folder without a version, or with one later
            than this package's, is refused.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range; the message names the field and what it allows.
    """

    r: int = _field(None, "Rank of the edited subspace.")  # None until __post_init__
    prompt_positions: int = _field(3, "How many of the last prompt tokens are edited.")
    answer_positions: int | None = _field(
        None, "How many of the first answer tokens are edited; default: all."
    )
    weighting: str = _field("basis", f"One of {', '.join(WEIGHTINGS)}.")
    gate_norm: str = _field("rms", f"One of {', '.join(GATE_NORMS)}.")
    gate_bias: bool = _field(False, "Whether each gate has a bias.")
    gate_offset: float = _field(-5.0, "Constant of every gate's logit; 0 starts half open.")
    layers_to_transform: list[int] | int | None = _field(
        None, "Blocks edited at their output, from 0; default: 9;18;24;28 of 32, scaled."
    )
    layers_pattern: list[str] | str | None = _field(
        None, "Name of the ModuleList that holds the blocks."
    )
    target_modules: list[str] | str | None = _field(
        None, "Names or a regular expression of the modules whose output is edited."
    )
    exclude_modules: list[str] | str | None = _field(
        None, "Names or a regular expression of modules to skip."
    )
    modules_to_save: list[str] | None = _field(
        None, "Modules that are trained and saved in addition to the adapter."
    )
    settings: Any = _field(None, "Settings of a kind of adapter other than plain BaFT.")
    balance_weight: float = _field(
        0.0, "Weight of the gates' load balance in the loss that the model returns."
    )
    pack_ranks: list[int] | None = _field(
        None, "Ranks of the adapters that were combined into this one."
    )
    init_weights: bool = _field(True, "True starts at the identity; False is for tests.")
    hidden_size: int | None = _field(None, "Width of the edited vectors, filled in.")
    template: str | None = _field(None, "Prompt format of the training, filled in by editors.")
    template_hash: str | None = _field(None, "Identifies its chat template, filled in.")
    base_sample: str | None = _field(None, "Identifies the base model, filled in.")
    requires: str = _field("peft_baft", "The package to import before loading.")
    baft_format: int | None = _field(
        None, "Version of the saved format; leave empty for this version's."
    )

    if TYPE_CHECKING:  # names of kinds are keywords too

        def __init__(self, **fields: Any) -> None: ...

    def __post_init__(self) -> None:
        # The following attributes are not fields, so they are not saved.
        # PEFT fills in `peft_version` when a config is created, and writes it into every file: a config that already has one
        # comes from a file. (transformers and PEFT read files with `PeftConfig.from_pretrained`, not with ours.)
        self.comes_from_a_file = self.peft_version is not None
        # Shapes of the tensors to load, by name; and the same while transformers loads them, which resizes nothing itself.
        self.saved_shapes: dict[str, tuple[int, ...]] = {}
        self.shapes_to_load: dict[str, tuple[int, ...]] = {}
        # The modules that were chosen for the last model that a reused config was passed for.
        self.chosen_targets: Any = None
        lowest_format = self.kind.saved_format(self)
        self.baft_format = _readable_format(
            self.baft_format, self.comes_from_a_file, self.kind, default=lowest_format
        )
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = BAFT
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
        if self.baft_format < lowest_format:
            raise ValueError(
                f"An adapter with these settings has baft_format {lowest_format}, not {self.baft_format}: the first format "
                "supports neither pack_ranks, answer_positions nor other kinds of adapters."
            )
        self.kind.check_config(self)
        for name in ("target_modules", "exclude_modules"):
            _require_expression(name, getattr(self, name))
        for module in self.modules_to_save or ():
            if not re.fullmatch(r"[\w.-]+", module):  # PEFT uses it as a regular expression
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
        """Read a config as PEFT does, and check the weights next to it, so that damage is found before a model is touched.

        Raises:
            ValueError: the config or the weights are damaged or missing.
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
        """Download an adapter's weights from the Hub into the cache, where PEFT will find them, and return their folder."""
        download_arguments = cls._split_kwargs(kwargs)[0]  # type: ignore[no-untyped-call]
        try:
            return Path(
                hf_hub_download(name, WEIGHTS, subfolder=subfolder, **download_arguments)
            ).parent
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{WEIGHTS} of {name}, the only format that is read, cannot be downloaded: {error}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as they are saved; the settings of another kind are saved under its name."""
        saved: dict[str, Any] = super().to_dict()
        settings = saved.pop("settings")
        if settings is not None:
            saved[self.kind.name] = settings
        if self.base_sample is None:
            saved.pop("base_sample")
        return saved

    @property
    def kind(self) -> AdapterKind:
        """The kind of adapter: what it adds to hidden vectors, and what it saves."""
        settings = self.__dict__.get("settings")
        found = [kind for kind in KINDS.values() if kind.settings is type(settings)]
        return found[0] if settings is not None and found else PLAIN

    def __getattr__(self, name: str) -> Any:
        """Return the settings as an attribute named after the adapter's kind; None under the names of other kinds."""
        kind = find_kind(name)
        if kind is not None:
            return self.settings if self.kind is kind else None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def edits(self, relative_positions: Tensor) -> Tensor:
        """Return which tokens the adapter edits, from their relative positions (rows, tokens): bool of that shape."""
        return edited(relative_positions, self.prompt_positions, self.answer_positions)

    @property
    def gate_count(self) -> int:
        """The number of gates: the width of w(h)."""
        return WEIGHTINGS[self.weighting].gate_count(self.r) if self.kind.trains else 0

    @property
    def forward_settings(self) -> tuple[Any, ...]:
        """All settings that a forward depends on; adapters that agree in them can be computed together."""
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
    number: object, comes_from_a_file: bool, kind: AdapterKind, default: int
) -> int:
    """Return the saved format of a config, `default` for a new config without one.

    Raises:
        TypeError, ValueError: it is not a format, belongs to a later version, or is missing from a saved config.
    """
    if number is None:
        if comes_from_a_file:
            raise ValueError(f"This adapter was {UNNUMBERED}.")
        return default
    number = _positive_integer("baft_format", number)
    if number > kind.formats[-1]:
        raise ValueError(f"This adapter was {NEWER.format(number, kind.formats[-1])}")
    return number


def _positive_integer(name: str, value: object) -> int:
    """Return `value`; raise a TypeError or ValueError unless it is an integer from 1 to `LARGEST_INTEGER`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}.")
    if value > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, not {value!r:.60}.")
    return value


@cache
def _field_types() -> dict[str, Any]:
    """Return the annotations of all fields, including PEFT's, as types."""
    return get_type_hints(BaftConfig)


def _is_of_type(value: object, type_: Any) -> bool:
    """Return whether a field annotated as `type_` may hold `value`; a tuple or a set counts as a list."""
    if type_ is Any:
        return True
    if get_origin(type_) in (Union, UnionType):
        return any(_is_of_type(value, option) for option in get_args(type_))
    if get_origin(type_) is list:
        (item_type,) = get_args(type_)
        return isinstance(value, (list, tuple, set)) and all(
            _is_of_type(item, item_type) for item in value
        )
    if get_origin(type_) is dict:
        key_type, value_type = get_args(type_)
        return isinstance(value, dict) and all(
            _is_of_type(k, key_type) and _is_of_type(v, value_type) for k, v in value.items()
        )
    if isinstance(value, bool):  # in Python, a bool is an int
        return type_ is bool
    return isinstance(value, (int, float) if type_ is float else type_)


def _in_words(type_: Any) -> str:
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(_in_words(option) for option in get_args(type_))
    if get_origin(type_) is list:
        return f"a list of {_in_words(get_args(type_)[0])}s"
    words = {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "None"}
    return words.get(type_) or str(type_.__name__)


def _require_expression(name: str, value: object) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{name} is not a regular expression ({error}): {value!r:.60}."
            ) from None


def _require_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in list(allowed):  # a value from a file need not be hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")
