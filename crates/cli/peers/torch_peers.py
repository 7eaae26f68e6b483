"""torch's attention and transformers' models, timed on jobs from standard input: one JSON object a line in, one out.

sattn bench starts it. On a GPU attention is timed with FlashAttention-2 and cuDNN, on the CPU with torch's own kernel; the
tensors are those that sattn attended. A model is a Llama of the same dimensions with random weights.
"""
import contextlib
import importlib
import json
import os
import statistics
import sys
import time

# What libraries print must not get between the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

SHORTEST_ROUND = 5e-3  # seconds; shorter calls are repeated
MOST_CALLS = 64
SLOW = 1.0  # seconds; a first call that takes longer is a round
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def say(message):
    ANSWERS.write(json.dumps(message) + "\n")
    ANSWERS.flush()


def doing(text):
    say({"doing": f"torch: {text}"})


class Seconds(dict):
    """Seconds by what they went into."""

    def time(self, part, work):
        begin = time.perf_counter()
        result = work()
        self[part] = self.get(part, 0.0) + time.perf_counter() - begin
        return result


def spread(values, calls=1):
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values), "calls": calls}


def read_safetensors(path, device, dtype):
    """The tensors of a file, by name."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        stored = getattr(torch, HEADER_DTYPES[entry["dtype"]])
        values = torch.frombuffer(data, dtype=stored, offset=begin, count=(end - begin) // stored.itemsize)
        tensors[name] = values.reshape(entry["shape"]).to(device, dtype)
    return tensors


def structured(path, device, dtype):
    """q, k and v put together as sattn does: noise, channels, neighbours."""
    parts = read_safetensors(path, device, dtype)
    noise_q, noise_k, noise_v = parts["q"], parts["k"], parts["v"]
    (length, dim), heads, kv_heads = noise_q.shape, parts["look"].shape[0], parts["pull"].shape[0]
    width = dim // 16
    look = parts["look"].repeat_interleave(width, dim=1)[:, None]
    pull = parts["pull"].repeat_interleave(width, dim=2)
    channels, local = look.shape[-1], parts["local"]
    near = slice(channels, channels + local.shape[-1])
    q = noise_q.expand(1, heads, length, dim).contiguous()
    q[0, :, :, :channels] += look
    for head, factor in enumerate(parts["near"]):
        q[0, head, :, near] += local * factor
    k = noise_k.expand(1, kv_heads, length, dim).contiguous()
    k[0, :, :, :channels] += pull
    k[0, :, :, near] += local
    return q, k, noise_v.expand(1, kv_heads, length, dim).contiguous()


def captured(path, length, device, dtype):
    tensors = read_safetensors(path, device, dtype)
    return tuple(tensors[name][:, :, :length].contiguous() for name in "qkv")


class Timer:
    """Seconds of repeated calls, by the device's clock where it has one."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"

    def __call__(self, call, calls):
        if not self.on_gpu:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            return time.perf_counter() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def base_row(job, device):
    return {
        "backend": "torch",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        "driver": f"torch {torch.__version__}",
        "dtype": job["dtype"],
        "length": job["length"],
    }


