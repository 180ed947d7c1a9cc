"""A damaged or hostile adapter folder is refused in words, or loads whole; the model is never left in between."""

# mypy: disable-error-code="arg-type, list-item, misc, return-value"
from __future__ import annotations

import builtins
import copy
import json
import math
import os
import pickle
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters import config, edited_model, is_bare, logits
from conftest import make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=120,
)
LONG = settings(QUICK, max_examples=3000)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Unexpected keyword arguments", "ignore:The configuration file contains"
)


class Trial:
    """A whole adapter folder, the models it is loaded onto, and a count of how that ended."""

    def __init__(self, folder: Path) -> None:
        model = edited_model()
        model.save_pretrained(str(folder))
        self.folder, self.expected = folder, logits(model, IDS)
        self.settings = json.loads((folder / CONFIG).read_text())
        self.base, self.held = make_model(), edited_model(seed=5)
        self.bare_logits, self.held_logits = logits(self.base, IDS), logits(self.held, IDS)
        self.states = {id(m): copy.deepcopy(m.state_dict()) for m in (self.base, self.held)}
        self.trainable = {
            id(m): [p.requires_grad for p in m.parameters()] for m in (self.base, self.held)
        }
        self.ends: Counter[str] = Counter()

    def damaged(self, damage: Callable[[Path], Any]) -> str:
        """How the loading of a damaged copy ends, onto the bare model and as a second adapter: alike."""
        with TemporaryDirectory() as parent:
            folder = Path(copytree(self.folder, Path(parent) / "adapter"))
            damage(folder)
            readable = is_ours(folder / CONFIG)
            with running_nothing():
                ends = {self.load_alone(folder, readable), self.load_second(folder, readable)}
        assert len(ends) == 1
        self.ends.update(ends)
        return ends.pop()

    def load_alone(self, folder: Path, readable: bool) -> str:
        with refusals(folder, readable) as refused:
            model = PeftModel.from_pretrained(self.base, folder)
            self.check_loaded(model, "default")
            model.unload()
            self.base.requires_grad_(True)
        assert is_bare(self.base) and not hasattr(self.base, "peft_config")
        self.check_untouched(self.base, self.bare_logits)
        return "refused" if refused else "loaded"

    def load_second(self, folder: Path, readable: bool) -> str:
        with refusals(folder, readable) as refused:
            self.held.load_adapter(folder, "second")
            self.held.set_adapter("second")
            self.check_loaded(self.held, "second")
            self.held.set_adapter("default")
            self.held.delete_adapter("second")
        assert [*self.held.peft_config] == ["default"] and self.held.active_adapters == ["default"]
        assert all([*layer.configs] == ["default"] for layer in baft_layers(self.held))
        self.check_untouched(self.held, self.held_logits)
        return "refused" if refused else "loaded"

    def check_loaded(self, model: PeftModel, name: str) -> None:
        state = {key: value for key, value in model.state_dict().items() if f".{name}" in key}
        assert state and all(value.isfinite().all() for value in state.values())
        assert logits(model, IDS).isfinite().all()

    def check_untouched(self, model: Any, before: torch.Tensor) -> None:
        kept, found = self.states[id(model)], model.state_dict()
        assert kept.keys() == found.keys() and all(
            torch.equal(kept[key], found[key]) for key in kept
        )
        assert self.trainable[id(model)] == [p.requires_grad for p in model.parameters()]
        assert torch.equal(logits(model, IDS), before)


def is_ours(file: Path) -> bool:
    """Whether PEFT can read the config, and finds our type there: what it cannot, it refuses before it calls us."""
    try:
        return json.loads(file.read_text())["peft_type"] == "BAFT"
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return False


@contextmanager
def refusals(folder: Path, readable: bool) -> Iterator[list[Exception]]:
    """The error of a refused loading: of ours, a ValueError that names a file of the folder."""
    found: list[Exception] = []
    try:
        yield found
    except (ValueError, TypeError, OSError) as error:
        found.append(error)
        assert not readable or (type(error) is ValueError and str(folder) in str(error))
        assert len(str(error)) < 1500
    except (
        KeyError,
        RecursionError,
    ) as error:  # PEFT's own, of a config without a type that it knows
        assert not readable
        found.append(error)


@contextmanager
def running_nothing() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file of the adapter was run")

    with pytest.MonkeyPatch.context() as patch:
        doors = [
            (torch, "load"),
            (pickle, "load"),
            (pickle, "loads"),
            (os, "system"),
            (subprocess, "Popen"),
        ]
        for owner, name in [*doors, (builtins, "eval"), (builtins, "exec")]:
            patch.setattr(owner, name, refuse)
        yield


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    made = Trial(tmp_path_factory.mktemp("whole"))
    # What torch and transformers import and compile at first use may run.
    made.load_alone(made.folder, True)
    return made


