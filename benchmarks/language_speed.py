"""Tokens per second of language models in prefill and generation: MHLA beside softmax.

    python benchmarks/language_speed.py OUT.json [--seconds 85]
    python benchmarks/language_speed.py OUT.json --table          only print the table

A Llama of 1.2 B parameters (16 layers, 32 heads of 64, 8 key heads) with random weights in
bfloat16, called as `generate` does: one call for the prompt, one for each token. Softmax keeps keys
and values in transformers' DynamicCache and uses `scaled_dot_product_attention`. Sequences of a
larger batch are copies of one prompt's cache. `gpu_ms` is the kernel time of one token from the
profiler: the time of a step without the launch overhead of Python. `copy_ms` is the part of it in
which a DynamicCache copies all keys and values to append one.
"""

import functools
import time
from typing import Any

import torch
from rows import Row, make_parser, markdown, measure_rows, number
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mhla_gen
from mhla_gen import CausalMHLAConfig
from mhla_gen.models.causal_decoder import CACHE

ARMS = {
    "softmax": None,
    "mhla": CausalMHLAConfig(block_size=64, num_blocks=32),
    "mhla + window": CausalMHLAConfig(block_size=64, num_blocks=32, window=256),
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}


def build(config: CausalMHLAConfig | None, device: str, longest: int, tiny: bool) -> Any:
    """The model with random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 2 * longest,
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes | (TINY if tiny else {})))
    model = model.to(torch.bfloat16).eval()
    return model if config is None else mhla_gen.inject(model, config)


class Meter:
    """Time and peak memory of work on a device."""

    def __init__(self, device: str):
        self.device = device
        self.before = 0

    def now(self) -> float:
        """Current time in seconds, after all started work is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def forget(self) -> None:
        """Measure peak memory beyond what is allocated now."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak_gib(self) -> float | None:
        """Peak memory since `forget`, beyond what was allocated then."""
        if self.device != "cuda":
            return None
        return (torch.cuda.max_memory_allocated() - self.before) / 2**30


def read_prompt(model: Any, ids: torch.Tensor) -> Any:
    """The cache after a prompt."""
    cache = DynamicCache(config=model.config)
    model(ids, logits_to_keep=1, **{CACHE: cache})
    return cache


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that the layers keep."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors = [layer.keys, layer.values] if state is None else []
        for part in [] if state is None else state.parts:
            tensors += [x for x in part.state_dict().values() if isinstance(x, torch.Tensor)]
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total


def generate(model: Any, cache: Any, batch: int, steps: int, meter: Meter) -> dict[str, float]:
    """Milliseconds and kernel time of one token of every sequence."""
    device = model.device
    token = torch.ones(batch, 1, dtype=torch.long, device=device)

    def step(token: torch.Tensor) -> torch.Tensor:
        return model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)

    for _ in range(3):
        token = step(token)
    start = meter.now()
    for _ in range(steps):
        token = step(token)
    milliseconds = (meter.now() - start) / steps * 1e3
    report = {"step_ms": milliseconds, "tokens_per_s": batch / milliseconds * 1e3}
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(token)
            meter.now()
        kernels = {e.key: e.self_device_time_total / 1e3 for e in profiler.key_averages()}
        report["gpu_ms"] = sum(kernels.values())
        report["copy_ms"] = sum(ms for name, ms in kernels.items() if "CatArray" in name)
    return report


@torch.inference_mode()
def measure(
    model: Any, length: int, batches: list[int], steps: int, meter: Meter
) -> dict[str, Any]:
    """One arm at one length."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    read_prompt(model, ids)
    meter.forget()
    start = meter.now()
    cache = read_prompt(model, ids)
    seconds = meter.now() - start
    report: dict[str, Any] = {
        "prefill_s": seconds,
        "prefill_tokens_per_s": length / seconds,
        "prefill_peak_gib": meter.peak_gib(),
        "cache_mib": cache_bytes(cache) / 2**20,
    }
    have = 1
    for batch in batches:
        try:
            cache.batch_repeat_interleave(batch // have)
            have = batch
            report[f"batch_{batch}"] = generate(model, cache, batch, steps, meter)
        except torch.OutOfMemoryError:
            report[f"batch_{batch}"] = {"error": "out of memory"}
            break
    return report


def table(rows: list[Row]) -> str:
    """Markdown for docs/language.md."""
    batches = sorted({int(key[6:]) for row in rows for key in row if key.startswith("batch_")})
    header = ["tokens", "attention", "prompt, tokens/s", "at most, GiB", "cache, MiB"]
    for n in batches:
        header += [f"{n} at once: kernels, ms (without copies)", "tokens/s"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["tokens"], list(ARMS).index(row["arm"]))):
        cells = [f"{row['tokens']:,}", row["arm"]]
        if "error" in row:
            lines.append([*cells, row["error"], *["-"] * (len(header) - 3)])
            continue
        cells += [f"{row['prefill_tokens_per_s']:,.0f}", number(row.get("prefill_peak_gib"))]
        cells += [f"{row['cache_mib']:,.1f}"]
        for found in (row.get(f"batch_{n}", {"error": "-"}) for n in batches):
            both = "-"
            if "gpu_ms" in found:
                both = f"{found['gpu_ms']:.2f} ({found['gpu_ms'] - found['copy_ms']:.2f})"
            cells += [both, found.get("error") or f"{found['tokens_per_s']:,.0f}"]
        lines.append(cells)
    return markdown(header, lines)


def main() -> None:
    """Measure all arms at all lengths, the shortest first."""
    parser = make_parser(__doc__, seconds=90)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="a model that shows only that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter = Meter(device)

    @functools.cache
    def model(arm: str) -> Any:
        return build(ARMS[arm], device, max(args.lengths), args.tiny)

    def row_of(case: Row) -> Row:
        return measure(model(case["arm"]), case["tokens"], args.batches, args.steps, meter)

    cases: list[Row] = [{"arm": arm, "tokens": n} for n in args.lengths for arm in ARMS]
    measure_rows(args, cases, row_of, table)


if __name__ == "__main__":
    main()
