"""The reference's classes over this engine, for scripts that were written for it (docs/migration.md).

from liveavatar_engine.compat import WanS2V                 # for liveavatar.models.wan.causal_s2v_pipeline
python -m liveavatar_engine.compat SCRIPT ARGS...           # or a script as it is
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fp8 import replace_linear_with_scaled_fp8
    from .model import CausalWanModel_S2V
    from .pipelines import BlockwiseWanS2V, TppWanS2V, WanS2V

__all__ = ["BlockwiseWanS2V", "CausalWanModel_S2V", "TppWanS2V", "WanS2V", "replace_linear_with_scaled_fp8"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when somebody wants them."""
    if name in ("BlockwiseWanS2V", "TppWanS2V", "WanS2V"):
        from . import pipelines

        return getattr(pipelines, name)
    if name == "CausalWanModel_S2V":
        from .model import CausalWanModel_S2V

        return CausalWanModel_S2V
    if name == "replace_linear_with_scaled_fp8":
        from .fp8 import replace_linear_with_scaled_fp8

        return replace_linear_with_scaled_fp8
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
