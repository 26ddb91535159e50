"""The counted memory is the real one: rows against the bytes that running models hold."""

from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from helpers import LAYOUTS, PAPER, ROOT, layout_name, random_model, random_text, tiny
from torch.profiler import ProfilerActivity, profile

import config
import dmd
import model
import ode_regression
import rollout
import self_forcing
from benchmarks import bench_decode, bench_generate
from full_size import decoders, fp8, memory, sharding, text
from full_size.memory import Row
from kv_cache import CachedView, MaskedView
from masks import block_span, clip_span

F32, BF16 = torch.float32, torch.bfloat16


# ---- counting ----


def test_peak_counts_what_is_alive_at_once():
    """Freed tensors make room, views and what was there before cost nothing."""
    x = torch.empty(100, device="meta")

    def chain():
        y = x.view(10, 10) + 1  # 400 bytes
        y = y * 2  # 400 more, then the first are freed
        return (y * 3).sum()  # 400 again, and 4

    assert memory.peak_bytes(chain) == 804


def test_attention_writes_no_scores():
    """A fused attention needs its output, not a (Q, K) matrix."""
    q = torch.empty(1, 2, 1000, 8, device="meta")

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert memory.peak_bytes(attend) == 1000 * 2 * 8 * 4


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path):
    """Kilobytes of Linux's MemAvailable; elsewhere pages times their size; bytes of a GPU."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:  1234 kB\n")
    monkeypatch.setattr(memory, "Path", lambda path: {"/proc/meminfo": meminfo}[path])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory.free_bytes(cpu) == 1234 * 1024
    meminfo.unlink()
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 7}.get)
    assert memory.free_bytes(cpu) == 7 * 4096
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 80))
    assert memory.free_bytes(gpu) == 40


# ---- a stream ----


@pytest.mark.parametrize("cfg", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("blocks, window", [(6, 2), (4, 2), (3, 2), (4, None), (1, 1)])
def test_the_cache_row_is_what_a_stream_holds(cfg, blocks, window):
    """Both layouts, with and without sinks, evicting or not, to the byte."""
    net = random_model(tiny(cfg), F32)
    view, prompt = CachedView(net.cfg, blocks, window), random_text(net, net.cfg)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        list(rollout.rollout(net, lambda k: prompt, blocks, (1.0, 0.0), generator, view=view))
    assert memory.cache_row(net.cfg, blocks, window, F32).num_bytes == view.num_bytes()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("in_fp8", [False, True])
def test_weights_are_counted_to_the_byte(dtype, in_fp8):
    """All storages of the model, with the scales of fp8."""
    net = random_model(tiny(LAYOUTS[1]), dtype)
    if in_fp8:
        fp8.quantise(net.layers)
    held = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in net.parameters()}
    row = memory.weights_row(net.cfg, dtype, in_fp8)
    assert row.num_bytes == sum(held.values())
    assert ("x 1 byte" in row.how) == in_fp8


def test_the_text_is_counted_to_the_byte():
    """Keys and values of two prompts of 1024 tokens."""
    net = random_model(tiny(LAYOUTS[0]), F32)
    prompts = random_text(net, net.cfg, text.TOKENS, clips=2)
    tensors = [t for stream in (prompts.video, prompts.audio) for pair in stream for t in pair]
    assert memory.text_row(net.cfg, 2, F32).num_bytes == sum(t.nbytes for t in tensors)


def test_a_pass_is_as_large_as_its_widest_layer():
    """Ten layers need no more activations than two."""
    two, ten = (memory.pass_row(config.TOY, F32, layers) for layers in (2, 10))
    assert two == ten and two.num_bytes > 0


def allocated_peak(function) -> int:
    """The most bytes that PyTorch's allocator held for a function, by its own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes))


