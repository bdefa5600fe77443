'''Bugs a reader could write, or that well-known projects did ship, each as one change to the code of one page: a
lesson, or a page of the workshop ("workshop/run").

`bug(id, what, old, new)`: `old` occurs exactly once in the exported cells of the page. `seen`: project and issue or
pull request where this bug, or a question caused by it, can be read. `tests`: what runs if the page lets the bug
through, "test_file.py" or "test_file.py -k word"; for a lesson tests/test_MODULE.py by default; "" for none.
`page=False`: the page is not about this and is not asked, only the tests are.
'''
import re
from collections import namedtuple

Bug = namedtuple("Bug", "lesson id what old new seen tests page", defaults=(True,))
BUGS = []

MODULES = {  # of pages whose module has another name
    "11_few_steps": "distill",
    "workshop/core": "core"}

def lesson(name, tests=None):
    "The function that adds bugs to one lesson."
    usual = f"test_{MODULES.get(name, name[3:])}.py" if tests is None else tests
    def bug(id, what, old, new, seen="", tests=usual, page=True):
        BUGS.append(Bug(name, id, what, old, new, seen, tests, page))
    return bug

# 05_sample -> diffnb/sample.py, 11_few_steps -> diffnb/distill.py, workshop/run -> diffnb/workshop/run.py,
# workshop/core -> diffnb/core.py
Bug.module = property(lambda self: MODULES.get(self.lesson, re.sub(r"^\d\d_", "", self.lesson)))


# ---------------------------------------------------------------- 01 data
bug = lesson("01_data")
bug(
    "bytes-truncated", "to_uint8 cuts fractions off instead of rounding", ".round().clamp(0, 255).to(torch.uint8)",
    ".clamp(0, 255).to(torch.uint8)")
bug(
    "bytes-wrap", "to_uint8 lets values beyond 1 wrap round to black", ".round().clamp(0, 255).to(torch.uint8)",
    ".round().to(torch.int64).to(torch.uint8)")
bug("range-128", "to_float divides by 128, so white is not 1", "images.float() / 127.5 - 1", "images.float() / 128 - 1")
bug(
    "no-antialias", "images are shrunk without antialiasing", '{"antialias": True}', '{"antialias": False}',
    "Lightning-AI/torchmetrics#3130")
bug(
    "resize-truncates", "resized bytes are cut instead of rounded", "batch = batch.round().clamp(0, 255)",
    "batch = batch.clamp(0, 255)")
bug(
    "filter-ignored", "the filter asked for is ignored: always bicubic",
    "resize(images, self.size, self.interpolation)", "resize(images, self.size)")
bug("flip-per-batch", "one coin decides for the whole batch", "draw(len(x0), 1, 1, 1) < 0.5", "draw(1, 1, 1, 1) < 0.5")
bug("flip-upside-down", "flips turn images upside down", "x0.flip(-1), x0)", "x0.flip(-2), x0)")
bug("jitter-per-batch", "one colour factor for the whole batch", "draw(3, len(x0), 1, 1, 1)", "draw(3, 1, 1, 1, 1)")
bug("jitter-unclamped", "jittered images leave [-1, 1]", "x0 = (2 * x - 1).clamp(-1, 1)", "x0 = 2 * x - 1")
bug(
    "brightness-around-grey", "brightness scales around mid-grey, so that black gets darker and lighter",
    "x = (x0 + 1) / 2 * brightness", "x = (x0 * brightness + 1) / 2")
bug(
    "saturation-reversed", "a saturation factor of 1 gives grey", "x.mean(1, keepdim=True).lerp(x, saturation)",
    "x.lerp(x.mean(1, keepdim=True), saturation)")
bug(
    "same-order-each-epoch", "every epoch visits the images in the same order", "_permutation(n, seed, epoch)[",
    "_permutation(n, seed, 0)[")
bug(
    "order-ignores-seed", "runs with different seeds see the images in the same order",
    'addressed(seed, "epoch", epoch)', 'addressed("epoch", epoch)')
bug(
    "epoch-border", "a batch across the end of an epoch repeats images of the old one", "divmod(start + have, n)",
    "divmod(start, n)")


# ---------------------------------------------------------------- 02 schedule
bug = lesson("02_schedule")
bug("alias", "a schedule shares memory with the tensor it was made from", "a = a.double().clone()", "a = a.double()")
bug(
    "variance-for-std", "for an int t the variance stands where the standard deviation belongs",
    "else (self.a[t].item(), self.s[t].item())", "else (self.a[t].item(), self.s[t].item() ** 2)",
    "huggingface/diffusion-models-class#18")
bug(
    "variance-for-std-table", "the table holds the variance where the standard deviation belongs",
    "torch.stack([self.a, self.s])", "torch.stack([self.a, self.s ** 2])", "acids-ircam/diffusion_models#1")
bug("table-bf16", "the levels are kept in bf16, where the first timesteps lose none of the signal",
    "torch.stack([self.a, self.s])], 1).float()", "torch.stack([self.a, self.s])], 1).bfloat16().float()")
bug(
    "table-shifted", "every timestep gets the noise of the one before it", "index_select(1, t.flatten() + 1)",
    "index_select(1, t.flatten())")
bug(
    "alpha-bar-unrooted", "the image is scaled by alpha_bar instead of its root",
    "return a * x0.float() + s * noise.float()", "return a ** 2 * x0.float() + s * noise.float()")
bug(
    "scaled-linear", "the betas of Stable Diffusion (linear in the root) pass for those of DDPM",
    "beta = torch.linspace(beta_start, beta_end, _check_T(T), dtype=torch.float64)",
    "beta = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, _check_T(T), dtype=torch.float64) ** 2")
bug(
    "cosine-unclipped", "betas of the cosine schedule reach 1, so that nothing is left at the end", ".clamp(max=0.999)",
    "")
bug("cosine-unsquared", "the cosine is not squared", "math.pi / 2).cos() ** 2", "math.pi / 2).cos()")
bug(
    "tau-ignored", "the temperature of the sigmoid schedule has no effect on its curve",
    "((u * (end - start) + start) / tau).sigmoid()", "((u * (end - start) + start)).sigmoid()")
bug(
    "snr-of-amplitudes", "the SNR is a ratio of amplitudes, not of powers", "self.alpha_bar.log() - 2 * self.s.log()",
    "0.5 * self.alpha_bar.log() - self.s.log()")
bug(
    "shift-unsquared", "shifting divides the SNR by scale instead of its square", "(1 - self.alpha_bar) * scale ** 2",
    "(1 - self.alpha_bar) * scale")
bug(
    "zero-snr-unscaled", "zero terminal SNR moves the curve without stretching it: the first timestep changes",
    "((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2", "(a - a[-1]) ** 2")
bug(
    "shift-after-zero-snr", "make_schedule forgets the shift if zero terminal SNR is asked for",
    "return schedule.zero_terminal_snr() if zero_terminal_snr",
    "return _SCHEDULES[name](T).zero_terminal_snr() if zero_terminal_snr")
bug(
    "v-sign", "the target v has its sign reversed", "return a * noise.float() - s * x0.float()",
    "return s * x0.float() - a * noise.float()")
bug(
    "v-to-x0-sign", "x0 from v adds where it must subtract",
    "return (a * x_t.float() - s * output.float()) / (a ** 2 + s ** 2)",
    "return (a * x_t.float() + s * output.float()) / (a ** 2 + s ** 2)")
bug(
    "x0-unrooted", "x0 from eps divides by alpha_bar instead of its root", "(x_t.float() - s * output.float()) / a",
    "(x_t.float() - s * output.float()) / a ** 2")
bug(
    "eps-unrooted", "eps from x0 divides by the variance", "(x_t.float() - a * x0.float()) / s",
    "(x_t.float() - a * x0.float()) / s ** 2")
bug(
    "zero-snr-silent", "eps prediction at zero terminal SNR divides by zero instead of saying so",
    "if self.alpha_bar[-1] == 0 and bool(", "if False and bool(")
bug("trailing-floor", "trailing spacing rounds down", "round(Fraction(T * (j + 1), S)) - 1", "T * (j + 1) // S - 1")
bug(
    "extra-steps", "range(0, T, T // S) yields more steps than were asked for", "for j in reversed(range(steps))]",
    "for j in reversed(range(len(range(0, self.T, self.T // steps))))]")
bug(
    "linspace-beyond", "linspace spacing begins at T, one beyond the last timestep", "round((T - 1) * u),",
    "round(T * u),")
bug(
    "quadratic-doubles", "quadratic spacing visits a timestep twice", "max(j, round((T - 1) * u * u))",
    "round((T - 1) * u * u)")
bug(
    "ends-at-alpha-bar-0", "the last step ends at alpha_bar_0 instead of 1 and leaves noise in the image",
    "ts[1:] + [-1]", "ts[1:] + [0]", "Stability-AI/stablediffusion#345")
bug(
    "next-computed", "the next timestep is computed as t - T//S instead of taken from the list",
    "list(zip(ts, ts[1:] + [-1]))", "[(t, max(t - self.T // steps, -1)) for t in ts]", "huggingface/diffusers#12633")
bug(
    "leading-by-default", "samplers begin below T-1, where they have never seen pure noise",
    'spacing="trailing" # see timesteps\n               )', 'spacing="leading" # see timesteps\n               )',
    "huggingface/diffusers#2585")
bug(
    "spectrum-uncentred", "the covariance forgets to subtract the mean", "products / n - means.T @ totals / n",
    "products / n")
bug(
    "floor-eps-x0", "the loss floors of eps and x0 are exchanged", '{"eps": a ** 2, "x0": s ** 2,',
    '{"eps": s ** 2, "x0": a ** 2,')
bug("floor-v", "the loss floor of v is that of eps", '"v": (a ** 2 + s ** 2) ** 2,', '"v": a ** 2,')
bug(
    "floor-formula", "the floor's denominator forgets that the signal is scaled", "(a ** 2 * v + s ** 2)",
    "(v + s ** 2)")
bug("floor-deaf", "the floor of a denoiser that is told the class is that of one that is not",
    "return [(1.0, image_spectrum(images, y=group))]", "return [(1.0, image_spectrum(images))]")
bug("floor-own-always", "classes of few images get a covariance of their own, which remembers them",
    "if counts.min() < COVARIANCE_IMAGES * images[0].numel():", "if False:")
bug("floor-unweighted", "the floor sums over the classes without their shares",
    "sum(share * (s ** 2 * v", "sum((s ** 2 * v")
bug(
    "flow-ends-early", "the flow ends before pure noise: its last timestep still holds some image",
    "s = torch.arange(1, _check_T(T) + 1, dtype=torch.float64) / T",
    "s = torch.arange(1, _check_T(T) + 1, dtype=torch.float64) / (T + 1)")
bug("flow-unsquared", "the flow's a takes the place of its square, so that image and noise do not add up to 1",
    "NoiseSchedule((1 - s) ** 2, s)", "NoiseSchedule(1 - s, s)")
bug(
    "flow-shift-squared", "on the flow a shift counts twice", "if self.straight: # keep a + s = 1",
    "if self.straight:\n        scale = scale ** 2")
bug(
    "flow-shift-bends", "a shifted flow preserves variance and is straight no more",
    "if self.straight: # keep a + s = 1", "if False:")
bug("snr-preserving", "the SNR takes the noise for what variance preservation leaves of it",
    "self.alpha_bar.log() - 2 * self.s.log()", "self.alpha_bar.log() - (-self.alpha_bar).log1p()")
