"""How fast is one attention at full size: against its lower bound, and by the kernel?  (GPU)

    python -m benchmarks.bench_attention                        one GPU, about a minute
    python -m benchmarks.bench_attention --sites v2a --ways tensor_cores  only these
    python -m benchmarks.bench_attention --device cpu --tiny    only to test the script

One attention of one layer in one pass, with a full window, bfloat16, one clip:

  chain    kv_cache.py in PyTorch: norm, rotate, write into the cache, SDPA over its slots
  cat      the textbook: norm, rotate, concatenate with the past, SDPA
  append   one kernel that norms, rotates and writes, then SDPA over the slots
  flash    the same, with the flash attention of SDPA, whatever SDPA would choose
  cudnn    the same, with the attention of cuDNN
  online   our two kernels: the one of `append`, then attention on the ordinary cores
  tensor_cores   the one of `append`, then attention of few queries on the tensor cores
  write    the kernel of `append` alone, without attention; its floor is its own

Each is launched from Python (eager) and replayed from a CUDA graph (graph), once for each layer of
a pass: 48 calls, each with its own inputs and cache, so that nothing waits in the L2 cache of the
GPU. Each result is compared with kv_cache.py in float64. Each round times all ways in turn. Ratios
are taken within a round; the results are medians over rounds.

The floor (lower bound) is the larger of two times: 4 Q K H D operations at the rate of a large
matrix product, and the bytes that must move at the rate of a large copy.

Writes results/bench_attention.json and, unless --tiny or a choice, a table of benchmarks/README.md.
"""

import copy
import functools
from statistics import median_high
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kv_cache
import rope
from benchmarks import page
from config import FULL
from full_size import faster
from kernel import cache_append_attention as kernel
from masks import SITES
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch, settled_median

# largest |out - truth| / |truth|; in bfloat16 PyTorch's chain comes to 0.014 over 18816 random keys
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
WAYS = ("chain", "cat", "append", "flash", "cudnn", "online", "tensor_cores", "write")


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

    def written_bytes(self, element=2) -> int:
        """Return the number of bytes that `write` must move: q, k and v in and out."""
        return (2 * self.Q + 4 * self.T) * self.H * self.D * element


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


# ---- the ways ----


def inputs(shape, device, dtype, seed=0):
    """Return projections q, k, v, `Heads` with random rotations, and a full cache."""
    torch.manual_seed(seed)
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


def flash(*arguments):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return append(*arguments)


def cudnn(*arguments):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return append(*arguments)


def ways(arguments, wanted=WAYS) -> dict:
    """Return the functions that can run here, by name."""
    q, _, _, heads, _ = arguments
    found = {"chain": chain, "cat": cat}
    if not kernel.path(q.device).startswith("PyTorch"):
        found["append"] = append
        found |= {"flash": flash, "cudnn": cudnn} if q.is_cuda else {}
        found["online"] = kernel.online
        found |= (
            {"tensor_cores": kernel.tensor_cores}
            if kernel.fits_tensor_cores(q, heads.count)
            else {}
        )
        found["write"] = kernel.append
    return {name: function for name, function in found.items() if name in wanted}


def sdpa_backend(q, k, v, heads, cache) -> str:
    """Return the name of the kernel that SDPA chooses for these sizes and strides."""
    tensors = [x.transpose(1, 2) for x in (heads.queries(q), *cache.visible())]
    found = SDPBackend(torch._fused_sdp_choice(*tensors)).name
    if found == "MATH":  # compared with the unfused kernel, everything would look good
        raise ValueError("SDPA has no fused kernel for this shape: it would store all scores")
    return found


def in_float64(x):
    """Return tensors, tuples and a cache of them in float64."""
    if isinstance(x, torch.Tensor):
        return x.double()
    if isinstance(x, kv_cache.RollingCache):
        x = copy.copy(x)
        x.k, x.v = x.k.double(), x.v.double()
    return type(x)(*map(in_float64, x)) if isinstance(x, tuple) else x


def errors(functions, arguments) -> dict:
    """Return |out - truth| / |truth| of each function; the truth is kv_cache.py in float64.

    Raises ValueError if one is too large.
    """
    truth, found = chain(*map(in_float64, arguments)), {}
    for name, function in functions.items():
        expected = arguments[3].queries(arguments[0]).flatten(2) if name == "write" else truth
        found[name] = float((function(*arguments) - expected).norm() / expected.norm())
        if not found[name] <= TOLERANCE[arguments[0].dtype]:
            raise ValueError(f"{name} differs from kv_cache.py in float64 by {found[name]:.2g}")
    return found


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


def floor(shape, rate, element, way="") -> float:
    """Return the lower bound in seconds at these rates."""
    if way == "write":
        return shape.written_bytes(element) / rate["bytes"]
    return max(shape.operations() / rate["operations"], shape.bytes(element) / rate["bytes"])


def for_each(function, layers):
    """Call a function with the arguments of every layer."""
    for arguments in layers:
        function(*arguments)


