"""What a kernel's result may differ by, wherever it is tested or timed; errors are relative L2 against float64."""

from __future__ import annotations

TIMES_WORSE = 2.0
"""Error over that of the same maths in torch at the same precision."""
LEAST_SQNR = 25.0
"""dB that e4m3 leaves, of signal to quantisation noise, with a scale per token and channel."""
EMULATION_SQNR = 45.0
"""dB between e4m3 attention and its emulation, which rounds at the same places, up to values on an edge."""
FLIPPED_SHARE = 2e-3
"""Share of e4m3 values that may be the neighbour of the expected one, because they lie on the edge between two."""
