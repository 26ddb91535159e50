"""fp8 rounds what it should, as finely as 8 bits can, without a second copy of the weights."""

import functools
import weakref
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import PAPER, random_model, random_text, run_here, tiny
from tape import Operators, Side, Tape, TwoStreams
from test_faster import WAITS, Counting, stream
from torch import nn

import generate
import model
from full_size import faster, fp8, source
from full_size import weights as ltx2
from full_size.source import StreamSource
from masks import clip_span
from plumbing import files
from studies import fp8 as study

CFG = tiny(PAPER, num_sinks=2)
BF16 = torch.bfloat16


def in_fp8(cfg=CFG):
    """A random model in bfloat16 whose layers multiply in fp8."""
    net = random_model(cfg, BF16)
    fp8.quantise(net.layers)
    return net


def bits(tensors):
    """Tensors as comparable numbers: torch.equal does not know fp8."""
    return [t.view(torch.uint8) if t.dtype == fp8.FP8 else t for t in tensors]


def assert_bitwise(one, other):
    assert all(map(torch.equal, bits(one), bits(other)))


# ---- rounding and multiplying ----


def test_each_number_keeps_four_digits():
    """At most 1/16 off, or an absolute 2^-10 of a row whose largest number is 448."""
    x = torch.randn(50, 300) * torch.logspace(-20, 20, 50)[:, None]
    values, scale = fp8.rounded(x)
    assert values.dtype == fp8.FP8 and scale.shape == (50, 1)
    assert (values.float().abs().amax(1) == 448).all()
    wrong = (values.float() * scale - x).abs()
    assert (wrong <= torch.maximum(x.abs() / 16 * 1.0001, scale * 2**-10 * 1.0001)).all()


def test_a_large_row_does_not_harm_another():
    """Scales are by row, so an outlier costs digits in its own row only; zeros stay zeros."""
    x = torch.randn(3, 64)
    alone = fp8.rounded(x[:1])
    x[1, 5], x[2] = 1e6, 0
    values, scale = fp8.rounded(x)
    assert torch.equal(values[:1].float(), alone.values.float()) and scale[0] == alone.scale
    assert (values[2].float() == 0).all() and scale.isfinite().all()


def test_a_product_is_that_of_the_rounded_numbers():
    """Against float64, with bias, for rows of any shape, in the dtype of the model."""
    linear, x = nn.Linear(96, 40, dtype=BF16), torch.randn(2, 5, 96, dtype=BF16)
    weight, rows = fp8.rounded(linear.weight.detach()), fp8.rounded(x)
    exact = [r.values.double() * r.scale.double() for r in (rows, weight)]
    exact = exact[0] @ exact[1].t() + linear.bias.double()
    narrow = fp8.Fp8Linear(linear)
    found = narrow(x)
    assert found.dtype == BF16 and found.shape == (2, 5, 40)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    assert torch.equal(found, narrow(rows))  # rounded before
    assert 0 < (found - linear(x)).norm() / linear(x).norm() < 0.06


def test_products_of_many_rows_are_rounded_and_nothing_else():
    """Rows are counted in a stream: of the layers, all products but those of audio's rows."""
    net, wide, rows = in_fp8(), random_model(CFG, BF16), {}

    def count(name, layer, inputs, _):
        rows[name] = inputs[0].shape[-2]

    for name, linear in wide.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("layers."):
            linear.register_forward_hook(functools.partial(count, name))
    with torch.no_grad():
        stream(wide, [random_text(wide, CFG, length=99)] * 2, blocks=1)
    assert set(rows.values()) == {of_audio := 1 + CFG.num_sinks, CFG.tokens_per_frame, 99}
    captions = [f"layers.{i}.audio.text_attn.{name}" for i in range(2) for name in ("to_k", "to_v")]
    assert [rows.pop(name) for name in captions] == [99] * 4  # once for each prompt: not worth it
    rounded = {n for n, m in net.named_modules() if isinstance(m, fp8.Fp8Linear)}
    assert rounded == {name for name, n in rows.items() if n != of_audio}
    for name, p in wide.named_parameters():
        if name.removesuffix(".weight") not in rounded:
            assert torch.equal(p, net.get_parameter(name)), name