@torch.inference_mode()
def bench(shape, device, rate, rounds, layers, wanted=WAYS) -> dict:
    """Return medians in microseconds, and ratios to the floor and to `chain` and `cat`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = [inputs(shape, device, dtype, seed) for seed in range(layers)]
    functions = ways(layers[0], wanted)
    chosen = "tensor_cores" if kernel.fits_tensor_cores(layers[0][0], shape.H) else "append"
    result = {"chosen_by_kv_cache": chosen, "sdpa": sdpa_backend(*layers[0])}
    specified = {"kv_cache.py": kv_cache.cache_append_attention}
    result["errors"] = errors({**functions, **specified}, layers[0])
    calls = {(n, "eager"): functools.partial(for_each, f, layers) for n, f in functions.items()}
    for call in calls.values():
        seconds(call, device, 1)  # to warm up
    if device.type == "cuda":
        record = faster.cuda_recorder()
        calls |= {(n, "graph"): record(calls[n, "eager"])[0] for n in functions}
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(seconds(call, device, 1) / len(layers))
    for (name, mode), values in times.items():
        median, least = median_high(values), floor(shape, rate, dtype.itemsize, name)
        entry = {"us": 1e6 * median, "floor_us": 1e6 * least, "floors": median / least}
        for other in {"chain", "cat"} & {*functions}:
            pairs = zip(times[other, mode], values)
            entry[f"{other}_takes"] = median_high([o / mine for o, mine in pairs])
        result[f"{name}_{mode}"] = {key: round(x, 2) for key, x in entry.items()}
    return result


# ---- the table ----


def table(shapes) -> str:
    """Return all shapes as Markdown, in microseconds; bold: the way that kv_cache.py takes."""
    head = ["attention", "launched", "floor", *WAYS[:-1], "bold ÷ floor"]
    head += ["chain ÷ bold", "cat ÷ append", "SDPA", "`write`, its floor"]
    rows = [
        [name, mode, *cells(result, mode)]
        for name, result in shapes.items()
        for mode in ("eager", "graph")
        if any(f"{way}_{mode}" in result for way in WAYS)
    ]
    return page.table(head, rows)


def cells(result, mode) -> list[str]:
    """Return one line of the table, without name and mode; "" for what was not timed."""
    found = {way: result.get(f"{way}_{mode}", {}) for way in WAYS}
    taken = result["chosen_by_kv_cache"]

    def cell(way, key, form="{:.2f}"):
        return form.format(found[way][key]) if key in found[way] else ""

    floors = {cell(way, "floor_us", "{:.1f}") for way in WAYS[:-1]} - {""}
    times = [cell(way, "us", "**{:.1f}**" if way == taken else "{:.1f}") for way in WAYS[:-1]]
    ratios = [cell(taken, "floors"), cell(taken, "chain_takes"), cell("append", "cat_takes")]
    written = " / ".join(cell("write", key, "{:.1f}") for key in ("us", "floor_us"))
    return ["".join(floors), *times, *ratios, result["sdpa"], written.strip(" /")]


def summary(shape, result) -> str:
    """Return one line: the time of every way, beside its floor and its error."""
    ways = [key for key in result if key.endswith(("_eager", "_graph"))]
    times = [f"{key} {result[key]['us']:.1f} ({result[key]['floor_us']:.1f})" for key in ways]
    worst = max(result["errors"].values())
    return f"{shape.name}: us (floor): {', '.join(times)}; largest error {worst:.1e}"


def main():
    p = cli.parser(__doc__)
    p.add_argument("--device", default="cuda", help="cuda; cpu only with --tiny")
    p.add_argument("--tiny", action="store_true", help="two tiny shapes; numbers mean nothing")
    p.add_argument("--sites", nargs="+", choices=SITES, default=SITES, help="default: all")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    p.add_argument("--out", help="JSON file to write; default in results/, with --tiny in runs/")
    args = p.parse_args()
    args.out = page.json_path(args, "bench_attention")
    device = cli.find_device(args.device)
    if not args.tiny:
        kernel.require(device)  # otherwise PyTorch would be measured under the kernel's name
    shapes, rounds, layers = (TINY, 2, 2) if args.tiny else (full_shapes(), 10, FULL.num_layers)
    shapes = [shape for shape in shapes if shape.site in args.sites]
    dtype, n = (torch.float32, 64) if args.tiny else (torch.bfloat16, 8192)
    rate = {"operations": matmul_rate(device, dtype, n), "bytes": copy_rate(device, 16 * n * n)}
    measured_rates = (
        f"{kernel.path(device)}; {rate['operations'] / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{rate['bytes'] / 1e12:.3g} TB/s in a copy"
    )
    result = {"path": kernel.path(device), "rates": rate, "shapes": {}}
    with kernel.strict(not args.tiny):  # kv_cache.py may not fall back to PyTorch
        for shape in shapes:
            found = bench(shape, device, rate, rounds, layers, args.ways)
            result["shapes"][shape.name] = found
            print(summary(shape, found), flush=True)
    print(f"{measured_rates}\n\n{table(result['shapes'])}")
    result["machine"] = cli.machine(device)
    files.write_json(args.out, result)
    print(f"wrote {args.out}")
    if not args.tiny and len(shapes) == len(full_shapes()) and len(args.ways) == len(WAYS):
        where = "{device}, torch {torch}, {date}, bfloat16".format(**result["machine"])
        page.fill_in("attention", f"{where}, {measured_rates}\n\n{table(result['shapes'])}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
