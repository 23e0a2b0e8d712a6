"""Stand-ins for packages that ColossalAI imports for optimizers this project does not use.

Invariant: a package that is installed is used; one that is not still counts as not installed for
everybody who asks, because its stand-in exists only while colossalai.nn.optimizer is imported.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any, Never

from llama_lib.errors import UserError

# Module -> the names ColossalAI imports from it. bitsandbytes alone is 125 MB.
_WANTED = {
    "galore_torch": ("GaLoreAdafactor", "GaLoreAdamW"),
    "bitsandbytes": (),
    "bitsandbytes.optim": (),
    "bitsandbytes.optim.optimizer": ("Optimizer2State",),
}


class AbsentOptimizer:
    """Base of the optimizers of a package that is not installed."""

    package = ""

    def __init__(self, *args: Any, **kwargs: Any) -> Never:
        raise UserError(
            f"{type(self).__name__} needs the package {self.package}, which is not installed and "
            f"which llama_lib does not use; `pip install {self.package}` brings it"
        )


def import_optimizers() -> None:
    """Import colossalai.nn.optimizer whether or not galore_torch and bitsandbytes are installed."""
    # Everything that asks at import whether these packages exist must have asked before.
    for name in ("transformers", "peft", "colossalai"):
        importlib.import_module(name)
    stand_ins = {
        name: _stand_in(name, attributes)
        for name, attributes in _WANTED.items()
        if importlib.util.find_spec(name.partition(".")[0]) is None
    }
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("colossalai.nn.optimizer")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _stand_in(name: str, attributes: tuple[str, ...]) -> ModuleType:
    package = name.partition(".")[0]
    module = ModuleType(name, f"Stand-in of llama_lib for {package}, which is not installed.")
    for attribute in attributes:
        setattr(module, attribute, type(attribute, (AbsentOptimizer,), {"package": package}))
    return module