def set_config(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(
            json.dumps(json.loads((folder / CONFIG).read_text()) | changes)
        )

    return damage


def set_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def counted(trial: Trial, check: Callable[[], None]) -> None:
    """Run a property, and see that it met both ends."""
    before = Counter(trial.ends)
    check()
    ends = trial.ends - before
    assert ends["refused"] > 2 and ends["loaded"] > 2, ends


@pytest.fixture(autouse=True)
def told(trial: Trial, tally: Callable[..., None]) -> Iterator[None]:
    before = Counter(trial.ends)
    yield
    ends = trial.ends - before
    tally("a damaged or hostile adapter folder", refused=ends["refused"], harmless=ends["loaded"])


def test_the_whole_folder_loads_and_edits(trial: Trial) -> None:
    assert trial.damaged(lambda folder: None) == "loaded"
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_model(), trial.folder).eval(), IDS), trial.expected
    )


# bytes


@st.composite
def byte_damage(draw: Any, names: list[str]) -> Callable[[Path], Any]:
    """Flip a bit, cut the end, fill or repeat a stretch: in the first bytes, where the header stands, as often as anywhere."""
    name, kind = (
        draw(st.sampled_from(names)),
        draw(st.sampled_from(["flip", "flip", "flip", "cut", "fill", "insert"])),
    )
    near, where, bit = (
        draw(st.booleans()),
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.integers(0, 7)),
    )
    some = draw(st.binary(min_size=1, max_size=12))

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        at = int(where * (min(400, len(data)) if near else len(data)))
        if kind == "flip":
            data[at] ^= 1 << bit
        elif kind == "cut":
            del data[at:]
        elif kind == "fill":
            data[at : at + len(some)] = some
        else:
            data[at:at] = some
        (folder / name).write_bytes(data)

    return damage


def harmless_damage(name: str) -> list[Callable[[Path], Any]]:
    """Give changes of bytes that change nothing that matters: white space in JSON, the last bits of numbers."""

    def change(place: int) -> Callable[[Path], Any]:
        def damage(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            if name == CONFIG:
                data = data[:place] + b" " + data[place:] if place >= 0 else data + b"\n"
            else:
                data[-4 * place] ^= 1  # little-endian float32: the lowest bit of a mantissa
            (folder / name).write_bytes(data)

        return damage

    return [change(place) for place in ((1, 0, -1) if name == CONFIG else (1, 2, 3))]


def bytes_are_refused_or_harmless(trial: Trial, budget: settings, names: list[str]) -> None:
    def check() -> None:
        # Of random damage, only a few per cent are harmless: some that is known to be stands for them all.
        for name in names:
            assert [trial.damaged(damage) for damage in harmless_damage(name)] == ["loaded"] * 3
        budget(given(byte_damage(names))(lambda damage: trial.damaged(damage) and None))()

    counted(trial, check)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damaged_bytes_are_refused_or_harmless(trial: Trial, name: str) -> None:
    bytes_are_refused_or_harmless(trial, QUICK, [name])


@pytest.mark.slow
def test_damaged_bytes_are_refused_or_harmless_at_length(trial: Trial) -> None:
    bytes_are_refused_or_harmless(trial, LONG, [CONFIG, WEIGHTS])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_empty_away_or_a_folder_is_refused(trial: Trial, name: str) -> None:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    assert trial.damaged(lambda folder: (folder / name).write_bytes(b"")) == "refused"
    assert trial.damaged(lambda folder: (folder / name).unlink()) == "refused"
    assert trial.damaged(replace) == "refused"


# tensors

NAME = "base_model.model.model.layers.1.baft.baft_"
DTYPES = {
    torch.float16: "loaded",
    torch.bfloat16: "loaded",
    torch.float64: "loaded",
    torch.float8_e4m3fn: "loaded",
}
DTYPES |= dict.fromkeys((torch.int64, torch.uint8, torch.bool, torch.complex64), "refused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_point_numbers_of_any_width_load_and_others_do_not(
    trial: Trial, dtype: torch.dtype
) -> None:
    assert (
        trial.damaged(set_tensors(lambda t: t.update({n: v.to(dtype) for n, v in t.items()})))
        == DTYPES[dtype]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -1e30, 1e300])
