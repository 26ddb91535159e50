"""How fast is one attention at full size: against its lower bound, and by the kernel?  (GPU)

    python -m benchmarks.bench_attention                        one GPU, about two minutes
    python -m benchmarks.bench_attention --device cpu --tiny    only to test the script

One attention of one layer in one pass, with a full window, bfloat16, one clip. Four ways:

  chain    kv_cache.py in PyTorch: norm, rotate, write into the cache, SDPA over its slots
  cat      the textbook: norm, rotate, concatenate with the past, SDPA
  append   one kernel that norms, rotates and writes, then SDPA over the slots
  fused    everything in one kernel, if the new keys of a head fit the shared memory of a block

Each is launched from Python (eager) and replayed from a CUDA graph (graph). All ways must agree,
kv_cache.py included. Each round times all ways in turn. Ratios are taken within a round; the
results are medians over rounds.

The floor (lower bound) is the larger of two times: 4 Q K H D operations at the rate of a large
matrix product, and the bytes that must move at the rate of a large copy.

Writes results/bench_attention.json and, unless --tiny, a table of benchmarks/README.md.
"""

import functools
from statistics import median_high
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

import kv_cache
import rope
from benchmarks import page
from config import FULL
from full_size import faster
from kernel import cache_append_attention as kernel
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median

# relative to the largest output; the order of summation differs
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
WAYS = ("chain", "cat", "append", "fused")


class Shape(NamedTuple):
    """The sizes of one attention in a stream."""

    site: str  # one of masks.SITES
    H: int  # heads
    D: int  # channels of a head
    Q: int  # queries of a block
    T: int  # keys of a block
    prefix: int  # keys of block 0
    window: int  # blocks = seconds

    @property
    def K(self) -> int:
        """Return the number of visible keys with a full window."""
        return self.prefix + (self.window + 1) * self.T

    @property
    def name(self) -> str:
        return f"{self.site}, window {self.window} s: {self.Q} x {self.K}, {self.H} x {self.D}"

    def operations(self) -> int:
        """Return the number of floating-point operations in q k^T and P v."""
        return 4 * self.Q * self.K * self.H * self.D

    def bytes(self, element=2) -> int:
        """Return the number of bytes that must move: each input once, each output once."""
        # q and out; projected k, v; their slots; the other slots
        rows = 2 * self.Q + 2 * self.T + 2 * self.T + 2 * (self.K - self.T)
        return rows * self.H * self.D * element