@torch.inference_mode()
def test_a_pass_needs_the_bytes_that_are_allocated():
    """Of a real pass on a CPU, 1 % off at most."""
    cfg = tiny(LAYOUTS[1], video_width=96, audio_width=64, height=64, width=64)
    net = random_model(cfg, F32)
    prompt, view = random_text(net, cfg, text.TOKENS), CachedView(cfg, 3, window=1)

    def one_pass(k):
        noise = model.draw_noise(1, block_span(k, cfg), cfg, torch.Generator())
        sigma = torch.ones(1)
        model.predict_x0(net, *noise, sigma, sigma, prompt, block_span(k, cfg), view)

    one_pass(0)
    view.next_block()
    one_pass(1)
    allocated = allocated_peak(lambda: one_pass(1))
    assert memory.pass_row(cfg, F32).num_bytes == pytest.approx(allocated, rel=0.01)


def test_rounding_to_fp8_needs_its_outputs_only():
    """One byte a number and four a row: on a GPU one kernel makes them."""
    x = torch.empty(10, 64, device="meta", dtype=BF16)
    assert memory.peak_bytes(lambda: fp8.rounded(x)) == 10 * 64 + 10 * 4


@torch.inference_mode()
def test_decoders_need_the_bytes_that_are_held(monkeypatch):
    """Small decoders of LTX-2's classes; a convolution on a CPU also takes some work space."""
    pytest.importorskip("diffusers")
    kinds = bench_decode.tiny_decoder_classes()
    monkeypatch.setattr(decoders, "decoder_classes", lambda: kinds)
    cfg = bench_generate.tiny(config.FULL)
    held, decoding = memory.decoder_rows(cfg, F32)
    nets = decoders.random_weights("cpu", F32)
    assert held.num_bytes == sum(t.nbytes for net in nets for t in net.state_dict().values())
    decoder, g = decoders.Decoder(*nets, cfg), torch.Generator()
    blocks = [rollout.Block(k, *model.draw_noise(1, block_span(k, cfg), cfg, g)) for k in range(4)]
    for block in blocks[:3]:
        decoder.decode(block)
    assert 0.6 < decoding.num_bytes / allocated_peak(lambda: decoder.decode(blocks[3])) <= 1


def test_recorded_passes_need_a_pool_and_a_copy_of_the_prompt():
    """One row more, as large as a pass, and one prompt more."""
    cfg = tiny(LAYOUTS[0])
    plain, recorded = (memory.stream_rows(cfg, 6, 2, F32, names) for names in ((), ("graph",)))
    assert recorded[2] == memory.text_row(cfg, 2, F32)
    assert recorded[4].num_bytes == plain[3].num_bytes
    assert [*recorded[:2], recorded[3]] == [*plain[:2], plain[3]]


@pytest.fixture(scope="module")
def full_plans():
    """Rows of two minutes at full size, by window: in bfloat16, in fp8."""
    pytest.importorskip("diffusers")
    return dict(zip(memory.WINDOWS, memory.plan()))


def test_the_full_size_fits_one_gpu_of_80_gb(full_plans):
    """Windows of 5 and 15 seconds do; weights are the 18.9 billion parameters in bfloat16."""
    for window in (5, 15):
        rows, _ = full_plans[window]
        assert rows[0].num_bytes == 2 * 18_876_207_360
        assert 51e9 < memory.total(rows) < 70e9


def test_in_fp8_it_fits_one_gpu_of_48_gb(full_plans):
    """With a window of 5 s, and 8 GB are left; products of video's rows take half, all other rows
    the same."""
    wide, narrow = full_plans[5]
    assert memory.total(narrow) < 40e9 < 48e9 < memory.total(wide)
    v, a = config.FULL.video_width, config.FULL.audio_width
    # self attention, captions, MLP; A2V: queries and output; V2A: keys and values
    in_fp8 = 48 * (4 * v * v + 4 * v * v + 8 * v * v + 2 * v * a + 2 * v * a)
    assert 0.99 * in_fp8 < wide[0].num_bytes - narrow[0].num_bytes < in_fp8
    assert wide[1:] == narrow[1:]


