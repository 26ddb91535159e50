"""Where weights, prompts and decoders of the full size come from: files of LTX-2 and its students.

`StreamSource` has what generate.py needs, `TrainingSource` what the stages need; toy/source.py has
the same for the toy. Text encoder, transformer and decoders do not fit a GPU at once. They are
loaded one after the other, and the text encoder is freed before the transformer comes. Everything
that can be rejected is rejected before any weights are read.

The weights "random" replace every file, to measure speed and memory.
"""

from typing import NamedTuple

import torch

import config
import model
from full_size import decoders, fp8, hub, memory, parts, sharding, text, weights


class StreamSource:
    """A student, the features of all prompts of a stream, and the decoders of LTX-2."""

    def __init__(self, request):
        """Load everything that a `generate.Request` needs."""
        is_random = request.weights == "random"
        prompts = [cue.prompt for cue in request.cues]
        device, dtype = request.device, request.dtype
        if request.in_fp8:
            fp8.check_device(device)
        if not is_random:  # headers only; complain before anything slow begins
            names = text.TEXT_PARTS + decoders.PARTS
            folder = hub.local(request.ltx2, hub.wanted_parts(*names))
            parts.check_folders(folder, names)
            request = request._replace(ltx2=folder)
            text.check_folder(request.ltx2, request.cfg.caption_width)
            decoders.check_folder(request.ltx2)
            source = weights.Source(request.weights, request.cfg)
        memory.check_stream(request)
        if is_random:
            self.features = text.random_features(prompts, request.cfg, device, dtype)
            self.text_seconds = 0.0
            self.net = weights.random_weights(request.cfg, device, dtype, request.in_fp8)
            self.decoders = decoders.random_weights(device, dtype)
        else:
            self.features, self.text_seconds = text.encode_and_free(
                request.ltx2, prompts, device, dtype
            )
            self.net = source.load(device, dtype, request.in_fp8)
            self.decoders = decoders.load(request.ltx2, device, dtype)
        self.cfg, self.overlap = self.net.cfg, decoders.Overlap(video=request.video_overlap)

    def read(self, words):
        """Return the features of a prompt of this stream."""
        return self.features[words]

    def decoder(self, watch, overlap=None):
        """Make a decoder for one stream; watch: `Stopwatch.watch`."""
        return decoders.Decoder(*self.decoders, self.cfg, overlap or self.overlap, watch)


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
