"""Prompts to caption features at full size, by Gemma 3.

LTX-2 reads prompts through Gemma 3 12B. All 49 hidden states of every token are normalised together
and projected to one vector. Two small transformers ("connectors"), one for video and one for audio,
then put learned registers where a prompt has no tokens. A prompt therefore has 1024 tokens whatever
its length, and needs no text mask.

The encoder has two thirds of the transformer's size, and no block of the stream needs it again. All
prompts of a stream are encoded before it starts, and the encoder is freed. A training reads
thousands of prompts. They are encoded once, into a folder with one file per prompt (15.7 MB):

    python -m full_size.text prompts.txt --ltx2 LTX-2 --out features --device cuda

prompts.txt has one prompt per line. A killed run continues where it was. The text path is the
published pipeline of Hugging Face diffusers.
"""

import contextlib
import gc
import hashlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from full_size import hub, parts
from model import Captions
from plumbing import cli, files, texts
from plumbing.stopwatch import Stopwatch

TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
SWITCHES = {  # of the connectors, as published
    "rope_type": "split",
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "connector_rope_base_seq_len": 4096,
    "causal_temporal_positioning": False,
    "per_modality_projections": False,
    "video_gated_attn": False,
    "audio_gated_attn": False,
}
TOKENS = 1024  # per prompt, whatever its length


class Features(NamedTuple):
    """Caption features of one prompt."""

    video: torch.Tensor  # (1, K, C_text)
    audio: torch.Tensor  # (1, K, C_text)


def check(prompt):
    """Raise ValueError for an empty prompt, or one that is not UTF-8."""
    if not prompt.strip():
        raise ValueError("the prompt says nothing; describe what is to be seen and heard")
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # Python's stand-ins for undecodable bytes
        raise ValueError(f"prompt {prompt[:60]!r}: not in UTF-8; write it in UTF-8")


def networks() -> dict:
    """Return what the two networks of the text path must be."""
    try:
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
        from transformers import Gemma3ForConditionalGeneration
    except (ImportError, RuntimeError):
        raise ValueError(parts.REQUIRED) from None
    return {
        # lm_head predicts the next word; LTX-2 reads hidden states only
        "text_encoder": parts.Part(Gemma3ForConditionalGeneration, {}, ("lm_head.",)),
        "connectors": parts.Part(LTX2TextConnectors, SWITCHES),
    }


def check_folder(folder, width=None):
    """Raise ValueError unless LTX-2's folder has a whole text path.

    width   channels that the transformer reads; None: any number
    """
    parts.check_folders(folder, TEXT_PARTS)
    encoder, connectors = parts.check_parts(folder, networks()).values()
    made = encoder.text_config.num_hidden_layers + 1, encoder.text_config.hidden_size
    read = connectors.text_proj_in_factor, connectors.caption_channels
    if made != read:
        raise ValueError(
            f"{folder}: text_encoder/ makes {made[0]} states of width {made[1]}, connectors/ read "
            f"{read[0]} of width {read[1]}; expected both as in Lightricks/LTX-2"
        )
    if width not in (None, read[1]):
        raise ValueError(f"{folder}: makes features of width {read[1]}, the config reads {width}")


def random_features(prompts, cfg, device="cpu", dtype=torch.bfloat16) -> dict[str, Features]:
    """Return random features, to measure speed and memory."""
    shape = 1, TOKENS, cfg.caption_width

    def draw():
        return torch.randn(shape, device=device, dtype=dtype)

    return {prompt: Features(draw(), draw()) for prompt in prompts}


@torch.inference_mode()
def encode(pipeline, prompts, device) -> dict[str, Features]:
    """Return the features of every different prompt.

    pipeline   diffusers' LTX2Pipeline with tokenizer, text_encoder and connectors
    """
    found = {}
    for prompt in dict.fromkeys(prompts):  # one at a time: padding must not depend on the others
        if end := unread_end(pipeline.tokenizer, prompt):
            print(
                f"{prompt[:40]!r}...: only {TOKENS} tokens of a prompt are read, so its end is "
                f"not: {end[:60]!r}{'...' if len(end) > 60 else ''}",
                file=sys.stderr,
            )
        states, mask, _, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device
        )
        side = pipeline.tokenizer.padding_side
        video, audio, _ = pipeline.connectors(states, mask, padding_side=side)
        found[prompt] = Features(video.cpu(), audio.cpu())  # a long list would fill a GPU
    return found


def unread_end(tokenizer, prompt) -> str:
    """Return the words of a prompt that no longer fit into TOKENS tokens."""
    return tokenizer.decode(tokenizer(prompt.strip()).input_ids[TOKENS:]).strip()


