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

import gc
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from full_size import weights
from model import Captions
from plumbing import cli, files
from plumbing.stopwatch import Stopwatch

REQUIRED = "reading prompts at full size needs: pip install -r requirements-full.txt"
TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
TOKENS = 1024  # per prompt, whatever its length


class Features(NamedTuple):
    """Caption features of one prompt."""

    video: torch.Tensor  # (1, K, C_text)
    audio: torch.Tensor  # (1, K, C_text)


def check(prompt):
    """Raise ValueError for an empty prompt; any text will do."""
    if not prompt.strip():
        raise ValueError("the prompt says nothing; describe what is to be seen and heard")


def check_folder(folder, parts=TEXT_PARTS):
    """Raise ValueError unless LTX-2's folder has these parts, with whole files of weights."""
    places = [Path(folder, part) for part in parts]
    for place in places:
        if not place.is_dir():
            raise ValueError(
                f"{folder}: no {place.name}/; expected LTX-2's folder in diffusers' format"
            )
    for place in places:
        found = [*place.glob("*.safetensors.index.json"), *place.glob("*.safetensors")]
        if not found and place.name != "tokenizer":
            raise ValueError(f"{place}: no .safetensors file in it; download the folder again")
        for file in {shard for path in found for shard in weights.shards(path)}:
            weights.opened(file)  # the header tells how long the file must be


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
        states, mask, _, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device
        )
        side = pipeline.tokenizer.padding_side
        video, audio, _ = pipeline.connectors(states, mask, padding_side=side)
        found[prompt] = Features(video, audio)
    return found


def load_text_path(folder, dtype=torch.bfloat16):
    """Return diffusers' LTX2Pipeline with only the text path of a folder."""
    try:
        from diffusers import LTX2Pipeline
    except (ImportError, RuntimeError):
        raise ValueError(REQUIRED) from None
    absent = dict.fromkeys(("transformer", "vae", "audio_vae", "vocoder", "scheduler"))
    try:
        return LTX2Pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **absent)
    except OSError as error:
        raise ValueError(f"{folder}: no text encoder in diffusers' format ({error})") from None


def encode_and_free(folder, prompts, device="cpu", dtype=torch.bfloat16) -> tuple[dict, float]:
    """Load the text path, encode, free its memory.

    -> {prompt: Features}, and the seconds of encoding without loading
    """
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
    """Read a text file with one prompt per line."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error.reason})") from None
    if not lines:
        raise ValueError(f"{path}: no prompts; expected one a line")
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty; expected one prompt a line")
    return lines


def encode_to_folder(read, prompts, negative, folder):
    """Write the missing features of all prompts and of the negative prompt.

    read       function from a prompt to its Features
    negative   prompt that guidance moves away from; may be empty
    """
    index, contents = Path(folder, "prompts.json"), {"prompts": prompts, "negative": negative}
    if index.exists() and json.loads(index.read_text()) != contents:
        raise ValueError(f"{folder}: holds features of other prompts; remove it or name another")
    files.write_json(index, contents)
    missing = [(p, path) for p, path in _places(folder, contents) if not path.exists()]
    for prompt, path in tqdm(missing, unit="prompt", mininterval=5):
        made = {name: x[0].cpu().contiguous() for name, x in read(prompt)._asdict().items()}
        files.write_beside(path, lambda p: save_file(made, p, {"prompt": prompt}))


def _places(folder, contents):
    """Yield all prompts with the files of their features, the negative prompt first."""
    yield contents["negative"], Path(folder, "negative.safetensors")
    for number, prompt in enumerate(contents["prompts"]):
        yield prompt, Path(folder, f"{number:06}.safetensors")


class EncodedPrompts:
    """A folder that `encode_to_folder` wrote: prompts by index, read when needed."""

    def __init__(self, folder, cfg):
        index = Path(folder, "prompts.json")
        if not index.is_file():
            raise ValueError(f"{folder}: no prompts.json; full_size/text.py makes such a folder")
        contents = index.read_bytes()
        # trajectories remember the prompts that they were drawn from by this hash
        self.cfg, self.identity = cfg, hashlib.sha256(contents).hexdigest()[:12]
        try:
            places = list(_places(folder, json.loads(contents)))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{index}: not an index of prompts; full_size/text.py makes one"
            ) from None
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
        return Captions(*(tuple(map(torch.stack, zip(*x))) for x in (rows, empty)))

    def draw(self, n, generator):
        """Return n random prompts, as the toy draws them, without clips."""
        return None, self.captions(torch.randint(len(self), (n,), generator=generator))

    def _read(self, path):
        try:
            with safe_open(path, "pt") as f:
                pair = [f.get_tensor(name).float() for name in Features._fields]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole file of features ({error})") from None
        if pair[0].shape[-1] != self.cfg.caption_width:
            raise ValueError(
                f"{path}: features of width {pair[0].shape[-1]}; config {self.cfg.name} reads "
                f"{self.cfg.caption_width}"
            )
        return pair


def main():
    p = cli.parser(__doc__)
    p.add_argument("prompts", help="text file, one prompt a line")
    p.add_argument("--ltx2", required=True, help="LTX-2's folder in diffusers' format")
    p.add_argument("--negative", default="", help="what guidance moves away from")
    p.add_argument("--out", default="features", help="folder to write, or to go on with")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = p.parse_args()
    prompts, device = read_lines(args.prompts), cli.find_device(args.device)
    check_folder(args.ltx2)
    pipeline = load_text_path(args.ltx2).to(device)

    def read(prompt):
        return encode(pipeline, [prompt], device)[prompt]

    encode_to_folder(read, prompts, args.negative, args.out)
    print(f"{len(prompts)} prompts in {args.out}; next: torchrun dmd.py --prompts {args.out} ...")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
