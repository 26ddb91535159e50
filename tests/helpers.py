"""Helpers of the tests: tiny models with random weights, so that no agreement is trivial."""

import contextlib
import functools
import io
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import config
from masks import block_span, clip_span
from model import OmniTransformer
from plumbing import cli, files

ROOT = Path(__file__).parent.parent
PAPER = replace(config.TOY, name="paper")
MERGED = replace(config.TOY, name="merged", prefix_video_frames=4, prefix_audio_frames=26)
SMALL = replace(config.TOY, num_layers=1, num_heads=2, video_width=16, audio_width=16)
LAYOUTS = [replace(cfg, num_sinks=S) for cfg in (PAPER, MERGED) for S in (0, 16)]

# prompts that something between the command line and a picture might take for its own
NASTY = {
    "dollars": "a coin worth $5 falls beside a $10 bill",
    "a formula": r"price tag reads $\frac{1$ and $_{$ flickers",
    "other scripts": "海浪拍打岩石 שלום עולם नमस्ते 🌊",
    "two lines": "first line\nsecond line\u2028third",
    "controls": "tab\tand bell\a and NUL\0 and escape \x1b[31m",
    "not UTF-8": "caf\udce9 at night",
    "markup": "</script><script>alert(1)</script><!-- <b>&amp;</b>",
    "placeholders": "an @film@ about @data@ in @video@ @nothing@",
    "no letter": "\U0010ffff\ufeff\u202e",
    "long": "waves break on the rocks and gulls cry, " * 100,
    "one long word": "w" * 5000,
}


def layout_name(cfg):
    """A readable test id, e.g. 4+26,S=16."""
    return f"{cfg.prefix_video_frames}+{cfg.prefix_audio_frames},S={cfg.num_sinks}"


def tiny(cfg, **changes):
    """Return a config with the same blocks, 2 layers, small widths, and 2 x 2 tokens per frame."""
    # The video width is not a multiple of 6, so one channel pair is not rotated (full size: two).
    small = dict(num_layers=2, num_heads=2, video_width=32, audio_width=16)
    channels = dict(video_channels=5, audio_channels=3, height=16, width=16)
    return replace(cfg, **{**small, **channels, **changes})


def random_model(cfg, dtype=torch.float64, seed=0):
    """A model whose every parameter is random: no gate is closed, no matrix is zero."""
    torch.manual_seed(seed)
    model = OmniTransformer(cfg).to(dtype)
    for name, p in model.named_parameters():
        near_one = name.endswith(("q_norm", "k_norm"))
        scale = p.shape[-1] ** -0.5 if name.endswith(".weight") else 0.3
        torch.nn.init.normal_(p, mean=1.0 if near_one else 0.0, std=scale)
    return model.requires_grad_(False)


def save_small_student(path):
    """Write a random student of the config SMALL, in float32."""
    files.save_weights(path, random_model(SMALL, torch.float32).state_dict(), SMALL, {})
    return path


def random_text(model, cfg, length=3, clips=1):
    """Keys and values of random captions."""
    like = model.video.proj_in.weight
    features = torch.randn(clips, length, cfg.caption_width, dtype=like.dtype)  # on the CPU
    return model.project_text(features.to(like.device))


def random_clip(cfg, blocks, clips=1, dtype=torch.float64):
    """Random latents of a whole clip: (B, T_v, C_v) and (B, F_a, C_a)."""
    span = clip_span(blocks, cfg)
    video_tokens = len(span.video) * cfg.tokens_per_frame
    return (
        torch.randn(clips, video_tokens, cfg.video_channels, dtype=dtype),
        torch.randn(clips, len(span.audio), cfg.audio_channels, dtype=dtype),
    )


def block_rows(k, cfg):
    """Slices of block k's tokens in a clip's video and audio, sinks not counted."""
    span = block_span(k, cfg)
    video = slice(span.video.start * cfg.tokens_per_frame, span.video.stop * cfg.tokens_per_frame)
    return video, slice(span.audio.start, span.audio.stop)


def assert_same(one, other):
    """Check that float64 tensors of order 1 are equal up to rounding."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def differ(one, other):
    return all((a - b).abs().max() > 1e-3 for a, b in zip(one, other, strict=True))


def run_here(script, arguments, monkeypatch, capsys):
    """Run a module's command line in this process: -> exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    status = 0
    try:
        with cli.one_line_errors():
            script.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@functools.cache
def help_of(script) -> str:
    """Return the --help text of a file of the project."""
    out, argv = io.StringIO(), [str(ROOT / script), "--help"]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out):
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return out.getvalue()


def options_of(script) -> set[str]:
    """Return the options that a script lists in its --help, below its text."""
    return set(
        re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(script).split("\noptions:")[-1], re.M)
    )


def random_decoders():
    """Return tiny decoders of the classes of LTX-2, with random weights."""
    from benchmarks import bench_decode  # here, because few tests need it

    return bench_decode.tiny_decoders()


def save_text_path(folder, width):
    """Write a folder like LTX-2's, with a tiny random Gemma 3 whose tokens are letters.

    Like the published index, its index also names the other parts of LTX-2; they are missing.
    """
    from diffusers import LTX2Pipeline
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = dict(num_attention_heads=2, num_hidden_layers=2, hidden_size=width, intermediate_size=8)
    text = dict(heads, vocab_size=128, num_key_value_heads=1, head_dim=8)
    vision = dict(heads, image_size=28, patch_size=14)
    gemma = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    letters = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=chr(0), unk_token="?")
    sizes = dict(num_attention_heads=2, attention_head_dim=width // 2, num_layers=1)
    sizes = {f"{s}_connector_{n}": size for s in ("video", "audio") for n, size in sizes.items()}
    connectors = LTX2TextConnectors(width, 3, rope_type="split", **sizes)
    others = dict.fromkeys(("transformer", "vae", "audio_vae", "vocoder", "scheduler"))
    encoder = Gemma3ForConditionalGeneration(gemma)
    pipeline = LTX2Pipeline(
        text_encoder=encoder, tokenizer=tokenizer, connectors=connectors, **others
    )
    pipeline.save_pretrained(folder)
    index = Path(folder, "model_index.json")
    named = {part: ["diffusers", "ModelMixin"] for part in others}
    index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
