"""Where weights, prompts and decoders of the full size come from: files of LTX-2 and its students.

`StreamSource` has what generate.py needs, `TrainingSource` what the stages need; toy/source.py has
the same for the toy. Text encoder, transformer and decoders do not fit a GPU at once. They are
loaded one after the other, and the text encoder is freed before the transformer comes. Everything
that can be rejected is rejected before any weights are read.

The weights "random" replace every file, to measure speed and memory.
"""

import gc
from pathlib import Path
from typing import NamedTuple

import torch

import config
import model
from film.picture import read_picture
from full_size import decoders, fp8, hub, memory, parts, sharding, text, weights


class StreamSource:
    """A student, the features of all prompts, and the decoders of LTX-2."""

    def __init__(self, requests):
        """Load everything that `generate.Request`s need.

        They differ only in prompts, seed, length and image.
        The plan of memory is for the longest request, with the prompts of the one that has most.
        """
        request = max(requests, key=lambda request: request.seconds)
        is_random = request.weights == "random"
        prompts = [*dict.fromkeys(cue.prompt for each in requests for cue in each.cues)]
        device, dtype = request.device, request.dtype
        if request.in_fp8:
            fp8.check_device(device)
        images = [*dict.fromkeys(each.image for each in requests if each.image)]
        if not is_random:  # headers only; complain before anything slow begins
            names = text.TEXT_PARTS + decoders.PARTS
            folder = hub.local(request.ltx2, hub.wanted_parts(*names))
            parts.check_folders(folder, names)
            request = request._replace(ltx2=folder)
            text.check_folder(request.ltx2, request.cfg.caption_width)
            decoders.check_folder(request.ltx2)
            if images:
                parts.check_part(Path(folder, "vae"), decoders.encoder())
            source = weights.Source(request.weights, request.cfg)
        most = max((each.cues for each in requests), key=len)
        memory.check_stream(request._replace(cues=most))
        memory.check_features(len(prompts), request)
        if images:
            memory.check_encoder(request)
        if is_random:
            self.encode = lambda words: text.random_features([words], request.cfg, "cpu", dtype)
            self.features = text.random_features(prompts, request.cfg, "cpu", dtype)
            self.text_seconds = 0.0
            shape = 1, request.cfg.tokens_per_frame, request.cfg.video_channels
            self.pictures = {image: torch.randn(shape) for image in images}
            self.net = weights.random_weights(request.cfg, device, dtype, request.in_fp8)
            self.decoders = decoders.random_weights(device, dtype)
        else:
            self.encode = lambda words: encode_beside(request.ltx2, words, device, dtype)
            self.features, seconds = text.encode_and_free(request.ltx2, prompts, device, dtype)
            self.text_seconds = seconds / len(requests)  # the mean of a film
            self.pictures = encode_pictures(request, images)
            self.net = source.load(device, dtype, request.in_fp8)
            self.decoders = decoders.load(request.ltx2, device, dtype)
        self.cfg, self.overlap = self.net.cfg, decoders.Overlap(video=request.video_overlap)

    def read(self, words):
        """Return the features of a prompt; a new one is encoded now, while the stream runs."""
        if words not in self.features:
            text.check(words)
            self.features |= self.encode(words)
        return self.features[words]

    def picture(self, image):
        """Return the tokens (1, rows * columns, 128) of an image file; None without one."""
        return self.pictures[image] if image else None

    def decoder(self, watch, overlap=None):
        """Make a decoder for one stream; watch: `Stopwatch.watch`."""
        return decoders.Decoder(*self.decoders, self.cfg, overlap or self.overlap, watch)


def encode_beside(folder, words, device, dtype) -> dict:
    """Encode a prompt beside a loaded stream: load the text encoder, read, free it again."""
    # On a GPU with room it takes as long as at the start. On the CPU it takes longer and no memory
    # of the GPU. From another thread, the stream waits for its computation only. Not measured.
    place = memory.place_for_text(folder, device)
    return text.encode_and_free(folder, [words], place, dtype)[0]


def encode_pictures(request, images) -> dict:
    """Return the tokens of image files, on the CPU; the encoder is there for this moment only."""
    if not images:
        return {}
    vae = decoders.load_encoder(request.ltx2, request.device, request.dtype)
    size = request.cfg.height, request.cfg.width
    found = {image: decoders.encode_picture(vae, read_picture(image, *size)) for image in images}
    found = {image: tokens.cpu() for image, tokens in found.items()}
    del vae
    gc.collect()  # as after the text encoder
    torch.cuda.empty_cache()
    return found


class FileWeights(NamedTuple):
    """Weights that a training may start at: checked, but not read yet."""

    source: weights.Source

    @property
    def cfg(self):
        return self.source.cfg

    @property
    def weights_id(self):
        return self.source.fingerprint()

    def load(self, learns):
        """Read a sharded net."""
        # On the meta device it takes no memory. Each process then reads only its shards.
        net = model.build(self.cfg, device="meta").to(torch.float32 if learns else torch.bfloat16)
        net.requires_grad_(learns)
        if learns:
            sharding.passes_apart(sharding.checkpoint_layers(net))
        sharding.shard(net, torch.bfloat16)
        sharding.fill(net, self.source.tensors())
        return net


class TrainingSource:
    """Files of LTX-2 and of students, and prompts that were encoded before."""

    is_toy = False
    write, dtype = staticmethod(weights.save), torch.bfloat16

    def __init__(self, cfg, prompts):
        """cfg: of the student; prompts: a folder made by full_size/text.py."""
        self.cfg, self.prompts = cfg, text.EncodedPrompts(prompts, cfg)

    def open(self, path, cfg=None, seed=0) -> FileWeights:
        """Check a file; cfg: the config of a student, None: that of LTX-2."""
        return FileWeights(weights.Source(path, cfg or config.LTX2))