bug(
    "velocity-sign", "the target velocity points from noise to image", "return noise.float() - x0.float()",
    "return x0.float() - noise.float()")
bug(
    "velocity-to-x0-sign", "x0 from the velocity adds where it must subtract",
    "return x_t.float() - s * output.float()", "return x_t.float() + s * output.float()")
bug("velocity-anywhere", "a velocity is accepted on schedules that are not straight",
    'if prediction == "velocity" and not schedule.straight:', 'if prediction == "velocity" and False:')
bug("v-undivided", "x0 from v is right only where variance is preserved", " / (a ** 2 + s ** 2)\n", "\n")
bug(
    "floor-v-preserving", "the loss floor of v is right only where variance is preserved",
    '"v": (a ** 2 + s ** 2) ** 2,', '"v": 1,')
bug("equal-whatever-s", "schedules are equal if their signals are, whatever their noise",
    "\n                and torch.equal(self.s, other.s))", ")", tests="test_schedule.py -k equality")
bug(
    "beta-end-ignored", "the last beta is 0.02, whatever was asked for", "beta = torch.linspace(beta_start, beta_end,",
    "beta = torch.linspace(beta_start, 0.02,")


# ---------------------------------------------------------------- 03 unet
bug = lesson("03_unet")
bug(
    "sin-cos", "sines before cosines: weights trained elsewhere do not fit", "[angle.cos(), angle.sin()]",
    "[angle.sin(), angle.cos()]")
bug(
    "frequencies", "the frequencies stop at 1/100: dim stands where dim/2 belongs", "i / (half - freq_shift)",
    "i / (dim - freq_shift)")
bug(
    "bf16-timesteps", "timesteps go through bf16, where 750 is 752", "angle = t.float()[:, None]",
    "angle = t.bfloat16().float()[:, None]", "huggingface/diffusers#9405")
bug(
    "bf16-before-waves", "in a bf16 network timesteps are cast before the waves instead of after",
    "timestep_embedding(t, self.dim, self.freq_shift)",
    "timestep_embedding(t.to(self.linear1.weight.dtype), self.dim, self.freq_shift)", "modelscope/DiffSynth-Studio#562")
bug(
    "film-no-one", "FiLM without the 1: features start out scaled to nearly nothing",
    "self.norm2(h) * (1 + scale) + shift", "self.norm2(h) * scale + shift")
bug(
    "film-swapped", "scale and shift are exchanged", "scale, shift = e.chunk(2, dim=1)",
    "shift, scale = e.chunk(2, dim=1)")
bug(
    "film-before-norm", "FiLM before the norm, which takes it away again", "self.norm2(h) * (1 + scale) + shift",
    "self.norm2(h * (1 + scale) + shift)")
bug(
    "block-not-zero", "the last convolution of a block is not zero-initialised",
    "self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))",
    "self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)")
bug(
    "attention-not-zero", "the output of attention is not zero-initialised", "zero_init(nn.Linear(channels, channels))",
    "nn.Linear(channels, channels)")
bug(
    "output-not-zero", "the network's last convolution is not zero-initialised",
    "zero_init(nn.Conv2d(widths[0], folded, 3, padding=1))", "nn.Conv2d(widths[0], folded, 3, padding=1)")
bug(
    "bias-not-zero", "zero_init forgets the bias", "    for p in layer.parameters():\n        nn.init.zeros_(p)",
    "    nn.init.zeros_(layer.weight)")
bug(
    "groups-lost", "the second norm of a block has one group, whatever was asked for",
    "nn.GroupNorm(groups, c_out, eps)", "nn.GroupNorm(1, c_out, eps)")
bug(
    "eps-lost", "the second norm of a block keeps PyTorch's epsilon, whatever was asked for",
    "nn.GroupNorm(groups, c_out, eps)", "nn.GroupNorm(groups, c_out)")
bug("shortcut-lost", "a block forgets its shortcut", "return self.shortcut(x) + self.conv2(", "return self.conv2(")
bug(
    "time-ignored", "the block forgets the time", "e = self.emb(F.silu(emb))[:, :, None, None]",
    "e = self.emb(F.silu(0 * emb))[:, :, None, None]")
bug(
    "heads-legacy-order", "q, k, v are split inside each head, while the weights hold all q first",
    "view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)",
    "view(b, h * w, self.heads, 3, c // self.heads).permute(3, 0, 2, 1, 4)")
bug(
    "heads-for-width", "the width of a head is taken for the number of heads",
    "self.heads = channels // (head_dim or channels)", "self.heads = head_dim or 1", "huggingface/diffusers#2011")
bug(
    "heads-mixed", "heads and positions are mixed up on the way out", "a.transpose(1, 2).reshape(b, h * w, c)",
    "a.reshape(b, h * w, c)")
bug(
    "positions-mixed", "channels and positions are mixed up on the way back to an image",
    "x + a.transpose(1, 2).reshape(b, c, h, w)", "x + a.reshape(b, c, h, w)")
bug(
    "attention-unscaled", "attention forgets to divide by the root of the head's width",
    "F.scaled_dot_product_attention(q, k, v)", "F.scaled_dot_product_attention(q, k, v, scale=1.0)")
bug("written-attention-unscaled", "attention written out forgets to divide by the root of the head's width",
    "(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)", "(q @ k.transpose(-1, -2))")
bug("softmax-over-queries", "weights add up to 1 over the positions that ask, not over those that are asked",
    ".softmax(-1).to(v.dtype) @ v", ".softmax(-2).to(v.dtype) @ v")
bug(
    "attention-replaces", "attention replaces its input instead of adding to it", "return x + a.transpose(1, 2)",
    "return a.transpose(1, 2)")
bug(
    "padding-swapped", "the two paddings of Downsample are exchanged", 'if padding == "both" else',
    'if padding != "both" else')
bug("upsample-bilinear", "Upsample smooths where pixels should be repeated", 'mode="nearest"', 'mode="bilinear"')
bug("skips-from-the-front", "the way up takes the oldest skip instead of the newest", "join.pop()]", "join.pop(0)]")
bug(
    "skips-in-front", "skips are put in front of the features", "torch.cat([x, join.pop()], dim=1)",
    "torch.cat([join.pop(), x], dim=1)")
bug(
    "skips-before-attention", "skips are taken before attention",
    "            x = attend(block(x, emb))\n            if keep is not None:\n                keep.append(x)",
    "            x = block(x, emb)\n            if keep is not None:\n                keep.append(x)\n     "
    "       x = attend(x)")
bug(
    "null-is-last-class", "without labels the network is told the last class",
    'torch.full(shape, c["num_classes"], device=x_t.device)',
    'torch.full(shape, c["num_classes"] - 1, device=x_t.device)')
bug(
    "class-replaces-time", "the class replaces the time instead of joining it", "emb = emb + self.classes(y)",
    "emb = self.classes(y)")
bug(
    "half-timesteps-pass", "timesteps in half precision are accepted", "(torch.bfloat16, torch.float16, torch.bool)",
    "(torch.bool,)")
bug(
    "attention-everywhere", "by default attention is put at every size up to 16",
    "[s for s in sizes[1:] if s <= 16][:1]", "[s for s in sizes[1:] if s <= 16]")
bug("patches-reshaped", "pixels are reshaped where squares must be cut out",
    "F.pixel_unshuffle(x, patch_size)", "x.reshape(x.shape[0], -1, x.shape[2] // patch_size, x.shape[3] // patch_size)")
bug(
    "patches-transposed", "patches are put back with rows and columns exchanged", "F.pixel_shuffle(x, patch_size)",
    "F.pixel_shuffle(x.unflatten(1, (-1, patch_size, patch_size)).mT.flatten(1, 3), patch_size)")
bug("attention-in-pixels", "resolutions are counted in pixels although the network works on patches",
    'size = c["image_size"] // c["patch_size"]', 'size = c["image_size"]')
bug(
    "dropout-forgotten", "dropout is made and never called", "self.conv2(self.dropout(F.silu(h)))",
    "self.conv2(F.silu(h))")
bug(
    "dropout-frozen", "dropout switches off the same units in every call",
    "        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))",
    "        with torch.random.fork_rng([]): torch.manual_seed(0); h = self.dropout(F.silu(h))\n        "
    "return self.shortcut(x) + self.conv2(h)")
bug(
    "dropout-not-handed-on", "the UNet keeps its dropout to itself", 'c["norm_groups"], c["dropout"], c["film"]',
    'c["norm_groups"], 0.0, c["film"]')
bug(
    "groups-not-handed-on", "blocks have 16 groups, whatever was asked for",
    '4 * widths[0], c["norm_groups"], c["dropout"]', '4 * widths[0], 16, c["dropout"]')
bug(
    "head-dim-not-handed-on", "attention has a single head, whatever was asked for", 'Attention(width, c["head_dim"],',
    "Attention(width, None,")
bug(
    "always-a-unet", "the kind of network is not looked at: everything becomes a UNet",
    'if name == "unet":', 'if name:', tests="test_transformer.py -k rebuild", page=False)


# ---------------------------------------------------------------- 04 train
bug = lesson("04_train")
bug(
    "target-always-eps", "the loss compares every prediction with the noise",
    "schedule.target(x0, noise, t, prediction)", "noise")
bug(
    "loss-summed", "the loss is summed over pixels, so that it depends on the size of the image",
    ".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)")
bug(
    "loss-clean-input", "the network is shown the clean image", "model(schedule.add_noise(x0, noise, t), t, y)",
    "model(x0, t, y)")
bug(
    "lr-starts-at-zero", "the first step has learning rate 0", "return peak * (step + 1) / warmup",
    "return peak * step / warmup")
bug("no-warmup", "there is no warm-up", "if step < warmup:", "if False:")
bug(
    "lr-jumps", "the cosine forgets the warm-up and jumps at its end",
    "math.pi * (step - warmup) / max(1, total - warmup)", "math.pi * step / total")
bug("warmup-too-long", "in a short run the warm-up never ends", "warmup = min(warmup, total // 10)", "pass")
bug(
    "lr-bounces", "a whole cosine: the rate rises again in the second half", "math.pi * (step - warmup) / max",
    "2 * math.pi * (step - warmup) / max")
bug(
    "ema-no-warmup", "the EMA has no warm-up: its early weights are those of the untrained network",
    "return min(decay, (1 + step) / (10 + step))", "return decay", "openai/improved-diffusion#59")
bug(
    "ema-wrong-way", "the EMA keeps what it should forget", "weight = 1 - self.decay_at(step)",
    "weight = self.decay_at(step)")
bug(
    "ema-forgets-buffers", "the EMA keeps the buffers of the untrained network", "mine.copy_(theirs)", "pass",
    "CuriousAI/mean-teacher#9")
bug(
    "ema-decay-one", "the warm-up ignores the decay that was asked for", "return min(decay, (1 + step) / (10 + step))",
    "return (1 + step) / (10 + step)", "huggingface/diffusers#1864")
bug(
    "dropout-per-batch", "labels are hidden for whole batches",
    "torch.rand(len(y), device=y.device, generator=generator) < p",
    "torch.rand((), device=y.device, generator=generator).expand(len(y)) < p")
