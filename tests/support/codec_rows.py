"""Every codec with each of its bits, and a ratio where it has one."""

CODEC_ROWS = [
    ("fp32", 0.0, 0), ("fp16", 0.0, 0), ("int8", 0.0, 0), ("xor", 0.0, 0),
    *(("topk", 0.3, bits) for bits in (0, 4, 8, 16)),
    *(("quant", 0.0, bits) for bits in (1, 2, 3, 4, 8, 16)),
    *(("innovation", 0.0, bits) for bits in (0, 1, 3, 8, 16)),
    *((name, 0.4, bits) for name in ("caesar", "caesar-sign", "caesar-zero") for bits in (16, 32)),
]  # fmt: skip
"""(name, ratio, bits) of ``make_codec``."""