def full_shapes() -> list[Shape]:
    """Return the four attentions of the full size, with windows of 5 and of 15 seconds."""
    video = FULL.video_tokens_per_block, FULL.prefix_video_frames * FULL.tokens_per_frame
    audio = FULL.audio_frames_per_block, FULL.num_sinks + FULL.prefix_audio_frames
    H, wide, narrow = FULL.num_heads, FULL.video_width, FULL.audio_width
    sites = (
        ("video_self", wide // H, video[0], *video),
        ("audio_self", narrow // H, audio[0], *audio),
        ("a2v", narrow // H, video[0], *audio),
        ("v2a", narrow // H, audio[0], *video),
    )
    return [Shape(s[0], H, *s[1:], window) for window in (5, 15) for s in sites]


TINY = [Shape("video_self", 1, 40, 6, 6, 2, 2), Shape("v2a", 2, 24, 3, 6, 2, 1)]


# ---- the four ways ----


def inputs(shape, device, dtype):
    """Return projections q, k, v, `Heads` with random rotations, and a full cache."""
    torch.manual_seed(0)
    width = shape.H * shape.D

    def random(*size):
        return torch.randn(size, device=device, dtype=dtype)

    def table(tokens):
        return rope.Rope(*(random(tokens, width // 2) for _ in range(2)), FULL.rope_layout)

    cache = kv_cache.RollingCache(shape.prefix, shape.T, shape.window + 1)
    cache.k, cache.v = (random(1, shape.K, shape.H, shape.D) for _ in range(2))
    # The current block is at the end of the ring, so that `cat` finds its past in one piece.
    cache.block = 2 * cache.ring_blocks
    q, k, v = (random(1, n, width) for n in (shape.Q, shape.T, shape.T))
    one = torch.ones(width, device=device, dtype=dtype)
    heads = kv_cache.Heads(shape.H, FULL.norm_eps, one, one, table(shape.Q), table(shape.T))
    return q, k, v, heads, cache


def chain(q, k, v, heads, cache):
    keys, values = cache.append(heads.keys(k), heads.split(v))
    return kv_cache.attention(heads.queries(q), keys, values)


def cat(q, k, v, heads, cache):
    past = slice(0, cache.slots.start)
    keys = torch.cat([cache.k[:, past], heads.keys(k)], dim=1)
    values = torch.cat([cache.v[:, past], heads.split(v)], dim=1)
    return kv_cache.attention(heads.queries(q), keys, values)


def append(q, k, v, heads, cache):
    queries = heads.split(kernel.append(q, k, v, heads, cache))
    return kv_cache.attention(queries, *cache.visible())


def fits(arguments) -> bool:
    """Return whether the new keys of a head fit the shared memory of a thread block."""
    try:
        kernel.fused(*arguments)
    except RuntimeError as error:
        if "CUDA error 1:" not in str(error):  # invalid value: a launch with too much of it
            raise
        return False
    return True


def ways(arguments) -> dict:
    """Return the functions that can run here, by name."""
    found = {"chain": chain, "cat": cat}
    if not kernel.path(arguments[0].device).startswith("PyTorch"):
        found["append"] = append
        if fits(arguments):
            found["fused"] = kernel.fused
    return found


def sdpa_backend(q, k, v, heads, cache) -> str:
    """Return the name of the kernel that SDPA chooses for these sizes and strides."""
    tensors = [x.transpose(1, 2) for x in (heads.queries(q), *cache.visible())]
    found = SDPBackend(torch._fused_sdp_choice(*tensors)).name
    if found == "MATH":  # compared with the unfused kernel, everything would look good
        raise ValueError("SDPA has no fused kernel for this shape: it would store all scores")
    return found


def check_agreement(functions, arguments):
    """Raise ValueError unless all functions return what the first returns."""
    truth, *others = (f(*arguments).float() for f in functions.values())
    limit = TOLERANCE[arguments[0].dtype] * truth.abs().max()
    for name, other in zip(list(functions)[1:], others):
        if not (worst := (other - truth).abs().max()) <= limit:
            raise ValueError(f"{name} differs from {next(iter(functions))} by {worst:.3g}")


# ---- time ----


def seconds(call, device, repeats) -> float:
    """Return the mean seconds of a call, over `repeats` calls in a row."""

    def calls():
        for _ in range(repeats):
            call()

    watch = Stopwatch(device)
    watch.watch("calls", calls)()
    return watch.stages()["calls"] / repeats


def matmul_rate(device, dtype, n=8192) -> float:
    """Measure the operations per second in a product of n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / settled_median([seconds(lambda: a @ b, device, 5) for _ in range(7)])


def copy_rate(device, n) -> float:
    """Measure the bytes per second, read and written, in a copy of n bytes."""
    x, y = (torch.empty(n, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * n / settled_median([seconds(lambda: y.copy_(x), device, 5) for _ in range(7)])


def floor(shape, rate, element) -> float:
    """Return the lower bound in seconds at these rates."""
    # Buffers are used again and again. Small ones (audio) stay in the L2 cache, so their times may
    # lie below the floor.
    return max(shape.operations() / rate["operations"], shape.bytes(element) / rate["bytes"])


@torch.inference_mode()
def bench(shape, device, rate, rounds, repeats) -> dict:
    """Return medians in microseconds, and ratios to the floor and to `chain` and `cat`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arguments = inputs(shape, device, dtype)
    functions, backend = ways(arguments), sdpa_backend(*arguments)
    check_agreement({**functions, "kv_cache.py": kv_cache.cache_append_attention}, arguments)
    calls = {(n, "eager"): functools.partial(f, *arguments) for n, f in functions.items()}
    if device.type == "cuda":
        record = faster.cuda_recorder()
        calls |= {(n, "graph"): record(calls[n, "eager"])[0] for n in functions}
    for call in calls.values():
        seconds(call, device, repeats)  # to warm up
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(seconds(call, device, repeats))
    least = floor(shape, rate, dtype.itemsize)
    chosen = "fused" if kernel.fits_fused(*arguments[:2]) else "append"
    result = {"floor_us": round(1e6 * least, 2), "chosen_by_kv_cache": chosen, "sdpa": backend}
    for (name, mode), values in times.items():
        median = median_high(values)
        entry = {"us": round(1e6 * median, 2), "floors": round(median / least, 2)}
        for other in ("chain", "cat"):
            pairs = zip(times[other, mode], values)
            entry[f"{other}_takes"] = round(median_high([o / mine for o, mine in pairs]), 2)
        result[f"{name}_{mode}"] = entry
    return result


# ---- the table ----


def table(shapes) -> str:
    """Return all shapes as Markdown, in microseconds; bold: the way that kv_cache.py takes."""
    head = ["attention", "launched", "floor", *WAYS, "bold ÷ floor"]
    head += ["chain ÷ fused", "cat ÷ append", "SDPA"]
    rows = [
        [name, mode, *cells(result, mode)]
        for name, result in shapes.items()
        for mode in ("eager", "graph")
        if f"chain_{mode}" in result
    ]
    return page.table(head, rows)


def cells(result, mode) -> list[str]:
    """Return one line of the table, without name and mode; "" for what was not timed."""
    found, taken = {way: result.get(f"{way}_{mode}") for way in WAYS}, result["chosen_by_kv_cache"]

    def cell(way, key, form="{:.2f}"):
        return form.format(found[way][key]) if found[way] else ""

    times = [cell(way, "us", "**{:.1f}**" if way == taken else "{:.1f}") for way in WAYS]
    ratios = [cell(taken, "floors"), cell("fused", "chain_takes"), cell("append", "cat_takes")]
    return [f"{result['floor_us']:.1f}", *times, *ratios, result["sdpa"]]


def main():
    p = cli.parser(__doc__)
    p.add_argument("--device", default="cuda", help="cuda; cpu only with --tiny")
    p.add_argument("--tiny", action="store_true", help="two tiny shapes; numbers mean nothing")
    p.add_argument("--out", help="JSON file to write; default in results/, with --tiny in runs/")
    args = p.parse_args()
    args.out = page.json_path(args, "bench_attention")
    device = cli.find_device(args.device)
    if not args.tiny:
        kernel.require(device)  # otherwise PyTorch would be measured under the kernel's name
    shapes, rounds, repeats = (TINY, 2, 2) if args.tiny else (full_shapes(), 20, 20)
    dtype, n = (torch.float32, 64) if args.tiny else (torch.bfloat16, 8192)
    rate = {"operations": matmul_rate(device, dtype, n), "bytes": copy_rate(device, 16 * n * n)}
    measured_rates = (
        f"{kernel.path(device)}; {rate['operations'] / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{rate['bytes'] / 1e12:.3g} TB/s in a copy"
    )
    result = {"path": kernel.path(device), "rates": rate, "shapes": {}}
    with kernel.strict(not args.tiny):  # kv_cache.py may not fall back to PyTorch
        for shape in shapes:
            print(shape.name, flush=True)
            result["shapes"][shape.name] = bench(shape, device, rate, rounds, repeats)
    print(f"{measured_rates}\n\n{table(result['shapes'])}")
    result["machine"] = cli.machine(device)
    files.write_json(args.out, result)
    print(f"wrote {args.out}")
    if not args.tiny:
        where = "{device}, torch {torch}, {date}, bfloat16".format(**result["machine"])
        page.fill_in("attention", f"{where}, {measured_rates}\n\n{table(result['shapes'])}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