bug(
    "dropout-per-word", "the words of a sentence are hidden one by one",
    """torch.rand(len(y), device=y.device, generator=generator) < p
    return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)""",
    """torch.rand(y.shape, device=y.device, generator=generator) < p
    return torch.where(dropped, null, y)""", tests="test_text.py", page=False)
bug(
    "dropout-inverted", "labels are hidden nine times out of ten", "generator=generator) < p\n",
    "generator=generator) >= p\n")
bug(
    "null-off-by-one", "hidden labels become the last class",
    "drop_labels(y, images.label_dropout, len(data.classes), g)",
    "drop_labels(y, images.label_dropout, len(data.classes) - 1, g)")
bug(
    "last-timestep-untrained", "the last timestep is never drawn", "return torch.randint(T, (n,),",
    "return torch.randint(T - 1, (n,),")
bug(
    "one-t-per-batch", "all images of a batch share one timestep",
    "t = draw_timesteps(len(x0), config.noise.T, g, config.noise.logit_normal)",
    "t = draw_timesteps(1, config.noise.T, g, config.noise.logit_normal).expand(len(x0))")
bug(
    "noise-streamed", "noise comes from the global generator, so a resumed run draws other noise",
    "noise = torch.randn(x0.shape, device=device, generator=g)", "noise = torch.randn(x0.shape, device=device)")
bug(
    "same-noise-each-step", "every step draws the same noise and timesteps",
    'g = addressed(seed, "batch", step, device=device)', 'g = addressed(seed, "batch", device=device)')
bug(
    "labels-of-others", "labels are taken in stored order, not in that of the batch",
    "y = to_device(data.labels[index], device)", "y = data.labels[:len(index)].to(device)")
bug(
    "range-0-1", "the network is trained on images in [0, 1]", "augment(to_float(to_device(data.take(index), device))",
    "augment(data.take(index).to(device) / 255")
bug(
    "bins-swapped", "losses are counted in the wrong timestep bin", "bins = t * BINS // T",
    "bins = BINS - 1 - t * BINS // T")
bug(
    "clipped-inverted", "the share of clipped steps is that of the others", "(grad_norm > clip).float()",
    "(grad_norm <= clip).float()")
bug("meter-not-reset", "the meter averages over the whole run", "self.sums.zero_()", "pass")
bug(
    "mean-of-means", "the loss is a mean of bin means, whatever the bins hold",
    '{"loss": s[:BINS].sum() / s[BINS:2 * BINS].sum()', '{"loss": np.nanmean(bins)')
bug(
    "moments-laid-out-otherwise", "a resumed optimiser's moments lie in memory in another order than its weights",
    'torch.empty_like(p).copy_(tensors[f"{m}.{name}"])', 'tensors[f"{m}.{name}"].to(p)', "pytorch/pytorch#110758",
    tests="test_train.py -k order_of_memory", page=False)
bug(
    "ema-not-saved", "checkpoints hold the last weights in place of the average",
    "for k, v in ema.model.state_dict().items()}", "for k, v in self.model.state_dict().items()}", "Vchitect/Latte#55")
bug(
    "prefix-saved", "weights are saved with the prefix of a wrapper", '{f"model.{k}": v for k, v',
    '{f"model._orig_mod.{k}": v for k, v', "karpathy/nanoGPT#325")
bug("optimizer-not-restored", "a resumed run starts with an empty optimiser", "if name not in moments:", "if True:")
bug(
    "meter-not-restored", "a resumed run forgets the sums since the last row",
    '        self.meter.sums.copy_(tensors["meter"])\n', "")
bug(
    "norm-after-clipping", "the gradient norm is reported after clipping",
    "ranks.clip(state.model.parameters(), config.training.grad_clip)",
    "ranks.clip(state.model.parameters(), config.training.grad_clip).clamp(max=config.training.grad_clip or math.inf)")
bug(
    "accumulation-undivided", "parts of a batch add up to a gradient that is too large",
    "(loss.sum() / len(batch.t)).backward()", "loss.mean().backward()", "openai/guided-diffusion#111")
bug("gradients-pile-up", "gradients are never set back to zero", "        state.optimizer.zero_grad()\n", "")
bug(
    "decay-of-the-rest", "the linear decay takes the share that should be constant", "max(1, decay_share * total)",
    "max(1, (1 - decay_share) * total)")
bug(
    "decay-knows-length", "with a constant rate the cosine stays in force until the decay",
    "return peak * min(1, (total - step) / max(1, decay_share * total))",
    "return peak * min(0.5 * (1 + math.cos(math.pi * (step - warmup) / total)), (total - step) / max(1, "
    "decay_share * total))")
bug(
    "share-inverted", "an average asked for a tenth of the run looks back on nine tenths", "math.log(1 - self.share)",
    "math.log(self.share)")
bug(
    "share-as-decay", "a share of the run is taken for a decay",
    "        if self.share is None:\n            return ema_decay_at(step, self.decay)",
    "        return self.share or ema_decay_at(step, self.decay)")
bug(
    "half-life-in-steps", "half-lives in images are counted in steps", "0.5 ** (training.batch_size / h)",
    "0.5 ** (1 / h)")
bug(
    "one-average-moves", "only the first of several averages is updated",
    "for ema in self.averages.values():\n            ema.update(self.model, self.step)",
    "self.ema.update(self.model, self.step)")
bug(
    "logit-std-ignored", "the deviation of logit-normal timesteps has no effect", "mean + std * torch.randn(n,",
    "mean + torch.randn(n,")
bug(
    "logit-mean-reversed", "a negative mean draws timesteps near the noise", "mean + std * torch.randn(n,",
    "-mean + std * torch.randn(n,")
bug(
    "logit-normal-ignored", "batches draw all timesteps alike, whatever was asked for",
    "config.noise.T, g, config.noise.logit_normal)", "config.noise.T, g)")
bug(
    "probabilities-reversed", "the weights of a mean loss are those of the opposite draw",
    "edges.logit() - mean) / std)", "edges.logit() + mean) / std)")
bug(
    "muon-no-nesterov", "Muon does not look ahead", "updates = torch._foreach_lerp(grads, buffers, self.momentum)",
    "updates = buffers")
bug(
    "muon-unscaled", "Muon's steps do not depend on the size of the matrix",
    "alpha=-group[\"lr\"] * 0.2 * max(shape) ** 0.5)", "alpha=-group[\"lr\"])")
bug(
    "muon-shorter-side", "Muon's steps are scaled by the shorter side",
    "alpha=-group[\"lr\"] * 0.2 * max(shape) ** 0.5)", "alpha=-group[\"lr\"] * 0.2 * min(shape) ** 0.5)")
bug(
    "muon-embeddings", "Muon orthogonalises the embeddings of time and class",
    '"proj_out.", "time.", "classes.")', '"proj_out.")')
bug(
    "muon-last-layer", "Muon takes the first and the last layer too",
    'outside = ("conv_in.", "conv_out.", ', "outside = (")
bug("muon-no-decay", "Muon forgets weight decay", 'if group["weight_decay"]:', "if False:")
bug(
    "muon-and-adamw", "AdamW takes a second step with Muon's matrices", "            p.grad = None\n",
    "            pass\n")
bug(
    "newton-schulz-once", "one step of the iteration: singular values are as unequal as before",
    "for _ in range(steps):", "for _ in range(1):")
bug(
    "muon-momentum-forgotten", "a resumed run forgets Muon's momentum",
    '            kept = {m: torch.empty_like(p).copy_(tensors[f"{m}.{name}"]) for m in moments[name]}',
    '            kept = {\n                m: torch.empty_like(p).copy_(tensors[f"{m}.{name}"]) for m in '
    'moments[name] if m != "momentum_buffer"}')
bug(
    "clipping-measured-only", "gradients are measured, and never clipped",
    "ranks.clip(state.model.parameters(), config.training.grad_clip)", "ranks.clip(state.model.parameters(), 0)")
bug("ema-before-step", "the average is taken before the optimiser's step",
    "state.optimizer.step()\n        state.optimizer.zero_grad()\n        state.average()",
    "state.average()\n        state.optimizer.step()\n        state.optimizer.zero_grad()")
bug(
    "ema-of-last-step-only", "the average counts its updates from the end, so that its warm-up never ends",
    "ema.update(self.model, self.step)", "ema.update(self.model, 0)")
bug(
    "ema-decay-ignored", "the average decays by its default", "EMA(model, training.ema_decay, fused)",
    "EMA(model, fused=fused)")
bug(
    "weight-decay-ignored", "weight decay is ignored", "weight_decay=training.weight_decay, fused=fused",
    "weight_decay=0.0, fused=fused")
bug("jitter-ignored", "colour jitter is ignored", "g, images.flip, images.jitter)", "g, images.flip)")
bug("flip-ignored", "images are never mirrored", "g, images.flip, images.jitter)", "g, False, images.jitter)")
bug(
    "dropout-same-units", "dropout drops the same units at every step",
    'addressed(training.seed, "dropout", self.step, *address)', 'addressed(training.seed, "dropout", *address)',
    tests="test_train.py -k dropout_has_an_address", page=False)
bug(
    "dropout-asleep", "the network trains in eval mode, in which nothing is dropped",
    "(network or state.model).train()", "(network or state.model).eval()",
    tests="test_train.py -k dropout_has_an_address", page=False)
bug(
    "rate-of-first-step", "the learning rate is worked out once instead of in each step",
    'group["lr"] = lr_at(self.step,', 'group["lr"] = lr_at(0,')
bug(
    "warmup-ignored", "the loop warms up for 500 steps, whatever was asked for",
    "lr_at(self.step, total, training.lr, training.warmup,", "lr_at(self.step, total, training.lr, 500,")
bug(
    "accumulate-ignored", "a batch goes through the network in one piece, whatever memory there is",
    "b.chunk(k) for b in batch", "[b] for b in batch")
bug(
    "label-dropout-ignored", "labels are hidden as often as by default", "drop_labels(y, images.label_dropout,",
    "drop_labels(y, 0.1,")
bug(
    "conditional-ignored", "the network is told the class although it should not be",
    "if images.conditional and data.labels is not None else None", "if data.labels is not None else None")
bug(
    "noise-ignores-seed", "runs with different seeds draw the same noise", 'addressed(seed, "batch", step,',
    'addressed(0, "batch", step,')
bug(
    "images-ignore-seed", "runs with different seeds see the images in one order",
    "config.training.batch_size, seed, step)", "config.training.batch_size, 0, step)")
bug(
    "bf16-training-ignored", "bf16 is ignored in training", 'enabled=precision == "bf16"):\n                loss =',
    "enabled=False):\n                loss =", tests="test_train.py -k dropout_has_an_address", page=False)
bug(
    "tokens-in-muon", "Muon gets the first and the last layer of a transformer", '"proj_in.", "proj_out.", ', "",
    tests="test_transformer.py -k muon_gets", page=False)


# ---------------------------------------------------------------- 05 sample
bug = lesson("05_sample")
bug(
    "eps-not-rederived", "x0 is clipped, and eps stays what it was",
    "        if self.clip:\n            x0 = x0.clamp(-1, 1)\n        return x0, self.schedule.to_eps(x0, x_t, t)",
    "        eps = self.schedule.to_eps(x0, x_t, t)\n        if self.clip:\n            x0 = x0.clamp(-1, "
    "1)\n        return x0, eps",
    "lucidrains/denoising-diffusion-pytorch#84")
bug("output-is-eps", "the output is taken for eps, whatever the network predicts",
    "return x0, self.schedule.to_eps(x0, x_t, t)", "return x0, output.float()", "huggingface/diffusers#1486")
