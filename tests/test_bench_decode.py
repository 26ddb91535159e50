"""The benchmark of chunked decoding measures what it says."""

import json

import pytest
import torch
from helpers import random_decoders, run_here

import config
from benchmarks import bench_decode, bench_generate, page
from full_size import decoders


def test_errors_are_told_apart_by_place():
    """A difference of a tenth in the frames beside a border, of a hundredth elsewhere."""
    whole = torch.ones(12, 3, 2, 2)
    near = bench_decode.near_borders(12, [0.5], 12, 2 / 12)
    assert near.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    pieces = whole + torch.where(near, 0.1, -0.01)[:, None, None, None]
    errors = bench_decode.relative_errors(pieces, whole, near)
    assert errors == {"border": pytest.approx(0.1), "elsewhere": pytest.approx(0.01)}


def test_a_click_is_a_step_of_the_difference_at_a_seam():
    """Not a step of the sound itself, not one elsewhere, and not a slow drift."""
    whole = torch.linspace(-1, 1, 100)[:, None].repeat(1, 2)
    whole[50:] += 0.5  # the sound's own
    seams, typical = [0, 30, 60, 100], float(whole.diff(dim=0).square().mean().sqrt())
    drift = whole + torch.linspace(0, 0.01, 100)[:, None]
    assert bench_decode.largest_step(drift, whole, seams) < 0.01
    clicking = whole.clone()
    clicking[60:, 1] += 0.2
    assert bench_decode.largest_step(clicking, whole, seams) == pytest.approx(0.2 / typical)
    assert bench_decode.largest_step(clicking, whole, [30]) < 1e-6


def test_it_runs_and_prints_its_table(tmp_path, monkeypatch, capsys):
    """`--device cpu --tiny`, two overlaps: a look-ahead latent waits for one more block and lowers
    the error at the borders; nothing else is written."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_decode, "LATENTS", [(4, 0), (4, 1)])
    monkeypatch.setattr(bench_decode, "MEL_FRAMES", [(16, 4)])
    monkeypatch.setattr(page, "fill_in", None)
    args = "--device", "cpu", "--tiny", "--seconds", 3, "--out", tmp_path / "x.json"
    args += "--block-seconds", 2
    status, out, err = run_here(bench_decode, args, monkeypatch, capsys)
    assert status == 0, err
    written = json.loads((tmp_path / "x.json").read_text())
    plain, ahead, sound = written["rows"]
    assert (plain["blocks_before_first_second"], ahead["blocks_before_first_second"]) == (2, 3)
    assert plain["border"] > 1.1 * ahead["border"] and plain["seconds_later"] == 0
    decoding = ahead["decode_seconds"] - plain["decode_seconds"]
    assert ahead["seconds_later"] == pytest.approx(2 + decoding)  # passes of a block take 2 s
    assert sound["seam"] < 0.1 and plain["seam"] is None
    assert out.count("| video |") == 2 and "%" in out
    assert bench_decode.picture_table(written["video_decoder"]) in out
    times = bench_decode.table(bench_decode.without_errors([plain, sound]))
    assert "%" not in times and times.count("| – | – | – |") == 2 and "2 blocks" in times


def test_each_video_decoder_is_timed_with_kernels_in_its_layout(monkeypatch):
    """Ours with channels innermost, diffusers with channels outermost; context and new latents."""
    pytest.importorskip("diffusers")
    cfg = bench_generate.tiny(config.FULL)
    vae, *others = random_decoders()
    decoder = decoders.Decoder(decoders.channels_innermost(vae), *others, cfg)
    kernel, seen = vae.decoder.conv_in.conv.weight, []

    def record(x):
        seen.append((x.shape[2], kernel.is_contiguous()))

    monkeypatch.setattr(decoders, "decode_video", lambda _, x, new: record(x))
    monkeypatch.setattr(vae, "decode", record)
    times = bench_decode.picture_seconds(decoder, torch.device("cpu"), (2, 1), calls=1)
    assert list(times) == ["diffusers, context 2", "context 2", "context 1"]
    assert seen == [(5, False), (4, False), (5, True)]


def test_the_error_of_a_context(monkeypatch):
    """A decoder that looks 2 latents back and 1 ahead: context 2 is enough, the future is not."""

    def decode(_, latents):
        t = torch.arange(latents.shape[2])
        seen = [latents[:, :1, (t + i).clamp(0, len(t) - 1)] for i in (-2, -1, 0, 1)]
        return sum(seen).repeat_interleave(8, 2)[:, :, 7:]

    monkeypatch.setattr(bench_decode.decoders, "decode_video", decode)
    errors = bench_decode.context_errors(None, (1, 2, 3))
    assert errors[2] == errors[3] == (0, 0) and errors[1][0] > errors[1][1] > 0
    assert errors["no look-ahead"][0] == 0 < errors["no look-ahead"][1]
    table = bench_decode.context_table({1: (0.5, 0.25), "no look-ahead": (1, 0.125)})
    assert "| error | context 1 | no look-ahead |" in table
    assert "| first frame | 50.0% | 100.0% |" in table and "| the block | 25.0% | 12.5% |" in table


def test_frame_errors_are_relative():
    """To the root mean square of all frames; the first of two frames is off by half."""
    expected = torch.full((1, 3, 2, 4, 4), 2.0)
    found = expected.clone()
    found[:, :, 0] += 1
    assert bench_decode.frame_errors(found, expected) == pytest.approx((0.5, 0.125**0.5))


def test_a_table_is_filled_in_between_its_marks(tmp_path):
    """Everything else of the file stays; without marks it is refused."""
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- x -->\nnot measured\n<!-- x -->\nafter\n")
    page.fill_in("x", "| 1 |", path)
    page.fill_in("x", "| 2 |", path)
    assert path.read_text() == "before\n<!-- x -->\n| 2 |\n<!-- x -->\nafter\n"
    with pytest.raises(ValueError, match="expected the mark <!-- y --> twice, found it 0 times"):
        page.fill_in("y", "", path)
    path.write_text("<!-- x -->\n" * 3)
    with pytest.raises(ValueError, match="twice, found it 3 times"):
        page.fill_in("x", "", path)