@pytest.mark.parametrize(
    "part", ["basis.weight", "source.weight", "source.bias", "gate.weight", "gate_usage"]
)
def test_one_number_that_no_training_gives_is_refused(
    trial: Trial, part: str, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME + part] = tensors[NAME + part].double()
        tensors[NAME + part].view(-1)[-1] = value

    assert trial.damaged(set_tensors(spoil)) == "refused"


HEADERS = st.sampled_from(["dtype", "shape", "data_offsets", "name", "metadata"])
NUMBERS = st.integers(-2, 40) | st.sampled_from(
    [2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
)
NAMES = [
    NAME,
    "",
    ".",
    "../../../etc/passwd",
    "/tmp/x",
    "\0",
    "hello",
    "base_model.model.lm_head.weight",
    NAME + "x" * 9999,
]
NAMES += [
    "base_model.model.model.embed_tokens.weight",
    "__class__.__init__",
    NAME + "basis.weight",
    f"{NAME}__dict__.x",
]


def header_damage(kind: str, numbers: list[int], name: str, dtype: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        if kind == "name":
            header[name] = header.pop(NAME + "source.bias")
        elif kind == "metadata":
            header["__metadata__"] = {name: dtype}
        else:
            header[NAME + "source.bias"][kind] = dtype if kind == "dtype" else numbers
        written = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(
            len(written).to_bytes(8, "little") + written + data[8 + size :]
        )

    return damage


def test_a_header_that_lies_is_refused_or_harmless(trial: Trial) -> None:
    dtypes = st.sampled_from(
        ["F32", "F64", "F16", "I32", "U32", "F4", "F8_E8M0", "C64", "BOOL", "object", ""]
    )
    damage = st.builds(
        header_damage, HEADERS, st.lists(NUMBERS, max_size=3), st.sampled_from(NAMES), dtypes
    )
    counted(trial, QUICK(given(damage)(lambda damage: trial.damaged(damage) and None)))


SHAPES = st.lists(st.integers(0, 40), max_size=4)


def test_a_tensor_of_another_shape_is_refused(trial: Trial) -> None:
    parts = {
        "basis.weight": [4, 32],
        "source.weight": [4, 32],
        "source.bias": [4],
        "gate.weight": [4, 32],
        "gate_usage": [5],
    }

    @QUICK
    @given(st.sampled_from([*parts]), SHAPES | st.sampled_from([*parts.values()]))
    def check(part: str, shape: list[int]) -> None:
        end = trial.damaged(set_tensors(lambda t: t.update({NAME + part: torch.ones(shape)})))
        assert end == ("loaded" if shape == parts[part] else "refused")

    counted(trial, check)


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_a_file_that_holds_more_than_its_adapter_is_refused(trial: Trial, name: str) -> None:
    """PEFT would write over the model's own embeddings, or norms, whatever has their name."""
    spare = NAME.replace("layers.1", "layers.0") if name.endswith("basis.weight") else name
    extra = spare if spare != NAME else "base_model.model.model.norm.weight"
    extra += "x.weight" if spare != name else ""
    assert trial.damaged(set_tensors(lambda t: t.update({extra: torch.ones(32)}))) == "refused"


def test_every_missing_tensor_is_missed(trial: Trial) -> None:
    for name in load_file(trial.folder / WEIGHTS):
        assert trial.damaged(set_tensors(lambda t, name=name: t.pop(name))) == "refused"
    assert trial.damaged(set_tensors(lambda t: t.clear())) == "refused"


# the config

SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from(
    [
        "12",
        "1e400",
        "(",
        "(a+)+$",
        "../../../etc/passwd",
        "norm",
        "lm_head",
        "layers.1",
        "rms",
        "none",
    ]
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)
)
FIELDS = [
    "r",
    "prompt_positions",
    "answer_positions",
    "weighting",
    "gate_norm",
    "gate_bias",
    "gate_offset",
    "layers_to_transform",
]
FIELDS += [
    "layers_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "init_weights",
    "hidden_size",
]
FIELDS += [
    "requires",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "peft_type",
    "task_type",
]
FIELDS += [
    "baft_format",
    "base_sample",
    "inference_mode",
    "runtime_config",
    "unknown",
    "__class__",
    "self",
]


def fields_are_refused_or_harmless(trial: Trial, budget: settings) -> None:
    @budget
    @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        trial.damaged(set_config(**changes))

    counted(trial, check)


def test_any_value_of_any_field_is_refused_or_harmless(trial: Trial) -> None:
    fields_are_refused_or_harmless(trial, QUICK)


@pytest.mark.slow
def test_any_value_of_any_field_is_refused_or_harmless_at_length(trial: Trial) -> None:
    fields_are_refused_or_harmless(trial, LONG)


REFUSED = [
    ("r", "12"),
    ("r", -1),
    ("r", 10**9),
    ("r", 10**30),
    ("prompt_positions", 10**30),
    ("answer_positions", -1),
    ("answer_positions", 10**30),
    ("answer_positions", True),
    ("gate_norm", "batch"),
]
REFUSED += [("gate_offset", value) for value in ("0.5", None, math.nan, math.inf, 10**400, [0])]
REFUSED += [
    ("gate_bias", "no"),
    ("weighting", ["basis"]),
    ("hidden_size", 10**12),
    ("hidden_size", -32),
]
REFUSED += [
    ("layers_to_transform", "0"),
    ("layers_to_transform", [1.5]),
    ("target_modules", "("),
    ("target_modules", 3),
]
REFUSED += [
    ("target_modules", "a{4294967296}"),
    ("target_modules", ["model.layers.9"]),
    ("exclude_modules", "["),
]
REFUSED += [
    ("modules_to_save", value)
    for value in (
        "norm",
        ["norm"],
        ["absent"],
        ["baft"],
        ["layers.3"],
        ["(a+)+"],
        [""],
        [None],
        [["a"]],
    )
]
REFUSED += [("baft_format", value) for value in (None, 0, -1, 4, 10**30, "1", 1.0, True, [1])]
REFUSED += [
    ("base_model_name_or_path", 3),
    ("auto_mapping", "os"),
    ("inference_mode", "yes"),
    ("task_type", "X"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=str)
def test_a_field_that_holds_what_it_cannot_is_refused(trial: Trial, field: str, value: Any) -> None:
    assert trial.damaged(set_config(**{field: value})) == "refused"


HARMLESS: list[tuple[str, Any]] = [
    ("base_model_name_or_path", "../../../etc/passwd"),
    ("auto_mapping", {"parent_library": "this"}),
]
HARMLESS += [
    ("unknown", {"a": [1]}),
    ("revision", "../x"),
    ("requires", "antigravity"),
    ("runtime_config", 1),
]
HARMLESS += [
    ("layers_to_transform", [10**30]),
    ("layers_pattern", "((a+)+)+$"),
    ("prompt_positions", 10**9),
]


@pytest.mark.parametrize(("field", "value"), HARMLESS, ids=str)
def test_what_a_folder_says_but_nobody_needs_is_not_acted_on(
    trial: Trial, field: str, value: Any
) -> None:
    assert trial.damaged(set_config(**{field: value})) == "loaded"


SLOW_EXPRESSION = r"([a-z0-9._]+)+!"  # takes years on the name of a module


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_out_of_a_file_is_not_run(trial: Trial, field: str) -> None:
    assert trial.damaged(set_config(**{field: SLOW_EXPRESSION})) == "loaded"


TEXTS = [
    "",
    "[]",
    "1",
    "null",
    '"x"',
    "{}",
    '{"peft_type": 1}',
    '{"peft_type": "NONE"}',
    '{"peft_type": []}',
    "\0",
]
TEXTS += ["[" * 100_000, '{"peft_type": "BAFT", "r": ' + "9" * 5000 + "}", '{"peft_type": "BAFT"}']
TEXTS += ['{"peft_type": "BAFT", "auto_mapping": ' + '{"a":' * 20_000 + "1" + "}" * 20_001]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_json_that_is_no_config_is_refused(trial: Trial, text: str) -> None:
    assert trial.damaged(lambda folder: (folder / CONFIG).write_text(text)) == "refused"


def test_of_a_field_given_twice_the_last_counts_and_must_fit(trial: Trial) -> None:
    whole = json.dumps(trial.settings)
    assert (
        trial.damaged(lambda folder: (folder / CONFIG).write_text('{"r": 1, ' + whole[1:]))
        == "loaded"
    )
    assert (
        trial.damaged(lambda folder: (folder / CONFIG).write_text(whole[:-1] + ', "r": 1}'))
        == "refused"
    )


# nothing whole is refused

WHOLE: dict[str, dict[str, Any]] = {
    "ends of names": {"target_modules": ["layers.1", "layers.3"]},
    "expression": {"target_modules": r"model\.layers\.[12]"},
    "exclusion": {"target_modules": r"model\.layers\.\d", "exclude_modules": ["layers.2"]},
    "parts of blocks": {
        "target_modules": r".*\.mlp",
        "gate_norm": "scale",
        "weighting": "product",
        "gate_bias": True,
    },
    "no gates": {"weighting": "none", "layers_to_transform": (0, 1)},
    "other modules": {"modules_to_save": ["norm", "lm_head"]},
    "no task": {"task_type": None},
}


@pytest.mark.parametrize("how", WHOLE)
def test_what_was_saved_is_loaded_however_its_blocks_were_named(tmp_path: Path, how: str) -> None:
    model = get_peft_model(make_model(), config(**WHOLE[how])).eval()
    randomise(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_pickle_is_not_opened(trial: Trial) -> None:
    def pickled(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()

    assert trial.damaged(pickled) == "refused"


def test_a_config_in_python_is_checked_as_one_in_a_file() -> None:
    assert BaftConfig(target_modules={"a"}, layers_to_transform=(0, 1)).r == 12
    with pytest.raises(
        TypeError,
        match=r"layers_to_transform must hold a list of integers or integer or None, not \[None\]",
    ):
        BaftConfig(layers_to_transform=[None])
    with pytest.raises(ValueError, match="names of modules"):
        BaftConfig(modules_to_save=["a b"])


@pytest.mark.parametrize("shape", [(32,), (64, 31), (65, 32), (0,)])
def test_a_module_beside_the_adapter_that_does_not_fit_is_refused_before_the_model_is_touched(
    tmp_path, shape
) -> None:
    model = get_peft_model(make_model(), config(modules_to_save=["lm_head"])).eval()
    model.save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(make_model(), tmp_path)
    set_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(shape)}))(
        tmp_path
    )
    base = make_model()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"lm_head.weight of shape .* does not fit LlamaForCausalLM"
        ):
            PeftModel.from_pretrained(base, tmp_path)
        assert is_bare(base) and not hasattr(base, "peft_config")
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path, "second")
    assert [*model.peft_config] == ["default"]
    set_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)}))(
        tmp_path
    )
    # Its control: of the right shape it loads, also beside another.
    model.load_adapter(tmp_path, "second")