def test_only_the_chosen_products_are_rounded():
    """By name, in all layers."""
    net = random_model(CFG, BF16)
    fp8.quantise(net.layers, lambda name: name.endswith("video.mlp_in"))
    rounded = [n for n, m in net.named_modules() if isinstance(m, fp8.Fp8Linear)]
    assert rounded == [f"layers.{i}.video.mlp_in" for i in range(CFG.num_layers)]


def test_a_kernel_is_compiled_for_each_of_many_sizes(monkeypatch):
    """PyTorch by itself would run the ninth size operator by operator, and tell nobody."""
    compiler = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    rounded = fp8.in_one_kernel(lambda x: fp8.rounded(x))
    for rows in range(2, 14):
        assert_bitwise(rounded(x := torch.randn(rows, 8)), fp8.rounded(x))
    assert compiler.call_count == 12


# ---- loading ----


def test_weights_are_rounded_one_by_one_while_they_are_read():
    """The same bits as rounding afterwards; of the wide weights, one is alive at a time."""
    wide, net = random_model(CFG, BF16).state_dict(), ltx2.build(CFG, device="meta")
    alive, right = weakref.WeakSet(), in_fp8().state_dict()
    in_eight_bits = {name for name, tensor in right.items() if tensor.dtype == fp8.FP8}

    def read():
        for name, tensor in wide.items():
            copy = tensor.clone()
            if name in in_eight_bits:
                assert not alive
                alive.add(copy)
            yield name, copy
            del copy

    files.load_into(net, dict(fp8.while_read(net, read())), "x", assign=True)
    assert list(right) == list(net.state_dict())
    assert_bitwise(right.values(), net.state_dict().values())


def test_a_published_file_and_random_weights_can_be_read_in_fp8(tmp_path):
    """From a file the weights of that file; random ones are those of bfloat16, rounded."""
    wide = random_model(CFG, BF16).state_dict()
    ltx2.save(tmp_path / "x.safetensors", wide, CFG, {})
    read = ltx2.Source(tmp_path / "x.safetensors", CFG).load(in_fp8=True)
    assert_bitwise(read.state_dict().values(), in_fp8().state_dict().values())
    drawn, rounded = ltx2.random_weights(CFG), ltx2.random_weights(CFG, in_fp8=True)
    fp8.quantise(drawn.layers)
    assert_bitwise(drawn.state_dict().values(), rounded.state_dict().values())


# ---- with the speed-ups ----


def test_a_recorded_stream_beside_its_audio_is_the_same_bit_by_bit():
    """Recorded passes and two streams; nothing is read back."""
    net = in_fp8()
    with torch.no_grad():
        texts = [random_text(net, CFG)] * 2
    plain = stream(net, texts)
    with Operators() as seen:
        stream(net, texts, seed=1)
    assert not WAITS & seen.counts.keys()
    recorded = Counting(net, lambda: Tape.record)
    assert_bitwise(plain, stream(recorded, texts))
    assert recorded.counts["replayed"] > 0
    with TwoStreams() as streams:
        faster.run_beside(net, Side(streams))
        assert_bitwise(plain, stream(net, texts))
    assert not streams.faults


def test_fused_kernels_round_what_the_products_read(monkeypatch):
    """Without the compiler: bit by bit the same stream, with the rounding inside the functions."""
    monkeypatch.setattr(faster, "fused", lambda function: function)
    net, product, given = in_fp8(), fp8.product, Counter()

    def counted(x, *parts):
        given[type(x)] += 1
        return product(x, *parts)

    monkeypatch.setattr(fp8, "product", counted)
    with torch.no_grad():
        texts = [random_text(net, CFG)] * 2
    plain = stream(net, texts, blocks=1)
    faster.fuse(net)
    given.clear()
    assert_bitwise(plain, stream(net, texts, blocks=1))
    # a layer rounds apart what attention gives to three `to_out`
    passes = 2 * CFG.num_layers
    assert given[torch.Tensor] == passes * 3
    # q, k, v; q of captions and of A2V; k, v of V2A; both products of the MLP
    assert given[fp8.Rounded] == passes * (3 + 2 + 2 + 2)


# ---- the command line ----


