"""The decoders of LTX-2: latents to frames and sound, block by block.

The three networks come from Hugging Face diffusers: the video VAE, the audio VAE and the vocoder.
`Decoder` runs them on a stream in overlapping chunks (film/decoders.py).
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from film.decoders import Chunk, ChunkedDecoder

PARTS = ("vae", "audio_vae", "vocoder")  # folders
STEREO, MEL_LATENT_BINS, MEL_BINS = 2, 16, 64


class Overlap(NamedTuple):
    """Context and look-ahead of each network, in its own inputs."""

    video: tuple[int, int] = (4, 0)  # latent frames
    audio: tuple[int, int] = (8, 0)  # latent frames
    vocoder: tuple[int, int] = (16, 4)  # mel frames


class Decoder:
    """Decodes the blocks of one stream of LTX-2's latents."""

    channels, scale = STEREO, 1  # audio channels; factor from decoded to written pixels

    def __init__(self, vae, audio_vae, vocoder, cfg, overlap=Overlap(), watch=lambda _, f: f):
        """Take the three networks; watch: `Stopwatch.watch`, to time each of them."""
        self.vae, self.audio_vae, self.vocoder, self.cfg = vae, audio_vae, vocoder.float(), cfg
        self.size = cfg.height, cfg.width
        self.sample_rate = vocoder.config.output_sampling_rate
        samples = self.sample_rate // cfg.mel_rate  # of one mel frame
        decode_video = watch("video decoder", self._decode_video)
        decode_audio = watch("audio decoder", self._decode_audio)
        synthesise = watch("vocoder", self._synthesise)
        self.video = ChunkedDecoder(decode_video, cfg.video_stride, 1, *overlap.video)
        self.mel = ChunkedDecoder(decode_audio, cfg.audio_stride, 1, *overlap.audio)
        self.sound = ChunkedDecoder(synthesise, samples, samples, *overlap.vocoder)

    @torch.inference_mode()
    def decode(self, block) -> Chunk:
        """Return the part of the stream that is final once this `rollout.Block` is known."""
        rows, columns = self.cfg.grid
        like = next(self.vae.parameters())
        video = block.video.to(like).unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 2, 3)
        audio = block.audio.to(like).unflatten(2, (-1, MEL_LATENT_BINS)).transpose(1, 2)
        frames, mel = self.video.add(video), self.mel.add(audio)
        return self._chunk(frames, mel, self.sound.add(mel) if mel is not None else None)

    @torch.inference_mode()
    def finish(self) -> Chunk:
        """Return the end of the stream, which waited for later latents."""
        frames, mel = self.video.finish(), self.mel.finish()
        parts = [self.sound.add(mel)] if mel is not None else []
        parts = [p for p in (*parts, self.sound.finish()) if p is not None]
        return self._chunk(frames, mel, torch.cat(parts, 2) if parts else None)

    def _chunk(self, frames, mel, samples):
        empty = next(self.vae.parameters()).new_zeros  # on the same device
        frames = empty(1, 3, 0, *self.size) if frames is None else frames / 2 + 0.5
        levels = empty(1, STEREO, 0, MEL_BINS) if mel is None else mel
        samples = empty(1, STEREO, 0) if samples is None else samples
        return Chunk(frames[0].transpose(0, 1).clamp(0, 1), levels[0].mean(0), samples[0])

    def _decode_video(self, latents):
        """(B, C, F, h, w) normalised latents -> (B, 3, P, H, W) in [-1, 1]."""
        return self.vae.decode(denormalised(latents, self.vae, (-1, 1, 1, 1)), return_dict=False)[0]

    def _decode_audio(self, latents):
        """(B, 8, F, 16) normalised latents -> (B, 2, M, 64) log-mel frames."""
        shape = (latents.shape[1], 1, latents.shape[3])  # statistics are by channel and bin
        return self.audio_vae.decode(denormalised(latents, self.audio_vae, shape), False)[0]

    def _synthesise(self, mel):
        """(B, 2, M, 64) -> (B, 2, samples)."""
        with no_tf32():
            return self.vocoder(mel.float())


def denormalised(latents, vae, shape):
    """Return latents in the decoder's units, by the mean and std stored with its weights."""
    # Trap: the decoders of the reference code do this themselves, the networks of diffusers do not
    mean, std = (x.view(shape).to(latents) for x in (vae.latents_mean, vae.latents_std))
    return latents * std + mean


@contextmanager
def no_tf32():
    """Compute float32 convolutions in full precision."""
    # Trap: on a GPU, cuDNN by default rounds the inputs of a convolution to 10 bits (TF32)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ---- the three networks ----


def decoder_classes() -> dict:
    """Return {folder: (class of diffusers, arguments that differ from the class's defaults)}."""
    try:
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    except (ImportError, RuntimeError):
        raise ValueError(
            "decoding at full size needs diffusers: pip install -r requirements-full.txt"
        ) from None
    return {
        "vae": (AutoencoderKLLTX2Video, {"decoder_causal": False}),
        "audio_vae": (AutoencoderKLLTX2Audio, {}),
        "vocoder": (LTX2Vocoder, {}),
    }


def load(folder, device="cpu", dtype=torch.bfloat16) -> list:
    """Load the three networks from a local folder in diffusers' format (PARTS)."""
    nets = []
    for name, (network_class, _) in decoder_classes().items():
        try:
            net = network_class.from_pretrained(
                folder,
                subfolder=name,
                dtype=torch.float32 if name == "vocoder" else dtype,  # see `Decoder`
                local_files_only=True,
            )
        except OSError:
            raise ValueError(f"{folder}: no decoders in diffusers' format ({name}/)") from None
        nets.append(without_encoder(net).to(device).eval().requires_grad_(False))
    return nets


def without_encoder(net):
    """Remove the encoder, which a stream does not need."""
    if hasattr(net, "encoder"):
        net.encoder = None  # 1.4 GB for video alone
    return net


def meta_decoders(dtype=torch.bfloat16) -> list:
    """Build the three networks at their published size on the meta device, without contents."""
    with torch.device("meta"):
        classes = decoder_classes().values()
        nets = [without_encoder(network_class(**options)) for network_class, options in classes]
    # a network of diffusers would warn if its own `to` changed the dtype
    return [torch.nn.Module.to(net, dtype).eval() for net in nets]


def random_weights(device="cpu", dtype=torch.bfloat16) -> list:
    """Build the three networks with random weights, to measure speed and memory."""
    nets = [net.to_empty(device=device).requires_grad_(False) for net in meta_decoders(dtype)]
    for tensor in (t for net in nets for t in net.state_dict().values()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    return nets


def channels_last(nets, layout=torch.channels_last_3d):
    """Store the convolution kernels of the video decoder with channels innermost, or as before."""
    # PyTorch then uses this layout for the inputs and outputs of its convolutions too. cuDNN works
    # in it on tensor cores, and otherwise converts to it and back.
    for p in nets[0].parameters():  # the other two networks are small
        if p.dim() == 5:  # a kernel (C', C, frames, rows, columns)
            p.data = p.data.contiguous(memory_format=layout)