def op(job):
    seconds, rows = Seconds(), []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, limits, timer = getattr(torch, DTYPES[job["dtype"]]), job["limits"], Timer(device)
    tensors = job["tensors"]
    doing("inputs")
    if "captured" in tensors:
        q, k, v = seconds.time("peers' inputs", lambda: captured(tensors["captured"], job["length"], device, dtype))
        name = tensors["captured"]
    else:
        q, k, v = seconds.time("peers' inputs", lambda: structured(tensors["structured"], device, dtype))
        name = "structured"
    kernels = [("FlashAttention-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]
    if device == "cpu":
        kernels = [("SDPA", SDPBackend.FLASH_ATTENTION)]
    grouped = job["heads"] != job["kv_heads"]

    def attend(queries, causal):
        return lambda: scaled_dot_product_attention(queries, k, v, is_causal=causal, enable_gqa=grouped)

    # A decode step is left to the kernel that torch chooses by itself.
    calls = [(kernel, [backend], attend(q, True), False) for kernel, backend in kernels]
    calls.append(("decode (SDPA)", None, attend(q[:, :, -1:].contiguous(), False), True))
    operations = 2 * job["heads"] * job["head_dim"] * job["length"] * (job["length"] + 1)
    bytes_read = 2 * job["kv_heads"] * job["head_dim"] * job["length"] * dtype.itemsize
    timings = []
    for kernel, backends, call, is_decode in calls:
        row = {**base_row(job, device), "kind": "op", "attention": kernel, "inputs": name,
               "heads": job["heads"], "kv_heads": job["kv_heads"], "head_dim": job["head_dim"]}
        rows.append(row)
        doing(f"warm-up of {kernel}")
        try:
            with chosen(backends):
                first = seconds.time("peers' warm-up", lambda: (call(), timer(call, 1))[1])
        except Exception as error:
            row["failed"] = reason(error)
            continue
        repeated = max(1, min(MOST_CALLS, int(-(-SHORTEST_ROUND // max(first, 1e-7)))))
        slow = first >= SLOW
        timings.append((row, backends, call, is_decode, 1 if slow else repeated, [first] if slow else []))
    for _ in range(limits["rounds"]):
        for _, backends, call, _, repeated, times in timings:
            if sum(times) * repeated < limits["seconds"] and len(times) < limits["rounds"]:
                with chosen(backends):
                    times.append(seconds.time("peers' rounds", lambda: timer(call, repeated)) / repeated)
    for row, _, _, is_decode, repeated, times in timings:
        row["ms"] = spread([1e3 * value for value in times], repeated)
        median = row["ms"]["median"] / 1e3
        if is_decode:
            row["gigabytes_per_second"] = bytes_read / median / 1e9
        else:
            row["tflops"] = operations / median / 1e12
    return {"rows": rows, "seconds": seconds}


def chosen(backends):
    return contextlib.nullcontext() if backends is None else sdpa_kernel(backends)


MODEL = {}


def llama(dimensions, longest, device, dtype):
    """A model of random weights, kept for the next job."""
    key = json.dumps([dimensions, longest, str(dtype)])
    if key not in MODEL:
        from transformers import LlamaConfig, LlamaForCausalLM

        MODEL.clear()
        config = LlamaConfig(**dimensions, max_position_embeddings=longest, attn_implementation="sdpa")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                MODEL[key] = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    return MODEL[key]


def model(job):
    seconds = Seconds()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, limits = getattr(torch, DTYPES[job["dtype"]]), job["limits"]
    row = {**base_row(job, device), "kind": "model", "backend": "transformers", "model": "Llama, random weights"}
    try:
        transformers = seconds.time("peers' loading", lambda: importlib.import_module("transformers"))
    except ImportError:
        return {"rows": [], "seconds": seconds, "notes": ["transformers was left out: this Python does not have it"]}
    row["driver"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    # The prompt goes through FlashAttention-2 whole; a decode step goes where torch sends it.
    flash = [SDPBackend.FLASH_ATTENTION]
    row["attention"] = "FlashAttention-2"

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def step(net, ids, cache, backends):
        begin = time.perf_counter()
        with torch.inference_mode(), chosen(backends):
            output = net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        following = output.logits[:, -1].argmax(-1, keepdim=True)
        wait()
        return time.perf_counter() - begin, following, output.past_key_values

    try:
        doing("loading a Llama of the same dimensions")
        longest = job["longest"] + job["decode"]
        net = seconds.time("peers' loading", lambda: llama(job["dimensions"], longest, device, dtype))
        generator = torch.Generator().manual_seed(job["seed"])
        vocabulary = job["dimensions"]["vocab_size"]
        ids = torch.randint(vocabulary, (1, job["length"]), generator=generator).to(device)
        doing("warm-up of the Llama")

        def warm_up(backends):
            step(net, ids[:, :1], step(net, ids, None, backends)[2], None)

        try:
            seconds.time("peers' warm-up", lambda: warm_up(flash))
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            flash, row["attention"] = None, "SDPA"
            seconds.time("peers' warm-up", lambda: warm_up(flash))
        prompts, tokens = [], []
        for round_ in range(limits["rounds"]):
            if sum(prompts) >= limits["seconds"]:
                break
            doing(f"round {round_ + 1} of {limits['rounds']}")
            begin = time.perf_counter()
            taken, following, cache = step(net, ids, None, flash)
            prompts.append(taken)
            for _ in range(job["decode"] if round_ == 0 else 0):
                taken, following, cache = step(net, following, cache, None)
                tokens.append(1 / taken)
            del cache
            seconds["peers' rounds"] = seconds.get("peers' rounds", 0.0) + time.perf_counter() - begin
        row["ttft"], row["decode_tokens_per_second"], row["density"] = spread(prompts), spread(tokens), 1.0
        if device == "cuda":
            row["device_bytes"] = torch.cuda.max_memory_reserved()
    except Exception as error:
        row["failed"] = reason(error)
        MODEL.clear()
    return {"rows": [row], "seconds": seconds}


def reason(error):
    """The first line of what went wrong."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    say({"failed": {"reason": f"this Python has no torch ({reason(error)})", "variant": None}})
    sys.exit()
say("ready")
for line in sys.stdin:
    job = json.loads(line)
    try:
        answer = op(job) if job["kind"] == "op" else model(job)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say({"done": answer})
    except Exception as error:
        say({"failed": {"reason": reason(error), "variant": None}})