def test_a_stream_that_does_not_fit_is_refused_with_the_window_that_does():
    """One byte less than window 3 needs: window 2 is named, and it fits."""
    cfg = tiny(LAYOUTS[1])
    rows = [Row("weights", 1000, ""), memory.cache_row(cfg, 20, 3, F32)]
    memory.check_window(rows, memory.total(rows), cfg, 20, F32)
    with pytest.raises(ValueError, match="--window 2 would fit; --dtype fp8 makes"):
        memory.check_window(rows, memory.total(rows) - 1, cfg, 20, F32)
    with pytest.raises(ValueError, match="--window 2 would fit$"):
        memory.check_window(rows, memory.total(rows) - 1, cfg, 20, F32, in_fp8=True)
    two = [rows[0], memory.cache_row(cfg, 20, 2, F32)]
    memory.check_window(two, memory.total(two), cfg, 20, F32)
    with pytest.raises(ValueError, match="no window is short enough"):
        memory.check_window(rows, 1000, cfg, 20, F32)


def test_a_request_is_checked_with_its_text_encoder(monkeypatch, tmp_path, capsys):
    """Rows are printed; a text encoder that is larger than the free memory is refused."""
    monkeypatch.setattr(memory, "decoder_rows", lambda *_: [Row("decoders", 10, "")])
    request = SimpleNamespace(
        cfg=tiny(LAYOUTS[0]), num_blocks=6, window=2, dtype=F32, device=torch.device("cpu"),
        speedups=("graph",), cues=["a", "b"], ltx2=tmp_path, in_fp8=True,
        video_overlap=(4, 0),
    )  # fmt: skip
    for name, size in (
        ("text_encoder/model", 10**7),
        ("text_encoder/diffusion_pytorch_model", 10**9),  # a second copy, which nobody reads
        ("connectors/diffusion_pytorch_model", 9),
    ):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        with open(file, "wb") as f:
            f.truncate(size)  # takes no space on the disk
    rows = memory.film_rows(request.cfg, 6, 2, F32, request.speedups, prompts=2, in_fp8=True)
    assert memory.total(rows) < 10**7
    memory.check_stream(request)
    printed = capsys.readouterr().out
    assert "3 x 1024 tokens" in printed and " 0.01 GB  before all that" in printed
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**7 + 9)
    memory.check_stream(request)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**7 + 8)
    with pytest.raises(ValueError, match="a text encoder of 0.0 GB"):
        memory.check_stream(request)
    monkeypatch.setattr(memory, "free_bytes", lambda device: memory.total(rows) - 1)
    with pytest.raises(ValueError, match="--window 1 would fit"):
        memory.check_stream(request)


def test_the_page_quotes_the_plan(full_plans):
    """The tables of memory in full_size/README.md are what `python -m full_size.memory` prints."""
    page, plans = (ROOT / "full_size" / "README.md").read_text(), list(full_plans.values())
    assert memory.window_table(plans) in page
    assert memory.card_table(plans) in page


# ---- a training ----

CFG = tiny(PAPER, num_sinks=0)
GENERATOR, CRITIC = dmd.make_recipes(10, 0, 8, is_toy=False)


def one_pass(net, captions, generator):
    """The smallest loss: one pass over two blocks."""
    span = clip_span(2, net.cfg)
    noise = model.draw_noise(len(captions), span, net.cfg, generator)
    prompt = net.project_text(*captions.features)
    sigma = torch.rand(len(captions), generator=generator)
    return sum(v.mean() for v in net(*noise, sigma, sigma, prompt, span, MaskedView()))


def third_layer(nets, loss, batch):
    """Bytes that a third layer adds."""
    two, three = (memory.peak_of_update(nets, loss, batch, layers) for layers in (2, 3))
    return three - two