bug("clip-0-1", "x0 is clipped to [0, 1]", "x0 = x0.clamp(-1, 1)", "x0 = x0.clamp(0, 1)")
bug(
    "clip-always", "clip=False has no effect", "        if self.clip:\n            x0 = x0.clamp(-1, 1)",
    "        x0 = x0.clamp(-1, 1)")
bug("clip-after-mean", "the mean is clipped instead of x0: too late to help",
    "x0, _ = denoiser(x, t)\n        kept = a / a_next                            # of the amplitude, from t_next "
    "to t: root of the paper's alpha\n        mean = a_next * x0 + kept * (s_next / s) ** 2 * (x - a * x0)",
    "x0, _ = replace(denoiser, clip=False)(x, t)\n        kept = a / a_next\n"
    "        mean = (a_next * x0 + kept * (s_next / s) ** 2 * (x - a * x0)).clamp(-1, 1)", "hojonathanho/diffusion#5")
bug(
    "ddpm-variance", "DDPM adds noise scaled by the variance",
    "sigma = s_next * math.sqrt(1 - (kept * s_next / s) ** 2)", "sigma = s_next ** 2 * (1 - (kept * s_next / s) ** 2)",
    "Y-debug-sys/Diffusion-TS#135")
bug("ddpm-beta", "DDPM adds the forward noise, not that of the posterior",
    "sigma = s_next * math.sqrt(1 - (kept * s_next / s) ** 2)", "sigma = s * math.sqrt(1 - (kept * s_next / s) ** 2)")
bug("ddpm-alpha-of-t", "the posterior mean uses alpha_bar of t where that of the next timestep belongs",
    "mean = a_next * x0 + kept", "mean = a * x0 + kept")
bug("ddpm-step-unsquared", "alpha, which is what is kept of the power, stands where its root belongs",
    "kept = a / a_next", "kept = (a / a_next) ** 2")
bug("ddim-variance", "eta scales a variance where the standard deviation belongs",
    "sigma = eta * s_next * math.sqrt(1 - (a / a_next * s_next / s) ** 2)",
    "sigma = eta * s_next ** 2 * (1 - (a / a_next * s_next / s) ** 2)", "jsboige/CoursIA#16158")
bug("ddim-too-noisy", "with eta above 0 fresh noise comes on top of all the old",
    "math.sqrt(s_next ** 2 - sigma ** 2) * eps", "s_next * eps")
bug("ddim-eta-ignored", "eta has no effect", "if sigma:", "if False:")
bug("ddim-x0-unscaled", "the estimate of x0 is not scaled to the next noise level",
    "x = a_next * x0 + math.sqrt(s_next", "x = x0 + math.sqrt(s_next")
bug("network-told-next-t", "the network is told a timestep one too high", "torch.full((len(x_t),), t, device",
    "torch.full((len(x_t),), min(t + 1, self.schedule.T - 1), device")
bug(
    "labels-not-passed", "the denoiser forgets to hand the labels on", "return self.model(x_t, t, y)",
    "return self.model(x_t, t)")
bug("one-generator-for-all", "all images draw from the first generator, so that they depend on the batch",
    "for g in generator]).to(device)", "for g in generator[:1] * len(generator)]).to(device)")
bug("heun-euler", "Heun's corrector replaces the first slope instead of averaging", "(eps + eps_next) / 2", "eps_next")
bug("heun-same-t", "the second slope is asked for at the old timestep", "denoiser(euler, t_next)", "denoiser(euler, t)")
bug(
    "heun-coefficient", "the corrector forgets how the signal's scale changes", "(s_next - s * a_next / a) *",
    "(s_next - s) *")
bug(
    "dpm-ratio", "the extrapolation of DPM-Solver++ has its steps exchanged", "* h / (2 * h_before)",
    "* h_before / (2 * h)")
bug(
    "dpm-sign", "the extrapolation of DPM-Solver++ points backwards", "d = x0 + (x0 - before)", "d = x0 - (x0 - before)"
)
bug("dpm-log-snr", "steps are measured in log SNR of powers, which is twice as long",
    "h = math.log(a_next / s_next) - math.log(a / s) if", "h = 2 * (math.log(a_next / s_next) - math.log(a / s)) if")
bug("dpm-first-order", "the memory of the last step is lost: first order, not second",
    "before, h_before = x0, h\n", "before, h_before = None, h\n")
bug("invert-forwards", "the inversion walks from noise to image",
    "reversed(denoiser.schedule.transitions(steps, spacing))", "denoiser.schedule.transitions(steps, spacing)")
bug("lerp", "noises are mixed in a straight line, which makes them too quiet",
    "return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()", "return (1 - w) * a + w * b")
bug("mask-inverted", "inpainting keeps the hole and invents the rest",
    "x = mask * (a * x0 + s * draw_noise(x.shape, generator, x.device)) + (1 - mask) * x",
    "x = (1 - mask) * (a * x0 + s * draw_noise(x.shape, generator, x.device)) + mask * x")
bug(
    "inpaint-noise-level", "the known part is put back with the noise of the step before",
    "a, s = denoiser.schedule.signal_noise(t_next)\n        x = mask",
    "a, s = denoiser.schedule.signal_noise(t)\n        x = mask")
bug(
    "callback-ignored", "what a callback returns is thrown away", "return x if changed is None else changed", "return x"
)
bug("ddim-eta-preserving", "the noise that eta adds is right only where variance is preserved",
    "sigma = eta * s_next * math.sqrt(1 - (a / a_next * s_next / s) ** 2)",
    "sigma = eta * s_next / s * math.sqrt(max(0, 1 - (a / a_next) ** 2))")
bug("ddpm-preserving", "DDPM's noise is right only where variance is preserved",
    "sigma = s_next * math.sqrt(1 - (kept * s_next / s) ** 2)", "sigma = s_next / s * math.sqrt(max(0, 1 - kept ** 2))")
bug("heun-at-pure-noise", "Heun divides by a signal of zero", "if t_next >= 0 and a > 0:", "if t_next >= 0:")
bug(
    "dpm-at-pure-noise", "DPM-Solver++ takes the logarithm of a signal of zero", "if s_next > 0 and a > 0 else",
    "if s_next > 0 else")
bug("ddpm-spacing-ignored", "DDPM visits the same timesteps, whatever spacing was asked for",
    "T if steps is None else steps, spacing)", "T if steps is None else steps)")
bug("heun-forgets-labels", "the second evaluation of Heun is not told the labels",
    "denoiser(euler, t_next)", "replace(denoiser, y=None)(euler, t_next)")
bug(
    "one-plus-w", "guidance of the paper's scale: w stands where w - 1 belongs",
    "uncond + self.guidance_scale * (cond - uncond)", "cond + self.guidance_scale * (cond - uncond)",
    "lucidrains/denoising-diffusion-pytorch#155")
bug(
    "halves-swapped", "conditional and unconditional answers are exchanged", "uncond, cond = self.model(",
    "cond, uncond = self.model(")
bug("null-is-zero", "class 0 is taken for the null class", "torch.full_like(y, self.null)", "torch.zeros_like(y)")
bug(
    "null-is-last", "the last class is taken for the null class", "torch.full_like(y, self.null)",
    "torch.full_like(y, self.null - 1)")
bug("w-whole", "a guidance scale of 1.5 counts as 1",
    "uncond + self.guidance_scale * (cond - uncond)", "uncond + int(self.guidance_scale) * (cond - uncond)")
bug(
    "images-interleaved", "images are doubled one by one, labels as a block", "x_t.repeat(2, 1, 1, 1)",
    "x_t.repeat_interleave(2, 0)")
bug("times-interleaved", "timesteps are doubled one by one, images as a block", "t.repeat(2)", "t.repeat_interleave(2)")
bug("w-one-unconditional", "w = 1 forgets the labels", "return self.model(x_t, t, y)",
    "return self.model(x_t, t, None)")
bug(
    "label-short", "the first labels are taken for all, where there are more than images", "len(self.y) != len(x_t):",
    "len(self.y) < len(x_t):")
bug(
    "loads-raw-weights", "load_model takes the last weights, not the average", 'weights="ema", # or "model"',
    'weights="model", # or "model"', "lucidrains/denoising-diffusion-pytorch#288")
bug(
    "weights-argument-ignored", "load_model gives the average, whatever weights were asked for",
    'load_weights(model, tensors, f"{weights}.")', 'load_weights(model, tensors, "ema.")',
    tests="test_train.py -k average_can_be_loaded", page=False)


bug(
    "latents-clipped", "estimates of latents are bounded to [-1, 1]", "clip and self.autoencoder is None", "clip",
    tests="test_latent.py", page=False)


# ---------------------------------------------------------------- 06 guide
bug = lesson("06_guide")
bug(
    "interval-inverted", "guidance is on outside its interval", "(t >= first) & (t <= last)", "(t < first) | (t > last)"
)
bug("interval-open", "the ends of the interval are left out", "(t >= first) & (t <= last)", "(t > first) & (t < last)")
bug("outside-unconditional", "outside the interval labels are forgotten", "out, cond)", "out, uncond)")
bug(
    "rescale-inverted", "rescaling raises the contrast instead of lowering it", "std = _std(cond) / _std(out)",
    "std = _std(out) / _std(cond)")
bug(
    "rescale-whole-batch", "rescaling uses the contrast of the batch, not of each image",
    "x.std((1, 2, 3), keepdim=True)", "x.std()")
bug("rescale-all-or-nothing", "rescaling a little rescales all",
    "self.rescale * std * out + (1 - self.rescale) * out", "std * out")
bug("rescale-share", "rescale 0.3 acts like 0.7",
    "self.rescale * std * out + (1 - self.rescale) * out", "(1 - self.rescale) * std * out + self.rescale * out")
bug("interval-costs", "outside the interval the network is asked twice all the same",
    "and (self.interval is None or bool(self.inside(t).any()))", "and True")


# ---------------------------------------------------------------- 07 evaluate
bug = lesson("07_evaluate")
bug(
    "loss-of-batches", "batch means are added as if they were sums", "prediction).sum().item()",
    "prediction).mean().item()")
bug(
    "loss-streamed", "the noise of the measured loss depends on what was drawn before",
    'generator=addressed(seed, "loss_by_timestep", t, i)', "generator=None")
bug("ddof", "the covariance divides by n", "self.scatter / (self.n - 1)", "self.scatter / self.n")
bug(
    "merge-cross-term", "merging batches forgets how far their means are apart",
    " + step.outer(step) * (self.n * n / total)", "")
bug(
    "merge-mean", "merging batches gives each the same weight", "self.mean + step * (n / total), total, None",
    "self.mean + step / 2, total, None")
bug("root-stale", "the cached root of a covariance outlives its numbers", "total, None\n", "total, self._root\n")
bug("trace-sign", "the trace of the root is added", "- 2 * shared).item()", "+ 2 * shared).item()")
bug("trace-once", "the trace of the root is subtracted once", "- 2 * shared).item()", "- shared).item()")
bug(
    "mean-unsquared", "the distance of the means is not squared", "(a.mean.to(b.mean) - b.mean).square().sum()",
    "(a.mean.to(b.mean) - b.mean).norm()")
