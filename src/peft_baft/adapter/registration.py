"""Register the type `BAFT` with PEFT: the only file that modifies PEFT's tables of types.

`peft.register_peft_method` is public, but accepts only members of the closed enum `peft.PeftType`, so this file adds one
at run time. If a future PEFT has its own BAFT, importing this package raises an error.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def _member(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, after adding it if necessary.

    Raises:
        ImportError: this version of Python or PEFT builds enums differently; nothing is registered then.
    """
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        type.__setattr__(PeftType, name, member)  # the enum's own __setattr__ refuses
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    member = PeftType.__members__[name]
    if not (
        PeftType(name) is PeftType[name] is getattr(PeftType, name) is member
        and member in list(PeftType)
    ):
        raise ImportError(
            f"peft_baft cannot add {name} to peft.PeftType on this combination of Python and PEFT versions."
        )
    return member


BAFT = _member("BAFT")


def register(config_cls: type, model_cls: type) -> None:
    """Register the tuner once; a second import does nothing.

    Raises:
        ImportError: another package has registered a `BAFT`.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(BAFT)
    if known is config_cls:
        return
    if known is not None:
        raise ImportError(
            f"PEFT already has a method named BAFT ({known.__module__}); use that one or remove peft_baft."
        )
    register_peft_method(
        name="baft",
        config_cls=config_cls,
        model_cls=model_cls,
        prefix="baft_",
        is_mixed_compatible=False,
    )
