"""Times torch's causal attention with FlashAttention-2 and cuDNN: medians of five calls after two, bf16, 32 heads of 128.

  python3 torch_attention.py [LENGTH...]
"""
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, DIM = 32, 128


def milliseconds(call):
    times = []
    for step in range(7):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if step >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


print(torch.__version__, torch.cuda.get_device_name())
for length in map(int, sys.argv[1:] or (8192, 32768, 98304)):
    q, k, v = (torch.randn(1, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    operations = 2 * HEADS * DIM * length * (length + 1)
    for name, backend in (("FlashAttention-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            time = milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
        print(f"{name} {length}: {time:.2f} ms, {operations / time / 1e9:.0f} TFLOP/s")
