"""Settings and every number derived from them, in one place. Imports neither torch nor the rest of the engine."""

from .engine import EngineConfig
from .geometry import SinkSegment, StreamGeometry
from .model import ModelConfig
from .size import Size

__all__ = ["EngineConfig", "ModelConfig", "SinkSegment", "Size", "StreamGeometry"]
