from . import configs  # noqa: F401
from .other_tasks import TextToVideo  # noqa: F401
