"""Attention as the reference has it: two entries that need CUDA."""

try:
    import flash_attn
except ModuleNotFoundError:
    flash_attn = None


def cudnn_attention_forward_with_lse(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    raise RuntimeError("cuDNN needs CUDA")


def flash_attention(q, k, v, q_lens=None, k_lens=None, **options):
    assert q.device.type == "cuda"
    assert flash_attn is not None
    return q


def attention(q, k, v, k_lens=None, window_size=(-1, -1)):
    return cudnn_attention_forward_with_lse(q, k, v) if window_size == (-1, -1) else flash_attention(q, k, v)