def test_a_film_in_fp8_is_another_film_and_says_so(tmp_path, monkeypatch, capsys):
    """The toy on a CPU: as many frames as in bfloat16, other pixels, "fp8" in the report."""
    films = []
    for dtype in ("bfloat16", "fp8"):
        out, report = tmp_path / f"{dtype}.mp4", tmp_path / f"{dtype}.json"
        arguments = "--dtype", dtype, "--seconds", 1, "--out", out, "--report", report
        status, printed, err = run_here(generate, arguments, monkeypatch, capsys)
        assert status == 0 and "25 frames" in printed, err
        assert files.json.loads(report.read_text())["dtype"] == dtype
        films.append(out.read_bytes())
    assert films[0] != films[1]


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_without_fp8_is_refused(name, monkeypatch):
    """An A100, or a Mac: one line that says which option to take instead."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    request = SimpleNamespace(
        weights="random", cues=[], image=None, device=torch.device(name), dtype=BF16, in_fp8=True,
        seconds=1,
    )  # fmt: skip
    for check in (lambda: fp8.check_device(torch.device(name)), lambda: StreamSource([request])):
        with pytest.raises(ValueError, match="has no fp8; .* use --dtype bfloat16"):
            check()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.check_device(torch.device("cuda"))
    fp8.check_device(torch.device("cpu"))


@pytest.mark.parametrize("weights", ["random", "file"])
def test_a_full_size_request_in_fp8_reaches_the_weights_and_the_plan(weights, monkeypatch):
    """The loaders and the memory check are told; everything else is loaded in bfloat16."""
    seen = mock.MagicMock()
    for name in ("memory", "weights", "text", "decoders", "hub", "parts"):
        monkeypatch.setattr(source, name, getattr(seen, name))
    line = "--config full --ltx2 ltx2 --dtype fp8 --weights"
    request = generate.check_args(generate.options().parse_args([*line.split(), weights]))
    seen.text.encode_and_free.return_value = {}, 0.0
    StreamSource([request])
    load = seen.weights.random_weights if weights == "random" else seen.weights.Source().load
    assert load.call_args.args[-3:] == (torch.device("cpu"), BF16, True)
    assert seen.memory.check_stream.call_args.args[0].in_fp8


# ---- the study at toy scale ----


def test_a_variant_is_off_by_what_it_rounds():
    """Nothing rounded: no error. One kind: some. All of them, and all products: more each time."""
    net, parts = random_model(CFG, torch.float32), ("", "mlp", "mlp_in")
    span, features = clip_span(study.BLOCKS, CFG), torch.randn(2, 3, CFG.caption_width)
    clip = model.draw_noise(2, span, CFG, torch.Generator().manual_seed(0))

    def predict(variant):
        with variant.at_work(), torch.no_grad():
            rounded = variant.applied_to(net)
            return study.velocities(rounded, clip, rounded.project_text(features))

    truth = predict(study.Variant())
    found = [study.errors(predict(study.Variant(study.inside(part))), truth) for part in parts]
    none = study.errors(predict(study.Variant()), truth)
    assert none == {"video_error": [0, 0, 0], "audio_error": [0, 0, 0]}
    for stream_error in none:
        all_products, mlps, first = (error[stream_error] for error in found)
        assert 0.2 > all_products[0] > mlps[0] > first[0] > 1e-3
        assert mlps[1] < mlps[0] < mlps[2]  # the best block, all, the worst


def test_an_error_is_relative_to_the_velocity():
    """Differences of 1 and 2 against velocities of 10 and 10, in two blocks of six."""
    levels = [(k, 0.5) for k in range(study.BLOCKS)]
    truth = {key: (torch.full((1, 4, 2), 10.0), torch.full((1, 3, 2), -10.0)) for key in levels}
    found = {key: (v + (key[0] == 1) + 2 * (key[0] == 5), a) for key, (v, a) in truth.items()}
    error = study.errors(found, truth)
    assert error["video_error"] == [pytest.approx((5 / 600) ** 0.5, rel=0.01), 0, 0.2]
    assert error["audio_error"] == [0, 0, 0]


def test_the_table_of_errors_ends_in_the_worst_block(monkeypatch):
    """Of [all blocks, best block, worst block], the first and the last; rows, then kinds."""
    monkeypatch.setattr(study.evaluate, "table", lambda rows: "")
    row = {"video_error": [0.2, 0.1, 0.3], "audio_error": [0.5, 0.4, 0.6]}
    lines = study.table({"fp8, 0-5 s": row}, {"all MLPs": row}).splitlines()[-2:]
    cells = "| 0.2000, 0.3000 | 0.5000, 0.6000 |"
    assert lines == [f"| fp8 {cells}", f"| all MLPs {cells}"]


def test_one_scale_serves_a_whole_tensor():
    """The control to scales by row: a row a million times larger costs the others' digits."""
    x = torch.randn(2, 3, 8)
    x[0, 1] *= 1e6
    values, scale = study.tensor_rounded(x)
    assert scale.shape == (2, 3, 1) and scale.unique().numel() == 1
    small = x[1]
    assert (values[1].float() * scale[1] - small).norm() > 0.05 * small.norm()
    right = fp8.rounded(x)
    assert (right.values[1].float() * right.scale[1] - small).norm() < 0.04 * small.norm()