bug(
    "product-asymmetric", "eigenvalues of a product that is not symmetric, by a routine for symmetric matrices",
    "eigvalsh(b_root @ a.cov.to(b_root) @ b_root)", "eigvalsh(b.cov @ a.cov.to(b_root))")
bug(
    "root-complex", "tiny negative eigenvalues become NaN", "@ b_root).clamp(min=0).sqrt()", "@ b_root).sqrt()",
    "mseitzer/pytorch-fid#13")
bug(
    "root-absolute", "roots are taken of variances and then once more", "values.clamp(min=0).sqrt() @",
    "values.clamp(min=0) @")
bug(
    "few-images-silent", "too few images for a covariance pass without a warning", "if n <= dim:", "if n <= 2:")
bug(
    "kid-biased", "KID counts the kernel of each image with itself",
    "(m.sum() - m.diagonal().sum()) / (size * (size - 1))", "m.mean()")
bug(
    "kid-dimension", "KID's kernel forgets to divide by the dimension", "(x @ y.T / x.shape[1] + 1) ** 3",
    "(x @ y.T + 1) ** 3")
bug(
    "kid-one-subset", "all subsets of KID are the same", 'addressed(seed, "kid", k, which)',
    'addressed(seed, "kid", which)')
bug(
    "precision-recall-swapped", "precision and recall are exchanged",
    "return inside(generated, real, True), inside(real, generated, False)",
    "return inside(real, generated, True), inside(generated, real, False)", "toshas/torch-fidelity#58")
bug(
    "reach-counts-self", "the third neighbour is the second: an image counts as its own", "d.kthvalue(min(k + 1, ",
    "d.kthvalue(min(k, ")
bug(
    "nearest-is-self", "the nearest image of a set is always the image itself",
    "(d.masked_fill(d == 0, math.inf) if skip_self else d)", "d")
bug(
    "jackknife-factor", "the jackknife's error is that of a mean", "math.sqrt(len(values) - 1) * float(np.std(values))",
    "float(np.std(values)) / math.sqrt(len(values))")
bug(
    "floor-with-itself", "real images are compared with a set that contains them",
    "reference.without(p) if apart else reference", "reference")
bug("infinity-slope", "the score at infinite n is the slope of the line", ", 1)[1])", ", 1)[0])")
bug("infinity-n", "the line is drawn through n instead of 1/n", "np.polyfit([1 / n for", "np.polyfit([n for")
bug("n-passes-for-fid", "a score of 2,000 images calls itself FID", "(self.n != 50_000,", "(self.n < 2_000,")
bug(
    "test-passes-for-fid", "a score against the test split calls itself FID", '(self.split != "train",',
    '(self.split not in ("train", "test"),')
bug(
    "held-out-is-train", "the score against held-out images is computed against the training images",
    "distance(f, new.n, new, jack", "distance(f, new.n, real, jack")
bug(
    "unseen-is-generated", "what unseen real images would score is the model's own score",
    "distance(f_new, total, real)", "distance(f, total, real)")
bug(
    "copies-inverted", "copies are counted among the images farthest away", "(d < d_real.quantile(0.05))",
    "(d > d_real.quantile(0.05))")
bug(
    "farthest-pairs", "the closest pairs are the most distant ones", "first = d.argsort()[:10]",
    "first = d.argsort(descending=True)[:10]")
bug(
    "loss-ignores-seed", "the measured loss has one noise for all seeds", 'addressed(seed, "loss_by_timestep", t, i)',
    'addressed(0, "loss_by_timestep", t, i)')
bug(
    "kid-ignores-seed", "KID takes the same subsets for all seeds", 'addressed(seed, "kid", k, which)',
    'addressed(0, "kid", k, which)')
bug(
    "evaluate-forgets-seed", "an evaluation does not tell KID its seed", "kid(f, f_real, max(2, sub), seed=seed)",
    "kid(f, f_real, max(2, sub))")
bug(
    "evaluate-forgets-batch-size", "features are worked out 256 images at a time, whatever was asked for",
    "features(images, batch_size), features(reference, batch_size)", "features(images), features(reference)")
bug(
    "jackknife-ignores-groups", "the jackknife always has 20 groups", "shuffled.chunk(min(groups, len(f) // 2))",
    "shuffled.chunk(min(20, len(f) // 2))")


# ---------------------------------------------------------------- 08 doctor
bug = lesson("08_doctor")
bug(
    "trend-not-log", "the trend is fitted to the loss, not to its logarithm", "x[keep], np.log(y[keep])",
    "x[keep], y[keep]")
bug("interval-narrow", "the 95% interval covers half", "(0.025, 0.975)", "(0.25, 0.75)")
bug(
    "spikes-std", "spikes are measured with a deviation that they inflate", "1.4826 * np.median(np.abs(rest))",
    "rest.std()")
bug("spikes-early-fall", "a steep fall at the start counts as spikes", " & (y - before > math.log(SPIKE_RATIO))", "")
bug(
    "floor-inverted", "runs below the floor are called worse than it", "if loss - 1.96 * error > f.floor_mean:",
    "if loss - 1.96 * error < f.floor_mean:")
bug(
    "floor-too-early", "young runs are judged", 'if f.done < LATE or len(f.metrics["step"]) < LEAST_ROWS:',
    'if len(f.metrics["step"]) < LEAST_ROWS:')
bug(
    "floor-bins", "the floor is averaged over the wrong timesteps",
    "torch.arange(facts.config.noise.T) * BINS // facts.config.noise.T", "torch.arange(facts.config.noise.T) % BINS")
bug(
    "bin-floor-plain", "within a bin the floor is a plain mean",
    "facts.chances * curve) / _by_bin(facts, facts.chances)", "curve) / _by_bin(facts, torch.ones_like(curve))")
bug(
    "weak-at-no-noise", "a bin counts by the loss, where high noise hides, not by what its errors do to a sample",
    "if drift[i] > DRIFT and b", "if False and b", tests="test_doctor.py")
bug(
    "untold-is-good", "a network that is told the class is called good for beating a floor that is not",
    "if change > 0.02 and f.config.images.conditional and not f.told:", "if False:", tests="test_doctor.py")
bug(
    "by-heart-unsquared", "the posterior over the training images forgets how long they are",
    "(a * (x_t @ x.T) - a ** 2 * x.square().sum(1) / 2) / s ** 2", "a * (x_t @ x.T) / s ** 2")
bug(
    "by-heart-chunks", "the softmax over chunks forgets those before", "kept * weighted + weights @ x",
    "weighted + weights @ x", tests="test_doctor.py")
bug(
    "diverging-on-noise", "a loss that may be rising is called diverging", "fit is None or fit[1] <= RISE",
    "fit is None or fit[2] <= RISE")
bug(
    "plateau-at-the-end", "a plateau is reported when the learning rate has decayed", "fit is None or rate < 0.3",
    "fit is None or rate > 0.3")
bug("paired-error", "the t value forgets the root of n", "d.std(ddof=1) / math.sqrt(len(d))", "d.std(ddof=1)")
bug(
    "mildest-first", "the mildest problems come first", "key=lambda x: order.index(x.severity)",
    "key=lambda x: -order.index(x.severity)")
bug(
    "unknown-facts", "checks are asked about facts that nobody knows",
    "        if any(getattr(facts, need) is None for need in c.needs):\n            continue", "        pass")
bug(
    "basis-unchecked", "advice may do without a basis", "if not basis.startswith(BASES):", "if False:",
    tests="test_doctor.py -k without_strength", page=False)
bug(
    "good-inverted", "a loss below the floor is called above it", "change = 1 - loss / f.floor_mean",
    "change = loss / f.floor_mean - 1")
bug("falling-word", "a trend that may be falling is called falling", "if high < 0", "if low < 0")
bug(
    "stop-at-once", "unfinished runs may be stopped",
    '                f"stays at its peak until step {_decay_begins(f):,}; let it decay, or extend the run '
    'before that step.")\n    if f.step < f.total:',
    '                f"stays at its peak until step {_decay_begins(f):,}; let it decay, or extend the run '
    'before that step.")\n    if f.step > f.total:')


# ---------------------------------------------------------------- 10 transformer
bug = lesson("10_transformer")
bug(
    "pictures-mirrored", "pictures are mirrored at their diagonal on their way in",
    "rearrange(fold(x, patch_size)", "rearrange(fold(x.mT, patch_size)")
bug("columns-first", "patches are counted column by column", "b c h w -> b (h w) c", "b c h w -> b (w h) c")
bug(
    "columns-put-together", "an image is put together column by column", "b (h w) c -> b c h w", "b (w h) c -> b c h w")
bug(
    "places-by-column", "patches in one column are all told the same place", 'repeat(line, "h d -> (h w) d", w=side)',
    'repeat(line, "w d -> (h w) d", h=side)')
bug(
    "cosines-first", "the waves of positions begin with cosines, unlike those of published weights",
    "torch.cat([sines, cosines], dim=1)", "torch.cat([cosines, sines], dim=1)")
bug(
    "modulation-without-one", "a scale of 0 wipes a token out", "x * (1 + scale[:, None])", "x * scale[:, None]")
bug(
    "gate-forgotten", "attention is added without its gate, so that a new block is not the identity",
    "x = x + gate1[:, None] * self.attend", "x = x + self.attend")
bug(
    "gates-open-at-first", "the layer that makes shifts, scales and gates does not start at zero",
    "zero_init(nn.Linear(width, 6 * width))", "nn.Linear(width, 6 * width)")
bug(
    "heads-interleaved", "heads take every n-th number of q, k and v", "b n (k heads d) -> k b heads n d",
    "b n (k d heads) -> k b heads n d")
bug(
    "mlp-modulated-as-attention", "the MLP gets attention's shift and scale", "modulate(self.norm2(x), shift2, scale2)",
    "modulate(self.norm2(x), shift1, scale1)")
bug(
    "other-gelu", "the exact GELU where published weights have the approximation", 'approximate="tanh"',
    'approximate="none"')
bug(
    "class-unheard", "the class is not added to the time", "emb = emb + self.classes(y)",
    "emb = emb + 0 * self.classes(y)")
bug("places-unheard", "positions are not added to the tokens", '+ self.positions', '+ 0 * self.positions')
bug(
    "answers-before-learning", "the last layer does not start at zero", "zero_init(nn.Linear(width, numbers))",
    "nn.Linear(width, numbers)")
bug(
    "nameless", "the arguments do not say that the network is a transformer",
    '{"network": "transformer", **_checked(settings)}', "_checked(settings)")


# ---------------------------------------------------------------- 12 latent
bug = lesson("12_latent")
bug("axes-rising", "the axes come smallest first, while the variances fall", "axes.flip(1).float()", "axes.float()")
bug("axes-uncentred", "the mean counts as variance", "torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))",
    "torch.linalg.eigh(x.T @ x / len(x))")
bug("axes-deviations", "standard deviations stand where variances belong", "variances.flip(0).clamp(min=0)",
    "variances.flip(0).clamp(min=0).sqrt()")
bug("mosaic-any-class", "the tiles of a scene are not of its class", "order[first[y, None] + place]", "order[place]")
bug("mosaic-unseeded", "every seed gives the same scenes", 'addressed(seed, "mosaic", n)', 'addressed("mosaic", n)')
bug("psnr-range-1", "the peak is that of pixels in [0, 1]", "10 * (4 / (x0", "10 * (1 / (x0")
bug("psnr-natural", "the logarithm is the natural one", ".mean()).log10().item()", ".mean()).log().item()")
bug("bands-of-amplitudes", "amplitudes are summed, not power", ".abs().square().sum(1).mean(0)",
    ".abs().sum(1).mean(0)")