def load_text_path(folder, dtype=torch.bfloat16):
    """Return diffusers' LTX2Pipeline with only the text path of a folder."""
    loaded = {
        name: parts.load_part(Path(folder, name), part, dtype) for name, part in networks().items()
    }
    from diffusers import LTX2Pipeline
    from transformers import AutoTokenizer

    place = Path(folder, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # its library raises anything
        raise ValueError(f"{place}: no tokenizer ({error}); download it again") from None
    absent = dict.fromkeys(("transformer", "vae", "audio_vae", "vocoder", "scheduler"))
    return LTX2Pipeline(tokenizer=tokenizer, **loaded, **absent)


def encode_and_free(folder, prompts, device="cpu", dtype=torch.bfloat16) -> tuple[dict, float]:
    """Return {prompt: Features}, and the seconds of encoding without loading; free the memory."""
    pipeline = load_text_path(folder, dtype).to(device)
    watch = Stopwatch(torch.device(device))
    features = encode(pipeline, prompts, device)
    seconds = watch.lap()
    del pipeline
    gc.collect()  # the encoder may be part of a reference cycle
    torch.cuda.empty_cache()  # the transformer needs this memory; does nothing without a GPU
    return features, seconds


# ---- a folder of features, to train on ----


def read_lines(path) -> list[str]:
    """Read a text file with one prompt per line; empty lines at its end do not count."""
    # Trap: str.splitlines would also split at a form feed or U+2028, which a prompt may hold.
    lines = re.split(r"\r\n|\r|\n", texts.read_text(path).rstrip())
    lines = [line.strip("\ufeff \t") for line in lines]  # U+FEFF: two files in one
    if lines == [""]:
        raise ValueError(f"{path}: no prompts; expected one a line")
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty; expected one prompt a line")
    return lines


def encode_to_folder(read, prompts, negative, folder):
    """Write the missing features of all prompts and of the negative prompt.

    A folder grows: prompts may be added after those that it has.

    read       function from a prompt to its Features
    negative   prompt that guidance moves away from; may be empty
    """
    index = Path(folder, "prompts.json")
    if index.exists():
        _check_grows(folder, *_contents(index), prompts, negative)
    files.write_json(index, {"prompts": prompts, "negative": negative})
    places = _places(folder, prompts, negative)
    missing = [(prompt, path) for prompt, path in places if not path.exists()]
    for prompt, path in tqdm(missing, unit="prompt", mininterval=5):
        made = {name: x[0].cpu().contiguous() for name, x in read(prompt)._asdict().items()}
        files.write_beside(path, lambda p: save_file(made, p, {"prompt": prompt}))


def _check_grows(folder, old, old_negative, new, new_negative):
    """Raise ValueError unless the new prompts of a folder begin with the old ones."""
    # None: the new list has already ended
    pairs = zip([old_negative, *old], [new_negative, *new, *[None] * len(old)])
    for number, (before, now) in enumerate(pairs):
        if before != now:
            place = f"prompt {number}" if number else "the negative prompt"
            is_now = "missing" if now is None else f"{now[:40]!r}"
            raise ValueError(
                f"{folder}: holds features of other prompts: {place} was {before[:40]!r}, "
                f"is now {is_now}; add prompts at the end, or name another folder"
            )


def _contents(index) -> tuple[list, str]:
    """Return the prompts and the negative prompt that an index names."""
    with contextlib.suppress(ValueError, KeyError):
        found = texts.read_json(index)
        prompts, negative = found["prompts"], found["negative"]
        if isinstance(prompts, list) and all(isinstance(x, str) for x in [*prompts, negative]):
            return prompts, negative
    raise ValueError(f"{index}: not an index of prompts; full_size/text.py makes one")


def _places(folder, prompts, negative):
    """Yield all prompts with the files of their features, the negative prompt first."""
    yield negative, Path(folder, "negative.safetensors")
    for number, prompt in enumerate(prompts):
        yield prompt, Path(folder, f"{number:06}.safetensors")


class EncodedPrompts:
    """A folder that `encode_to_folder` wrote; features are read when they are needed."""

    def __init__(self, folder, cfg):
        index = Path(folder, "prompts.json")
        if not index.is_file():
            raise ValueError(f"{folder}: no prompts.json; full_size/text.py makes such a folder")
        places = list(_places(folder, *_contents(index)))
        # trajectories remember the prompts that they were drawn from by this hash
        self.cfg, self.identity = cfg, hashlib.sha256(index.read_bytes()).hexdigest()[:12]
        if missing := [path.name for _, path in places if not path.is_file()]:
            raise ValueError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(places)}); run "
                f"full_size/text.py again, it goes on where it was"
            )
        (_, negative), *self.places = places
        self.negative = self._read(negative)

    def __len__(self):
        return len(self.places)

    def numbers(self, seeds) -> torch.Tensor:
        """Return (B,) indices of prompts for B seeds, round-robin."""
        return torch.tensor([seed % len(self) for seed in seeds])

    def captions(self, numbers) -> Captions:
        """Return the captions of (B,) indices of prompts."""
        rows = [self._read(self.places[n][1]) for n in numbers.tolist()]
        empty = [self.negative] * len(rows)
        # of each: a pair of video (B, K, C_text) and audio (B, K, C_text)
        return Captions(*(tuple(map(torch.stack, zip(*x))) for x in (rows, empty)))

    def draw(self, n, generator):
        """Return (None, captions of n random prompts); the toy has clips in place of None."""
        return None, self.captions(torch.randint(len(self), (n,), generator=generator))

    def _read(self, path):
        with files.opened(path) as f:
            if set(f.keys()) != set(Features._fields):
                raise ValueError(f"{path}: not a file of features; full_size/text.py makes one")
            pair = [f.get_tensor(name).float() for name in Features._fields]
        if pair[0].shape[-1] != self.cfg.caption_width:
            raise ValueError(
                f"{path}: features of width {pair[0].shape[-1]}; config {self.cfg.name} reads "
                f"{self.cfg.caption_width}"
            )
        return pair


def main():
    p = cli.parser(__doc__)
    p.add_argument("prompts", help="text file, one prompt a line")
    p.add_argument("--ltx2", required=True, help=hub.ABOUT_LTX2)
    p.add_argument("--negative", default="", help="what guidance moves away from")
    p.add_argument("--out", default="features", help="folder to write, or to go on with")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = p.parse_args()
    prompts, device = read_lines(args.prompts), cli.find_device(args.device)
    folder = hub.local(args.ltx2, hub.wanted_parts(*TEXT_PARTS))
    check_folder(folder)
    pipeline = load_text_path(folder).to(device)

    def read(prompt):
        return encode(pipeline, [prompt], device)[prompt]

    encode_to_folder(read, prompts, args.negative, args.out)
    print(f"{len(prompts)} prompts in {args.out}; next: torchrun dmd.py --prompts {args.out} ...")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
