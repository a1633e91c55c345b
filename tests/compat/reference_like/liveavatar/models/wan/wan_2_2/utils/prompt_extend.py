"""Longer prompts, from a service whose package few have."""

import dashscope
from dashscope.api import Client

try:
    from flash_attn import flash_attn_varlen_func
except ModuleNotFoundError:
    flash_attn_varlen_func = None


class Answer(Client):
    pass


class DashScopePromptExpander:
    def __init__(self, model_name: str | None) -> None:
        dashscope.connect(model_name)