bug("bands-squared", "rings are numbered by the square of the frequency",
    "(2 * bands * (f[:, None] ** 2 + f ** 2).sqrt())", "(2 * bands * (f[:, None] ** 2 + f ** 2))")
bug("encode-unscaled", "latents leave the encoder at whatever scale it chose",
    "(self.encode_unscaled(x0) - self.mean) / self.std", "self.encode_unscaled(x0)")
bug("scaled-by-variance", "latents are divided by their variance", "(squares / n - mean ** 2).clamp(min=0).sqrt()",
    "(squares / n - mean ** 2).clamp(min=0)")
bug("scale-of-the-scaled", "measured again, the scale is that of latents that are scaled already",
    "    autoencoder.mean.zero_()\n    autoencoder.std.fill_(1)\n", "")
bug("decoder-never-saw-unit-variance", "the decoder learns from latents of another scale than it will get",
    "F.batch_norm(autoencoder.encode_unscaled(x0), None, None, training=True)", "4 * autoencoder.encode_unscaled(x0)")
bug("latents-keep-pixel-size", "a data set of latents claims the size of its images",
    "native_size=z.shape[-1], size=z.shape[-1])", "native_size=data.size, size=data.size)")


# ---------------------------------------------------------------- 14 text
bug = lesson("14_text")
bug("padding-is-a-word", "short sentences are filled up with the last word of the vocabulary",
    "torch.full((len(sentences), length), len(words))", "torch.full((len(sentences), length), len(words) - 1)")
bug("words-at-the-end", "the words of a short sentence stand at the end of its row", "row[:len(found)] =",
    "row[length - len(found):] =")
bug("unknown-words-skipped", "unknown words are passed over in silence",
    "raise DiffnbError(f\"{unknown[0]!r} in", "found = [w for w in found if w in number] or (f\"{unknown[0]!r} in")
bug("long-sentences-cut", "a sentence that is too long loses its end in silence", "if len(found) > length:",
    "found = found[:length]\n        if len(found) > length:")
bug("queries-from-words", "the words look at the image, which gets what they find",
    "self.query(self.norm(x))", "self.query(self.norm(words.mean(1, keepdim=True).expand_as(x)))")
bug("keys-as-values", "keys and values are exchanged", "k, v = rearrange(self.key_value",
    "v, k = rearrange(self.key_value")
bug("text-heads-interleaved", "heads take every n-th number of a query", '"b n (heads d) -> b heads n d", heads',
    '"b n (d heads) -> b heads n d", heads')
bug("text-at-once", "a new layer does not begin as nothing", "zero_init(nn.Linear(width, width))",
    "nn.Linear(width, width)")
bug("words-without-places", "words are not told their places", "self.classes(y) + self.word_positions",
    "self.classes(y) + 0 * self.word_positions")
bug("words-do-not-look", "words do not look at each other", "return words + self.read(words, words)",
    "return words + 0 * self.read(words, words)")
bug("words-replaced", "a word is replaced by what it has seen, and forgets itself",
    "return words + self.read(words, words)", "return self.read(words, words)")
bug("image-does-not-look", "the image never looks at the words", "x + look(x, words)", "x + 0 * look(x, words)")
bug("queries-unnormed", "queries come from tokens of any size", "self.query(self.norm(x))", "self.query(x)")
bug("image-looks-at-words-apart", "the image looks at words that have not looked at each other",
    "words, emb, x = self.read_words(y),", "words, emb, x = self.classes(y) + self.word_positions,")
bug("text-nameless", "the arguments do not say that the network reads text",
    '{"network": "text_transformer", "text_length": text_length}', '{"text_length": text_length}')


# ---------------------------------------------------------------- 11 few steps
bug = lesson("11_few_steps")
bug("student-target-end", "the student's target is where the teacher arrives, not the x0 that leads there",
    "return (x_end - s_end / s * x_t) / (a_end - s_end / s * a)", "return x_end")
bug(
    "student-target-levels", "the target's denominator forgets the noise level at t", "(a_end - s_end / s * a)",
    "(a_end - s_end * a)")
bug("student-one-step", "the teacher makes one step in place of two",
    "_ddim_step(teacher, _ddim_step(teacher, x_t, t, middle), middle, end)", "_ddim_step(teacher, x_t, t, end)")
bug("student-same-t", "the teacher's second step is told the timestep of the first",
    "_ddim_step(teacher, x_t, t, middle), middle, end)", "_ddim_step(teacher, x_t, t, middle), t, end)")
bug("distill-unweighted", "errors of x0 are not weighed by the noise level",
    "((x0 - target) / schedule.signal_noise(t, x_t.ndim)[1]).square()", "(x0 - target).square()")
bug("distill-no-labels", "the student is not told the labels", "model(x_t, t, teacher.y)", "model(x_t, t, None)")
bug("distill-other-steps", "the student learns steps that begin halfway, which no sampler makes",
    "i = 2 * torch.randint(steps, ", "i = torch.randint(2 * steps - 1, ")
bug("distill-last-half", "the clean end is never a target", "i = 2 * torch.randint(steps, ",
    "i = 2 * torch.randint(max(1, steps - 1), ")
bug("distill-teacher", "the teacher's own weights are trained", "model = copy.deepcopy(teacher.model)",
    "model = teacher.model")
bug("distill-unguided", "the guidance asked for is not distilled",
    "if teacher.classes else None, guidance_scale), x0, g", "if teacher.classes else None), x0, g")
bug("distill-guided-twice", "a student lets itself be guided, though it never saw the null class",
    '"prediction": prediction, "label_dropout": 0.0}', '"prediction": prediction}')
bug("distill-eps", "the student goes on to predict eps, which says nothing about the image at pure noise",
    '"velocity" if teacher.schedule.straight else "v"', "teacher.prediction")
bug("mean-flow-fixed-z", "the derivative of the average velocity forgets that the point moves",
    "(velocity, torch.zeros_like(r), torch.ones_like(t))",
    "(torch.zeros_like(z), torch.zeros_like(r), torch.ones_like(t))")
bug("mean-flow-moving-end", "the end of the walk moves with its beginning",
    "(velocity, torch.zeros_like(r), torch.ones_like(t))", "(velocity, torch.ones_like(r), torch.ones_like(t))")
bug("mean-flow-sign", "the time the walk takes enters with the wrong sign", "(velocity - (t - r).view(",
    "(velocity + (t - r).view(")
bug("mean-flow-gradient", "the target is trained, too, and both sides meet at a wrong place",
    "* change).detach()", "* change)")


# ---------------------------------------------------------------- 09 flow
bug = lesson("09_flow")
bug("curvature-chord", "the velocity is compared with the chord of a single step",
    "off = (len(path) - 1) * path.diff(dim=0) - chord", "off = path.diff(dim=0) - chord")
bug("curvature-mean", "curvature grows with the number of steps",
    "(off.square().sum() / (len(path) - 1) / chord", "(off.square().sum() / chord")
bug("curvature-root", "curvature is the ratio of the roots", "chord.square().sum()).item()",
    "chord.square().sum()).sqrt().item()")
bug("retimed-size", "the network of another schedule is shown the straight path's size", "x = (a + s) * x_t",
    "x = x_t")
bug("retimed-sign", "the velocity points from noise to image, as in Lipman et al.",
    "self.schedule.to_eps(x0, x, t) - x0", "x0 - self.schedule.to_eps(x0, x, t)")
bug("retimed-output", "the network's own output is taken for eps",
    "self.schedule.to_eps(x0, x, t) - x0", "self.model(x, t, y) - self.schedule.to_eps(x0, x, t)")
bug("retimed-levels", "the new path has the old noise level, not the old SNR",
    "NoiseSchedule((a / (a + s)) ** 2, s / (a + s))", "NoiseSchedule((1 - s) ** 2, s)")
bug("retimed-label", "the label is lost on the way", "self.model(x, t, y), x, t,", "self.model(x, t), x, t,")
bug("skip-signal", "c_skip forgets the signal level, which is 1 in the paper",
    "return a * self.sigma_data ** 2 / total", "return self.sigma_data ** 2 / total")
bug("out-root", "c_out is divided by the variance", "s * self.sigma_data / total ** 0.5", "s * self.sigma_data / total")
bug("in-variance", "the input is divided by its variance", "1 / total ** 0.5", "1 / total")
bug("unscaled-input", "the network sees x_t as it is", "self.network(c_in * x_t, t, y)", "self.network(x_t, t, y)")
bug("weights-density", "drawn timesteps are counted as if log SNR were even", "chance / -torch.gradient(log_snr)[0]",
    "chance")
bug("weights-units", "the weight is that of an error in x0", "density * factor * torch.exp(-log_snr)",
    "density * factor")
bug("weights-uniform", "the weight forgets how timesteps are drawn", "timestep_probabilities(schedule.T, logit_normal)",
    "timestep_probabilities(schedule.T)")
bug("couple-apart", "noises are exchanged where that takes them further away",
    "cost[i, q] + cost[j, p] < cost[i, p] + cost[j, q]", "cost[i, q] + cost[j, p] > cost[i, p] + cost[j, q]")
bug("couple-nearest", "each image takes a near noise, some noises twice",
    "torch.where(better, q, p), torch.where(better, p, q)", "torch.where(better, q, p), q")
bug("couple-classes", "noises leave their class", "better &= (y[i] == y[j]).view(len(i), -1).all(1)", "pass")


# ---------------------------------------------------------------- workshop core
bug = lesson("workshop/core", tests="")
bug(
    "address-salted", "addresses go through Python's hash, which differs from process to process",
    'digest = hashlib.sha256(repr(key).encode()).digest()',
    'digest = hash(repr(key)).to_bytes(8, "little", signed=True)', tests="test_data.py")
bug(
    "address-forgets-step", "only the first part of an address counts: every batch draws the same noise",
    "hashlib.sha256(repr(key)", "hashlib.sha256(repr(key[0])", tests="test_data.py")
bug(
    "write-in-place", "files are written under their final name: a crash leaves half of one",
    'with open(partial_path, "wb") as f:', 'partial_path = path\n        with open(path, "wb") as f:',
    tests="test_data.py")
bug(
    "partial-left", "a failed write leaves its temporary file behind",
    "        if partial_path.is_file():\n            partial_path.unlink()", "        pass", tests="test_data.py")
bug(
    "digest-skips-data", "the checksum covers names and shapes, not numbers",
    "h.update(t.reshape(-1).view(torch.uint8).numpy())", "pass", tests="test_train.py")
bug(
    "digest-skips-facts", "the checksum does not cover step and configuration",
    "h = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())", "h = hashlib.sha256()", tests="test_train.py")
bug(
    "checksum-ignored", "the checksum is written and never compared", "if _digest(tensors, meta) == checksum:",
    "if checksum:", tests="test_train.py")
bug(
    "checkpoint-in-place", "checkpoints are written under their final name",
    "return write_whole(path, save(tensors, metadata=facts))",
    "Path(path).write_bytes(save(tensors, metadata=facts)); return path", tests="test_train.py")
bug(
    "reader-disturbed", "a reader gives up if a running training removes the checkpoint it has chosen",
    "if path not in checkpoints(run):", "if False:", tests="test_runs.py -k rotated_away", page=False)
