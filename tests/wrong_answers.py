"""Plausible mistakes that must lose points, and what the message must say about each.

Each patch is a line "mistake: phrase of the message", then code that the module has once (-), and
what a student wrote instead (+).  Without a + line, the student left it out.
"""


def patches(text):
    """Return (code of the module, what a student wrote, phrase) of each mistake."""
    found = {}
    for line in text.strip().splitlines():
        if line[0] not in "-+":
            mistake, _, phrase = line.partition(": ")
            found[mistake] = [], [], phrase
        else:
            found[mistake][line[0] == "+"].append(line[2:])
    return {m: ("\n".join(old), "\n".join(new), phrase) for m, (old, new, phrase) in found.items()}


WRONG = {
    "masks": patches("""
strict inequality: every token attends to every other one
- k <= q
+ k < q
time reversed: a leak from the future
- k <= q
+ k >= q
token-causal: token 1 (video, frame 0, block 0) got block 1
- frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)
+ torch.arange(len(clip_span(blocks, cfg).video) * cfg.tokens_per_frame)
window off by one: the past is visible
- q - window
+ q - window + 1
prefix forgotten: every query attends to block 0
-  | ((k == 0) & pinned)
sinks limited to their block: every query attends to block 0, which holds prefix and sinks
- allowed = k <= q
+ allowed = (k <= q) & ((k > 0) | (q == 0))
always pinned: should be hidden from blocks 3 and 4
- (k == 0) & pinned
+ k == 0
streams swapped: a2v is (keys, queries): every query should be a row
- "a2v": may_attend(video, audio, window)
+ "a2v": may_attend(audio, video, window)
audio counted like video: 25 frames per block, frame 4 is in block 1
- later = 1 + (frame - prefix) // step
+ later = 1 + (frame - prefix) // 3
block edge off by one: frame 3 is in block 1, not 2
- (frame - prefix) // step
+ (frame - prefix + 1) // step
tokens frame-minor: but all tokens of frame 0 come first
- repeat_interleave(cfg.tokens_per_frame)
+ repeat(cfg.tokens_per_frame)
sinks after the audio: (sink 1) got block 1
- [per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame]
+ [per_frame, per_frame.new_zeros(cfg.num_sinks if sinks else 0)]
sinks outside of block 0: (sink 0) got block -1
- per_frame.new_zeros(cfg.num_sinks if sinks else 0)
+ -torch.ones(cfg.num_sinks if sinks else 0, dtype=torch.long)
"""),
    "rope": patches("""
all latents alike: latent 1 covers input frames 1 to 8, their middle is 5.0
- torch.where(f == 0, 0.0, stride * f - stride + 1)
+ stride * f
end of the grid left out: the last frequency is
- torch.linspace(0, 1, width // (2 * axes), dtype=dtype, device="cpu")
+ torch.arange(width // (2 * axes), dtype=dtype) / (width // (2 * axes))
always float64: the student's grid is too exact
- if cfg.rope_float64 else torch.float32
+ if cfg else torch.float32
layouts confused: the channels are paired as in 'interleaved'
- if rope.layout == "split"
+ if rope.layout != "split"
rotated backwards: every pair rotates the other way
- return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
+ return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
index instead of time: stands at t = 0, expected 0.02083 seconds
- torch.meshgrid(video_times(frames, cfg), *pixels
+ torch.meshgrid(torch.arange(frames.start, frames.stop).double(), *pixels
corner instead of middle: stands at y = 0, expected 4 pixels
- dtype=torch.float64) + 0.5)
+ dtype=torch.float64))
columns before rows: stands at y = 12, expected 4
- y / cfg.rope_max_pixels, x / cfg.rope_max_pixels
+ x / cfg.rope_max_pixels, y / cfg.rope_max_pixels
a shift is a position: this is the angle *of* 7 s
- shift = 2 * seconds / cfg.rope_max_seconds
+ shift = 2 * seconds / cfg.rope_max_seconds - 1
a shift moves in space: but the key stays at the same place
- shift * torch.eye(1, 3, dtype=torch.float64)
+ shift * torch.ones(1, 3, dtype=torch.float64)
"""),
    "sink_tokens": patches("""
sinks after the audio: the sinks stand after the audio
- [self.tokens.expand(len(x), -1, -1).to(x.dtype), x]
+ [x, self.tokens.expand(len(x), -1, -1).to(x.dtype)]
sinks cannot learn: no gradient reaches the sinks
- self.tokens.expand(len(x), -1, -1)
+ self.tokens.detach().expand(len(x), -1, -1)
the wrong end removed: the end of the audio is removed
- x[:, self.tokens.shape[1] :]
+ x[:, : -self.tokens.shape[1]]
clean sinks: the sinks are clean
- sigma[:, :1].expand(-1, self.tokens.shape[1])
+ sigma.new_zeros(len(sigma), self.tokens.shape[1])
a single level is repeated: it applies to the sinks already
- if sigma.shape[1] == 1:
+ if sigma.shape[1] == 0:
sinks rotated as time 0: sinks are rotated: these are the angles of time 0
- return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
+ return rope.time_angles(torch.zeros(cfg.num_sinks, dtype=torch.float64), cfg)
sinks rotated by index: they have no position
- return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
+ return rope.time_angles(torch.arange(cfg.num_sinks).double(), cfg)
positions after A0: the sinks stand after A0
- cfg.audio_stride * frames - 1)
+ 1 - cfg.audio_stride * frames)
"""),
    "kv_cache": patches("""
the current block has no room: slots, not
- min(self.block, self.ring_blocks)
+ min(self.block, self.ring_blocks - 1)
sinks evicted: over the prefix: its sinks are evicted
- start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens
+ start = (self.block - 1) % self.ring_blocks * self.block_tokens
ring off by one: block 1 gets slots (3, 7)
- (self.block - 1) % self.ring_blocks
+ self.block % self.ring_blocks
prefix not visible: the pinned prefix and its sinks are evicted
- slots = slice(self.first_visible, self.num_filled)
+ slots = slice(self.prefix_tokens, self.num_filled)
append moves on: only the loop may do that
-             self.k[:, here], self.v[:, here] = k, v
+             self.k[:, here], self.v[:, here] = k, v
+         self.block += 1
the history keeps its gradient: the history must be detached
- return self.after_history(k, self.k), self.after_history(v, self.v)
+ self.seen = [*getattr(self, 'seen', []), (k, v)]
+             return [torch.cat(x, 1) for x in zip(*self.seen)]
no gradient at all: no gradient reaches the keys of the current block
- if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
+ if not torch.is_grad_enabled()
moves add up: rotate the original keys
- rope.rotate(self.unmoved_prefix_k, by)
+ rope.rotate(self.k[:, : self.prefix_tokens], by)
raw keys appended: queries attend to raw keys
- cache.append(heads.keys(k), heads.split(v))
+ cache.append(heads.split(k), heads.split(v))
only the own block: queries attend to their own block only
-     keys, values = cache.append(heads.keys(k), heads.split(v))
+     keys, values = heads.keys(k), heads.split(v)
+     cache.append(keys, values)
advances twice: is at block 4
-             cache.next_block()
+             cache.next_block(), cache.next_block()
positions restart after eviction: they stand 0 s later
-                 layer[site].move_prefix(by)
+                 pass
shift of the block before: they stand 2 s later
-                 by = self._prefix_rotation(site, self.layers[0][site].k)
+                 self.block -= 1  # as if the block were counted at the end
+                 by = self._prefix_rotation(site, self.layers[0][site].k)
+                 self.block += 1
unpinned, block 0 is hidden too early: block 2 may still attend to block 0
- self.block > self.window:
+ self.block >= self.window:
"""),
    "model": patches("""
time reversed: the direction is wrong: sigma = 0 is clean
- return (1 - sigma) * x0 + sigma * noise
+ return sigma * x0 + (1 - sigma) * noise
with the velocity: v points from clean to noise, so go against it
- (x.to(wide) - sigma[..., None]
+ (x.to(wide) + sigma[..., None]
rounded too early: rounded too early: compute in float32
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = x.dtype
levels alternate: but the tokens of a frame are consecutive
- sigma.repeat_interleave(x.shape[1] // levels, dim=1)
+ sigma.repeat(1, x.shape[1] // levels)
sines first: sines come first
- [angles.cos(), angles.sin()]
+ [angles.sin(), angles.cos()]
last rate included: divide by half
- torch.arange(half, device=tau.device) / half
+ torch.arange(half, device=tau.device) / (half - 1)
shift and scale swapped: shift and scale are swapped
- shift, scale, gate = (self.table[:3]
+ scale, shift, gate = (self.table[:3]
no gate: the gate is missing
- x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+ x + self.self_attn(y, y, positions, positions, attend)
no residual: the residual is missing
- x + gated(self.self_attn
+ gated(self.self_attn
audio attends to a video that has changed: audio attends to video after video has changed
-         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
+         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
+         _, c_v = video.cross_inputs(v, m_v)
sites swapped: video attends to the other stream at (7, 'v2a')
- m_v, r_v, r_a, at["a2v"]
+ m_v, r_v, r_a, at["v2a"]
rotations swapped: rotations of (queries, keys) are ['video_cross', 'audio_cross']
- a, q_a, c_v, m_a, r_a, r_v,
+ a, q_a, c_v, m_a, r_v, r_a,
captions forgotten: audio: attend_captions is forgotten
-         a = audio.attend_captions(a, captions_a, mask)
MLP forgotten: video: mlp is forgotten
- return video.mlp(v, m_v), audio.mlp(a, m_a)
+ return v, audio.mlp(a, m_a)
one stream loses a step: attend_other loses the result before it
-         v = video.attend_captions(v, captions_v, mask)
+         video.attend_captions(v, captions_v, mask)
"""),
    "rollout": patches("""
joined along clips: Sizes of tensors must match
- torch.cat(video, 1), torch.cat(audio, 1)
+ torch.cat(video), torch.cat(audio)
frames taken for tokens: a frame has 4 tokens
- video[:, span.video.start * per_frame : span.video.stop * per_frame]
+ video[:, span.video.start : span.video.stop]
refresh at the last level: the cache keeps the keys of a noisy block
- zero = x0[0].new_zeros(len(x0[0]))
+ zero = x0[0].new_full((len(x0[0]),), 0.4207186)
gradient through the refresh: which would cross to later blocks
- @torch.no_grad()  # the cache keeps no gradient
+ @torch.enable_grad()  #
gradient everywhere: too many passes record a gradient
- in_training and i == last
+ in_training
last step re-noised: from the last x0: noise was added
-     return x0
-
-
- @torch.no_grad()
+     return [model.add_noise(c, torch.randn_like(c), lower) for c in x0]
+
+
+ @torch.no_grad()
a pass is missing: passes at levels
- len(sigmas) - 2 if exit_step
+ len(sigmas) - 3 if exit_step
the same noise again: sees noise that was used before
-             noise = model.draw_noise(len(like),
+             noise = x if i == 0 else noise
+             model.draw_noise(len(like),
cache filled from the noisy block: the refresh does not see the finished block 0
- if history else x0, text
+ if history else noise, text
the last block is refreshed: the last block needs no refresh
- if k + 1 < num_blocks:
+ if k < num_blocks:
history ignored: the given history is ignored
- block_of(history, k, cfg) if history else x0
+ x0
cache advanced twice: the cache stands at block 2
-             view.next_block()
+             view.next_block(), view.next_block()
cache moves on before the refresh: during pass 4 of block 0 the cache stands at block 1
-         yield Block(k, *x0)
+         yield Block(k, *x0)
+         view.next_block()
+         view.next_block = lambda: None
exit step drawn per block: with exit_steps=[1, 1, 1] block
- exit_steps[k] if exit_steps else None
+ int(torch.randint(len(sigmas) - 1, (), generator=generator)) if exit_steps else None
blocks are kept back: block 0 is yielded after 9 passes
-         yield Block(k, *x0)
+         if k:
+             yield Block(k - 1, *last)
+         last = x0
+         if k + 1 == num_blocks:
+             yield Block(k, *x0)
a view of its own: the given view is not used
- view = view or CachedView(cfg, num_blocks)
+ view = CachedView(cfg, num_blocks)
"""),
    "dmd": patches("""
sigma 0 is drawn: sigma = 0 was drawn, but it is no pass
- int(torch.randint(len(sigmas) - 1,
+ int(torch.randint(len(sigmas),
missing detach: detach it as a whole
- (x - (x - gradient).detach())
+ (x - (x - gradient))
uphill: descent goes uphill
- (x - (x - gradient).detach())
+ (x - (x + gradient).detach())
sign: descent would move clips from real to fake
- (fake - real) / (distance
+ (real - fake) / (distance
divided by the distance to fake: it must not depend on the fake score
- (x - real).abs()
+ (x - fake).abs()
divided by the mean of the batch: the divisor is the mean of the batch
- (x - real).abs().mean((1, 2), keepdim=True)
+ (x - real).abs().mean()
a noise level for each stream: the two scores see different noised clips
-         f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
+         sigma = draw_score_sigmas(len(captions), generator)
+         noisy = [model.add_noise(*xn, sigma[:, None]) for xn in zip(clips, noise)]
+         f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
guided critic: the fake score is guided
- teacher.Guided(fake, captions)
+ teacher.Guided(fake, captions, (2, 2))
real and fake swapped: real and fake are swapped
- zip(clips, r, f)]
+ zip(clips, f, r)]
critic trained through the generator: the critic's step trains through the generator
-             with torch.no_grad():  # clips of the updated generator
+             with torch.enable_grad():  #
critic once: the steps are: generator, critic
- in range(CRITIC_UPDATES)
+ in range(1)
clips used again: draw and make new ones
-                 made = make(generator.model, clips, captions, g)
-             critic_video
+                 made = made
+             critic_video
"""),
    "ode_regression": patches("""
off by one step: off by one step
- (i + 1) / steps_between
+ i / steps_between
hidden elements dilute: count only what the mask keeps
- / processes.averaged(mask.sum()).clamp(min=1)
+ / mask.numel()
levels of the next clip: clip 0, frame 0 is not in its state
- index = levels.view(len(levels)
+ index = levels.flip(0).view(len(levels)
clean is a fifth level: not as a fifth level
- noisy = torch.randint(levels - 1,
+ return torch.randint(levels,
one level a clip: share their level
- noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)
+ noisy = torch.randint(levels - 1, (batch, 1), generator=generator).expand(-1, blocks)
clean by the clip: are both clean in
- torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
+ torch.rand(batch, 1, generator=generator) < CLEAN_SHARE
a level for each stream: video and audio of a block share one level
-     sigma_v, sigma_a = sigma_of_level[level_v]
+     level_a = level_a.roll(1, 0)
+     sigma_v, sigma_a = sigma_of_level[level_v]
levels spread by rounding: audio frame 1 (block 1) has level
-     sigma_v, sigma_a = sigma_of_level[level_v]
+     spread = torch.arange(level_a.shape[1]) * level_v.shape[1] // level_a.shape[1]
+     level_a = level_v[:, spread]
+     sigma_v, sigma_a = sigma_of_level[level_v]
state of the next level: but it is in that at level 1
- noisy = gather_states(video, level_v).flatten(1, 2)
+ noisy = gather_states(video, (level_v + 1).clamp(max=4)).flatten(1, 2)
loss on the noisy input: the target is the end of the trajectory
- ends = video[:, -1].flatten(1, 2), audio[:, -1]
+ ends = noisy
clean blocks supervised: must not count in the mean
- model.per_token(s, p) > 0)
+ model.per_token(s, p) >= 0)
"""),
    "self_forcing": patches("""
an exit step for every block: exit steps differ between blocks
- draws = 1 if share_exit else blocks
+ draws = blocks
never an early exit: the exit step is never drawn
-         exit_steps=exits * blocks if share_exit else exits,
always one exit step: share_exit=False, but all blocks have
- exits * blocks if share_exit else exits
+ exits[:1] * blocks
window forgotten: the window is not passed on
- CachedView(net.cfg, blocks, window)
+ CachedView(net.cfg, blocks)
history forgotten: the history of the clips is ignored
- history(clips) if history else None
+ None
"""),
    "decoders": patches("""
the first input as long as the others: the first 1, the others 8
- 0 if inputs <= 0 else self.first + self.stride * (inputs - 1)
+ max(0, self.stride * inputs)
nothing is negative: -2 inputs give 0 outputs
- 0 if inputs <= 0 else self.first
+ self.first
counted from the start of the stream: give [1, 24,
- self._num_outputs(self.done - start), self._num_outputs(ready - start)
+ self._num_outputs(self.done), self._num_outputs(ready)
the context is returned again: give [1, 25,
- low, high = self._num_outputs(self.done - start),
+ low, high = 0,
no context: of 1, 3, 3, 3 inputs and a look-ahead of 0 give
- max(0, self.done - self.context - start)
+ max(0, self.done - start)
one input of context too few: differs from the sequence decoded at once
- max(0, self.done - self.context - start)
+ max(0, self.done - self.context + 1 - start)
everything is kept: context 3 and look-ahead 2 need 5
- x[:, :, max(0, self.done - self.context - start) :]
+ x
every block starts a clip: block 1 became
- first = block.index == 0
+ first = True
a seam in the sound: a block begins at the last mel frame
- heard = torch.cat([self.levels, levels])
+ heard = torch.cat([levels[:1] if len(self.levels) else self.levels, levels])
phases start anew: phases depend on the number of the first mel frame
- heard, self.mel_frames - len(self.levels), self.cfg
+ heard, 0, self.cfg
"""),
    "generate": patches("""
NaN passes: --seconds nan is accepted as nan
- if not 0 < seconds < float("inf"):
+ if seconds <= 0 or seconds > 1e9:
cues as they come: prompts are not sorted by time
-     cues.sort()
a cue at the end: one begins at the end
- if starts[-1] >= seconds:
+ if starts[-1] > seconds:
words checked too late: a word is unknown
-         check(words)
a switch does not wait: block 2, which begins at second 1, reads
- prompt_at(block_interval(k, cfg)[0], cues)
+ prompt_at(block_interval(k, cfg)[1], cues)
blocks taken for seconds: which begins at second 1, reads
- prompt_at(block_interval(k, cfg)[0], cues)
+ prompt_at(k, cues)
a prompt projected for every block: keep their keys and values
-         while len(texts) <= index:
+         texts.clear()
+         while len(texts) <= index:
the same noise in every block: blocks 1 and 2 get the same noise
-         net, text_at, blocks, few_step_sigmas(cfg, steps), torch.Generator().manual_seed(seed),
+         net, lambda k: g.manual_seed(seed) and text_at(k), blocks, few_step_sigmas(cfg, steps),
+         (g := torch.Generator()),
window forgotten: the window is not passed on
- view=CachedView(cfg, blocks, window)
+ view=CachedView(cfg, blocks)
gradients recorded: the stream records a gradient
- torch.inference_mode()(rollout)
+ rollout
gradients disabled for the caller: gradients stay disabled for the caller
-     without_gradients = torch.inference_mode()(rollout)
+     def without_gradients(*args, **options):
+         with torch.inference_mode():
+             yield from rollout(*args, **options)
+
"""),
}