def test_the_study_runs_from_start_to_end_and_goes_on(tmp_path, monkeypatch, capsys):
    """Two variants and a kind; killed after the first, it measures the second only."""
    monkeypatch.setattr(study, "ERROR_CLIPS", 2)
    monkeypatch.setattr(study, "kinds_of", lambda net: {"all MLPs": "mlp"})
    monkeypatch.setattr(study.evaluate, "RESAMPLES", 5)
    arguments = "--clips", 2, "--seconds", 5, "--only", "float32", "fp8", "--run", tmp_path
    arguments += "--out", tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(study.fp8, "quantise", mock.Mock(side_effect=[None, None, ValueError("end")]))
        status, out, err = run_here(study, arguments, monkeypatch, capsys)
    assert status == 2 and "float32, 0-5 s" in out, err
    status, out, err = run_here(study, arguments, monkeypatch, capsys)
    assert status == 0 and "{'float32, 0-5 s'" not in out, err
    written = files.json.loads((tmp_path / "x.json").read_text())
    assert set(written["result"]) == {"float32, 0-5 s", "fp8, 0-5 s"}
    wrong = {name: row["video_error"][0] for name, row in written["result"].items()}
    assert wrong["float32, 0-5 s"] == 0 < written["kinds"]["all MLPs"]["video_error"][0]
    assert written["kinds"]["all MLPs"]["video_error"][0] < wrong["fp8, 0-5 s"]
    assert "| fp8 |" in (tmp_path / "x.md").read_text() and (tmp_path / "x.png").exists()


# ---- on a GPU ----

needs_fp8 = functools.partial(fp8.check_device, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1152, 25, 1])
def test_the_gpu_multiplies_as_specified(rows):
    """Also a number of rows that is no multiple of 16; sums are a little narrower there."""
    needs_fp8()
    linear, x = nn.Linear(2048, 512, dtype=BF16), torch.randn(1, rows, 2048, dtype=BF16)
    with torch.no_grad():
        narrow = fp8.Fp8Linear(linear)
        right, found = narrow(x), narrow.cuda()(x.cuda()).cpu()
    assert (found - right).float().norm() < 5e-3 * right.float().norm()


@pytest.mark.gpu
def test_a_recorded_stream_in_fp8_is_close_to_the_eager_one():
    """Real CUDA graphs and streams, no wait while it runs."""
    needs_fp8()
    cfg = tiny(PAPER, num_sinks=2, video_width=64, audio_width=32)
    net = in_fp8(cfg).cuda()
    with torch.no_grad():
        features = torch.randn(1, 3, cfg.caption_width).to("cuda", BF16)
        texts = [net.project_text(features)] * 2
    plain = stream(net, texts, blocks=14)
    faster.run_beside(net, faster.SideStream())
    recorded = Counting(net, faster.cuda_recorder)
    for x, y in zip(plain, stream(recorded, texts, blocks=14), strict=True):
        assert (x - y).float().norm() < 0.05 * x.float().norm()
    assert recorded.counts["replayed"] > recorded.counts["recorded"] > 0
