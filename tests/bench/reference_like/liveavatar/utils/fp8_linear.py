"""FP8 in name: weights rounded to e4m3 with one scale each, products in the layer's own dtype."""

import torch
from torch import nn


@torch.compile(mode="max-autotune-no-cudagraphs", dynamic=True)
def rounded(weight):
    scale = weight.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
    return ((weight / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def replace_linear_with_scaled_fp8(module, ignore_keys=(), quantize_weight=True):
    torch.empty(1, device="cuda")
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and not any(key in name for key in ignore_keys):
            child.weight.data = rounded(child.weight.data)
