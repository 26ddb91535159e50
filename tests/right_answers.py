"""Right answers that differ from the modules: each must get full points.

RIGHT is written as in wrong_answers.py, without a phrase.
"""

from marking import patches

RIGHT = {
    "masks": patches("""
blocks counted from the end of the prefix
-     later = 1 + (frame - prefix) // step
-     return later * (frame >= prefix)
+     is_later = frame >= prefix
+     return is_later * ((frame - prefix + step) // step)
a loop over frames
-     later = 1 + (frame - prefix) // step
-     return later * (frame >= prefix)
+     if torch.is_tensor(frame):
+         return torch.tensor([block_of_frame(int(f), prefix, step) for f in frame])
+     return 0 if frame < prefix else 1 + (frame - prefix) // step
tokens by a new axis
- return frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)
+ return frame_blocks(blocks, cfg)[0][:, None].expand(-1, cfg.tokens_per_frame).reshape(-1)
sinks by padding
-     return torch.cat([per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame])
+     return torch.nn.functional.pad(per_frame, (cfg.num_sinks * sinks, 0))
the rule by ages
-     q, k = query_blocks[:, None], key_blocks[None, :]
-     allowed = k <= q
-     if window is not None:
-         allowed &= (k >= q - window) | ((k == 0) & pinned)
-     return allowed
+     age = query_blocks.unsqueeze(1) - key_blocks
+     allowed = age >= 0
+     if window is None:
+         return allowed
+     near = age <= window
+     if pinned:
+         near = torch.logical_or(near, key_blocks == 0)
+     return torch.logical_and(allowed, near)
the rule by loops
-     q, k = query_blocks[:, None], key_blocks[None, :]
-     allowed = k <= q
-     if window is not None:
-         allowed &= (k >= q - window) | ((k == 0) & pinned)
-     return allowed
+     oldest = float("inf") if window is None else window
+     return torch.tensor([
+         [k <= q and (q - k <= oldest or (pinned and k == 0)) for k in key_blocks.tolist()]
+         for q in query_blocks.tolist()
+     ])
"""),
    "rope": patches("""
middles by a list
-     f = torch.arange(frames.start, frames.stop, dtype=torch.float64)
-     start = torch.where(f == 0, 0.0, stride * f - stride + 1)  # frame 0 covers one input frame
-     return (start + stride * f + 1) / 2
+     middles = [stride * f - stride / 2 + 1 if f else 0.5 for f in frames]
+     return torch.tensor(middles, dtype=torch.float64)
frequencies by exp and log
-     exponents = torch.linspace(0, 1, width // (2 * axes), dtype=dtype, device="cpu")
-     grid = torch.pow(cfg.rope_theta, exponents) * math.pi / 2
+     count = width // (2 * axes)
+     exponents = torch.arange(count, dtype=dtype) / (count - 1)
+     grid = math.pi / 2 * torch.exp(exponents * math.log(cfg.rope_theta))
rotation of complex numbers
-     if rope.layout == "split":
-         a, b = x.chunk(2, dim=-1)
-         return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
-     a, b = x.unflatten(-1, (half, 2)).unbind(-1)
-     return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
+     wide = torch.promote_types(x.dtype, torch.float32)
+     turn = torch.complex(cos.to(wide), sin.to(wide))
+     pairs = x.unflatten(-1, (2, half)).transpose(-1, -2) if rope.layout == "split" else (
+         x.unflatten(-1, (half, 2)))
+     y = torch.view_as_real(torch.view_as_complex(pairs.to(wide).contiguous()) * turn)
+     y = y.transpose(-1, -2) if rope.layout == "split" else y
+     return y.flatten(-2).to(x.dtype)
rotation into an empty tensor
-     if rope.layout == "split":
-         a, b = x.chunk(2, dim=-1)
-         return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
-     a, b = x.unflatten(-1, (half, 2)).unbind(-1)
-     return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
+     first = slice(0, half) if rope.layout == "split" else slice(0, None, 2)
+     second = slice(half, None) if rope.layout == "split" else slice(1, None, 2)
+     y = torch.empty_like(x)
+     y[..., first] = x[..., first] * cos - x[..., second] * sin
+     y[..., second] = x[..., second] * cos + x[..., first] * sin
+     return y
video angles by a loop over frames
-     t, y, x = torch.meshgrid(video_times(frames, cfg), *pixels, indexing="ij")
-     scaled = (t / cfg.rope_max_seconds, y / cfg.rope_max_pixels, x / cfg.rope_max_pixels)
-     positions = torch.stack([2 * p.flatten() - 1 for p in scaled], dim=1)
-     return pair_angles(positions, cfg.video_width, cfg)
+     y, x = (2 * p / cfg.rope_max_pixels - 1 for p in pixels)
+     space = torch.cartesian_prod(y, x)
+     made = []
+     for t in 2 * video_times(frames, cfg) / cfg.rope_max_seconds - 1:
+         made.append(torch.cat([t.expand(len(space), 1), space], 1))
+     return pair_angles(torch.cat(made), cfg.video_width, cfg)
a shift as the difference of two angles
-     return pair_angles(torch.full((1, 1), shift, dtype=torch.float64), cfg.audio_width, cfg)
+     times = torch.tensor([0.0, seconds], dtype=torch.float64)
+     start, end = time_angles(times, cfg)
+     return (end - start)[None]
"""),
    "sink_tokens": patches("""
repeated sinks, cast before
- torch.cat([self.tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
+ torch.hstack([self.tokens.to(x).repeat(x.shape[0], 1, 1), x])
split instead of a slice
- return x[:, self.tokens.shape[1] :]
+ count = self.tokens.shape[1]
+         return x.split([count, x.shape[1] - count], dim=1)[1]
levels repeated in place
- torch.cat([sigma[:, :1].expand(-1, self.tokens.shape[1]), sigma], dim=1)
+ torch.cat([sigma[:, 0, None].repeat_interleave(self.tokens.shape[1], 1), sigma], 1)
levels by an index
-         return torch.cat([sigma[:, :1].expand(-1, self.tokens.shape[1]), sigma], dim=1)
+         index = torch.arange(-self.tokens.shape[1], sigma.shape[1]).clamp(min=0)
+         return sigma[:, index]
times from a list
-         frames = torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
-         return rope.time_angles((cfg.audio_stride * frames - 1) / cfg.mel_rate, cfg)
+         times = [(cfg.audio_stride * -s - 1) / cfg.mel_rate for s in range(cfg.num_sinks, 0, -1)]
+         return rope.time_angles(torch.tensor(times, dtype=torch.float64), cfg)
"""),
    "kv_cache": patches("""
slots counted by a sum
-         return self.prefix_tokens + min(self.block, self.ring_blocks) * self.block_tokens
+         return sum([self.prefix_tokens] + [self.block_tokens] * min(self.block, self.ring_blocks))
a slice without a start
-             return slice(0, self.prefix_tokens)
-         start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens
-         return slice(start, start + self.block_tokens)
+             return slice(self.prefix_tokens)
+         place = divmod(self.block - 1, self.ring_blocks)[1]
+         end = self.prefix_tokens + (place + 1) * self.block_tokens
+         return slice(end - self.block_tokens, end)
the history is detached by hand
-         with torch.no_grad():
-             self.k[:, here], self.v[:, here] = k, v
-         if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
+         for buffer, new in ((self.k, k), (self.v, v)):
+             buffer[:, here] = new.detach()
+         if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v)):
a list, always a copy
-         if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
+         if True:
the block in its place, not at the end
-             return self.after_history(k, self.k), self.after_history(v, self.v)
+             both = []
+             for buffer, new in ((self.k, k), (self.v, v)):
+                 x = buffer.clone()
+                 x[:, here] = new
+                 both.append(x[:, self.first_visible : self.num_filled])
+             return both
rotated key by key
-         self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)
+         for t in range(self.prefix_tokens):
+             self.k[:, t] = rope.rotate(self.unmoved_prefix_k[:, t : t + 1], by)[:, 0]
attention by einsum
-     keys, values = cache.append(heads.keys(k), heads.split(v))
-     return attend_keys(heads.queries(q), keys, values)
+     keys, values = cache.append(heads.keys(k), heads.split(v))
+     scores = torch.einsum("bqhd,bkhd->bhqk", heads.queries(q), keys) / keys.shape[-1] ** 0.5
+     return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)
an unpinned prefix stays where it is
-         if self.num_evicted:
+         if self.pinned and self.num_evicted > 0:
moved layer by layer
-             for site in SITES:
-                 self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
+             for layer in self.layers:
+                 for site, cache in layer.items():
+                     cache.move_prefix(self._prefix_rotation(site, cache.k))
"""),
    "model": patches("""
a step from clean towards noise
-     sigma = sigma[..., None].to(x0.dtype)
-     return (1 - sigma) * x0 + sigma * noise
+     return x0 + sigma.to(x0.dtype).unsqueeze(2) * (noise - x0)
lerp
-     sigma = sigma[..., None].to(x0.dtype)
-     return (1 - sigma) * x0 + sigma * noise
+     return torch.lerp(x0, noise.to(x0.dtype), sigma.unsqueeze(-1).to(x0.dtype))
computed in float64
-     wide = torch.promote_types(x.dtype, torch.float32)
-     return (x.to(wide) - sigma[..., None].to(wide) * v.to(wide)).to(x.dtype)
+     wide = torch.float64 if x.dtype == torch.float64 else torch.float32
+     return torch.sub(x.to(wide), sigma.unsqueeze(-1).to(wide) * v.to(wide)).type_as(x)
always a level for every token
- return sigma if levels == 1 else sigma.repeat_interleave(x.shape[1] // levels, dim=1)
+ return sigma[:, torch.arange(x.shape[1]) * levels // x.shape[1]]
rates by a power
-     rates = torch.exp(-math.log(10000) * torch.arange(half, device=tau.device) / half)
-     angles = tau[..., None].float() * rates
+     rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
+     angles = torch.einsum("bt,r->btr", tau.float(), rates.float())
rows one by one
-         shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
-         y = modulated(norm(x, self.eps), scale, shift)
-         return x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+         rows = [self.table[i] + modulation.main[:, :, i] for i in range(3)]
+         shift, scale, gate = (r.repeat_interleave(x.shape[1] // r.shape[1], 1) for r in rows)
+         y = norm(x, self.eps) * (1 + scale) + shift
+         return x + gate * self.self_attn(y, y, positions, positions, attend)
attention step by step
-         return x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+         own = self.self_attn
+         q, k, v = own.project(y, y)
+         return x.add(gated(own.to_out(attend(q, k, v, own.heads(positions, positions))), gate))
audio first, in one loop
-         v = video.attend_self(v, m_v, ropes["video_self"], at["video_self"])
-         a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
-         v = video.attend_captions(v, captions_v, mask)
-         a = audio.attend_captions(a, captions_a, mask)
-         q_v, c_v = video.cross_inputs(v, m_v)  # both streams before either attends to the other
-         q_a, c_a = audio.cross_inputs(a, m_a)
-         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
-         a = audio.attend_other(a, q_a, c_v, m_a, r_a, r_v, at["v2a"])
-         del q_v, c_v, q_a, c_a  # as large as the streams: free them before the MLPs
-         return video.mlp(v, m_v), audio.mlp(a, m_a)
+         made = []
+         for half, x, m, captions, site in (
+             (audio, a, m_a, captions_a, "audio_self"), (video, v, m_v, captions_v, "video_self")
+         ):
+             x = half.attend_self(x, m, ropes[site], at[site])
+             x = half.attend_captions(x, captions, mask)
+             made.append((x, *half.cross_inputs(x, m)))
+         (a, q_a, c_a), (v, q_v, c_v) = made
+         a = audio.attend_other(a, q_a, c_v, m_a, r_a, r_v, at["v2a"])
+         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
+         return [video.mlp(v, m_v), audio.mlp(a, m_a)]
"""),
    "rollout": patches("""
a clip from columns
-     _, video, audio = zip(*blocks)
-     return torch.cat(video, 1), torch.cat(audio, 1)
+     blocks = sorted(blocks, key=lambda block: block.index)
+     return [torch.cat([getattr(b, name) for b in blocks], dim=1) for name in ("video", "audio")]
a block by narrow
-     video = video[:, span.video.start * per_frame : span.video.stop * per_frame]
-     return video, audio[:, span.audio.start : span.audio.stop]
+     start, count = span.video.start * per_frame, len(span.video) * per_frame
+     return [video.narrow(1, start, count), audio.narrow(1, span.audio.start, len(span.audio))]
the refresh with a level for every token
-     zero = x0[0].new_zeros(len(x0[0]))
-     net(*x0, zero, zero, text, span, view)
+     video, audio = (x.detach() for x in x0)
+     levels = (torch.zeros(x.shape[:2], dtype=x.dtype) for x in (video, audio))
+     with torch.no_grad():
+         return net(video, audio, *levels, text, span, view)
levels in pairs, noise by hand
-     for i in range(last + 1):
-         sigma = like.new_full((len(like),), sigmas[i])  # (B,), one level for both streams
-         with torch.set_grad_enabled(in_training and i == last):
-             x0 = model.predict_x0(net, *x, sigma, sigma, text, span, view)
-         if i < last:
-             noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
-             lower = like.new_full((1, 1), sigmas[i + 1])
-             x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
-     return x0
+     for i, (high, low) in enumerate(zip(sigmas[: last + 1], sigmas[1:])):
+         sigma = torch.full((len(like), 1), high, dtype=like.dtype)
+         if i == last:
+             return model.predict_x0(net, *x, sigma, sigma, text, span, view)
+         with torch.no_grad():
+             x0 = model.predict_x0(net, *x, sigma, sigma, text, span, view)
+             noise = [torch.randn(c.shape, generator=generator).to(c) for c in x0]
+             x = tuple((1 - low) * c + low * n for c, n in zip(x0, noise))
audio noise first
-             noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
+             noise = [model.noise_like(c, generator) for c in x0[::-1]][::-1]
an extra refresh at the end
-         if k + 1 < num_blocks:
+         if True:
the refresh after a return for the last block
-         yield Block(k, *x0)  # the caller decodes and writes while the loop waits here
-         if k + 1 < num_blocks:  # no block reads the keys of the last one
-             refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
-             view.next_block()
+         yield Block(index=k, video=x0[0], audio=x0[1])
+         if k == num_blocks - 1:
+             return
+         clean = x0 if history is None else block_of(history, k, cfg)
+         refresh(net, [x.detach() for x in clean], text_at(k), span, view)
+         view.next_block()
texts and noise before the first block
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         if k == 0:
+             texts = [text_at(j) for j in range(num_blocks)]
+             noises = [
+                 model.draw_noise(batch, block_span(j, cfg), cfg, generator, None, like.dtype)
+                 for j in range(num_blocks)
+             ]
+         text, noise = texts[k], noises[k]
"""),
    "self_forcing": patches("""
exit steps in two branches, the clip from a list
-     draws = 1 if share_exit else blocks
-     exits = [dmd.draw_exit_step(sigmas, generator) for _ in range(draws)]
+     if share_exit:
+         exits = (dmd.draw_exit_step(sigmas, generator),)
+     else:
+         exits = tuple(dmd.draw_exit_step(sigmas, generator) for _ in range(blocks))
the captions in a function of their own
-     text = net.project_text(*captions.features)
+     def text_at(k, kept=[]):
+         if not kept:
+             kept.append(net.project_text(*captions.features))
+         return kept[0]
+
+     text = text_at(0)
the history before the rollout
-         history=history(clips) if history else None,
-     )  # fmt: skip
-     return whole_clip(rolled)
+         history=None if history is None else tuple(history(clips)),
+     )
+     return whole_clip([block for block in rolled])
"""),
    "decoders": patches("""
outputs by max
- return 0 if inputs <= 0 else self.first + self.stride * (inputs - 1)
+ return max(inputs > 0, 0) * (self.first + self.stride * (max(inputs, 1) - 1))
nothing to do: an early end
-         out = self.decode(x)[:, :, low:high] if high > low else None
-         self.done = ready
-         self.kept = x[:, :, max(0, self.done - self.context - start) :]
-         return out
+         self.done, self.kept = ready, x[:, :, max(0, ready - self.context - start) :].clone()
+         if high <= low:
+             return None
+         return self.decode(x).narrow(2, low, high - low)
only the inputs that are needed
-         out = self.decode(x)[:, :, low:high] if high > low else None
+         out = None
+         if high > low:
+             out = torch.stack(list(self.decode(x).unbind(2))[low:high], dim=2)
a plain loop over clips
-         out = self.decode(x)[:, :, low:high] if high > low else None
+         clips = x.split(1) if high > low else []
+         out = torch.cat([self.decode(clip)[:, :, low:high] for clip in clips]) if clips else None
the last levels first
-         heard = torch.cat([self.levels, levels])
-         samples = self.synthesise(heard, self.mel_frames - len(self.levels), self.cfg)
-         self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
+         before, self.levels = self.levels, levels[-1:].clone()
+         start = 0 if block.index == 0 else self.mel_frames - 1
+         samples = self.synthesise(torch.vstack([before, levels]), start, self.cfg)
+         self.mel_frames += levels.shape[0]
only the first clip is decoded
-         frames = self.decode_video(block.video.float().cpu(), first)[0]
-         levels = self.decode_audio(block.audio.float().cpu(), first)[0]
+         latents = (x[:1].to("cpu", torch.float32) for x in (block.video, block.audio))
+         both = zip((self.decode_video, self.decode_audio), latents)
+         frames, levels = (decode(x, first).squeeze(0) for decode, x in both)
"""),
    "generate": patches(r"""
a test for bad numbers
-     if not 0 < seconds <= MOST_SECONDS:
-         raise ValueError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
-     return seconds
+     if 0 < seconds <= MOST_SECONDS:
+         return seconds
+     raise ValueError(f"{text!r} is not a number of seconds above 0 and up to a day")
the error of float
-     try:
-         seconds = float(text)
-     except ValueError:
-         raise ValueError(f"--seconds {text}: expected a whole number of seconds") from None
+     seconds = float(text)
cues without a regular expression
-         check(words)
-         cues.append(Cue(float(start or 0), words.strip()))
-     cues.sort()
+         start, colon, words = text.partition(":")
+         digits = start.strip().replace(".", "", 1)
+         is_cue = colon and digits.isdecimal() and (not words or words[0].isspace())
+         start, words = (start, words.strip()) if is_cue else (0, text.strip())
+         check(words)
+         cues.append(Cue(float(start), words))
+     cues = sorted(cues, key=lambda cue: cue.seconds)
texts before the first block
-             texts[:-1] = [None] * (len(texts) - 1)  # at full size, each has 1.2 GB
-         return texts[index]
+         return texts[index]
+
+     for k in range(blocks):
+         text_at(k)
no gradient by no_grad
- torch.inference_mode()(rollout)
+ torch.no_grad()(rollout)
texts in a dictionary
-     like, texts = next(net.parameters()), []
-
-     def text_at(k):
-         index = prompt_at(block_interval(k, cfg)[0], cues)
-         while len(texts) <= index:  # each prompt is projected once, when its time has come
-             features = read(cues[len(texts)].prompt)
-             texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
-             texts[:-1] = [None] * (len(texts) - 1)  # at full size, each has 1.2 GB
-         return texts[index]
+     texts, dtype = {}, next(net.parameters()).dtype
+
+     def text_at(k):
+         start, _ = block_interval(k, cfg)
+         index = prompt_at(start, cues)
+         if index not in texts:
+             features = [f.to(dtype).repeat(batch, 1, 1) for f in read(cues[index].prompt)]
+             texts[index] = net.project_text(*features)
+         return texts[index]
one caption for all clips
- f.to(like).expand(batch, -1, -1) for f in features
+ f.to(like) for f in features
"""),
    "dmd": patches("""
a step by rand
- int(torch.randint(len(sigmas) - 1, (), generator=generator))
+ min(int(torch.rand(1, generator=generator).item() * (len(sigmas) - 1)), len(sigmas) - 2)
a product with the detached gradient
- 0.5 * (x - (x - gradient).detach()).square().mean()
+ (x * gradient.detach()).sum() / x.numel()
mse_loss
- 0.5 * (x - (x - gradient).detach()).square().mean()
+ torch.nn.functional.mse_loss(x, (x - gradient).detach()) / 2
a clamped divisor, clips flattened
-     distance = (x - real).abs().mean((1, 2), keepdim=True)
-     return (fake - real) / (distance + 1e-8)
+     distance = torch.abs(x - real).flatten(1).mean(1)
+     return -(real - fake) / distance.clamp(min=1e-8)[:, None, None]
everything in one loop
-         noise = [model.noise_like(x, generator) for x in clips]
-         noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clips, noise)]
-         r = teacher.Guided(real, captions, guidance).x0(*noisy, sigma, span, MaskedView())
-         f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
-     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
+         s = sigma.view(-1, 1, 1)
+         noise = [torch.randn(x.shape, generator=generator) for x in clips[::-1]][::-1]
+         noisy = [(1 - s) * x + s * n for x, n in zip(clips, noise)]
+         scores = teacher.Guided(fake, captions), teacher.Guided(real, captions, guidance)
+         f, r = (score.x0(*noisy, sigma, span, MaskedView({})) for score in scores)
+         gradients = [dmd_gradient(*triple) for triple in zip(clips, r, f)]
+     video, audio = (surrogate(x, g) for x, g in zip(clips, gradients))
+     return video, audio
one function for both kinds of steps
-         g = trainer.generator(seed, step)
-         clips, captions = draw(batch, g)
-         made = make(generator.model, clips, captions, g)
-         video, audio = dmd_losses(made, captions, real, critic.model, guidance, g)
-         norm = generator.update(video + audio, step)
-         for _ in range(CRITIC_UPDATES):
-             clips, captions = draw(batch, g)
-             with torch.no_grad():  # clips of the updated generator; only the critic learns here
-                 made = make(generator.model, clips, captions, g)
-             critic_video, critic_audio = critic_losses(critic.model, made, captions, g)
-             critic.update(critic_video + critic_audio, step)
-         losses = {"video": video, "audio": audio}
-         return {**losses, "critic v": critic_video, "critic a": critic_audio, "norm": norm}
+         g = trainer.generator(generator.recipe.seed, step)
+
+         def new():
+             examples, captions = draw(generator.recipe.batch, g)
+             return make(generator.model, examples, captions, g), captions
+
+         made, captions = new()
+         scores = dict(real=real, fake=critic.model, guidance=guidance)
+         losses = dmd_losses(made, captions, **scores, generator=g)
+         norm = generator.update(sum(losses), step)
+         for _ in range(CRITIC_UPDATES):
+             with torch.no_grad():
+                 made, captions = new()
+             made = [x.detach() for x in made]
+             both = critic_losses(critic.model, made, captions, g)
+             critic.update(both[0] + both[1], step)
+         values = dict(zip(("video", "audio"), (x.item() for x in losses)))
+         return values | {"critic": float(sum(both).detach()), "norm": norm}
"""),
    "ode_regression": patches("""
fine levels by linspace
-     fine = [sigmas[0]]
-     for high, low in zip(sigmas, sigmas[1:]):
-         fine += [high + (low - high) * (i + 1) / steps_between for i in range(steps_between)]
-     return fine
+     pairs = zip(sigmas[:-1], sigmas[1:])
+     fine = [torch.linspace(*pair, steps_between + 1, dtype=torch.float64)[:-1] for pair in pairs]
+     return (*torch.cat(fine).tolist(), sigmas[-1])
masked_fill and one process
-     return (x * mask).sum() / processes.averaged(mask.sum()).clamp(min=1)
+     kept = x.masked_fill(~mask, 0.0)
+     return kept.sum() / max(1, int(mask.sum()))
a selection
-     return (x * mask).sum() / processes.averaged(mask.sum()).clamp(min=1)
+     return x[mask].mean() if mask.any() else x.sum() * 0
states by index
-     index = levels.view(len(levels), 1, -1, *[1] * (trajectory.dim() - 3))
-     return trajectory.gather(1, index.expand(-1, -1, -1, *trajectory.shape[3:])).squeeze(1)
+     clips, frames = torch.arange(levels.shape[0])[:, None], torch.arange(levels.shape[1])
+     return trajectory[clips, levels, frames]
states by loops
-     index = levels.view(len(levels), 1, -1, *[1] * (trajectory.dim() - 3))
-     return trajectory.gather(1, index.expand(-1, -1, -1, *trajectory.shape[3:])).squeeze(1)
+     return torch.stack([
+         torch.stack([clip[level, f] for f, level in enumerate(row.tolist())])
+         for clip, row in zip(trajectory, levels)
+     ])
clean drawn first, by where
-     noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)
-     is_clean = torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
-     return noisy.masked_fill(is_clean, levels - 1)
+     is_clean = torch.rand(batch, blocks, generator=generator) >= 1 - CLEAN_SHARE
+     noisy = (torch.rand(batch, blocks, generator=generator) * (levels - 1)).long()
+     return torch.where(is_clean, levels - 1, noisy)
levels for every token
-     sigma_v, sigma_a = sigma_of_level[level_v], sigma_of_level[level_a]
+     per_frame = net.cfg.tokens_per_frame
+     sigma_v = sigma_of_level[level_v].repeat_interleave(per_frame, 1)
+     sigma_a = sigma_of_level[level_a]
the clean level by its index
-     return [
-         masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
-         for p, end, s in zip(x0, ends, (sigma_v, sigma_a))
-     ]
+     losses = []
+     for p, end, level in zip(x0, ends, (level_v, level_a)):
+         is_noisy = (level < len(sigmas) - 1).repeat_interleave(p.shape[1] // level.shape[1], 1)
+         losses.append(masked_mean(((p - end) ** 2).mean(2), is_noisy))
+     return tuple(losses)
"""),
}

