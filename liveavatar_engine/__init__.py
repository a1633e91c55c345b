"""Inference engine for Live Avatar: a portrait, speech and a prompt in, talking video out, block by block.

from liveavatar_engine import Engine, EngineConfig

engine = Engine.from_pretrained("ckpt/Wan2.2-S2V-14B", config=EngineConfig(size="704*384"))
for chunk in engine.generate(image="a.jpg", audio="a.wav", prompt="..."):
    chunk.frames  # uint8 [T, H, W, 3]
"""

from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .frames import FrameChunk

if TYPE_CHECKING:
    from .pipeline.engine import Engine
    from .pipeline.session import Session

__version__ = "0.1.0"
__all__ = ["Engine", "EngineConfig", "FrameChunk", "Session", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when somebody wants them, so that `--help` answers at once."""
    if name == "Engine":
        from .pipeline.engine import Engine

        return Engine
    if name == "Session":
        from .pipeline.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
