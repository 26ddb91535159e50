"""Plausible mistakes: what graders must refuse, and what they must say about it.

exercise -> mistake -> (code of the module, what a student wrote instead, a phrase of the message)
"""

WRONG = {
    "masks": {
        "strict inequality": ("k <= q", "k < q", "inside a block everything sees everything"),
        "time reversed": ("k <= q", "k >= q", "a leak from the future"),
        "token-causal": (
            "frame_blocks(blocks, cfg)[0].repeat_interleave(cfg.tokens_per_frame)",
            "torch.arange(len(clip_span(blocks, cfg).video) * cfg.tokens_per_frame)",
            "token 1 (video, frame 0, block 0) is said to be in block 1",
        ),
        "window off by one": ("q - window", "q - window + 1", "the past is visible"),
        "prefix forgotten": (" | ((k == 0) & pinned)", "", "is seen by all, for ever"),
        "sinks limited to their block": (
            "allowed = k <= q",
            "allowed = (k <= q) & ((k > 0) | (q == 0))",
            "block 0, with prefix and sinks, is seen by all",
        ),
        "always pinned": ("(k == 0) & pinned", "k == 0", "it should leave the window"),
        "streams swapped": (
            '"a2v": may_attend(video, audio, window)',
            '"a2v": may_attend(audio, video, window)',
            "a2v is (keys, queries): who listens asks",
        ),
        "audio counted like video": (
            "later = 1 + (frame - prefix) // step",
            "later = 1 + (frame - prefix) // 3",
            "25 frames a block, frame 4 is in block 1",
        ),
        "block edge off by one": (
            "(frame - prefix) // step",
            "(frame - prefix + 1) // step",
            "frame 3 is in block 1, not 2",
        ),
        "tokens frame-minor": (
            "repeat_interleave(cfg.tokens_per_frame)",
            "repeat(cfg.tokens_per_frame)",
            "tokens are frame-major",
        ),
        "sinks behind the audio": (
            "[per_frame.new_zeros(cfg.num_sinks if sinks else 0), per_frame]",
            "[per_frame, per_frame.new_zeros(cfg.num_sinks if sinks else 0)]",
            "(sink 1) is said to be in block 1",
        ),
        "sinks outside of block 0": (
            "per_frame.new_zeros(cfg.num_sinks if sinks else 0)",
            "-torch.ones(cfg.num_sinks if sinks else 0, dtype=torch.long)",
            "(sink 0) is said to be in block -1",
        ),
    },
    "rope": {
        "all latents alike": (
            "torch.where(f == 0, 0.0, stride * f - stride + 1)",
            "stride * f",
            "latent 1 covers input frames 1..8, whose middle is 5.0",
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
        "turned backwards": (
            "return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)",
            "return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
            "every pair is turned the other way",
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
            "turn = 2 * seconds / cfg.rope_max_seconds",
            "turn = 2 * seconds / cfg.rope_max_seconds - 1",
            "this is the angle *of* 7 s",
        ),
        "a shift moves in space": (
            "turn * torch.eye(1, 3, dtype=torch.float64)",
            "turn * torch.ones(1, 3, dtype=torch.float64)",
            "a later key is at the same place",
        ),
    },
    "sink_tokens": {
        "sinks behind": (
            "[self.tokens.expand(len(x), -1, -1).to(x.dtype), x]",
            "[x, self.tokens.expand(len(x), -1, -1).to(x.dtype)]",
            "the sinks stand behind the audio",
        ),
        "sinks cannot learn": (
            "self.tokens.expand(len(x), -1, -1)",
            "self.tokens.detach().expand(len(x), -1, -1)",
            "no gradient reaches the sinks",
        ),
        "the wrong end removed": (
            "x[:, self.tokens.shape[1] :]",
            "x[:, : -self.tokens.shape[1]]",
            "audio was cut off behind",
        ),
        "sinks count as clean": (
            "sigma[:, :1].expand(-1, self.tokens.shape[1])",
            "sigma.new_zeros(len(sigma), self.tokens.shape[1])",
            "sinks count as clean",
        ),
        "a single level is repeated": (
            "if sigma.shape[1] == 1:",
            "if sigma.shape[1] == 0:",
            "it holds for the sinks already",
        ),
        "sinks rotated as time 0": (
            "return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)",
            "return rope.time_angles(torch.zeros(cfg.num_sinks, dtype=torch.float64), cfg)",
            "sinks are rotated: these are the angles of the time 0",
        ),
        "sinks rotated by index": (
            "return torch.zeros(cfg.num_sinks, cfg.audio_width // 2, dtype=torch.float64)",
            "return rope.time_angles(torch.arange(cfg.num_sinks).double(), cfg)",
            "they carry no position",
        ),
        "positions after A0": (
            "cfg.audio_stride * frames - 1)",
            "1 - cfg.audio_stride * frames)",
            "sinks stand at times after A0",
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
            "block 1 belongs into slots (3, 7)",
        ),
        "prefix not handed out": (
            "return self.k[:, self.first : self.num_filled]",
            "return self.k[:, self.prefix_tokens : self.num_filled]",
            "the pinned prefix and its sinks are evicted",
        ),
        "append moves on": (
            "            self.k[:, here], self.v[:, here] = k, v\n",
            "            self.k[:, here], self.v[:, here] = k, v\n        self.block += 1\n",
            "that is the loop's business",
        ),
        "history leaks": (
            "return self.after_history(k, self.k), self.after_history(v, self.v)",
            "self.seen = [*getattr(self, 'seen', []), (k, v)]\n"
            "            return [torch.cat(x, 1) for x in zip(*self.seen)]",
            "history leaks",
        ),
        "no gradient at all": (
            "if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)",
            "if not torch.is_grad_enabled()",
            "no gradient reaches the keys of the current block",
        ),
        "errors add up": (
            "rope.rotate(self.unmoved_prefix_k, by)",
            "rope.rotate(self.k[:, : self.prefix_tokens], by)",
            "turn the original keys",
        ),
        "raw keys remembered": (
            "cache.append(heads.keys(k), heads.split(v))",
            "cache.append(heads.split(k), heads.split(v))",
            "raw keys are attended to",
        ),
        "only the own block": (
            "    keys, values = cache.append(heads.keys(k), heads.split(v))",
            "    keys, values = heads.keys(k), heads.split(v)\n    cache.append(keys, values)",
            "queries see their own block only",
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
            "        self.move_on()\n        for site, by in self.shifts().items():",
            "        shifts = self.shifts()\n        self.move_on()\n"
            "        for site, by in shifts.items():",
            "they stand 2 s later",
        ),
        "unpinned is forgotten too early": (
            "self.block > self.window:",
            "self.block >= self.window:",
            "block 2 may still read block 0",
        ),
    },
    "model": {
        "time reversed": (
            "return (1 - sigma) * x0 + sigma * noise",
            "return sigma * x0 + (1 - sigma) * noise",
            "time runs the wrong way round",
        ),
        "with the velocity": (
            "(x.to(wide) - sigma[..., None]",
            "(x.to(wide) + sigma[..., None]",
            "v points from clean to noise",
        ),
        "rounded on the way": (
            "wide = torch.promote_types(x.dtype, torch.float32)",
            "wide = x.dtype",
            "rounded on the way",
        ),
        "levels alternate": (
            "sigma.repeat_interleave(x.shape[1] // levels, dim=1)",
            "sigma.repeat(1, x.shape[1] // levels)",
            "tokens are frame-major",
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
            "x + gated(self.self_attn(y, y, table, table, attend), gate)",
            "x + self.self_attn(y, y, table, table, attend)",
            "the gate is missing",
        ),
        "no residual": (
            "x + gated(self.self_attn",
            "gated(self.self_attn",
            "the residual is missing",
        ),
        "audio listens to a video that has listened": (
            "        q_a, c_a = half_a.listening(n_a, m_a), half_a.heard(n_a, m_a)\n"
            '        r_v, r_a = ropes["video_cross"], ropes["audio_cross"]\n'
            "        beside = self.fork()\n"
            '        v = half_v.attend_other(v, q_v, c_a, m_v, r_v, r_a, at("a2v"))\n',
            "        q_a, c_a = half_a.listening(n_a, m_a), half_a.heard(n_a, m_a)\n"
            '        r_v, r_a = ropes["video_cross"], ropes["audio_cross"]\n'
            "        beside = self.fork()\n"
            '        v = half_v.attend_other(v, q_v, c_a, m_v, r_v, r_a, at("a2v"))\n'
            "        c_v = half_v.heard(norm(v, self.cfg.norm_eps), m_v)\n",
            "audio hears video after that has listened",
        ),
        "sites swapped": (
            'm_v, r_v, r_a, at("a2v")',
            'm_v, r_v, r_a, at("v2a")',
            "video listens at v2a",
        ),
    },
    "dmd": {
        "sigma 0 is drawn": (
            "int(torch.randint(len(sigmas) - 1,",
            "int(torch.randint(len(sigmas),",
            "sigma = 0. It is no pass",
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
        "normaliser from the fake score": (
            "(x - real).abs()",
            "(x - fake).abs()",
            "it must not depend on the fake score",
        ),
        "normaliser of the batch": (
            "(x - real).abs().mean((1, 2), keepdim=True)",
            "(x - real).abs().mean()",
            "the normaliser is the batch's",
        ),
        "gradient everywhere": (
            "wants_gradient and i == last",
            "wants_gradient",
            "gradient everywhere",
        ),
        "last step re-noised": (
            "    return x0\n\n\ndef at_sigma",
            "    level = x0[0].new_full((1, 1), 0.4)\n"
            "    return [model.add_noise(c, n, level) for c, n in zip(x0, noise)]\n"
            "\n\ndef at_sigma",
            "it was re-noised",
        ),
        "a pass is missing": (
            "len(sigmas) - 2 if exit_step",
            "len(sigmas) - 3 if exit_step",
            "passes at levels",
        ),
        "the same noise again": (
            "zip(x0, fresh)]",
            "zip(x0, noise)]",
            "sees noise that was there before",
        ),
        "a noise level for each stream": (
            "        f = teacher.Guided(fake, captions).x0(*noisy, sigma, span, MaskedView())",
            "        sigma = draw_sigmas(len(captions), generator)\n"
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
            "            with torch.no_grad():  # clips of the moved generator, as data",
            "            with torch.enable_grad():",
            "the critic is trained through the generator",
        ),
        "critic once": (
            "in range(CRITIC_UPDATES)",
            "in range(1)",
            "who steps, in order: generator, critic",
        ),
        "clips used again": (
            "                made = make(generator.model, clips, captions, g)\n"
            "            critic_video",
            "                made = made\n            critic_video",
            "draw and make them afresh",
        ),
    },
    "ode_regression": {
        "off by one step": ("(i + 1) / steps_between", "i / steps_between", "off by one step"),
        "hidden elements dilute": (
            "/ processes.averaged(mask.sum()).clamp(min=1)",
            "/ mask.numel()",
            "dilute the mean",
        ),
        "levels of the next clip": (
            "index = levels.view(len(levels)",
            "index = levels.flip(0).view(len(levels)",
            "clip 0, frame 0 is not in its state",
        ),
        "clean is a fifth level": (
            "noisy = torch.randint(levels - 1,",
            "return torch.randint(levels,",
            "clean blocks are no fifth level",
        ),
        "one level a clip": (
            "noisy = torch.randint(levels - 1, (batch, blocks), generator=generator)",
            "noisy = torch.randint(levels - 1, (batch, 1), generator=generator).expand(-1, blocks)",
            "share their level",
        ),
        "clean by the clip": (
            "torch.rand(batch, blocks, generator=generator) < CLEAN_SHARE",
            "torch.rand(batch, 1, generator=generator) < CLEAN_SHARE",
            "are clean together in",
        ),
        "a level for each stream": (
            "    sigma_v, sigma_a = table[level_v]",
            "    level_a = level_a.roll(1, 0)\n    sigma_v, sigma_a = table[level_v]",
            "a block's video and audio share one level",
        ),
        "levels spread by rounding": (
            "    sigma_v, sigma_a = table[level_v]",
            "    spread = torch.arange(level_a.shape[1]) * level_v.shape[1] // level_a.shape[1]\n"
            "    level_a = level_v[:, spread]\n"
            "    sigma_v, sigma_a = table[level_v]",
            "audio frame 1 (block 1) is told level",
        ),
        "state of the next level": (
            "noisy = gather_states(video, level_v).flatten(1, 2)",
            "noisy = gather_states(video, (level_v + 1).clamp(max=4)).flatten(1, 2)",
            "it is in that at level 1",
        ),
        "loss on the noisy input": (
            "ends = video[:, -1].flatten(1, 2), audio[:, -1]",
            "ends = noisy",
            "the target is the end of the walk",
        ),
        "clean blocks supervised": (
            "model.per_token(s, p) > 0)",
            "model.per_token(s, p) >= 0)",
            "must not count in the mean",
        ),
    },
    "self_forcing": {
        "joined along clips": (
            "torch.cat(video, 1), torch.cat(audio, 1)",
            "torch.cat(video), torch.cat(audio)",
            "Sizes of tensors must match",
        ),
        "frames taken for tokens": (
            "video[:, span.video.start * per_frame : span.video.stop * per_frame]",
            "video[:, span.video.start : span.video.stop]",
            "a frame is 4 tokens",
        ),
        "cache filled from the noisy block": (
            "for x in clean]",
            "for x in noise]",
            "the cache is filled from something else than finished block 0",
        ),
        "refresh at the last level": (
            "past.latents, 0.0",
            "past.latents, sigmas[-2]",
            "the cache holds the keys of a noisy block",
        ),
        "the last block is refreshed": (
            "text, span)\n\n\ndef whole_clip",
            "text, span)\n    dmd.at_sigma(net, past.latents, 0.0, text, span, view)\n\n\n"
            "def whole_clip",
            "the last block needs no refresh",
        ),
        "history ignored": (
            "block_of(history, k, net.cfg) if history else x0",
            "x0",
            "a given history is ignored",
        ),
        "cache advanced twice": (
            "            view.next_block()",
            "            view.next_block(), view.next_block()",
            "the cache stands at block 2",
        ),
        "cache moves on before the refresh": (
            "        yield Block(k, *x0)\n",
            "        yield Block(k, *x0)\n        view.next_block()\n"
            "        view.next_block = lambda: None\n",
            "during pass 4 of block 0 the cache stands at block 1",
        ),
        "gradient through the refresh": (
            "with torch.no_grad():  # the cache holds data",
            "with torch.enable_grad():  # ",
            "which would reach across blocks",
        ),
        "exit step drawn per block": (
            "span, view, generator, exits[k], past)",
            "span, view, generator, dmd.draw_exit_step(sigmas, generator), past)",
            "one exit step for all blocks",
        ),
        "blocks are kept back": (
            "        yield Block(k, *x0)\n",
            "        if k:\n            yield Block(k - 1, *last)\n        last = x0\n"
            "        if k + 1 == blocks:\n            yield Block(k, *x0)\n",
            "block 0 is handed over after 9 passes",
        ),
        "never an early exit": (
            "exit_step=exits[0] if share_exit else exits, ",
            "",
            "the exit step is never drawn",
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
            "self._end(self.done - start), self._end(ready - start)",
            "self._end(self.done), self._end(ready)",
            "give [1, 24, ",
        ),
        "the context is handed out again": (
            "low, high = self._end(self.done - start), ",
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
            "phases follow the number of its first mel frame",
        ),
    },
    "generate": {
        "NaN passes": (
            'if not 0 < seconds < float("inf"):',
            "if seconds <= 0 or seconds > 1e9:",
            "--seconds nan is taken for nan",
        ),
        "cues as they come": ("    cues.sort()\n", "", "prompts are not in the order of time"),
        "a cue after the end": (
            "if starts[-1] >= seconds:",
            "if starts[-1] > seconds:",
            "one begins after the end",
        ),
        "words judged too late": (
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
            "keys and values can be kept",
        ),
        "the same noise in every block": (
            "    generator = torch.Generator().manual_seed(seed)\n",
            "    generator = torch.Generator().manual_seed(seed)\n"
            "    old_text_at = text_at\n\n"
            "    def text_at(k):\n"
            "        generator.manual_seed(seed)\n"
            "        return old_text_at(k)\n\n",
            "blocks 1 and 2 get the same noise",
        ),
        "window forgotten": (
            "blocks, sigmas, generator, batch, window, **how)",
            "blocks, sigmas, generator, batch, **how)",
            "the window is not handed on",
        ),
    },
}