def test_what_is_kept_is_multiplied_out():
    """Weights, gradient, two moments and average in float32; frozen weights in bfloat16."""
    nets = [("t", config.LTX2, None), ("g", config.FULL, GENERATOR), ("c", config.LTX2, CRITIC)]
    found = memory.training_rows(nets, 10**9, 8)
    teacher, student = 18_876_174_592, 18_876_207_360
    sizes = [row.num_bytes * 8 for row in found[:8]]
    right = [2 * teacher, *(n * student for n in (4, 4, 8, 4)), *(n * teacher for n in (4, 4, 8))]
    assert sizes == pytest.approx(right, abs=8)
    assert found[-1].num_bytes == 10**9 and "8 processes" in found[0].how


def test_a_layer_more_takes_what_the_third_takes():
    """Five layers counted need as much as five layers extrapolated."""
    nets = [("g", replace(CFG, num_layers=5), GENERATOR)]
    counted = memory.peak_of_update(nets, one_pass, 2, 5)
    assert memory.activation_bytes(nets, one_pass, 2) == pytest.approx(counted, rel=0.02)


def test_layers_that_run_twice_keep_their_inputs_only(monkeypatch):
    """A layer more takes a small part of what it takes where activations are kept."""
    monkeypatch.setattr(text, "TOKENS", 4)  # whose keys and values are kept in any case
    nets = [("g", CFG, GENERATOR)]
    twice = third_layer(nets, one_pass, 4)
    monkeypatch.setattr(sharding, "checkpoint_layers", lambda net: net)
    assert 0 < twice < 0.2 * third_layer(nets, one_pass, 4)


def test_gradients_of_a_rollout_do_not_wait_for_its_last_pass(monkeypatch):
    """In one backward call for all blocks, every layer would keep its gradients, in bfloat16."""
    monkeypatch.setattr(text, "TOKENS", 4)
    monkeypatch.setattr(self_forcing, "CLIP_SECONDS", 2)
    cfg = replace(CFG, sigmas=(1.0, 0.0))  # a pass and a refresh: what keeps gradients is the exit
    nets, made = [("g", cfg, GENERATOR)], partial(self_forcing.rollout_clip, window=4)

    def loss(net, captions, generator):
        return sum(x.mean() for x in made(net, None, captions, generator))

    apart = third_layer(nets, loss, 1)
    monkeypatch.setattr(sharding, "passes_apart", lambda net: net)
    two, three = (memory.num_parameters(CFG, layers) for layers in (2, 3))
    assert 0.8 < (third_layer(nets, loss, 1) - apart) / (2 * (three - two)) < 1


def test_a_count_does_not_depend_on_the_count_before():
    """Rotation tables are kept between passes; every count starts without them."""
    count = partial(memory.peak_of_update, [("student", CFG, GENERATOR)])
    first, second = (count(ode_regression.trial_loss, 1, layers=2) for _ in range(2))
    assert first == pytest.approx(second, rel=1e-3)  # frequencies, some bytes, are kept as well


def test_a_training_that_does_not_fit_is_refused_with_the_number_that_does(monkeypatch):
    """One process is too few by one byte: two would do, and do; without room for one layer none."""
    nets = [("g", CFG, GENERATOR)]
    needed = memory.total(memory.training_rows(nets, 5000, 1))
    assert memory.training_refusal(nets, 5000, 1, needed - 1).endswith("free: 2 would do")
    assert memory.total(memory.training_rows(nets, 5000, 2)) < needed
    assert memory.training_refusal(nets, 5000, 1, 5000).endswith("no number of them is enough")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5000)
    with pytest.raises(ValueError, match="^this training needs .* in each of 1 processes"):
        memory.check_training(nets, one_pass, 2)


def test_processes_on_a_cpu_share_its_memory(monkeypatch):
    """Two of them need twice as much, to the byte."""
    nets = [("g", CFG, GENERATOR)]
    monkeypatch.setattr(memory.processes, "count", lambda: 2)
    monkeypatch.setattr(memory, "activation_bytes", lambda *_: 5000)
    each = memory.total(memory.training_rows(nets, 5000, 2))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * each)
    memory.check_training(nets, one_pass, 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * each - 1)
    with pytest.raises(ValueError, match="^this training needs .* in each of 2 processes"):
        memory.check_training(nets, one_pass, 2)