bug(
    "version-1-model", "checkpoints of version 0.1, which know no patches, are refused",
    '_same_model(_whole(meta["model"]), model, path)', '_same_model(meta["model"], model, path)',
    tests="test_versions.py")


# ---------------------------------------------------------------- workshop datasets
bug = lesson("workshop/datasets", tests="")
bug(
    "digits-overflow", "digits are multiplied by 16: full ink becomes 256, which wraps to black", "* (255 / 16)",
    "* 16", tests="test_data.py")
bug(
    "split-leaks", "the training split contains the test images", '% 6 == 5) == (split == "test")',
    '% 6 == 5) | (split != "test")', tests="test_data.py")
bug("fashion-lies-down", "clothes stored column by column are read row by row: everything lies on its side",
    ".mT[:, None].contiguous()", "[:, None].contiguous()", tests="test_data.py")
bug("fashion-labels-shift", "each image of clothes gets the label of the one before it",
    "torch.from_numpy(labels).long()", "torch.from_numpy(labels).long().roll(1)", tests="test_data.py")
bug(
    "fashion-split-ignored", "the test split of the clothes is their training split",
    '(f"{split}_images", f"{split}_labels", "classes")', '("train_images", "train_labels", "classes")',
    tests="test_data.py")
bug(
    "cifar-layout", "CIFAR-10 is reshaped where axes must be permuted",
    "torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous()", "torch.from_numpy(d.data).reshape(-1, 3, 32, 32)",
    tests="test_data.py -k axes")
bug(
    "labels-shift", "after a broken file all labels shift by one", 'labels[kept]', 'labels[:len(kept)]',
    tests="test_data.py")
bug(
    "cache-stale", "the cache of decoded images does not depend on size and filter",
    "json.dumps([digest, size, interpolation, channels, on_broken, _reader])", "json.dumps([digest])",
    tests="test_data.py")


# ---------------------------------------------------------------- workshop diagnosis
bug = lesson("workshop/diagnosis", tests="")
bug(
    "misfit-cancels", "bins above and below the log cancel out", "max(0, (d ** 2 - var).mean())",
    "max(0, d.mean() ** 2 - var.mean() / len(d))")
bug("bgr-is-flip", "the order BGR is tried by turning the image over", 'inputs["in the order BGR"] = x0.flip(1)',
    'inputs["in the order BGR"] = x0.flip(2)')
bug(
    "seed-ignored", "first weights are always those of seed 0",
    'torch.manual_seed(addressed(seed, "weights").initial_seed())',
    'torch.manual_seed(addressed(0, "weights").initial_seed())')
bug(
    "decay-moves", "weights that only decayed count as trained",
    "left = now - (now @ first / size if size else 0) * first", "left = now - first")
bug(
    "grid-elsewhere", "the grid is drawn again from other noise", 'generator=addressed(config.training.seed, "grid"))',
    'generator=addressed(config.training.seed, "start"))')
bug(
    "probe-stays", "the network stays where the last trial left it",
    "    model.load_state_dict(start)\n    return found", "    return found")
bug("copies-of-one", "an image counts as its own copy", "if c > 1)", "if c > 0)")
bug(
    "first-only", "of a larger set the first images are compared", "torch.arange(n) * len(images) // n",
    "torch.arange(n)")
bug("grey-blanks", "an image of one colour must be grey to count as blank", "x.amax((2, 3)) == x.amin((2, 3))).all(1)",
    "x.flatten(1).amax(1) == x.flatten(1).amin(1))")
bug(
    "parts-as-wholes", "each part of a batch counts as a whole one",
    "*part, config.noise.prediction).sum() / len(batch[1])", "*part, config.noise.prediction).mean()")
bug("others-whatever-they-cost", "other samplers are tried at any cost", "if not afford(", "if afford(")
bug(
    "renamed-by-one", "one image of a class that fits another is enough to rename the class",
    "d.mean() < -sure * d.std(ddof=1)", "d.min() < -sure * d.std(ddof=1)")


# ---------------------------------------------------------------- workshop facts
bug = lesson("workshop/facts", tests="")
bug(
    "told-always", "the floor forgets that labels are hidden in some steps",
    "(1 - hidden) * floor + hidden * f.unconditional_floor", "floor", tests="test_doctor.py")
bug(
    "optimum-unmirrored", "mirrored images do not count as training images", "if c.images.flip:\n        images",
    "if False:\n        images", tests="test_doctor.py")
bug(
    "late-is-early", "the last third of the rows is the first", "v[-max(LEAST_ROWS, round(n * share)):]",
    "v[:max(LEAST_ROWS, round(n * share))]", tests="test_doctor.py")
bug(
    "calm-is-spikes", "the calm rows are the spikes", "keep = ~np.isin(late", "keep = np.isin(late",
    tests="test_doctor.py")
bug(
    "floor-plain", "the floor is a plain mean over timesteps that are not drawn alike", "(curve * self.chances).sum()",
    "curve.mean()", tests="test_doctor.py")
bug(
    "oldest-checkpoint", "the oldest checkpoint is examined", "for path in reversed(checkpoints(run)):",
    "for path in checkpoints(run):", tests="test_doctor.py")
bug(
    "other-tools-nameless", "the folder of another tool is only not a run folder", "for tool, names in OTHERS.items():",
    "for tool, names in ():")
bug(
    "extended-in-place", "more epochs are advised in the folder of a finished run",
    'if changes and changes.keys() <= free_to_change - {"epochs"}:', "if changes and changes.keys() <= free_to_change:")
bug("again-in-place", "the same settings again are advised in the folder that holds them", "if changes and changes",
    "if changes")
bug(
    "odd-rows-silent", "rows are left out and nobody is told",
    """f.missing += [f"a part of metrics.csv: {', '.join(odd)}"] if odd else []""", "pass")


# ---------------------------------------------------------------- workshop findings
bug = lesson("workshop/findings", tests="test_doctor.py")
bug(
    "lower-alarms", "a loss below the logged one counts as unexplained, as it has with dropout",
    'f.fit["mean"][0] < f.fit["mean"][1] or ', "")
bug(
    "poor-explanation", "the best hypothesis is believed however badly it fits",
    "if best and tried[best] < min(AGREE, late / 2):", "if best:")
bug(
    "sampler-worst", "the way to sample that fits worst is named", "way = min(middle, key=middle.get, default=None)",
    "way = max(middle, key=middle.get, default=None)")
bug(
    "labels-blind", "labels that are used are called ignored", "if not gain - 2 * error > -BLIND * share:",
    "if gain - 2 * error > -BLIND * share:")
bug(
    "constant-alarms", "a constant rate before its planned decay is not told from one that forgot to decay",
    '    if f.holding:\n        return (f"The rate is constant, as planned, and its decay begins at step '
    '{_decay_begins(f):,} of "\n                f"{f.total:,}. Before that step the run can be extended as '
    'if it had been planned so.")',
    '    if not f.holding:\n        return (f"The rate is constant, as planned, and its decay begins at '
    'step {_decay_begins(f):,} of "\n            f"{f.total:,}. Before that step the run can be extended '
    'as if it had been planned so.")')
bug(
    "share-judged", "an average over a share of the run is judged by the unused ema_decay",
    "if c.training.ema_half_lives is None:", "if True:")
bug(
    "decay-inverted", "a learning rate that fell to zero counts as not decayed",
    'f.metrics["lr"].max(), f.config.training.decay_share\n    if _decayed(f):',
    'f.metrics["lr"].max(), f.config.training.decay_share\n    if not _decayed(f):')
bug(
    "warmup-is-jump", "the warm-up counts as a jump of the learning rate",
    " & (step[:-1] > min(f.config.training.warmup, f.total // 10))", "")
bug(
    "average-inverted", "a constant rate is a fault where the weights are averaged, and none where they are not",
    "if _averaged(f):", "if not _averaged(f):")
bug(
    "mirrored-copies-pass", "mirrored copies of training images count as new", "torch.cat([made, made.flip(-1)])",
    "torch.cat([made, made])")
bug(
    "copying-without-error", "any share above 5% counts as copying", "if share - COPIED_SURE * error <= COPIED:",
    "if share <= COPIED:")
bug(
    "capacity-inverted", "few images are a danger to networks too small to hold them", "f.parameters < HOLD * values",
    "f.parameters > HOLD * values")
bug(
    "counted-though-measured", "few images are counted even where held-out loss was measured",
    'if f.losses and "held-out" in f.losses or passes < PASSES', "if passes < PASSES")
bug(
    "ema-against", "EMA and last weights are compared the wrong way round",
    '_paired(f.losses["train"], f.losses["raw"])', '_paired(f.losses["raw"], f.losses["train"])')
bug(
    "overfitting-against", "held-out and training loss are compared the wrong way round",
    '_paired(f.losses["held-out"], f.losses["train"])', '_paired(f.losses["train"], f.losses["held-out"])')
bug("images-seen-inverted", "long runs are called short", "if ratio >= SEEN:", "if ratio <= SEEN:")
bug(
    "mirror-inverted", "flips are called harmful where they do no harm", "if m[0] - m[1] < MIRROR_LOSS:",
    "if m[0] - m[1] > MIRROR_LOSS:")
bug(
    "mirror-leaks", "the mirror test scores on the images it learned from", ".score(*sides(odd[half:]))",
    ".score(*sides(odd[:half]))")
bug("imbalance-lenient", "classes may differ thirtyfold", "if high <= 3 * max(low, 1)", "if high <= 30 * max(low, 1)")
bug(
    "amplitude-power", "what is left of the signal is given as power, so that too much passes",
    "left = float(f.schedule.a[-1])", "left = float(f.schedule.alpha_bar[-1])")
bug(
    "copies-self", "each training image is its own nearest neighbour", "nearest(some, pool, skip_self=True)[0]",
    "nearest(some, pool)[0]")
bug(
    "copies-far", "pictures far from the training images count as copies", "(near < usual.mul(COPY).clamp(min=grey))",
    "(near > usual.mul(COPY).clamp(min=grey))")
bug(
    "contrast-inverted", "contrast is that of the real images over the made ones",
    "(made.std().maximum(grey) / real.std().maximum(grey))", "(real.std().maximum(grey) / made.std().maximum(grey))")
bug(
    "sizes-agree", "sizes that disagree pass", "if len({v for v in sizes.values() if v}) == 1:",
    "if len({v for v in sizes.values() if v}) >= 1:")
bug(
    "upscaled-inverted", "images that were shrunk are called enlarged", "f.size / f.native, f.config.noise.shift",
    "f.native / f.size, f.config.noise.shift")
bug(
    "few-is-good", "scores of few images pass", 's["n"] >= SCORE_TIMES * dim',
    's["n"] < SCORE_TIMES * dim')


# ---------------------------------------------------------------- workshop features
bug = lesson("workshop/features", tests="")
bug(
    "features-range", "the feature network is shown another range than it was trained on", "self.body(x / 127.5 - 1)",
    "self.body(x / 255)", tests="test_evaluate.py")
bug(
    "features-aliased", "images are shrunk for the feature network without antialiasing", 'resize(x, 8, "bilinear")',
    'resize(x, 8, "nearest")', "Lightning-AI/torchmetrics#3130", tests="test_evaluate.py")


# ---------------------------------------------------------------- workshop folder
bug = lesson("workshop/folder", tests="")
bug(
    "cut-row-read", "the row that is being written is read as if it were whole", "filter(None, lines[:-1])",
    "filter(None, lines)", tests="test_train.py")