def test_a_width_that_the_config_leaves_open_is_checked_against_the_model(
    trial: Trial, tmp_path: Path
) -> None:
    def narrower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [
            name
            for name in tensors
            if name.endswith(("basis.weight", "source.weight", "gate.weight"))
        ]:
            tensors[name] = tensors[name][:, :16].clone()

    assert trial.damaged(set_config(hidden_size=None)) == "loaded"
    folder = Path(copytree(trial.folder, tmp_path / "narrower"))
    set_config(hidden_size=None)(folder)
    set_tensors(narrower)(folder)
    with pytest.raises(
        ValueError, match=r"basis.weight of shape \(4, 16\), which does not fit LlamaForCausalLM"
    ):
        PeftModel.from_pretrained(trial.base, folder)
    trial.check_untouched(trial.base, trial.bare_logits)
    assert is_bare(trial.base) and not hasattr(trial.base, "peft_config")


@pytest.mark.parametrize("how", ["expression", "exclusion"])
def test_blocks_chosen_by_an_expression_are_named_in_the_saved_config(
    tmp_path: Path, how: str
) -> None:
    model = get_peft_model(make_model(), config(**WHOLE[how]))
    model.save_pretrained(str(tmp_path))
    found = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(found["target_modules"]) == [layer.name for layer in baft_layers(model)]
    assert found["exclude_modules"] is None
    set_tensors(lambda t: [t.pop(name) for name in list(t) if "layers.1." in name])(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.baft.baft_\S+ is missing"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def on_the_hub(cache: Path, folder: Path) -> str:
    """Put a folder where a download from the Hub would have left it; returns its name there."""
    repository = cache / "models--someone--edits"
    copytree(folder, repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    return "someone/edits"


@pytest.mark.parametrize(
    "damage", [None, set_tensors(lambda t: t.popitem()), lambda folder: (folder / WEIGHTS).unlink()]
)
def test_an_adapter_from_the_hub_is_checked_as_one_from_a_folder(
    trial: Trial, tmp_path: Path, damage: Any
) -> None:
    folder = Path(copytree(trial.folder, tmp_path / "adapter"))
    if damage is not None:
        damage(folder)
    name = on_the_hub(tmp_path / "cache", folder)
    there: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    if damage is not None:
        with pytest.raises(ValueError, match=WEIGHTS):
            PeftModel.from_pretrained(trial.base, name, **there)
        assert is_bare(trial.base) and not hasattr(trial.base, "peft_config")
        return
    loaded = PeftModel.from_pretrained(make_model(), name, **there).eval()
    assert torch.equal(logits(loaded, IDS), trial.expected)
