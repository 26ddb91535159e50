"""Plausible mistakes that must lose points, and what the message must say about each.

A mistake is written as marking.py reads it: "mistake: phrase of the message", then code that the
module has once (-), and what a student wrote instead (+).  Most are slips that students make. Each
one stands for a kind: only the first clip of a batch, a size of the toy written as a number, an
argument that is not passed on, a gradient that is lost.
"""

from marking import patches

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
audio forgets the window when it listens to video: v2a with window 1 and no sinks: query
- "v2a": may_attend(audio, video, window)
+ "v2a": may_attend(audio, video)
video forgets the window: video_self with window 1 and no sinks: query
- "video_self": may_attend(video, video, window)
+ "video_self": may_attend(video, video)
no window and a window of 0 are confused: window 0, keys of blocks
- if window is not None:
+ if window:
the earliest key is pinned: keys of blocks [3, 1, 2]
- ((k == 0) & pinned)
+ ((k == key_blocks.min()) & pinned)
the first key is pinned: keys of blocks [4, 5, 3, 0, 6, 2, 1]
- ((k == 0) & pinned)
+ ((torch.arange(len(key_blocks)) == 0) & pinned)
the query's own block counts: window 2, keys of blocks
- k >= q - window
+ k > q - window
the frames of the caller are changed: an argument is changed in place
-     later = 1 + (frame - prefix) // step
+     frame -= prefix
+     later, prefix = 1 + frame // step, 0
block 0 has one frame: with a prefix of 4 and 3 frames per block, frame 1
-     later = 1 + (frame - prefix) // step
+     prefix = 1
+     later = 1 + (frame - prefix) // step
a tensor of floats: block indices are whole numbers: use //
- (frame - prefix) // step
+ ((frame - prefix) / step)
frames counted from the first of the tensor: frames 30 to 89 with a prefix of 26
-     later = 1 + (frame - prefix) // step
+     frame = torch.arange(len(frame)) if torch.is_tensor(frame) else frame
+     later = 1 + (frame - prefix) // step
sixteen tokens in every frame: 16 tokens, expected 3
- frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)
+ frame_blocks(blocks, cfg)[0].repeat_interleave(16)
sixteen sinks whatever the config says: 17 tokens, expected 3
- per_frame.new_zeros(cfg.num_sinks if sinks else 0)
+ per_frame.new_zeros(16 if sinks else 0)
sinks although there should be none: 3 tokens, expected 1
- cfg.num_sinks if sinks else 0
+ cfg.num_sinks
blocks of audio as floats: block indices are whole numbers, not floats
- per_frame.new_zeros(cfg.num_sinks if sinks else 0)
+ torch.zeros(cfg.num_sinks if sinks else 0)
a mask of numbers: a mask holds booleans
-     return allowed
+     return allowed.float()
unpinned, block 0 is never visible: should be hidden from blocks 3 and 4; blocks 0 to 4 attend
- | ((k == 0) & pinned)
+ & (pinned | (k > 0) | (q == 0)) | ((k == 0) & pinned)
unpinned even without a window: no window: query
-     if window is not None:
+     if not pinned:
+         allowed &= (k > 0) | (q == 0)
+     if window is not None:
the window also reaches into the future: window 2, keys of blocks
- allowed &= (k >= q - window)
+ allowed = ((k - q).abs() <= window)
sinks forgotten in the masks: with window 1 and no sinks: the mask is
- audio = audio_token_blocks(blocks, cfg, sinks)
+ audio = audio_token_blocks(blocks, cfg)
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
a shift is a position: this is the angle *of* 7.3 s
- shift = 2 * seconds / cfg.rope_max_seconds
+ shift = 2 * seconds / cfg.rope_max_seconds - 1
a shift moves in space: but the key stays at the same place
- shift * torch.eye(1, 3, dtype=torch.float64)
+ shift * torch.ones(1, 3, dtype=torch.float64)
only the first clip is rotated: split: (3, 4, 2, 6) became (1, 4, 2, 6)
-     H, half = x.shape[2], x.shape[3] // 2
+     x = x[:1]
+     H, half = x.shape[2], x.shape[3] // 2
a row of the table for every token: a table of one row must rotate all tokens
- rope.cos.view(-1, H, half), rope.sin.view(-1, H, half)
+ rope.cos.view(x.shape[1], H, half), rope.sin.view(x.shape[1], H, half)
x is rotated in place: an argument is changed in place
-         a, b = x.chunk(2, dim=-1)
+         a, b = x.chunk(2, dim=-1)
+         x[..., :half], x[..., half:] = a * cos - b * sin, b * cos + a * sin
+         return x
rotated in float32: the result has the dtype of x
-     H, half = x.shape[2], x.shape[3] // 2
+     x = x.float()
+     H, half = x.shape[2], x.shape[3] // 2
the rotation has no gradient: no gradient passes through the rotation
-     H, half = x.shape[2], x.shape[3] // 2
+     x = x.detach()
+     H, half = x.shape[2], x.shape[3] // 2
every head gets the same angles: (a, b) should become (a cos - b sin
- cos, sin = rope.cos.view(-1, H, half), rope.sin.view(-1, H, half)
+ cos, sin = rope.cos.view(-1, H, half)[:, :1], rope.sin.view(-1, H, half)[:, :1]
the halves are interleaved in the result: interleaved: (a, b) should become
- torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
+ torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
the grid stays on the CPU: `device` is ignored
- grid.to(torch.float32).double().to(device)
+ grid.to(torch.float32).double()
the grid is not rounded: not cast to float32 at the end
- grid.to(torch.float32).double().to(device)
+ grid.double().to(device)
frequencies in float32: angles are computed in float64
- grid.to(torch.float32).double().to(device)
+ grid.to(torch.float32).to(device)
theta of the paper: the last frequency is
- torch.pow(cfg.rope_theta, exponents)
+ torch.pow(10000.0, exponents)
from fast to slow: the first frequency is
- torch.linspace(0, 1, width // (2 * axes)
+ torch.linspace(1, 0, width // (2 * axes)
evenly spaced without the logarithm: the second frequency is
- grid = torch.pow(cfg.rope_theta, exponents) * math.pi / 2
+ grid = (1 + (cfg.rope_theta - 1) * exponents) * math.pi / 2
the pixel stride of the toy: 32 pixels a token: the pixel stride is a fixed number
- (torch.arange(n, dtype=torch.float64) + 0.5) * cfg.pixel_stride
+ (torch.arange(n, dtype=torch.float64) + 0.5) * 8
times go through float32: after an hour the angles are off
- torch.meshgrid(video_times(frames, cfg), *pixels
+ torch.meshgrid(video_times(frames, cfg).float().double(), *pixels
every call starts at time 0: counted from the first frame given
- torch.meshgrid(video_times(frames, cfg), *pixels
+ torch.meshgrid(video_times(range(len(frames)), cfg), *pixels
time scaled like pixels: stands at t =
- t / cfg.rope_max_seconds, y
+ t / cfg.rope_max_pixels, y
positions from 0 to 1: stands at t =
- torch.stack([2 * p.flatten() - 1 for p in scaled], dim=1)
+ torch.stack([p.flatten() for p in scaled], dim=1)
tokens by columns first: stands at y = 12, expected 4
- t, y, x = torch.meshgrid(video_times(frames, cfg), *pixels, indexing="ij")
+ t, x, y = torch.meshgrid(video_times(frames, cfg), *pixels[::-1], indexing="ij")
every clip starts at the first latent: latents 2 to 4 stand at
-     f = torch.arange(frames.start, frames.stop, dtype=torch.float64)
+     f = torch.arange(len(frames), dtype=torch.float64) + (frames.start if len(frames) == 1 else 0)
the first of any frames covers one input frame: latents 2 to 4 stand at
- torch.where(f == 0, 0.0, stride * f - stride + 1)
+ torch.where((f == f[0]) & (len(f) > 1) | (f == 0), stride * f, stride * f - stride + 1)
the end without the last frame: their middle is
- (start + stride * f + 1) / 2
+ (start + stride * f) / 2
middles in float32: positions must stay exact for hours
- return (start + stride * f + 1) / 2
+ return ((start + stride * f + 1) / 2).float()
a shift of half the angle: audio_self: wrong angle
- shift = 2 * seconds / cfg.rope_max_seconds
+ shift = seconds / cfg.rope_max_seconds
all keys have the video width: audio_self: one row of audio_width / 2
-     if site == "video_self":
+     if site:
keys of video have the video width: v2a: one row of audio_width / 2
-     if site == "video_self":
+     if site in ("video_self", "v2a"):
a shift in float32: angles are computed in float64
- pair_angles(torch.full((1, 1), shift, dtype=torch.float64), cfg.audio_width, cfg)
+ pair_angles(torch.full((1, 1), shift), cfg.audio_width, cfg).float()
the split layout without gradient: split: no gradient passes through the rotation
-         a, b = x.chunk(2, dim=-1)
+         a, b = x.detach().chunk(2, dim=-1)
a shift that goes through float32: the shift goes through float32
- torch.full((1, 1), shift, dtype=torch.float64)
+ torch.full((1, 1), shift)
seconds cut to whole ones: 7.3 s are cut to 7 s
- shift = 2 * seconds
+ shift = 2 * int(seconds)
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
sixteen rows of angles: (S, audio_width / 2) is (3, 16), not (16, 16)
- return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
+ return torch.zeros(16, cfg.audio_width // 2, dtype=torch.float64)
angles in float32: angles are computed in float64
- return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
+ return torch.zeros(cfg.num_sinks, cfg.audio_width // 2)
angles of the video width: (S, audio_width / 2) is (16, 48)
- return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)
+ return torch.zeros(cfg.num_sinks, cfg.video_width // 2, dtype=torch.float64)
the ablation is forgotten: must be rotated
- if cfg.sink_positions == "incremental":
+ if not cfg.sink_positions:
sinks run backwards: sink 0 is the earliest
- torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
+ torch.arange(-1, -cfg.num_sinks - 1, -1, dtype=torch.float64)
sinks one latent too late: the sinks should stand at
- torch.arange(-cfg.num_sinks, 0, dtype=torch.float64)
+ torch.arange(1 - cfg.num_sinks, 1, dtype=torch.float64)
the times of the toy: the sinks should stand at -0.22
- (cfg.audio_stride * frames - 1) / cfg.mel_rate
+ (4 * frames - 1) / 100
a batch of two: a batch of 1 clips does not work
- self.tokens.expand(len(x), -1, -1)
+ self.tokens.expand(2, -1, -1)
the dtype of the sinks: the sinks are cast to the dtype of the audio
- .expand(len(x), -1, -1).to(x.dtype)
+ .expand(len(x), -1, -1)
the audio in the dtype of the sinks: the sinks are cast to the dtype of the audio
- .to(x.dtype), x]
+ , x.to(self.tokens.dtype)]
new random sinks at every call: the sinks are not the parameters
- self.tokens.expand(len(x), -1, -1)
+ (self.tokens + torch.ones_like(self.tokens)).expand(len(x), -1, -1)
sinks of the first clip only: 2 clips became
- x[:, self.tokens.shape[1] :]
+ x[0, self.tokens.shape[1] :]
sixteen sinks removed: tokens 0 to 7 begin with
- x[:, self.tokens.shape[1] :]
+ x[:, 16:]
one sink removed: tokens 0 to 7 begin with
- x[:, self.tokens.shape[1] :]
+ x[:, len(self.tokens) :]
removed without gradient: no gradient passes on to the audio tokens
- x[:, self.tokens.shape[1] :]
+ x[:, self.tokens.shape[1] :].detach()
sinks at the level of the last token: sinks have
- sigma[:, :1].expand(-1
+ sigma[:, -1:].expand(-1
sinks at the level of the first clip: sinks have
- sigma[:, :1].expand(-1, self.tokens.shape[1])
+ sigma[:1, :1].expand(len(sigma), self.tokens.shape[1])
sinks are noise: sinks have
- sigma[:, :1].expand(-1, self.tokens.shape[1])
+ sigma.new_ones(len(sigma), self.tokens.shape[1])
the levels in float32: noise levels keep their dtype
- self.tokens.shape[1]), sigma], dim=1)
+ self.tokens.shape[1]), sigma], dim=1).float()
equal levels taken for one level: 5 levels that happen to be equal
- if sigma.shape[1] == 1:
+ if (sigma == sigma[:, :1]).all():
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
advances twice: after 1 blocks layer 0, video_self is at block 2
-             cache.next_block()
+             cache.next_block(), cache.next_block()
positions restart after eviction: must stand 1 s later than they were written; they stand 0 s
-                 self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
+                 pass
shift of the block before: must stand 1 s later than they were written; they stand 0 s later
-                 self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
+                 self.block -= 1  # as if the block were counted at the end
+                 self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
+                 self.block += 1
unpinned, block 0 is hidden too early: block 2 may still attend to block 0
- self.block > self.window:
+ self.block >= self.window:
a hidden prefix is read: first_visible is ignored
-         return self.visible()
+         return self.k[:, : self.num_filled], self.v[:, : self.num_filled]
a hidden prefix is read in training: first_visible is ignored
-             return self.after_history(k, self.k), self.after_history(v, self.v)
+             shown, self.first_visible = self.first_visible, 0
+             found = self.after_history(k, self.k), self.after_history(v, self.v)
+             self.first_visible = shown
+             return found
nothing is written in training: a pass with a gradient writes nothing
-         with torch.no_grad():
-             self.k[:, here], self.v[:, here] = k, v
-         if torch.is_grad_enabled()
+         if not (torch.is_grad_enabled() and k.requires_grad):
+             with torch.no_grad():
+                 self.k[:, here], self.v[:, here] = k, v
+         if torch.is_grad_enabled()
values alone get no gradient: no gradient reaches the values of the current block
- (k.requires_grad or v.requires_grad)
+ k.requires_grad
keys alone get no gradient: no gradient reaches the keys of the current block
- (k.requires_grad or v.requires_grad)
+ v.requires_grad
the buffers learn: the buffers of the cache carry a gradient
-         with torch.no_grad():
-             self.k[:, here], self.v[:, here] = k, v
+         self.k = self.k.clone()
+         self.k[:, here], self.v[:, here] = k, v.detach()
keys stored as values: values and keys differ in their slots
- self.k[:, here], self.v[:, here] = k, v
+ self.k[:, here], self.v[:, here] = k, k
the whole buffer is returned: queries attend to blocks
-         return self.visible()
+         empty = slice(self.num_filled, None)
+         self.k[:, empty] = self.v[:, empty] = 990
+         return self.k, self.v
the first clip for all: with every token of clip 1 once
- self.k[:, here], self.v[:, here] = k, v
+ self.k[:, here], self.v[:, here] = k[:1], v[:1]
history without the ring that wrapped: with every token of clip 0 once
-             return self.after_history(k, self.k), self.after_history(v, self.v)
+             both = (self.k, k), (self.v, v)
+             return [torch.cat([x[:, : here.start], new], 1) for x, new in both]
the keys come before the history in one of two: values and keys differ in their slots
-             return self.after_history(k, self.k), self.after_history(v, self.v)
+             return self.after_history(k, self.k), self.after_history(v, self.v).roll(1, 1)
the prefix of the first clip: all clips became those of clip 0
- rope.rotate(self.unmoved_prefix_k, by)
+ rope.rotate(self.unmoved_prefix_k[:1], by)
the original is no copy: the moves add up
- self.k[:, : self.prefix_tokens].clone()
+ self.k[:, : self.prefix_tokens]
the original is copied at every move: the moves add up
-         if self.unmoved_prefix_k is None:
+         if True:
all keys move: only the prefix may move
- self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)
+ self.k[:] = rope.rotate(self.k, by)
values move too: values have no position
-         self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)
+         self.k[:, : self.prefix_tokens] = rope.rotate(self.unmoved_prefix_k, by)
+         self.v[:, : self.prefix_tokens] = rope.rotate(self.v[:, : self.prefix_tokens], by)
queries without gradient: no gradient reaches the queries
-     keys, values = cache.append(heads.keys(k), heads.split(v))
-     return attend_keys(heads.queries(q), keys, values)
+     keys, values = cache.append(heads.keys(k), heads.split(v))
+     return attend_keys(heads.queries(q).detach(), keys, values)
projections without gradient: no gradient reaches the keys
- cache.append(heads.keys(k), heads.split(v))
+ cache.append(heads.keys(k).detach(), heads.split(v))
raw queries: the queries are not normed and rotated
-     keys, values = cache.append(heads.keys(k), heads.split(v))
-     return attend_keys(heads.queries(q), keys, values)
+     keys, values = cache.append(heads.keys(k), heads.split(v))
+     return attend_keys(heads.split(q), keys, values)
keys prepared as queries: the keys are normed and rotated like queries
- cache.append(heads.keys(k), heads.split(v))
+ cache.append(heads.queries(k), heads.split(v))
values prepared as keys: the values are normed and rotated like keys
- cache.append(heads.keys(k), heads.split(v))
+ cache.append(heads.keys(k), heads.keys(v))
no division by sqrt(D): q k is not divided by sqrt(D)
-     keys, values = cache.append(heads.keys(k), heads.split(v))
-     return attend_keys(heads.queries(q), keys, values)
+     keys, values = cache.append(heads.keys(k), heads.split(v))
+     return attend_keys(heads.queries(q) * keys.shape[-1] ** 0.5, keys, values)
attention moves on: the cache moves on, but only the loop may do that
-     keys, values = cache.append(heads.keys(k), heads.split(v))
+     keys, values = cache.append(heads.keys(k), heads.split(v))
+     cache.next_block()
only the keys of the ring: queries do not attend to the pinned prefix
-     keys, values = cache.append(heads.keys(k), heads.split(v))
+     both = cache.append(heads.keys(k), heads.split(v))
+     keys, values = (x[:, cache.prefix_tokens :] for x in both)
the pin is ignored: no longer attends to the pinned block 0
- if not self.pinned and self.block > self.window:
+ if self.block > self.window:
only layer 0 moves: layer 1, video_self, block 4: 1 blocks are evicted
- self.move_prefixes(site, self._prefix_rotation(site, self.layers[0][site].k))
+ self.layers[0][site].move_prefix(self._prefix_rotation(site, self.layers[0][site].k))
only video moves: layer 0, audio_self, block 4
-             for site in SITES:
+             for site in ("video_self", "v2a"):
only the first eviction moves the prefix: must stand 2 s later than they were written; they stand
-         if self.num_evicted:
+         if self.num_evicted == 1:
only the first layer counts: layer 1, video_self is at block 0
-         for cache in self.caches:
+         for cache in self.layers[0].values():
the view does not count: the view is at block 0
-         self.block += 1
-         for cache
+         for cache
slots beside the ring: block 4 gets slots
- (self.block - 1) % self.ring_blocks * self.block_tokens
+ (self.block - 1) * self.block_tokens
the prefix as long as a block: block 0 has slots
- slice(0, self.prefix_tokens)
+ slice(0, self.block_tokens)
three blocks in every ring: the ring after the prefix holds blocks
- (self.block - 1) % self.ring_blocks
+ (self.block - 1) % 3
the cache never stops to grow: slots, not
- min(self.block, self.ring_blocks)
+ self.block
block 0 counts twice: slots, not
- self.prefix_tokens + min(self.block, self.ring_blocks)
+ self.prefix_tokens + min(self.block + 1, self.ring_blocks)
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
sites swapped: video attends to audio at 'v2a', but queries of 'a2v'
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
one stream loses a step: video: attend_captions is forgotten, or its result is lost
-         v = video.attend_captions(v, captions_v, mask)
+         video.attend_captions(v, captions_v, mask)
the level of the first clip: all clips get the levels of clip 0
-     sigma = sigma[..., None].to(x0.dtype)
+     sigma = sigma[:1, :, None].to(x0.dtype)
the clean clip is overwritten: an argument is changed in place
-     return (1 - sigma) * x0 + sigma * noise
+     x0 = x0.data.mul_(1 - sigma)
+     return x0 + sigma * noise
a level for every channel: not (1 - sigma) x0 + sigma noise
-     sigma = sigma[..., None].to(x0.dtype)
+     sigma = sigma[:, None].to(x0.dtype)
the dtype of sigma: the result has the dtype of x0
-     sigma = sigma[..., None].to(x0.dtype)
+     sigma = sigma[..., None]
noise by its square root: not (1 - sigma) x0 + sigma noise
- return (1 - sigma) * x0 + sigma * noise
+ return (1 - sigma**2).sqrt() * x0 + sigma * noise
noised without gradient: no gradient passes on to x0
- return (1 - sigma) * x0 + sigma * noise
+ return (1 - sigma) * x0.detach() + sigma * noise
x0 of the level of the first clip: all clips get the levels of clip 0
- sigma[..., None].to(wide) * v.to(wide)
+ sigma[:1, :, None].to(wide) * v.to(wide)
x0 without gradient: no gradient passes through
- v.to(wide)).to(x.dtype)
+ v.to(wide)).to(x.dtype).detach()
the velocity without gradient: no gradient reaches the velocity
- v.to(wide)).to(x.dtype)
+ v.detach().to(wide)).to(x.dtype)
x0 in float32: the result has the dtype of x
- v.to(wide)).to(x.dtype)
+ v.to(wide))
float64 is too wide: float64 tokens go through float32
- wide = torch.promote_types(x.dtype, torch.float32)
+ wide = torch.float32
divided by sigma: this is not the clean end
- * v.to(wide)).to(x.dtype)
+ * v.to(wide)).div(1 - sigma[..., None].to(wide)).to(x.dtype)
one level of a batch: levels (3,) became
- sigma if levels == 1
+ sigma[0] if levels == 1
levels of the first clip: all clips get the levels of clip 0
- sigma.repeat_interleave(x.shape[1] // levels, dim=1)
+ sigma[:1].repeat_interleave(x.shape[1] // levels, dim=1).expand(len(sigma), -1)
levels of tokens are refused: levels (3, 3) of 6 tokens
- sigma.repeat_interleave(x.shape[1] // levels, dim=1)
+ sigma.repeat_interleave(x.shape[1] // 2, dim=1)[:, : x.shape[1]]
angles in bfloat16: bfloat16 timesteps: angles must be computed in float32
-     angles = tau[..., None].float() * rates
+     angles = (tau[..., None] * rates.to(tau.dtype)).float()
the embedding in the dtype of tau: the embedding is in float32
- torch.cat([angles.cos(), angles.sin()], dim=-1)
+ torch.cat([angles.cos(), angles.sin()], dim=-1).to(tau.dtype)
rates rise: the rates must fall from 1
- torch.exp(-math.log(10000)
+ torch.exp(math.log(10000)
sines and cosines alternate: the rates must fall from 1
- torch.cat([angles.cos(), angles.sin()], dim=-1)
+ torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2)
width 256 always: (4, 2) timesteps became
-     half = width // 2
+     half = 128
x is not normed: x is not normalised
-         shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
-         y = modulated(norm(x, self.eps), scale, shift)
+         shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+         y = modulated(x, scale, shift)
the modulation without the table: the table is left out
- shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+ shift, scale, gate = (modulation.main[:, :, :3] + 0 * self.table[:3]).unbind(2)
rows of the first clip: the rows of clip 0 modulate all clips
- shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+ rows = (self.table[:3] + modulation.main[:1, :, :3]).expand(len(x), -1, -1, -1)
+         shift, scale, gate = rows.unbind(2)
rows of the MLP: queries are not of N(x) (1 + scale) + shift
- shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+ shift, scale, gate = (self.table[3:] + modulation.main[:, :, 3:]).unbind(2)
keys from x itself: keys and values are of the same tokens as queries
- self.self_attn(y, y, positions, positions, attend)
+ self.self_attn(y, x, positions, positions, attend)
keys without positions: queries and keys need the same rotation table
- self.self_attn(y, y, positions, positions, attend)
+ self.self_attn(y, y, positions, None, attend)
gate of one plus: the gate is 1 + gate
- x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+ x + gated(self.self_attn(y, y, positions, positions, attend), 1 + gate)
the residual of the modulated x: the residual is the modulated x
- x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+ y + gated(self.self_attn(y, y, positions, positions, attend), gate)
one row of modulation for all: video, 3 levels for 6 tokens: queries are not of N(x)
- shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+ shift, scale, gate = (self.table[:3] + modulation.main[:, :1, :3]).unbind(2)
epsilon of torch: queries are not of N(x) (1 + scale) + shift
-         shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
-         y = modulated(norm(x, self.eps), scale, shift)
+         shift, scale, gate = (self.table[:3] + modulation.main[:, :, :3]).unbind(2)
+         y = modulated(norm(x, 1e-6), scale, shift)
self attention forgotten: audio: attend_self is forgotten
-         a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
the context without gradient: the gradient that reaches audio is not complete
-         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
+         v = video.attend_other(v, q_v, c_a.detach(), m_v, r_v, r_a, at["a2v"])
the mask is not passed on: audio: the mask of the captions is forgotten
- audio.attend_captions(a, captions_a, mask)
+ audio.attend_captions(a, captions_a, None)
layer 0 always: this is layer 7, but it attends as layer 0
- view.attend, self.index, site
+ view.attend, 0, site
queries of the first stage: the queries are not those of its own cross_inputs
- v = video.attend_other(v, q_v, c_a
+ v = video.attend_other(v, v, c_a
video and audio swapped at the end: video: not the four steps of the drawing
- return video.mlp(v, m_v), audio.mlp(a, m_a)
+ return audio.mlp(a, m_a), video.mlp(v, m_v)
captions before self attention: video: not the four steps of the drawing, in their order
-         v = video.attend_self(v, m_v, ropes["video_self"], at["video_self"])
-         a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
-         v = video.attend_captions(v, captions_v, mask)
+         v = video.attend_captions(v, captions_v, mask)
+         v = video.attend_self(v, m_v, ropes["video_self"], at["video_self"])
+         a = audio.attend_self(a, m_a, ropes["audio_self"], at["audio_self"])
self rotations for the other stream: rotations of (queries, keys) are ['video_self', 'audio_self']
- r_v, r_a = ropes["video_cross"], ropes["audio_cross"]
+ r_v, r_a = ropes["video_self"], ropes["audio_self"]
the residual has no gradient: the gradient that reaches x is not complete
- x + gated(self.self_attn(y, y, positions, positions, attend), gate)
+ x.detach() + gated(self.self_attn(y, y, positions, positions, attend), gate)
tokens without gradient: the gradient that reaches video is not complete
-         v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])
+         v = video.attend_other(v.detach(), q_v, c_a, m_v, r_v, r_a, at["a2v"])
"""),
    "rollout": patches("""
joined along clips: Sizes of tensors must match
- torch.cat(video, 1), torch.cat(audio, 1)
+ torch.cat(video), torch.cat(audio)
frames taken for tokens: a frame has 2 tokens
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
last step re-noised: from the last x0: noise was added
-         if i < last:
-             noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
-             lower = like.new_full((1, 1), sigmas[i + 1])
-             x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
-     return x0
+         noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
+         lower = like.new_full((1, 1), sigmas[i + 1])
+         x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
+     return [model.add_noise(c, n, like.new_full((1, 1), 0.1)) for c, n in zip(x0, noise)]
an exit at the first pass counts as none: exit_step=0: passes at levels
- len(sigmas) - 2 if exit_step is None else exit_step
+ exit_step or len(sigmas) - 2
an exit at the last pass: exit_step=0: passes at levels
- len(sigmas) - 2 if exit_step is None else exit_step
+ len(sigmas) - 2
an exit one pass too late: exit_step=0: passes at levels
- len(sigmas) - 2 if exit_step is None else exit_step
+ len(sigmas) - 2 if exit_step is None else exit_step + 1
four passes in every denoising: with levels [1.0, 0.751, 0.545, 0.0] and exit_step=None
- len(sigmas) - 2 if exit_step is None else exit_step
+ min(3, len(sigmas) - 1) if exit_step is None else exit_step
the levels of the config: with levels [1.0, 0.751, 0.545, 0.0] and exit_step=None
-     last = len(sigmas) - 2
+     sigmas = net.cfg.sigmas
+     last = len(sigmas) - 2
levels from low to high: passes at levels
- like.new_full((len(like),), sigmas[i])
+ like.new_full((len(like),), sigmas[last - i])
video and audio at different levels: the clips, or video and audio, are at different levels
- net, *x, sigma, sigma, text, span, view
+ net, *x, sigma, sigma * 0.9, text, span, view
noise at the level of the pass before: for its level s =
- like.new_full((1, 1), sigmas[i + 1])
+ like.new_full((1, 1), sigmas[i])
noise added to x0 without scaling: for its level s =
- model.add_noise(c, n, lower) for c, n in zip(x0, noise)
+ c + sigmas[i + 1] * n for c, n in zip(x0, noise)
Euler steps without fresh noise: noise that was used before
-             x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
+             x = [c + sigmas[i + 1] / sigmas[i] * (n - c) for c, n in zip(x0, x)]
one noise for all clips: two clips get the same noise
- x = [model.add_noise(c, n, lower) for c, n in zip(x0, noise)]
+ x = [model.add_noise(c, n[:1], lower) for c, n in zip(x0, noise)]
noise of the global generator: global random numbers are used
- noise = model.draw_noise(len(like), span, net.cfg, generator, like.device
+ noise = model.draw_noise(len(like), span, net.cfg, None, like.device
noise of a seed of its own: another seed of the generator gives the same noise
- noise = model.draw_noise(len(like), span, net.cfg, generator, like.device
+ noise = model.draw_noise(len(like), span, net.cfg, torch.Generator().manual_seed(i), like.device
x0 without gradient: the exit pass carries no gradient
-     return x0
-
-
- @torch.no_grad()
+     return [c.detach() for c in x0]
+
+
+ @torch.no_grad()
gradients even under no_grad: gradients are switched on under no_grad
- in_training and i == last
+ i == last
the first pass carries the gradient: record a gradient
- in_training and i == last
+ in_training and i == 0
the noise is overwritten: an argument is changed in place
-     last = len(sigmas) - 2
+     x[0].mul_(0.5)
+     last = len(sigmas) - 2
the noisy block is returned: from the last x0
-     return x0
-
-
- @torch.no_grad()
+     return x
+
+
+ @torch.no_grad()
the text of nobody: a pass does not read the given text
- x0 = model.predict_x0(net, *x, sigma, sigma, text, span, view)
+ x0 = model.predict_x0(net, *x, sigma, sigma, None, span, view)
gradients stay off: gradients stay disabled for the caller
-         x0 = denoise(net, noise, sigmas, text, span, view, generator, exit_step)
+         x0 = denoise(net, noise, sigmas, text, span, view, generator, exit_step)
+         torch.set_grad_enabled(False)
every block starts from the same noise: blocks 1 and 2 start from the same noise
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         g = torch.Generator().manual_seed(generator.initial_seed())
+         noise = model.draw_noise(batch, span, cfg, g, like.device, like.dtype)
a seed of its own for every block: another seed of the generator gives the same noise
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         g = torch.Generator().manual_seed(k)
+         noise = model.draw_noise(batch, span, cfg, g, like.device, like.dtype)
blocks from the global generator: global random numbers are used
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         noise = model.draw_noise(batch, span, cfg, None, like.device, like.dtype)
noise of one clip for all: two clips of a batch start from the same noise
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         noise = model.draw_noise(1, span, cfg, generator, like.device, like.dtype)
+         noise = [x.expand(batch, -1, -1) for x in noise]
a batch of one: a pass over 1 clips reads 3 texts
- model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+ model.draw_noise(1, span, cfg, generator, like.device, like.dtype)
noise in float32: blocks have the dtype of the network
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         noise = model.draw_noise(batch, span, cfg, generator)
the first exit step for all: with exit_steps=[1, 0, 2] block 1
- exit_steps[k] if exit_steps else None
+ exit_steps[0] if exit_steps else None
the text of the first block: block 1 reads the prompt of another block
- block_span(k, cfg), text_at(k)
+ block_span(k, cfg), text_at(0)
the refresh reads the next text: block 0 reads the prompt of another block
- if history else x0, text, span, view)
+ if history else x0, text_at(k + 1), span, view)
the history is yielded: the generated blocks must be yielded all the same
-         yield Block(k, *x0)
+         yield Block(k, *(block_of(history, k, cfg) if history else x0))
the first block of the history alone: block 1: the given history is ignored
- block_of(history, k, cfg) if history else x0
+ block_of(history, k, cfg) if history and k == 0 else x0
the yielded block has no gradient: video of the yielded block 0 carries no gradient
-         yield Block(k, *x0)
+         yield Block(k, *(x.detach() for x in x0))
audio has no gradient: audio of the yielded block 0 carries no gradient
-         yield Block(k, *x0)
+         yield Block(k, x0[0], x0[1].detach())
a window of four by default: the default view evicts blocks
- view = view or CachedView(cfg, num_blocks)
+ view = view or CachedView(cfg, num_blocks, 4)
seed 0 for every block: another seed of the generator gives the same noise
-         noise = model.draw_noise(batch, span, cfg, generator, like.device, like.dtype)
+         g = torch.Generator().manual_seed(0)
+         noise = model.draw_noise(batch, span, cfg, g, like.device, like.dtype)
a cache for every block: the cache stands at block 0
-     for k in range(num_blocks):
+     for k in range(num_blocks):
+         view = CachedView(cfg, num_blocks) if k else view
the cache moves before the first block: the cache stands at block 1
-     for k in range(num_blocks):
+     view.next_block()
+     for k in range(num_blocks):
blocks counted from one: have the indices [1, 2, 3]
-         yield Block(k, *x0)
+         yield Block(k + 1, *x0)
no refresh at all: is refreshed at levels []
-             refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
refreshed twice: is refreshed at levels [0.0, 0.0]
-             refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
+             refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
+             refresh(net, block_of(history, k, cfg) if history else x0, text, span, view)
audio is refreshed at another level: all clips and both streams are at noise level 0
- net(*x0, zero, zero, text, span, view)
+ net(*x0, zero, zero + 0.42, text, span, view)
the refresh moves the cache: only the loop moves the cache on
-     net(*x0, zero, zero, text, span, view)
+     net(*x0, zero, zero, text, span, view)
+     view.next_block()
the refresh without its text: the refresh needs the text of its block
- net(*x0, zero, zero, text, span, view)
+ net(*x0, zero, zero, None, span, view)
the first block of every clip: video of block 1 is
- clip, block_span(k, cfg), cfg.tokens_per_frame
+ clip, block_span(0, cfg), cfg.tokens_per_frame
the first clip alone: video of block 0 is (1, 2, 24), not (3, 2, 24)
- video = video[:, span.video.start
+ video = video[:1, span.video.start
block 0 is always one video frame: video of block 0 is (3, 2, 24), not (3, 8, 24)
- video[:, span.video.start * per_frame : span.video.stop * per_frame]
+ video[:, max(0, 3 * k - 2) * per_frame : (3 * k + 1) * per_frame]
audio frames of many tokens: audio of block 0 is (3, 2, 10), not (3, 1, 10): a frame has 1 tokens
- audio[:, span.audio.start : span.audio.stop]
+ audio[:, span.audio.start * per_frame : span.audio.stop * per_frame]
a block without gradient: of block 0 carries no gradient
- return video, audio[:, span.audio.start : span.audio.stop]
+ return video, audio[:, span.audio.start : span.audio.stop].detach()
blocks must be a list: object
- _, video, audio = zip(*blocks)
+ _, video, audio = zip(*(blocks[k] for k in range(len(blocks))))
from the last block to the first: are not joined in order
- _, video, audio = zip(*blocks)
+ _, video, audio = zip(*list(blocks)[::-1])
the clip without gradient: the clip carries no gradient
- torch.cat(video, 1), torch.cat(audio, 1)
+ torch.cat(video, 1).detach(), torch.cat(audio, 1)
noise between passes in float32: every pass gets tokens in the dtype of the input
-             noise = model.draw_noise(len(like), span, net.cfg, generator, like.device, like.dtype)
+             noise = model.draw_noise(len(like), span, net.cfg, generator)
a generator read twice: can be read only once
-     _, video, audio = zip(*blocks)
-     return torch.cat(video, 1), torch.cat(audio, 1)
+     return torch.cat([b.video for b in blocks], 1), torch.cat([b.audio for b in blocks], 1)
a block cut out in float32: a block has the dtype of its clip
- return video, audio[:, span.audio.start : span.audio.stop]
+ return video.float(), audio[:, span.audio.start : span.audio.stop].float()
noise to the levels of the config: for its level s = 0.600
- sigmas[i + 1]
+ net.cfg.sigmas[i + 1]
blocks at the levels of the config: not [1.0, 0.8, 0.6, 0.3]
- denoise(net, noise, sigmas,
+ denoise(net, noise, cfg.sigmas,
the history of block 1 for ever: block 2: the given history is ignored
- block_of(history, k, cfg) if
+ block_of(history, min(k, 1), cfg) if
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
four passes whatever the levels: sigma = 0 was drawn, but it is no pass: 3 passes
- int(torch.randint(len(sigmas) - 1,
+ int(torch.randint(4,
an exit step of the global generator: global random numbers are used
- int(torch.randint(len(sigmas) - 1, (), generator=generator))
+ int(torch.randint(len(sigmas) - 1, ()))
the first pass is left out: 600 draws fell on the
- int(torch.randint(len(sigmas) - 1, (), generator=generator))
+ max(1, int(torch.randint(len(sigmas) - 1, (), generator=generator)))
an exit step as a tensor: an exit step is an int
- int(torch.randint(len(sigmas) - 1, (), generator=generator))
+ torch.randint(len(sigmas) - 1, (), generator=generator)
a random level instead of its index: an exit step is an int
- int(torch.randint(len(sigmas) - 1, (), generator=generator))
+ sigmas[int(torch.randint(len(sigmas) - 1, (), generator=generator))]
without the half: twice the gradient
- 0.5 * (x - (x - gradient).detach()).square().mean()
+ (x - (x - gradient).detach()).square().mean()
a sum instead of a mean: not divided by the number of elements
- .detach()).square().mean()
+ .detach()).square().sum()
only x is detached: the gradient over 3 elements is not gradient / 3
- (x - (x - gradient).detach())
+ (x - (x.detach() - gradient))
a loss for every element: a loss is a scalar
- .detach()).square().mean()
+ .detach()).square()
all is detached: the loss has no gradient at all
- (x - (x - gradient).detach())
+ (x - (x - gradient)).detach()
the mean of every clip: divided by the number of clips
- .detach()).square().mean()
+ .detach()).square().sum() / len(x)
the distance of the scores: not the distance of the two scores
- (x - real).abs()
+ (fake - real).abs()
no division: the divisor is missing
- (fake - real) / (distance + 1e-8)
+ fake - real
a distance for every token: the divisor is the mean of a token
- .mean((1, 2), keepdim=True)
+ .mean(2, keepdim=True)
the squared distance: not (fake - real) / mean |x - real|
- (x - real).abs().mean((1, 2), keepdim=True)
+ (x - real).square().mean((1, 2), keepdim=True)
divided by zero: division by zero where x equals real
- (distance + 1e-8)
+ distance
a large number against zero: not (fake - real) / mean |x - real|
- (distance + 1e-8)
+ (distance + 0.1)
scales of guidance swapped: this is the scale of the other stream
- teacher.Guided(real, captions, guidance)
+ teacher.Guided(real, captions, guidance[::-1])
video's scale for both: this is the scale of the other stream
- teacher.Guided(real, captions, guidance)
+ teacher.Guided(real, captions, (guidance[0], guidance[0]))
no guidance: the real score is not guided
- teacher.Guided(real, captions, guidance)
+ teacher.Guided(real, captions)
noise of the global generator: global random numbers are used
- [model.noise_like(x, generator) for x in clips]
+ [torch.randn_like(x) for x in clips]
levels of the global generator: global random numbers are used
- sigma = draw_score_sigmas(len(captions), generator)
-         noise =
+ sigma = draw_score_sigmas(len(captions), None)
+         noise =
levels of the teacher's training: draw them by `draw_score_sigmas`
- sigma = draw_score_sigmas(len(captions), generator)
-         noise =
+ sigma = teacher.draw_training_sigmas(len(captions), generator)
+         noise =
levels without the shift: draw them by `draw_score_sigmas`
- sigma = draw_score_sigmas(len(captions), generator)
-         noise =
+ sigma = MIN_TIME + (MAX_TIME - MIN_TIME) * torch.rand(len(captions), generator=generator)
+         noise =
one level for the batch: all clips share one noise level
- sigma = draw_score_sigmas(len(captions), generator)
-         noise =
+ sigma = draw_score_sigmas(1, generator).expand(len(captions))
+         noise =
the noise of the first clip: two clips get the same noise
- [model.noise_like(x, generator) for x in clips]
+ [model.noise_like(x[:1], generator).expand_as(x) for x in clips]
scores with a gradient: carry a gradient
-     with torch.no_grad():
-         sigma = draw_score_sigmas
+     with torch.enable_grad():
+         sigma = draw_score_sigmas
the losses without a gradient: does not require grad
-     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
+     return [surrogate(x.detach(), dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
one loss for both: one loss for video and one for audio, not 1
-     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
+     return [sum(surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f))]
audio first: video comes first, then audio
-     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
+     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)][::-1]
a causal mask on the scores: is bidirectional: a MaskedView without masks
- teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())
+ teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView({"a2v": None}))
clean clips for the scores: the scores do not see (1 - sigma) x + sigma noise
- noisy = [model.add_noise(x, n, sigma[:, None]) for x, n in zip(clips, noise)]
+ noisy = [x.detach() + 0 * n for x, n in zip(clips, noise)]
scores in the wrong places: dmd_losses: real and fake are swapped
- dmd_losses(made, captions, real, critic.model, guidance, g)
+ dmd_losses(made, captions, critic.model, real, guidance, g)
the teacher as both scores: the fake score is not the critic
- dmd_losses(made, captions, real, critic.model, guidance, g)
+ dmd_losses(made, captions, real, real, guidance, g)
the generator as a critic: the fake score is not the critic
- dmd_losses(made, captions, real, critic.model, guidance, g)
+ dmd_losses(made, captions, real, generator.model, guidance, g)
no guidance in the update: the guidance (2, 3) is not passed on
- dmd_losses(made, captions, real, critic.model, guidance, g)
+ dmd_losses(made, captions, real, critic.model, (1, 1), g)
the teacher learns: the critic learns, but another network is given
- critic_losses(critic.model, made, captions, g)
+ critic_losses(real, made, captions, g)
clips of other captions: `make` gets other captions than those drawn
-         made = make(generator.model, clips, captions, g)
-         video, audio
+         made = make(generator.model, clips, draw(batch, g)[1], g)
+         video, audio
captions of the generator's step: judged with other captions than they were made of
- critic_losses(critic.model, made, captions, g)
+ critic_losses(critic.model, made, draw(batch, g)[1], g)
real clips for the critic: critic step 1: the loss gets other clips
- critic_losses(critic.model, made, captions, g)
+ critic_losses(critic.model, [x + 1 for x in made], captions, g)
the critic makes clips: only the generator may make clips
-                 made = make(generator.model, clips, captions, g)
+                 made = make(critic.model, clips, captions, g)
a generator for the whole run: in a resumed run: one generator a step
-     def update(step):
-         g = trainer.generator(seed, step)
+     g = trainer.generator(seed, 0)
+
+     def update(step):
the step is ignored: `step` is ignored
- trainer.generator(seed, step)
+ trainer.generator(seed, 0)
the seed is ignored: `seed` is ignored
- trainer.generator(seed, step)
+ trainer.generator(0, step)
the same numbers for every critic step: different batches: draw and make new ones
-             clips, captions = draw(batch, g)
-             with torch.no_grad():
+             clips, captions = draw(batch, g := trainer.generator(seed, step))
+             with torch.no_grad():
nothing is returned: the update returns None
-         return {**losses, "critic v": critic_video, "critic a": critic_audio, "norm": norm}
numbers without names: expected losses by name
-         return {**losses, "critic v": critic_video, "critic a": critic_audio, "norm": norm}
+         return video, audio, norm
the norm is lost: generator's losses and norm by these names
- "critic a": critic_audio, "norm": norm}
+ "critic a": critic_audio}
one of two losses: losses of the steps are
- generator.update(video + audio, step)
+ generator.update(video, step)
the critic learns first: the steps are: critic
-         clips, captions = draw(batch, g)
-         made = make(generator.model, clips, captions, g)
-         video, audio
+         clips, captions = draw(batch, g)
+         with torch.no_grad():
+             made = make(generator.model, clips, captions, g)
+         critic.update(sum(critic_losses(critic.model, made, captions, g)), step)
+         made = make(generator.model, clips, captions, g)
+         video, audio
one optimiser for both: the steps are: generator, generator
- critic.update(critic_video + critic_audio, step)
+ generator.update(critic_video + critic_audio, step)
steps from zero: update(7) tells the learners the steps
- critic.update(critic_video + critic_audio, step)
+ critic.update(critic_video + critic_audio, _)
one example: but 1 examples are drawn
-         clips, captions = draw(batch, g)
-         made = make(generator.model, clips, captions, g)
-         video, audio
+         clips, captions = draw(1, g)
+         made = make(generator.model, clips, captions, g)
+         video, audio
no clips for the history: `make` does not get the drawn clips
-                 made = make(generator.model, clips, captions, g)
-             critic
+                 made = make(generator.model, None, captions, g)
+             critic
only video is judged: the generator's step: the loss gets other clips
- dmd_losses(made, captions, real, critic.model, guidance, g)
+ dmd_losses(made[:1], captions, real, critic.model, guidance, g)
audio is not learnt: dmd_losses: the loss of audio gets no gradient
- generator.update(video + audio, step)
+ generator.update(video + audio.detach(), step)
seed and step swapped: not those of trainer.generator(seed, step)
- trainer.generator(seed, step)
+ trainer.generator(step, seed)
a divisor of at least 1: the divisor is limited to 1
- (distance + 1e-8)
+ distance.clamp(min=1)
one loss for both streams: also depends on the other stream
-     return [surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f)]
+     both = sum(surrogate(x, dmd_gradient(x, *rf)) for x, *rf in zip(clips, r, f))
+     return both, both
the critic learns the drawn clips: critic step 1: the loss gets other clips
- critic_losses(critic.model, made, captions, g)
+ critic_losses(critic.model, clips, captions, g)
names of the streams swapped: generator's losses and norm by these names
- "video": video, "audio": audio
+ "video": audio, "audio": video
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
clean is a fifth level: draw whether a block is clean separately, not as level 4 of 5
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
one step between always: 3 levels with 3 steps between neighbours are 7
- for i in range(steps_between)]
+ for i in range(2)]
the last level forgotten: are 7, not 6
-     return fine
+     return fine[:-1]
every level twice: are 7, not
-         fine += [high
+         fine += [high] + [high
steps of equal ratio: not even
- high + (low - high) * (i + 1) / steps_between
+ (low if i + 1 == steps_between else (high - low) * 0.5 ** (i + 1) + low)
even steps from the first to the last level: off by one step: every 3. one is
-     return fine
+     n = len(fine) - 1
+     return [sigmas[0] + (sigmas[-1] - sigmas[0]) * i / n for i in range(n + 1)]
a mean without gradient: the mean has no gradient
- (x * mask).sum() / processes
+ (x.detach() * mask).sum() / processes
the mean of the means: the mean of the means of the rows
-     return (x * mask).sum() / processes.averaged(mask.sum()).clamp(min=1)
+     return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
a mean for every row: the mean is one number
-     return (x * mask).sum() / processes.averaged(mask.sum()).clamp(min=1)
+     return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)
the mean of nothing: the mean of nothing should be 0, not nan
- processes.averaged(mask.sum()).clamp(min=1)
+ mask.sum()
one more in the divisor: the mean of 2, 4 and 9
- processes.averaged(mask.sum()).clamp(min=1)
+ (mask.sum() + 1)
the sum alone: the sum is not divided
- / processes.averaged(mask.sum()).clamp(min=1)
+ / 1
the mask is turned round: the mean of 2, 4 and 9
- (x * mask).sum() / processes
+ (x * ~mask).sum() / processes
hidden elements set to 0 in x: an argument is changed in place
-     return (x * mask).sum() / processes
+     x.data[~mask] = 0
+     return (x * mask).sum() / processes
one level for all frames: is not in its state at level
-     index = levels.view(len(levels), 1, -1,
+     index = levels[:, :1].expand_as(levels).reshape(len(levels), 1, -1,
frames counted from the end: is not in its state at level
-     index = levels.view(len(levels), 1, -1,
+     index = levels.flip(1).view(len(levels), 1, -1,
an axis too many: (B, F, ...) is (2, 3, 2, 2), not
- .expand(-1, -1, -1, *trajectory.shape[3:])).squeeze(1)
+ .expand(-1, -1, -1, *trajectory.shape[3:]))
states without gradient: no gradient passes on to the states
- return trajectory.gather(
+ return trajectory.detach().gather(
levels sorted within a clip: the levels of a clip are not independent
- noisy.masked_fill(is_clean, levels - 1)
+ noisy.masked_fill(is_clean, levels - 1).sort(1)[0]
noise that falls with time: the levels of a clip are not independent
- noisy.masked_fill(is_clean, levels - 1)
+ noisy.sort(1)[0].masked_fill(is_clean, levels - 1)
half of the blocks are clean: of the blocks are clean, but CLEAN_SHARE is 25 %
- < CLEAN_SHARE
+ < 0.5
levels of four passes: of the blocks are clean, but CLEAN_SHARE is 25 %
- torch.randint(levels - 1, (batch, blocks), generator=generator)
+ torch.randint(4, (batch, blocks), generator=generator)
clean with the highest index of four: of the blocks are clean
- noisy.masked_fill(is_clean, levels - 1)
+ noisy.masked_fill(is_clean, 0)
block 0 is always clean: blocks 0 and 1 are both clean in
-     return noisy.masked_fill
+     is_clean[:, 0] = True
+     return noisy.masked_fill
levels of the global generator: global random numbers are used
- torch.randint(levels - 1, (batch, blocks), generator=generator)
+ torch.randint(levels - 1, (batch, blocks))
clean blocks of the global generator: global random numbers are used
- torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE
+ torch.rand(batch, blocks) < CLEAN_SHARE
a clip for every row: (B, N) is (6000, 3), not (3, 6000)
- return noisy.masked_fill(is_clean, levels - 1)
+ return noisy.masked_fill(is_clean, levels - 1).T
a clean block makes the next one noisy: draw them independently
-     return noisy.masked_fill
+     is_clean[:, 1] &= ~is_clean[:, 0] | (torch.rand(batch, generator=generator) < 0.2)
+     return noisy.masked_fill
audio without gradient: audio: the loss has no gradient
-     ends = video[:, -1]
+     x0 = x0[0], x0[1].detach()
+     ends = video[:, -1]
the losses are swapped: video comes first, then audio
- zip(x0, ends, (sigma_v, sigma_a))
+ [*zip(x0, ends, (sigma_v, sigma_a))][::-1]
no masks: the given view is ignored
- text, span, view)
-     ends
+ text, span, MaskedView())
+     ends
masks of its own: the given view is ignored
- text, span, view)
-     ends
+ text, span, masked_view(net.cfg, levels.shape[1]))
+     ends
one caption for all clips: does not read its own features
- net.project_text(*captions.features)
+ net.project_text(*(x[:1].expand_as(x) for x in captions.features))
video's features for both: audio does not read its own features
- net.project_text(*captions.features)
+ net.project_text(captions.features[0])
the levels of the config: has level
- torch.tensor(sigmas, device=levels.device)
+ torch.tensor(net.cfg.sigmas, device=levels.device)
indices instead of levels: has level
- sigma_v, sigma_a = sigma_of_level[level_v], sigma_of_level[level_a]
+ sigma_v, sigma_a = level_v.float() / (len(sigmas) - 1), level_a.float() / (len(sigmas) - 1)
one level for the clip: video has levels (3, 1), expected one for each frame or token
- sigma_v, sigma_a = sigma_of_level[level_v], sigma_of_level[level_a]
+ sigma_v, sigma_a = sigma_of_level[level_v][:, :1], sigma_of_level[level_a][:, :1]
three frames a block: has level
- level_v, level_a = (levels[:, blocks] for blocks in frame_blocks(levels.shape[1], net.cfg))
+ level_v, level_a = (levels[:, blocks] for blocks in frame_blocks(levels.shape[1], net.cfg))
+     level_v = levels[:, [max(0, (f + 2) // 3) % levels.shape[1] for f in range(level_v.shape[1])]]
the first state as a target: the target is the end of the trajectory
- ends = video[:, -1].flatten(1, 2), audio[:, -1]
+ ends = video[:, 0].flatten(1, 2), audio[:, 0]
the loss of clip 0: video: not the mean squared error over the tokens of noisy blocks
-         masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
+         masked_mean((p - end)[:1].square().mean(-1), model.per_token(s, p)[:1] > 0)
absolute errors: the error is not squared
- (p - end).square().mean(-1)
+ (p - end).abs().mean(-1)
a sum over channels: the sum over the channels, not their mean
- (p - end).square().mean(-1)
+ (p - end).square().sum(-1)
weighted by the noise: instead of 4
- (p - end).square().mean(-1), model
+ (p - end).square().mean(-1) * model.per_token(s, p), model
every clip counts alike: the mean of the means of the clips
-         masked_mean((p - end).square().mean(-1), model.per_token(s, p) > 0)
+         torch.stack([
+             masked_mean(error, level > 0)
+             for error, level in zip((p - end).square().mean(-1), model.per_token(s, p))
+         ]).mean()
two at least: the mean of 4 alone should be 4, not 2
- processes.averaged(mask.sum()).clamp(min=1)
+ mask.sum().clamp(min=2)
captions projected without gradient: their layers learn too
-     text = net.project_text(*captions.features)
+     with torch.no_grad():
+         text = net.project_text(*captions.features)
the fifth state as the end: the target is the end of the trajectory, here state 5
- ends = video[:, -1].flatten(1, 2), audio[:, -1]
+ ends = video[:, 4].flatten(1, 2), audio[:, 4]
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
six blocks in either layout: with 4 video frames in block 0 video is
-     blocks, sigmas = num_blocks(CLIP_SECONDS, net.cfg), net.cfg.sigmas
+     blocks, sigmas = 6, net.cfg.sigmas
one block a second: with 1 video frames in block 0 video is
-     blocks, sigmas = num_blocks(CLIP_SECONDS, net.cfg), net.cfg.sigmas
+     blocks, sigmas = CLIP_SECONDS, net.cfg.sigmas
captions without gradient: gives no gradient to the caption layers
-     text = net.project_text(*captions.features)
+     import torch
+     with torch.no_grad():
+         text = net.project_text(*captions.features)
only the last block learns: video of block 0 gives no gradient to the network
-     return whole_clip(rolled)
+     rolled = list(rolled)
+     detached = [b._replace(video=b.video.detach(), audio=b.audio.detach()) for b in rolled[:-1]]
+     return whole_clip([*detached, rolled[-1]])
nothing learns: carries no gradient, so nothing would be learnt
-     return whole_clip(rolled)
+     import torch
+     with torch.no_grad():
+         return whole_clip(rolled)
audio does not learn: audio carries no gradient
-     return whole_clip(rolled)
+     video, audio = whole_clip(rolled)
+     return video, audio.detach()
features of video for both: audio does not read its own captions
- net.project_text(*captions.features)
+ net.project_text(captions.features[0])
empty captions: video does not read its own captions
- net.project_text(*captions.features)
+ net.project_text(*captions.nothing)
the caption of the first clip: video does not read its own captions
- net.project_text(*captions.features)
+ net.project_text(*(x[:1].expand_as(x) for x in captions.features))
captions projected for every block: captions are projected 6 times, once is enough
- net, lambda k: text, blocks
+ net, lambda k: net.project_text(*captions.features) if k else text, blocks
one clip: a pass over 1 clips reads 3 texts
-         batch=len(captions),
exit steps of the global generator: global random numbers are used
- dmd.draw_exit_step(sigmas, generator)
+ dmd.draw_exit_step(sigmas, None)
noise of the global generator: global random numbers are used
- net, lambda k: text, blocks, sigmas, generator
+ net, lambda k: text, blocks, sigmas, None
all passes in every block: the exit step is never drawn
- exit_steps=exits * blocks if share_exit else exits
+ exit_steps=None
the window of inference by default: window=None: the cache keeps
- CachedView(net.cfg, blocks, window)
+ CachedView(net.cfg, blocks, window or 3)
a window of one block more: window=20: the cache keeps [21] blocks
- CachedView(net.cfg, blocks, window)
+ CachedView(net.cfg, blocks, window and window + 1)
the history of no clips: the history is made of something else
- history(clips) if history else None
+ history(None) if history else None
the history is returned: the clips must still be the generated ones
-         history=history(clips) if history else None,
-     )  # fmt: skip
-     return whole_clip(rolled)
+         history=(real := history(clips) if history else None),
+     )
+     made = whole_clip(rolled)
+     return real or made
the clips themselves as history: `history` is a function
- history(clips) if history else None
+ clips if history else None
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
one output too many in every chunk: inputs give
- self.first + self.stride * (inputs - 1)
+ self.first + self.stride * inputs
one output for the first input: 1 inputs give 240 outputs
- self.first + self.stride * (inputs - 1)
+ 1 + self.stride * (inputs - 1)
only the first clip is decoded: 3 clips became 1: decode the whole batch
-         out = self.decode(x)[:, :, low:high] if high > low else None
+         out = self.decode(x[:1])[:, :, low:high] if high > low else None
one channel alone: outputs
-         out = self.decode(x)[:, :, low:high] if high > low else None
+         out = self.decode(x)[:, :1, low:high] if high > low else None
an empty tensor while nothing is ready: the result is None, not an empty tensor
- self.decode(x)[:, :, low:high] if high > low else None
+ self.decode(x)[:, :, low : max(low, high)]
the new inputs alone: inputs and a look-ahead of 0 give [1, 17, 17, 17, 0] outputs
-         out = self.decode(x)[:, :, low:high] if high > low else None
+         here = max(0, self.done - start)
+         out = self.decode(x[:, :, here:])[:, :, : high - low] if high > low else None
done counts all inputs: inputs and a look-ahead of 2 give [0, 8, 8, 8, 0] outputs
- self.done = ready
+ self.done = self.given
the inputs that wait are dropped: give [0,
- x[:, :, max(0, self.done - self.context - start) :]
+ x[:, :, max(0, self.done - self.context - start) : self.done - start]
two inputs of context in every stream: inputs are kept; context
- max(0, self.done - self.context - start)
+ max(0, self.done - 2 - start)
context before the newest input: inputs
- max(0, self.done - self.context - start)
+ max(0, x.shape[2] - self.context)
the time axis is the last one: time is axis 2
- self.decode(x)[:, :, low:high] if high > low else None
+ self.decode(x)[..., low:high] if high > low else None
the first clip is decoded twice: 1 clips became 2: decode the whole batch
- self.decode(x)[:, :, low:high] if high > low else None
+ torch.cat([self.decode(x[:1])] * 2)[:, :, low:high] if high > low else None
a hundred mel frames a block: with 4 video latents in block 0, second
- self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
+ self.levels, self.mel_frames = levels[-1:], 1 + 100 * block.index
mel frames of all blocks in front: expected [24, 100, 24000]
- self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
+ self.levels, self.mel_frames = heard, self.mel_frames + len(levels)
the number of the second mel frame: phases depend on the number of the first mel frame
- heard, self.mel_frames - len(self.levels), self.cfg
+ heard, self.mel_frames, self.cfg
mel frames are not counted: phases depend on the number of the first mel frame
- self.levels, self.mel_frames = levels[-1:], self.mel_frames + len(levels)
+ self.levels, self.mel_frames = levels[-1:], 1
the levels that were heard: expected [24, 100, 24000]
- Chunk(frames, levels, samples[None])
+ Chunk(frames, heard, samples[None])
samples without channels: samples (1, n): the picture and sound of clip 0
- Chunk(frames, levels, samples[None])
+ Chunk(frames, levels, samples)
frames of all clips: became
- self.decode_video(block.video.float().cpu(), first)[0]
+ self.decode_video(block.video.float().cpu(), first)
the second clip: the frames differ from those of the clip
- self.decode_video(block.video.float().cpu(), first)[0]
+ self.decode_video(block.video.float().cpu(), first)[-1]
block 0 in the middle of a clip: block 0 became
- first = block.index == 0
+ first = False
levels of the last block for ever: a block begins at the last mel frame
- heard = torch.cat([self.levels, levels])
+ heard = torch.cat([self.levels * 0, levels])
the sound of a block without its seam: expected [24, 100, 24000]
- heard = torch.cat([self.levels, levels])
+ heard = levels
the codec itself, which nobody times: the stopwatch never sees the video decoder
- self.decode_video(block.video.float().cpu(), first)[0]
+ self.codec.decode_video(block.video.float().cpu(), first)[0]
"""),
    "generate": patches(r"""
NaN passes: --seconds nan: accepted as nan
- if not 0 < seconds <= MOST_SECONDS:
+ if seconds <= 0 or seconds > 1e9:
cues as they come: prompts are not sorted by time
-     cues.sort()
a cue at the end: one begins at the end
- if starts[-1] >= seconds:
+ if starts[-1] > seconds:
every colon ends a time: '0:30' has no space after its colon
-         check(words)
+         start, words = re.fullmatch(r"(?:\s*(\d+(?:\.\d+)?):)?(.*)", text, re.S).groups()
+         check(words)
words checked too late: a word is unknown
-         check(words)
a switch does not wait: block 2, which begins at second 1, reads
- index = prompt_at(block_interval(k, cfg)[0], cues)
+ index = prompt_at(block_interval(k, cfg)[1], cues)
blocks taken for seconds: which begins at second 1, reads
- index = prompt_at(block_interval(k, cfg)[0], cues)
+ index = prompt_at(k, cues)
a prompt projected for every block: keep their keys and values
-         while len(texts) <= index:
+         texts.clear()
+         while len(texts) <= index:
the same noise in every block: blocks 1 and 2 get the same noise
-         net, text_at, blocks, few_step_sigmas(cfg, steps), generators,
+         net, lambda k: [g.manual_seed(seed + b) for b, g in enumerate(generators)]
+         and text_at(k), blocks, few_step_sigmas(cfg, steps), generators,
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
whole seconds alone: --seconds 2.5 is refused
-         seconds = float(text)
+         seconds = float(int(text))
no upper limit: --seconds 1e99: accepted as
- if not 0 < seconds <= MOST_SECONDS:
+ if not 0 < seconds < float("inf"):
a day is too long: --seconds 86400 is refused
- if not 0 < seconds <= MOST_SECONDS:
+ if not 0 < seconds < MOST_SECONDS:
zero seconds: --seconds 0: accepted as
- if not 0 < seconds <= MOST_SECONDS:
+ if not 0 <= seconds <= MOST_SECONDS:
the number is not named: the message of --seconds 0 should name 0
- raise ValueError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
+ raise ValueError("--seconds: not a good number")
another kind of error: --seconds 0: TypeError instead of a ValueError
- raise ValueError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
+ raise TypeError(f"--seconds {text}: expected 1 to {MOST_SECONDS}")
seconds cut to whole ones: --seconds 2.5 is 2.5 seconds, not 2
-     return seconds
+     return float(int(seconds))
text instead of a number: --seconds 5 is 5.0 seconds, not 5
-     return seconds
+     return text
split at the last colon: is the cue
-         check(words)
+         start, _, words = text.rpartition(": ")
+         start = start if start.replace(".", "").isdigit() else (words := text) and 0
+         check(words)
any number with a colon: ['at 5: a train'] are refused
-         check(words)
+         found = re.search(r"(\d+(?:\.\d+)?):(?!\S)(.*)", text, re.S)
+         start, words = found.groups() if found else (0, text)
+         check(words)
whole seconds of cues: are refused: two prompts begin
-         check(words)
+         start, words = re.fullmatch(r"(?:(\d+):(?!\S))?(.*)", text, re.S).groups()
+         check(words)
one line of words: object has no attribute 'groups'
-         check(words)
+         start, words = re.fullmatch(r"(?:(\d+(?:\.\d+)?):(?!\S))?(.*)", text).groups()
+         check(words)
cues sorted as text: seconds are numbers, not text
-     cues.sort()
+     cues.sort(key=lambda cue: f"{cue.seconds:g}")
words as they come: words are
- Cue(float(start or 0), words.strip())
+ Cue(float(start or 0), words)
only neighbours in the list are compared: although two begin together later
- if len(set(starts)) < len(starts):
+ if starts[:2] == [0, 0]:
a first cue later than 0: although none begins at 0
-     if starts[0] != 0:
+     if starts[0] < 0:
a check of the first prompt alone: a word is unknown
-         check(words)
+         check(words) if not cues else None
the check gets the whole prompt: expected all words
-         check(words)
+         check(text)
four seconds are five blocks in either layout: in block 0, 4 seconds are 4 blocks, not 5
- cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
+ cfg, blocks = net.cfg, int(seconds) + 1
a block too few: 4 seconds are 5 blocks, not 4
- cfg, blocks = net.cfg, num_blocks(seconds, net.cfg)
+ cfg, blocks = net.cfg, int(seconds)
a prompt of words is a list: object has no attribute
-     cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
+     cues = prompt
only the first cue: reads 'red fast metal', not 'blue slow wood'
- index = prompt_at(block_interval(k, cfg)[0], cues)
+ index = 0
features of video for both: audio does not get its own features
-             texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
+             texts.append(net.project_text(features[0].to(like).expand(batch, -1, -1)))
features in float32: gets features in torch.float32
- f.to(like).expand(batch, -1, -1)
+ f.expand(batch, -1, -1)
two captions: 2 captions of video for 3 clips
- f.to(like).expand(batch, -1, -1)
+ f.to(like).expand(2, -1, -1)
the words of the toy: audio does not get its own features
- features = read(cues[len(texts)].prompt)
+ features = toy_source.toy_features(cues[len(texts)].prompt)
the global seed: global random numbers are used or seeded
- few_step_sigmas(cfg, steps), generators
+ few_step_sigmas(cfg, steps), torch.manual_seed(seed) and None
seed 0 always: another seed gives the same stream
- manual_seed((seed + b) % 2**32)
+ manual_seed(b)
a random seed: the same seed gives another stream
- generators = [torch.Generator().manual_seed((seed + b) % 2**32) for b in range(batch)]
+ generators = [(g := torch.Generator(), g.seed())[0] for b in range(batch)]
one generator for all clips: clip 1 of a batch from seed 3 is not the clip of seed 4
- few_step_sigmas(cfg, steps), generators
+ few_step_sigmas(cfg, steps), generators[0]
the same noise for all clips: two clips of a batch start from the same noise
- manual_seed((seed + b) % 2**32)
+ manual_seed(seed)
steps forgotten: steps=3 is not 3 passes
- few_step_sigmas(cfg, steps)
+ few_step_sigmas(cfg)
all noise levels as they are: steps=3 is not 3 passes
- few_step_sigmas(cfg, steps)
+ cfg.sigmas
one clip: batch=3 is not three clips
-         batch=batch, view=CachedView
+         view=CachedView
a window of four always: the window is not passed on
- view=CachedView(cfg, blocks, window)
+ view=CachedView(cfg, blocks, 4)
no window is a window of four: window=None should keep all blocks
- view=CachedView(cfg, blocks, window)
+ view=CachedView(cfg, blocks, window or 4)
a list of blocks: the stream runs before a block is asked for: return a generator
-     return without_gradients(
-         net, text_at, blocks, few_step_sigmas(cfg, steps), generators,
-         batch=batch, view=CachedView(cfg, blocks, window),
-     )  # fmt: skip
+     return list(without_gradients(
+         net, text_at, blocks, few_step_sigmas(cfg, steps), generators,
+         batch=batch, view=CachedView(cfg, blocks, window),
+     ))
at least a second: --seconds 0.5 is refused
- if not 0 < seconds <= MOST_SECONDS:
+ if not 1 <= seconds <= MOST_SECONDS:
the latest text of the list, whichever it is: reads 'green slow wood'
-         while len(texts) <= index:  # each prompt is projected once, when its time has come
-             features = read(cues[len(texts)].prompt)
-             texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
-             texts[:-1] = [None] * (len(texts) - 1)  # at full size, each has 1.2 GB
-         return texts[index]
+         if len(texts) <= index:
+             features = read(cues[len(texts)].prompt)
+             texts.append(net.project_text(*(f.to(like).expand(batch, -1, -1) for f in features)))
+         return texts[-1]
an end mark appended to the cues: the list of cues is changed
-     cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
+     cues = [Cue(0, prompt)] if isinstance(prompt, str) else prompt
+     cues.append(Cue(MOST_SECONDS, ""))
"""),
}