bug("crlf-kept", "the last column of a file with CRLF has another name", '.replace("\\r\\n", "\\n")', "")
bug("bom-kept", "a file that an editor began with a BOM is damaged", '"utf-8-sig"', '"utf-8"')
bug(
    "rows-as-they-come", "rows stay out of order", "[rows[step] for step in sorted(rows)]", "list(rows.values())")
bug(
    "earlier-row-counts", "of two rows of a step the one before the resume counts", "rows[step], last = cells,",
    "rows[step], last = rows.get(step, cells),", tests="test_doctor.py -k later_counts")
bug(
    "other-images-go-on", "a run goes on with other images, if they are as many and of the same classes",
    '"class_counts", "digest")', '"class_counts")', tests="test_runs.py -k one_changed_pixel", page=False)
bug(
    "plan-over", "a run that is past the end of its new plan is called finished", "if over(config.training.epochs):",
    "if False:", tests="test_runs.py -k plan_that_is_over", page=False)
bug(
    "sweep-of-others", "a resumed run removes files that other commands are writing", '"samples/.step_*"', '"*/.*"',
    tests="test_runs.py -k left_alone", page=False)
bug(
    "run-among-images", "a run may be kept in its folder of images, which then has a class more",
    "Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder))", "False",
    tests="test_runs.py -k among_its_images", page=False)
bug(
    "version-1-rows", "metrics of version 0.1, without processor time, are refused",
    "if names not in (columns, columns[:-1]):", "if names != columns:", tests="test_versions.py")


# ---------------------------------------------------------------- workshop generate
bug = lesson("workshop/generate", tests="")
bug(
    "start-by-position", "an image depends on its place in the batch", '[addressed(seed, "start", k) for k in ks]',
    '[addressed(seed, "start", k) for k in range(len(ks))]', tests="test_sample.py")
bug(
    "labels-by-position", "every batch gets the labels of the first", "denoiser.take(ks)",
    "denoiser.take(slice(len(ks)))", tests="test_sample.py")
bug(
    "samples-mixed", "samples of another model are accepted as the beginning of these",
    '"model": fingerprint(denoiser.model, denoiser.schedule),', '"model": "",', tests="test_sample.py")
bug(
    "samples-again", "an interrupted call makes all samples again", "if not (folder / f\"{k:06d}.png\").exists()]", "]",
    tests="test_sample.py")
bug(
    "fingerprint-forgets-noise", "samples of two schedules with one signal curve are mixed",
    "    if schedule != NoiseSchedule(schedule.alpha_bar):\n        h.update(schedule.s.numpy().tobytes()) "
    "# otherwise alpha_bar determines s", "    pass # otherwise alpha_bar determines s",
    tests="test_sample.py")
bug(
    "bf16-sampling-ignored", "bf16 is ignored in sampling", 'enabled=precision == "bf16"):\n            x0 =',
    "enabled=False):\n            x0 =", tests="test_sample.py")
bug(
    "settings-not-handed-on", "the sampler never hears of the settings it was given", "generator=dice, **settings)",
    "generator=dice, steps=settings.get(\"steps\", 50))", tests="test_sample.py")
bug(
    "start-ignores-seed", "every seed starts from the same noise", '[addressed(seed, "start", k) for k in ks]',
    '[addressed(0, "start", k) for k in ks]', tests="test_sample.py")
bug(
    "fresh-noise-ignores-seed", "with eta above 0 every seed draws the same fresh noise",
    '[addressed(seed, "sample", k) for k in ks]', '[addressed(0, "sample", k) for k in ks]', tests="test_sample.py")


# ---------------------------------------------------------------- workshop preflight
bug = lesson("workshop/preflight", tests="test_preflight.py")
bug(
    "mirrored-upside-down", "mirrored copies are looked for upside down", "digest(x.flip(-1))", "digest(x.flip(-2))")
bug(
    "own-neighbour", "each image is its own nearest neighbour", "alike[rows[:, None] == order[low:high]] = -1",
    "alike[rows[:, None] == order[low:high]] = 1")
bug(
    "neighbours-on-one-side", "neighbours whose place along the direction is lower are not compared",
    "torch.searchsorted(place, at[0] - within - 1e-4)", "torch.searchsorted(place, at[0])")
bug("red-skies-pass", "skies may be red", "    if effect > 0:", "    if effect:")
bug(
    "empty-class-passes", "a class without images does not count", "low, high = min(counts), max(counts)",
    "low, high = min(k for k in counts if k), max(counts)")
bug(
    "new-batch-each-step", "the batch to be learnt by heart is another in each step",
    "def shard(self, batch): return self.batch", "def shard(self, batch): return batch")
bug(
    "rate-of-the-run", "a batch is learnt with a rate that is right for a run of hours",
    "lr=max(training.lr, LEAST_LR)", "lr=training.lr")
bug(
    "noise-averaged-by-area", "averaging n pixels divides the deviation of noise by n, not by its root",
    "schedule.s * 32 / max(size, 32)", "schedule.s * (32 / max(size, 32)) ** 2")
bug(
    "nearest-is-usual", "the usual distance is that to the nearest image, which may be a copy", "NEIGHBOUR = 10",
    "NEIGHBOUR = 1")
bug(
    "copies-searched", "exact copies are searched for near copies too", "near_duplicates(scan, skip=known)",
    "near_duplicates(scan)")
bug(
    "pairs-twice", "each pair of near-duplicates counts twice", "sorted({(max(pair), min(pair)) for pair in pairs})",
    "pairs")
bug(
    "tried-anyway", "a run that does not fit in memory is tried", 'fits = memory.state == "ok"', "fits = True")
bug(
    "median-size", "the size advised enlarges half of the images",
    "np.quantile(short, MANY,", "np.quantile(short, 0.5,")
bug(
    "variance-of-sample", "the variance along the first direction is divided by n - 1", ".item() / len(x))",
    ".item() / (len(x) - 1))")


# ---------------------------------------------------------------- workshop reader
bug = lesson("workshop/reader", tests="")
bug(
    "exif-ignored", "photographs taken upright lie on their side",
    "return im.transpose(_turns[orientation]) if orientation in _turns else im", "return im", tests="test_data.py")
bug(
    "sixteen-bits-clipped", "16-bit images are clipped to white instead of scaled", "(grey * (255 / top))", "(grey)",
    tests="test_data.py")
bug(
    "alpha-dropped", "transparent pixels show the colour hidden under them", "if im.has_transparency_data:",
    "if False:", tests="test_data.py")
bug(
    "squeezed", "images that are not square are squeezed instead of cropped", 'ImageOps.fit(im, (size, size),',
    'im.resize((size, size),', tests="test_data.py")
bug(
    "classes-by-position", "labels of a test split count in its own list of classes",
    "return torch.tensor(order, dtype=torch.int64, device=labels.device)[labels]", "return labels",
    tests="test_data.py")
bug(
    "suffix-case", "images whose suffix is in capitals are left out", "os.path.splitext(entry.name)[1].lower()",
    "os.path.splitext(entry.name)[1]", tests="test_data.py")


# ---------------------------------------------------------------- workshop report
bug = lesson("workshop/report", tests="")
bug(
    "watch-repeats", "each warning is repeated at every row", 'if x.severity == "good" or x.id in announced:',
    'if x.severity == "good" :', tests="test_doctor.py")
bug(
    "json-nan", "report.json holds NaN, which is no JSON", "return float(x) if math.isfinite(x) else None",
    "return float(x)")
bug("nothing-folded", "the details are not folded", "FOLDED = 3", "FOLDED = 99")
bug(
    "gallery-any-protocol", "pictures are chosen by scores of another protocol",
    'and all(s.get(k) == v for k, v in x["protocol"].items())', "and True")
bug(
    "gallery-best", "the best picture is shown for the nearest below", "[x for a, b, x in same if a <= b][-1:]",
    "[x for a, b, x in same if a <= b][:1]")


# ---------------------------------------------------------------- workshop run
bug = lesson("workshop/run", tests="")
bug(
    "rates-mixed", "the logged learning rate is that of the next step", '"lr": lr_at(state.step - 1, self.total',
    '"lr": lr_at(state.step, self.total', tests="test_train.py -k rate_of")
bug(
    "resume-from-zero", "a resumed run counts from 0 and replays its first batches",
    'state.restore(tensors, meta["step"],', 'state.restore(tensors, 0,', tests="test_train.py -k resumed_metrics")
bug(
    "metrics-twice", "a resumed run repeats rows of metrics.csv",
    'before = [r for r in _rows(run) if float(r["step"]) <= state.step]', "before = _rows(run)",
    tests="test_train.py -k written_once")
bug(
    "picture-lost", "killed between checkpoint and picture, a resumed run never draws it", "if resumed:", "if False:",
    tests="test_faults.py -k killed_20")
bug(
    "newest-removed", "the oldest checkpoints are kept instead of the newest", "checkpoints(self.run)[:-keep]",
    "checkpoints(self.run)[keep:]", tests="test_train.py")
bug(
    "samples-of-raw-weights", "sample grids come from the last weights, not from the average",
    "Denoiser(state.ema.model, schedule", "Denoiser(state.model, schedule", tests="test_train.py -k rate_of")
bug(
    "processor-time-restarts", "a resumed run counts processor time from zero", 'meta.get("processor_seconds", 0.0)',
    "0.0", tests="test_train.py -k processor")
bug(
    "bf16-grids-inverted", "sample grids are drawn in bf16 by all runs but those that ask for it",
    'enabled=config.run.precision == "bf16"):\n        made', 'enabled=config.run.precision != "bf16"):\n        made',
    tests="test_train.py")
bug(
    "grid-always-eps", "sample grids take every output for eps", "schedule, config.noise.prediction, y, clip=",
    'schedule, "eps", y, clip=', tests="test_train.py")
bug(
    "autoencoder-trained-again", "a resumed run in latents trains its autoencoder anew",
    "if fresh and not resumed:", "if fresh:", tests="test_latent.py")
bug(
    "grid-of-latents", "sample grids show latents instead of decoding them",
    "torch.cat([autoencoder.decode(part) for part in made.split(at_once)])", "made[:, :1]", tests="test_latent.py")


# ---------------------------------------------------------------- workshop scoring
bug = lesson("workshop/scoring", tests="")
bug(
    "read-layout", "pixels read from an .npz are reshaped where axes must be permuted",
    "torch.from_numpy(images[:n]).permute(0, 3, 1, 2).contiguous()",
    "torch.from_numpy(images[:n]).reshape(-1, images.shape[3], *images.shape[1:3])", tests="test_evaluate.py")
bug(
    "run-ignores-steps", "a run is evaluated with 50 steps, whatever was asked for",
    "steps=steps, seed=seed, **settings)", "steps=50, seed=seed, **settings)", tests="test_evaluate.py")


# ---------------------------------------------------------------- workshop settings
bug = lesson("workshop/settings", tests="")
bug(
    "unet-settings-ignored", "settings that only a UNet has are accepted for a transformer, and ignored",
    'for name in _unet_only if network.network == "transformer" else ("depth",):',
    'for name in () if network.network == "transformer" else ("depth",):', tests="test_transformer.py -k refused")
bug(
    "half-lives-too-long", "averages longer than the run are accepted", "if h > seen]:",
    "if False]:", tests="test_train.py -k half_lives")