# Bodies that follow the third hint of each function word by word: its code stands in them.
FOLLOWED = {
    "masks": {
        "block_of_frame": "return (1 + (frame - prefix) // step) * (frame >= prefix)",
        "video_token_blocks": """
            return frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)
        """,
        "audio_token_blocks": """
            per_frame = frame_blocks(blocks, cfg)[1]
            return torch.cat([per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame])
        """,
        "may_attend": """
            q, k = query_blocks[:, None], key_blocks[None, :]
            allowed = k <= q
            if window is not None:
                allowed = allowed & ((k >= q - window) | ((k == 0) & pinned))
            return allowed
        """,
        "four_masks": """
            video, audio = video_token_blocks(blocks, cfg), audio_token_blocks(blocks, cfg, sinks)
            return {
                "video_self": may_attend(video, video, window),
                "audio_self": may_attend(audio, audio, window),
                "a2v": may_attend(video, audio, window),
                "v2a": may_attend(audio, video, window),
            }
        """,
    },
    "rope": {
        "_midpoints": """
            f = torch.arange(frames.start, frames.stop).double()
            start = torch.where(f == 0, 0.0, stride * f - stride + 1)
            return (start + stride * f + 1) / 2
        """,
        "frequencies": """
            dtype = torch.float64 if cfg.rope_float64 else torch.float32
            exponents = torch.linspace(0, 1, width // (2 * axes), dtype=dtype)
            grid = torch.pow(cfg.rope_theta, exponents) * math.pi / 2
            return grid.to(torch.float32).double().to(device)
        """,
        "rotate": """
            H, half = x.shape[2], x.shape[3] // 2
            cos, sin = rope.cos.view(-1, H, half), rope.sin.view(-1, H, half)
            is_split = rope.layout == "split"
            a, b = x.chunk(2, -1) if is_split else x.unflatten(-1, (half, 2)).unbind(-1)
            y = a * cos - b * sin, b * cos + a * sin
            return torch.cat(y, -1) if is_split else torch.stack(y, -1).flatten(-2)
        """,
        "video_angles": """
            times = video_times(frames, cfg)
            y, x = ((torch.arange(n).double() + 0.5) * cfg.pixel_stride for n in cfg.grid)
            t, y, x = (p.flatten() for p in torch.meshgrid(times, y, x, indexing="ij"))
            most = cfg.rope_max_seconds, cfg.rope_max_pixels, cfg.rope_max_pixels
            positions = torch.stack([2 * p / m - 1 for p, m in zip((t, y, x), most)], dim=1)
            return pair_angles(positions, cfg.video_width, cfg)
        """,
        "shift_angles": """
            shift = 2 * seconds / cfg.rope_max_seconds
            if site == "video_self":
                moved = torch.tensor([[shift, 0.0, 0.0]], dtype=torch.float64)
                return pair_angles(moved, cfg.video_width, cfg)
            moved = torch.tensor([[shift]], dtype=torch.float64)
            return pair_angles(moved, cfg.audio_width, cfg)
        """,
    },
    "sink_tokens": {
        "SinkTokens.prepend": """
            return torch.cat([self.tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        """,
        "SinkTokens.remove": "return x[:, self.tokens.shape[1] :]",
        "SinkTokens.prepend_sigma": """
            if sigma.shape[1] == 1:
                return sigma
            return torch.cat([sigma[:, :1].expand(-1, self.tokens.shape[1]), sigma], dim=1)
        """,
        "sink_angles": """
            if cfg.sink_positions == "identity":
                return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
            frames = torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
            return rope.time_angles((cfg.audio_stride * frames - 1) / cfg.mel_rate, cfg)
        """,
    },
    "kv_cache": {
        "RollingCache.num_filled": """
            return self.prefix_tokens + min(self.block, self.ring_blocks) * self.block_tokens
        """,
        "RollingCache.slots": """
            if self.block == 0:
                return slice(0, self.prefix_tokens)
            start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens
            return slice(start, start + self.block_tokens)
        """,
        "RollingCache.append": """
            here = self.checked_slots(k)
            with torch.no_grad():
                self.k[:, here], self.v[:, here] = k, v
            if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
                return self.after_history(k, self.k), self.after_history(v, self.v)
            return self.visible()
        """,
        "RollingCache.move_prefix": """
            if self.unmoved_prefix_k is None:
                self.unmoved_prefix_k = self.k[:, : self.prefix_tokens].clone()
            self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)
        """,
        "cache_append_attention": """
            keys, values = cache.append(heads.keys(k), heads.split(v))
            return attention(heads.queries(q), keys, values)
        """,
        "CachedView.next_block": """
            self.block += 1
            for cache in self.caches:
                cache.next_block()
                if not self.pinned and self.block > self.window:
                    cache.first_visible = cache.prefix_tokens
            if self.num_evicted:
                for site in SITES:
                    self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
        """,
    },
    "model": {
        "add_noise": """
            sigma = sigma[..., None].to(x0.dtype)
            return (1 - sigma) * x0 + sigma * noise
        """,
        "to_x0": """
            wide = torch.promote_types(x.dtype, torch.float32)
            x0 = x.to(wide) - sigma[..., None].to(wide) * v.to(wide)
            return x0.to(x.dtype)
        """,
        "per_token": """
            sigma = sigma.view(len(sigma), -1)
            levels = sigma.shape[1]
            if levels == 1:
                return sigma
            return sigma.repeat_interleave(x.shape[1] // levels, dim=1)
        """,
        "timestep_embedding": """
            half = width // 2
            rates = torch.exp(-math.log(10000) * torch.arange(half) / half)
            angles = tau[..., None].float() * rates
            return torch.cat([angles.cos(), angles.sin()], -1)
        """,
        "HalfLayer.attend_self": """
            shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
            y = modulated(norm(x, self.eps), scale, shift)
            return x + gated(self.self_attn(y, y, positions, positions, attend), gate)
        """,
        "Layer.forward": """
            video, audio = self.video, self.audio
            at = {site: functools.partial(view.attend, self.index, site) for site in SITES}
            v = video.attend_self(v, m_v, ropes["video_self"], at["video_self"])
            a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
            v = video.attend_captions(v, captions_v, mask)
            a = audio.attend_captions(a, captions_a, mask)
            q_v, c_v = video.cross_inputs(v, m_v)
            q_a, c_a = audio.cross_inputs(a, m_a)
            v = video.attend_other(
                v, q_v, c_a, m_v, ropes["video_cross"], ropes["audio_cross"], at["a2v"])
            a = audio.attend_other(
                a, q_a, c_v, m_a, ropes["audio_cross"], ropes["video_cross"], at["v2a"])
            return video.mlp(v, m_v), audio.mlp(a, m_a)
        """,
    },
    "rollout": {
        "whole_clip": """
            _, video, audio = zip(*blocks)
            return torch.cat(video, 1), torch.cat(audio, 1)
        """,
        "block_of": """
            video, audio = clip
            span = block_span(k, cfg)
            n = cfg.tokens_per_frame
            return (
                video[:, span.video.start * n : span.video.stop * n],
                audio[:, span.audio.start : span.audio.stop],
            )
        """,
        "refresh": """
            zero = x0[0].new_zeros(len(x0[0]))
            net(*x0, zero, zero, text, span, view)
        """,
        "denoise": """
            last = len(sigmas) - 2 if exit_step is None else exit_step
            was_enabled = torch.is_grad_enabled()
            for i in range(last + 1):
                sigma = x[0].new_full((len(x[0]),), sigmas[i])
                with torch.set_grad_enabled(was_enabled and i == last):
                    x0 = model.predict_x0(net, *x, sigma, sigma, text, span, view)
                if i < last:
                    noise = model.draw_noise(
                        len(x[0]), span, net.cfg, generator, x[0].device, x[0].dtype)
                    lower = x[0].new_full((1, 1), sigmas[i + 1])
                    x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
            return x0
        """,
        "rollout": """
            cfg, like = net.cfg, next(net.parameters())
            view = view or CachedView(cfg, num_blocks)
            for k in range(num_blocks):
                span, text = block_span(k, cfg), text_at(k)
                noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
                exit_step = exit_steps[k] if exit_steps else None
                x0 = denoise(net, noise, sigmas, text_at(k), span, view, generator, exit_step)
                yield Block(k, *x0)
                if k + 1 < num_blocks:
                    clean = block_of(history, k, cfg) if history else x0
                    refresh(net, clean, text, span, view)
                    view.next_block()
        """,
    },
    "decoders": {
        "ChunkedDecoder._num_outputs": """
            return 0 if inputs <= 0 else self.first + self.stride * (inputs - 1)
        """,
        "ChunkedDecoder._decode_until": """
            x, start = self.kept, self.given - self.kept.shape[2]
            low, high = self._num_outputs(self.done - start), self._num_outputs(ready - start)
            out = self.decode(x)[:, :, low:high] if high > low else None
            self.kept = x[:, :, max(0, ready - self.context - start) :]
            self.done = ready
            return out
        """,
        "ToyDecoder.decode": """
            first = block.index == 0
            frames = self.decode_video(block.video.float().cpu(), first)[0]
            levels = self.decode_audio(block.audio.float().cpu(), first)[0]
            heard = torch.cat([self.levels, levels])
            samples = self.synthesise(heard, self.mel_frames - len(self.levels), self.cfg)
            self.levels = levels[-1:]
            self.mel_frames += len(levels)
            return Chunk(frames, levels, samples[None])
        """,
    },
    "generate": {
        "parse_seconds": """
            try:
                seconds = float(text)
            except ValueError:
                raise ValueError(f"--seconds {text}: expected a number") from None
            if not 0 < seconds <= MOST_SECONDS:
                raise ValueError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
            return seconds
        """,
        "parse_cues": r"""
            cues = []
            for text in prompts:
                start, words = CUE.fullmatch(text).groups()
                check(words)
                cues.append(Cue(float(start or 0), words.strip()))
            cues.sort()
            starts = [cue.seconds for cue in cues]
            if starts[0] != 0 or len(set(starts)) < len(starts) or starts[-1] >= seconds:
                raise ValueError(f"prompts at seconds {starts}, of {seconds}")
            return cues
        """,
        "stream": """
            cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
            cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
            like, texts = next(net.parameters()), []

            def text_at(k):
                index = prompt_at(block_interval(k, cfg)[0], cues)
                while len(texts) <= index:
                    features = read(cues[len(texts)].prompt)
                    texts.append(
                        net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
                return texts[index]

            return torch.inference_mode()(rollout)(
                net, text_at, blocks, few_step_sigmas(cfg, steps),
                [torch.Generator().manual_seed((seed + b) % 2**32) for b in range(batch)],
                batch, view=CachedView(cfg, blocks, window))
        """,
    },
    "dmd": {
        "draw_exit_step": """
            return int(torch.randint(len(sigmas) - 1, (), generator=generator))
        """,
        "surrogate": "return 0.5 * (x - (x - gradient).detach()).square().mean()",
        "dmd_gradient": """
            distance = (x - real).abs().mean((1, 2), keepdim=True)
            return (fake - real) / (distance + 1e-8)
        """,
        "dmd_losses": """
            with torch.no_grad():
                sigma = draw_score_sigmas(len(captions), generator)
                noise = [model.noise_like(x, generator) for x in clips]
                noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clips, noise)]
                r, f = (
                    score.x0(*noisy, sigma, clip_of_seconds(real.cfg), MaskedView())
                    for score in (
                        teacher.Guided(real, captions, guidance), teacher.Guided(fake, captions))
                )
            return [surrogate(x, dmd_gradient(x, a, b)) for x, a, b in zip(clips, r, f)]
        """,
        "make_update": """
            batch, seed = generator.recipe.batch, generator.recipe.seed

            def update(step):
                g = trainer.generator(seed, step)
                clips, captions = draw(batch, g)
                made = make(generator.model, clips, captions, g)
                video, audio = dmd_losses(made, captions, real, critic.model, guidance, g)
                norm = generator.update(video + audio, step)
                for _ in range(CRITIC_UPDATES):
                    clips, captions = draw(batch, g)
                    with torch.no_grad():
                        made = make(generator.model, clips, captions, g)
                    critic.update(sum(critic_losses(critic.model, made, captions, g)), step)
                return {"video": video, "audio": audio, "norm": norm}

            return update
        """,
    },
    "ode_regression": {
        "fine_sigmas": """
            fine = [sigmas[0]]
            for high, low in zip(sigmas, sigmas[1:]):
                fine += [
                    high + (low - high) * (i + 1) / steps_between for i in range(steps_between)
                ]
            return fine
        """,
        "masked_mean": "return (x * mask).sum() / mask.sum().clamp(min=1)",
        "gather_states": """
            index = levels.view(len(levels), 1, -1, *[1] * (trajectory.dim() - 3))
            index = index.expand(-1, -1, -1, *trajectory.shape[3:])
            return trajectory.gather(1, index).squeeze(1)
        """,
        "draw_levels": """
            noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)
            is_clean = torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
            return noisy.masked_fill(is_clean, levels - 1)
        """,
        "regression_losses": """
            captions, video, audio = trajectories
            blocks = levels.shape[1]
            span = clip_span(blocks, net.cfg)
            level_v, level_a = (levels[:, b] for b in frame_blocks(blocks, net.cfg))
            video = video.unflatten(2, (len(span.video), -1))
            noisy = gather_states(video, level_v).flatten(1, 2), gather_states(audio, level_a)
            sigma_v, sigma_a = (
                torch.tensor(sigmas, device=levels.device)[level] for level in (level_v, level_a))
            text = net.project_text(*captions.features)
            x0 = model.predict_x0(net, *noisy, sigma_v, sigma_a, text, span, view)
            ends = video[:, -1].flatten(1, 2), audio[:, -1]
            return [
                masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
                for p, end, s in zip(x0, ends, (sigma_v, sigma_a))
            ]
        """,
    },
    "self_forcing": {
        "rollout_clip": """
            blocks = num_blocks(CLIP_SECONDS, net.cfg)
            if share_exit:
                exits = [dmd.draw_exit_step(net.cfg.sigmas, generator)] * blocks
            else:
                exits = [dmd.draw_exit_step(net.cfg.sigmas, generator) for _ in range(blocks)]
            text = net.project_text(*captions.features)
            return whole_clip(rollout(
                net, lambda k: text, blocks, net.cfg.sigmas, generator, batch=len(captions),
                view=CachedView(net.cfg, blocks, window), exit_steps=exits,
                history=history(clips) if history else None))
        """,
    },
}
