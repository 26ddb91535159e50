"""Say in one line, for an error, what a file is that is not the expected weight file.

There are tables for the first bytes of a file and for the names of its tensors. Each row says what
the file is and what to do.
"""

import re
import shlex
from pathlib import Path

DOWNLOAD = "download it again"
CONVERT = "python -m full_size.weights FILE.pt --out X.safetensors"
LTX_2 = "this project implements LTX-2 (19B), Lightricks/LTX-2 on the Hub"

BYTES = [  # first bytes, what the file is, what to do
    (b"version https://git-lfs", "a pointer of Git LFS, without the file it points to",
     "fetch the file: git lfs pull, or hf download"),
    (b"PK\3\4", "a pickle of PyTorch, which may run code when it is opened, or another archive",
     f"take a .safetensors file; a generator of the full size can be converted: {CONVERT}"),
    (b"\x80", "a pickle, which may run code when it is opened", "take a .safetensors file"),
    (b"GGUF", "quantised weights in the format GGUF", "take the .safetensors file in bfloat16"),
    (b"\0\5\x16\7", "a note that macOS keeps beside a file (._NAME)", "name the file itself"),
    (b"{", "JSON, not weights", "an index of shards must be called NAME.safetensors.index.json"),
    (b"<", "a web page", f"the download went wrong; {DOWNLOAD}"),
    (b"\x1f\x8b", "a compressed archive", "unpack it first"),
    (b"\0" * 64, "only zeros so far, a download that has hardly begun", DOWNLOAD),
]  # fmt: skip

# Each row: a pattern in the names of tensors, one name a line; what they are; what to do. None of
# CHANGED and OTHERS fits a whole model of this project or of LTX-2.
CHANGED = [  # almost what is expected
    (r"lora_|\.lora\.|\.hada_|\.lokr_|\.dora_", "a LoRA, a change to other weights",
     "merge it into its base model with the program that made it"),
    (r"_scale$|\.scale_(weight|input)$|scaled_fp8|\.q(weight|zeros)$|\.g_idx$|\.scales?$|absmax|"
     r"quant_(state|map)|\.SCB$|comfy_quant|weight_(packed|format|zero_point)|\.(w|s)scales",
     "quantised weights", "take the file in bfloat16"),
    (r"to_gate_logits|prompt_(adaln|scale_shift)|keyframes_abs_pos|bwe_generator|"
     r"(video|audio)_(text_proj_in|aggregate_embed)", "weights of LTX-2.3 or later", LTX_2),
    (r"\A(?![\s\S]*audio)[\s\S]*transformer_blocks\.\d+\.attn2\.to_k",
     "a model of video without sound", LTX_2),
]  # fmt: skip
OTHERS = [  # something else
    (r"^(audio|video)_(first|later)\.basis", "the toy's codec", "name a model of the toy"),
    (r"embed_tokens|lm_head|self_attn\.q_proj", "a text encoder", "it belongs in --ltx2"),
    (r"^(up|down)_blocks|^(en|de)coder\.(mid|up|down|conv)", "a VAE", "it belongs in --ltx2"),
    (r"^(ups|upsamplers|conv_pre|resnets)\.", "a vocoder", "it belongs in --ltx2"),
    (r"^(video|audio)_connector\.", "text connectors", "they belong in --ltx2"),
    (r"\.optimiser\.\d", "the saved state of a training", "name the file that it wrote at its end"),
    (r"\Aaudio\ntokens\nvideo\Z", "trajectories of stage II", "name a model"),
    (r"\Aaudio\nvideo\Z", "features of one prompt", "name their folder in --prompts"),
]  # fmt: skip
TOY = r"^layers\.\d+\.(video|audio)\.", "a model of the toy", "it needs --config toy"
LTX = (r"transformer_blocks\.\d+\.audio_attn1\.", "a transformer of LTX-2",
       "it needs --config full or released")  # fmt: skip


def described(path) -> str:
    """Say what a path that is no safetensors file is, by its first bytes, and what to do.

    >>> described(__file__)
    'not a whole safetensors file; download it again'
    """
    if Path(path).is_dir():
        inside = sorted(str(file) for file in Path(path).glob("[!.]*.safetensors"))
        return f"a folder; name a file: {', '.join(inside[:3]) or 'none in it'}"
    if not Path(path).is_file():
        return "no such file"
    try:
        with open(path, "rb") as f:
            head = f.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not head:
        return f"an empty file; {DOWNLOAD}"
    # A safetensors file begins with the length of its header, which may look like anything.
    is_safetensors = int.from_bytes(head[:8], "little") < 10**9 and head[8:9] == b"{"
    for start, what, advice in () if is_safetensors else BYTES:
        if head.startswith(start):
            return f"{what}; {advice.replace('FILE.pt', shlex.quote(str(path)))}"
    return f"not a whole safetensors file; {DOWNLOAD}"


def named(names, rows) -> str | None:
    """Say what tensors with these names are, by the first row that fits; None if none does.

    >>> named(["a.to_q.lora_A.weight"], CHANGED)[:58]
    "a LoRA, a change to other weights ('a.to_q.lora_A.weight')"
    """
    lines = "\n".join(sorted(names))
    for pattern, what, advice in rows:
        if match := re.search(pattern, lines, re.M):
            # the name in which the match ends
            key = lines[lines.rfind("\n", 0, match.end()) + 1 :].split("\n", 1)[0]
            return f"{what} ({key!r}); {advice}"
    return None
