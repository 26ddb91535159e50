"""Plausible mistakes that must lose points, and what the message must say about each.

exercise -> mistake -> (code of the module, what a student wrote instead, a phrase of the message)
"""

WRONG = {
    "masks": {
        "strict inequality": (
            "k <= q",
            "k < q",
            "every token attends to every other one",
        ),
        "time reversed": ("k <= q", "k >= q", "a leak from the future"),
        "token-causal": (
            "frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)",
            "torch.arange(len(clip_span(blocks, cfg).video) * cfg.tokens_per_frame)",
            "token 1 (video, frame 0, block 0) got block 1",
        ),
        "window off by one": ("q - window", "q - window + 1", "the past is visible"),
        "prefix forgotten": (" | ((k == 0) & pinned)", "", "every query attends to block 0"),
        "sinks limited to their block": (
            "allowed = k <= q",
            "allowed = (k <= q) & ((k > 0) | (q == 0))",
            "every query attends to block 0, which holds prefix and sinks",
        ),
        "always pinned": ("(k == 0) & pinned", "k == 0", "should be hidden from blocks 3 and 4"),
        "streams swapped": (
            '"a2v": may_attend(video, audio, window)',
            '"a2v": may_attend(audio, video, window)',
            "a2v is (keys, queries): every query should be a row",
        ),
        "audio counted like video": (
            "later = 1 + (frame - prefix) // step",
            "later = 1 + (frame - prefix) // 3",
            "25 frames per block, frame 4 is in block 1",
        ),
        "block edge off by one": (
            "(frame - prefix) // step",
            "(frame - prefix + 1) // step",
            "frame 3 is in block 1, not 2",
        ),
        "tokens frame-minor": (
            "repeat_interleave(cfg.tokens_per_frame)",
            "repeat(cfg.tokens_per_frame)",
            "but all tokens of frame 0 come first",
        ),
        "sinks after the audio": (
            "[per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame]",
            "[per_frame, per_frame.new_zeros(cfg.num_sinks if sinks else 0)]",
            "(sink 1) got block 1",
        ),
        "sinks outside of block 0": (
            "per_frame.new_zeros(cfg.num_sinks if sinks else 0)",
            "-torch.ones(cfg.num_sinks if sinks else 0, dtype=torch.long)",
            "(sink 0) got block -1",
        ),
    },
    "rope": {
        "all latents alike": (
            "torch.where(f == 0, 0.0, stride * f - stride + 1)",
            "stride * f",
            "latent 1 covers input frames 1 to 8, their middle is 5.0",
        ),
        "end of the grid left out": (
            'torch.linspace(0, 1, width // (2 * axes), dtype=dtype, device="cpu")',
            "torch.arange(width // (2 * axes), dtype=dtype) / (width // (2 * axes))",
            "the last frequency is",
        ),
        "always float64": (
            "if cfg.rope_float64 else torch.float32",
            "if cfg else torch.float32",
            "the student's grid is too exact",
        ),
        "layouts confused": (
            'if rope.layout == "split"',
            'if rope.layout != "split"',
            "the channels are paired as in 'interleaved'",
        ),
        "rotated backwards": (
            "return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)",
            "return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
            "every pair rotates the other way",
        ),
        "index instead of time": (
            "torch.meshgrid(video_times(frames, cfg), *pixels",
            "torch.meshgrid(torch.arange(frames.start, frames.stop).double(), *pixels",
            "stands at t = 0, expected 0.02083 seconds",
        ),
        "corner instead of middle": (
            "dtype=torch.float64) + 0.5)",
            "dtype=torch.float64))",
            "stands at y = 0, expected 4 pixels",
        ),
        "columns before rows": (
            "y / cfg.rope_max_pixels, x / cfg.rope_max_pixels",
            "x / cfg.rope_max_pixels, y / cfg.rope_max_pixels",
            "stands at y = 12, expected 4",
        ),
        "a shift is a position": (
            "shift = 2 * seconds / cfg.rope_max_seconds",
            "shift = 2 * seconds / cfg.rope_max_seconds - 1",
            "this is the angle *of* 7 s",
        ),
        "a shift moves in space": (
            "shift * torch.eye(1, 3, dtype=torch.float64)",
            "shift * torch.ones(1, 3, dtype=torch.float64)",
            "but the key stays at the same place",
        ),
    },
    "sink_tokens": {
        "sinks after the audio": (
            "[self.tokens.expand(len(x), -1, -1).to(x.dtype), x]",
            "[x, self.tokens.expand(len(x), -1, -1).to(x.dtype)]",
            "the sinks stand after the audio",
        ),
        "sinks cannot learn": (
            "self.tokens.expand(len(x), -1, -1)",
            "self.tokens.detach().expand(len(x), -1, -1)",
            "no gradient reaches the sinks",
        ),
        "the wrong end removed": (
            "x[:, self.tokens.shape[1] :]",
            "x[:, : -self.tokens.shape[1]]",
            "the end of the audio is removed",
        ),
        "clean sinks": (
            "sigma[:, :1].expand(-1, self.tokens.shape[1])",
            "sigma.new_zeros(len(sigma), self.tokens.shape[1])",
            "the sinks are clean",
        ),
        "a single level is repeated": (
            "if sigma.shape[1] == 1:",
            "if sigma.shape[1] == 0:",
            "it applies to the sinks already",
        ),
        "sinks rotated as time 0": (
            "return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)",
            "return rope.time_angles(torch.zeros(cfg.num_sinks, dtype=torch.float64), cfg)",
            "sinks are rotated: these are the angles of time 0",
        ),
        "sinks rotated by index": (
            "return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)",
            "return rope.time_angles(torch.arange(cfg.num_sinks).double(), cfg)",
            "they have no position",
        ),
        "positions after A0": (
            "cfg.audio_stride * frames - 1)",
            "1 - cfg.audio_stride * frames)",
            "the sinks stand after A0",
        ),
    },
    "kv_cache": {
        "the current block has no room": (
            "min(self.block, self.ring_blocks)",
            "min(self.block, self.ring_blocks - 1)",
            "slots, not",
        ),
        "sinks evicted": (
            "start = self.prefix_tokens + (self.block - 1) % self.ring_blocks * self.block_tokens",
            "start = (self.block - 1) % self.ring_blocks * self.block_tokens",
            "over the prefix: its sinks are evicted",
        ),
        "ring off by one": (
            "(self.block - 1) % self.ring_blocks",
            "self.block % self.ring_blocks",
            "block 1 gets slots (3, 7)",
        ),
        "prefix not visible": (
            "slots = slice(self.first_visible, self.num_filled)",
            "slots = slice(self.prefix_tokens, self.num_filled)",
            "the pinned prefix and its sinks are evicted",
        ),
        "append moves on": (
            "            self.k[:, here], self.v[:, here] = k, v\n",
            "            self.k[:, here], self.v[:, here] = k, v\n        self.block += 1\n",
            "only the loop may do that",
        ),
        "the history keeps its gradient": (
            "return self.after_history(k, self.k), self.after_history(v, self.v)",
            "self.seen = [*getattr(self, 'seen', []), (k, v)]\n"
            "            return [torch.cat(x, 1) for x in zip(*self.seen)]",
            "the history must be detached",
        ),
        "no gradient at all": (
            "if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)",
            "if not torch.is_grad_enabled()",
            "no gradient reaches the keys of the current block",
        ),
        "moves add up": (
            "rope.rotate(self.unmoved_prefix_k, by)",
            "rope.rotate(self.k[:, : self.prefix_tokens], by)",
            "rotate the original keys",
        ),
        "raw keys appended": (
            "cache.append(heads.keys(k), heads.split(v))",
            "cache.append(heads.split(k), heads.split(v))",
            "queries attend to raw keys",
        ),
        "only the own block": (
            "    keys, values = cache.append(heads.keys(k), heads.split(v))",
            "    keys, values = heads.keys(k), heads.split(v)\n    cache.append(keys, values)",
            "queries attend to their own block only",
        ),
        "advances twice": (
            "            cache.next_block()",
            "            cache.next_block(), cache.next_block()",
            "is at block 4",
        ),
        "positions restart after eviction": (
            "                layer[site].move_prefix(by)",
            "                pass",
            "they stand 0 s later",
        ),
        "shift of the block before": (
            "                by = self._prefix_rotation(site, self.layers[0][site].k)",
            "                self.block -= 1  # as if the block were counted at the end\n"
            "                by = self._prefix_rotation(site, self.layers[0][site].k)\n"
            "                self.block += 1",
            "they stand 2 s later",
        ),
        "unpinned, block 0 is hidden too early": (
            "self.block > self.window:",
            "self.block >= self.window:",
            "block 2 may still attend to block 0",
        ),
    },
    "model": {
        "time reversed": (
            "return (1 - sigma) * x0 + sigma * noise",
            "return sigma * x0 + (1 - sigma) * noise",
            "the direction is wrong: sigma = 0 is clean",
        ),
        "with the velocity": (
            "(x.to(wide) - sigma[..., None]",
            "(x.to(wide) + sigma[..., None]",
            "v points from clean to noise, so go against it",
        ),
        "rounded too early": (
            "wide = torch.promote_types(x.dtype, torch.float32)",
            "wide = x.dtype",
            "rounded too early: compute in float32",
        ),
        "levels alternate": (
            "sigma.repeat_interleave(x.shape[1] // levels, dim=1)",
            "sigma.repeat(1, x.shape[1] // levels)",
            "but the tokens of a frame are consecutive",
        ),
        "sines first": (
            "[angles.cos(), angles.sin()]",
            "[angles.sin(), angles.cos()]",
            "sines come first",
        ),
        "last rate included": (
            "torch.arange(half, device=tau.device) / half",
            "torch.arange(half, device=tau.device) / (half - 1)",
            "divide by half",
        ),
        "shift and scale swapped": (
            "shift, scale, gate = (self.table[:3]",
            "scale, shift, gate = (self.table[:3]",
            "shift and scale are swapped",
        ),
        "no gate": (
            "x + gated(self.self_attn(y, y, positions, positions, attend), gate)",
            "x + self.self_attn(y, y, positions, positions, attend)",
            "the gate is missing",
        ),
        "no residual": (
            "x + gated(self.self_attn",
            "gated(self.self_attn",
            "the residual is missing",
        ),
        "audio attends to a video that has changed": (
            '        v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])\n',
            '        v = video.attend_other(v, q_v, c_a, m_v, r_v, r_a, at["a2v"])\n'
            "        _, c_v = video.cross_inputs(v, m_v)\n",
            "audio attends to video after video has changed",
        ),
        "sites swapped": (
            'm_v, r_v, r_a, at["a2v"]',
            'm_v, r_v, r_a, at["v2a"]',
            "video attends to the other stream at (7, 'v2a')",
        ),
        "rotations swapped": (
            "a, q_a, c_v, m_a, r_a, r_v,",
            "a, q_a, c_v, m_a, r_v, r_a,",
            "rotations of (queries, keys) are ['video_cross', 'audio_cross']",
        ),
        "captions forgotten": (
            "        a = audio.attend_captions(a, captions_a, mask)\n",
            "",
            "audio: attend_captions is forgotten",
        ),
        "MLP forgotten": (
            "return video.mlp(v, m_v), audio.mlp(a, m_a)",
            "return v, audio.mlp(a, m_a)",
            "video: mlp is forgotten",
        ),
        "one stream loses a step": (
            "        v = video.attend_captions(v, captions_v, mask)\n",
            "        video.attend_captions(v, captions_v, mask)\n",
            "attend_other loses the result before it",
        ),
    },
    "rollout": {
        "joined along clips": (
            "torch.cat(video, 1), torch.cat(audio, 1)",
            "torch.cat(video), torch.cat(audio)",
            "Sizes of tensors must match",
        ),
        "frames taken for tokens": (
            "video[:, span.video.start * per_frame : span.video.stop * per_frame]",
            "video[:, span.video.start : span.video.stop]",
            "a frame has 4 tokens",
        ),
        "refresh at the last level": (
            "zero = x0[0].new_zeros(len(x0[0]))",
            "zero = x0[0].new_full((len(x0[0]),), 0.4207186)",
            "the cache keeps the keys of a noisy block",
        ),
        "gradient through the refresh": (
            "@torch.no_grad()  # the cache holds data",
            "@torch.enable_grad()  #",
            "which would cross to later blocks",
        ),
        "gradient everywhere": (
            "in_training and i == last",
            "in_training",
            "too many passes record a gradient",
        ),
        "last step re-noised": (
            "    return x0\n\n\n@torch.no_grad()",
            "    return [model.add_noise(c, torch.randn_like(c), lower) for c in x0]\n"
            "\n\n@torch.no_grad()",
            "from the last x0: noise was added",
        ),
        "a pass is missing": (
            "len(sigmas) - 2 if exit_step",
            "len(sigmas) - 3 if exit_step",
            "passes at levels",
        ),
        "the same noise again": (
            "            noise = model.draw_noise(len(like),",
            "            noise = x if i == 0 else noise\n            model.draw_noise(len(like),",
            "sees noise that was used before",
        ),
        "cache filled from the noisy block": (
            "if history else x0, text",
            "if history else noise, text",
            "the refresh does not see the finished block 0",
        ),
        "the last block is refreshed": (
            "if k + 1 < num_blocks:",
            "if k < num_blocks:",
            "the last block needs no refresh",
        ),
        "history ignored": (
            "block_of(history, k, cfg) if history else x0",
            "x0",
            "the given history is ignored",
        ),
        "cache advanced twice": (
            "            view.next_block()",
            "            view.next_block(), view.next_block()",
            "the cache stands at block 2",
        ),
        "cache moves on before the refresh": (
            "        yield Block(k, *x0)",
            "        yield Block(k, *x0)\n        view.next_block()\n"
            "        view.next_block = lambda: None",
            "during pass 4 of block 0 the cache stands at block 1",
        ),
        "exit step drawn per block": (
            "exit_steps[k] if exit_steps else None",
            "int(torch.randint(len(sigmas) - 1, (), generator=generator)) if exit_steps else None",
            "with exit_steps=[1, 1, 1] block",
        ),
        "blocks are kept back": (
            "        yield Block(k, *x0)",
            "        if k:\n            yield Block(k - 1, *last)\n        last = x0\n"
            "        if k + 1 == num_blocks:\n            yield Block(k, *x0)",
            "block 0 is yielded after 9 passes",
        ),
        "a view of its own": (
            "view = view or CachedView(cfg, num_blocks)",
            "view = CachedView(cfg, num_blocks)",
            "the given view is not used",
        ),
    },
    "dmd": {
        "sigma 0 is drawn": (
            "int(torch.randint(len(sigmas) - 1,",
            "int(torch.randint(len(sigmas),",
            "sigma = 0 was drawn, but it is no pass",
        ),
        "missing detach": (
            "(x - (x - gradient).detach())",
            "(x - (x - gradient))",
            "detach it as a whole",
        ),
        "uphill": (
            "(x - (x - gradient).detach())",
            "(x - (x + gradient).detach())",
            "descent goes uphill",
        ),
        "sign": (
            "(fake - real) / (distance",
            "(real - fake) / (distance",
            "descent would move clips from real to fake",
        ),
        "divided by the distance to fake": (
            "(x - real).abs()",
            "(x - fake).abs()",
            "it must not depend on the fake score",
        ),
        "divided by the mean of the batch": (
            "(x - real).abs().mean((1, 2), keepdim=True)",
            "(x - real).abs().mean()",
            "the divisor is the mean of the batch",
        ),
        "a noise level for each stream": (
            "        f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())",
            "        sigma = draw_score_sigmas(len(captions), generator)\n"
            "        noisy = [model.add_noise(*xn, sigma[:, None]) for xn in zip(clips, noise)]\n"
            "        f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())",
            "the two scores see different noised clips",
        ),
        "guided critic": (
            "teacher.Guided(fake, captions)",
            "teacher.Guided(fake, captions, (2, 2))",
            "the fake score is guided",
        ),
        "real and fake swapped": (
            "zip(clips, r, f)]",
            "zip(clips, f, r)]",
            "real and fake are swapped",
        ),
        "critic trained through the generator": (
            "            with torch.no_grad():  # clips of the updated generator",
            "            with torch.enable_grad():  #",
            "the critic's step trains through the generator",
        ),
        "critic once": (
            "in range(CRITIC_UPDATES)",
            "in range(1)",
            "the steps are: generator, critic",
        ),
        "clips used again": (
            "                made = make(generator.model, clips, captions, g)\n"
            "            critic_video",
            "                made = made\n            critic_video",
            "draw and make new ones",
        ),
    },
    "ode_regression": {
        "off by one step": ("(i + 1) / steps_between", "i / steps_between", "off by one step"),
        "hidden elements dilute": (
            "/ processes.averaged(mask.sum()).clamp(min=1)",
            "/ mask.numel()",
            "count only what the mask keeps",
        ),
        "levels of the next clip": (
            "index = levels.view(len(levels)",
            "index = levels.flip(0).view(len(levels)",
            "clip 0, frame 0 is not in its state",
        ),
        "clean is a fifth level": (
            "noisy = torch.randint(levels - 1,",
            "return torch.randint(levels,",
            "not as a fifth level",
        ),
        "one level a clip": (
            "noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)",
            "noisy = torch.randint(levels - 1, (batch, 1), generator=generator).expand(-1, blocks)",
            "share their level",
        ),
        "clean by the clip": (
            "torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE",
            "torch.rand(batch, 1, generator=generator) < CLEAN_SHARE",
            "are both clean in",
        ),
        "a level for each stream": (
            "    sigma_v, sigma_a = sigma_of_level[level_v]",
            "    level_a = level_a.roll(1, 0)\n    sigma_v, sigma_a = sigma_of_level[level_v]",
            "video and audio of a block share one level",
        ),
        "levels spread by rounding": (
            "    sigma_v, sigma_a = sigma_of_level[level_v]",
            "    spread = torch.arange(level_a.shape[1]) * level_v.shape[1] // level_a.shape[1]\n"
            "    level_a = level_v[:, spread]\n"
            "    sigma_v, sigma_a = sigma_of_level[level_v]",
            "audio frame 1 (block 1) has level",
        ),
        "state of the next level": (
            "noisy = gather_states(video, level_v).flatten(1, 2)",
            "noisy = gather_states(video, (level_v + 1).clamp(max=4)).flatten(1, 2)",
            "but it is in that at level 1",
        ),
        "loss on the noisy input": (
            "ends = video[:, -1].flatten(1, 2), audio[:, -1]",
            "ends = noisy",
            "the target is the end of the trajectory",
        ),
        "clean blocks supervised": (
            "model.per_token(s, p) > 0)",
            "model.per_token(s, p) >= 0)",
            "must not count in the mean",
        ),
    },
    "self_forcing": {
        "an exit step for every block": (
            "draws = 1 if share_exit else blocks",
            "draws = blocks",
            "exit steps differ between blocks",
        ),
        "never an early exit": (
            "        exit_steps=exits * blocks if share_exit else exits,\n",
            "",
            "the exit step is never drawn",
        ),
        "always one exit step": (
            "exits * blocks if share_exit else exits",
            "exits[:1] * blocks",
            "share_exit=False, but all blocks have",
        ),
        "window forgotten": (
            "CachedView(net.cfg, blocks, window)",
            "CachedView(net.cfg, blocks)",
            "the window is not passed on",
        ),
        "history forgotten": (
            "history(clips) if history else None",
            "None",
            "the history of the clips is ignored",
        ),
    },
    "decoders": {
        "the first input as long as the others": (
            "0 if inputs <= 0 else self.first + self.stride * (inputs - 1)",
            "max(0, self.stride * inputs)",
            "the first 1, the others 8",
        ),
        "nothing is negative": (
            "0 if inputs <= 0 else self.first",
            "self.first",
            "-2 inputs give 0 outputs",
        ),
        "counted from the start of the stream": (
            "self._num_outputs(self.done - start), self._num_outputs(ready - start)",
            "self._num_outputs(self.done), self._num_outputs(ready)",
            "give [1, 24, ",
        ),
        "the context is returned again": (
            "low, high = self._num_outputs(self.done - start), ",
            "low, high = 0, ",
            "give [1, 25, ",
        ),
        "no context": (
            "max(0, self.done - self.context - start)",
            "max(0, self.done - start)",
            "of 1, 3, 3, 3 inputs and a look-ahead of 0 give",
        ),
        "one input of context too few": (
            "max(0, self.done - self.context - start)",
            "max(0, self.done - self.context + 1 - start)",
            "differs from the sequence decoded at once",
        ),
        "everything is kept": (
            "x[:, :, max(0, self.done - self.context - start) :]",
            "x",
            "context 3 and look-ahead 2 need 5",
        ),
        "every block starts a clip": ("first = block.index == 0", "first = True", "block 1 became"),
        "a seam in the sound": (
            "heard = torch.cat([self.levels, levels])",
            "heard = torch.cat([levels[:1] if len(self.levels) else self.levels, levels])",
            "a block begins at the last mel frame",
        ),
        "phases start anew": (
            "heard, self.mel_frames - len(self.levels), self.cfg",
            "heard, 0, self.cfg",
            "phases depend on the number of the first mel frame",
        ),
    },
    "generate": {
        "NaN passes": (
            'if not 0 < seconds < float("inf"):',
            "if seconds <= 0 or seconds > 1e9:",
            "--seconds nan is accepted as nan",
        ),
        "cues as they come": ("    cues.sort()\n", "", "prompts are not sorted by time"),
        "a cue at the end": (
            "if starts[-1] >= seconds:",
            "if starts[-1] > seconds:",
            "one begins at the end",
        ),
        "words checked too late": (
            "        check(words)\n",
            "",
            "a word is unknown",
        ),
        "a switch does not wait": (
            "prompt_at(block_interval(k, cfg)[0], cues)",
            "prompt_at(block_interval(k, cfg)[1], cues)",
            "block 2, which begins at second 1, reads",
        ),
        "blocks taken for seconds": (
            "prompt_at(block_interval(k, cfg)[0], cues)",
            "prompt_at(k, cues)",
            "which begins at second 1, reads",
        ),
        "a prompt projected for every block": (
            "        while len(texts) <= index:",
            "        texts.clear()\n        while len(texts) <= index:",
            "keep their keys and values",
        ),
        "the same noise in every block": (
            "    return without_gradients(\n"
            "        net, text_at, blocks, few_step_sigmas(cfg, steps), "
            "torch.Generator().manual_seed(seed),",
            "    generator = torch.Generator().manual_seed(seed)\n\n"
            "    def seed_and_text(k):\n"
            "        generator.manual_seed(seed)\n"
            "        return text_at(k)\n\n"
            "    return without_gradients(\n"
            "        net, seed_and_text, blocks, few_step_sigmas(cfg, steps), generator,",
            "blocks 1 and 2 get the same noise",
        ),
        "window forgotten": (
            "view=CachedView(cfg, blocks, window)",
            "view=CachedView(cfg, blocks)",
            "the window is not passed on",
        ),
        "gradients recorded": (
            "torch.inference_mode()(rollout)",
            "rollout",
            "the stream records a gradient",
        ),
        "gradients disabled for the caller": (
            "    without_gradients = torch.inference_mode()(rollout)\n",
            "    def without_gradients(*args, **options):\n"
            "        with torch.inference_mode():\n"
            "            yield from rollout(*args, **options)\n\n",
            "gradients stay disabled for the caller",
        ),
    },
}
