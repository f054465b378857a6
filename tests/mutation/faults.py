"""The faults: what a slip of the hand could make of a line, and the tests that must notice.

A fault names a room or a file, a text that occurs once in it, what to put there, and test files.  ``replay.py`` runs
them.  A fault that changes nothing that anyone could observe has no place here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        where: a room or file, relative to the repository.
        old, new: the text that occurs once there, and what replaces it.
        tests: files or folders below tests/ of which one test at least must fail.
    """

    where: str
    old: str
    new: str
    tests: tuple[str, ...]


def faults_of(where: str, tests: str, changes: list[tuple[str, str]]) -> list[Fault]:
    """The faults of one room or file, which the same tests must notice."""
    return [Fault(where, old, new, tuple(tests.split())) for old, new in changes]


SCHEDULE = faults_of(
    "samplers/noise_schedule.py",
    "samplers/test_noise_schedule.py",
    [
        ("(alphas_bar_sqrt - last) * (first / (first - last))", "(alphas_bar_sqrt - last) * first"),
        ("(first / (first - last))) ** 2", "(first / (first - last)))"),
        ("return 1 - alphas\n", "return (1 - alphas).float()\n"),
        ("beta_start**0.5, beta_end**0.5", "beta_start, beta_end"),
        ("clamp(max=0.999)", "clamp(max=0.99)"),
        ("t + 0.008", "t + 0.08"),
        (
            'bool(config.get("rescale_betas_zero_snr", False))',
            'bool(config.get("rescale_betas_zero_snr", True))',
        ),
        ("return self.alphas_cumprod[-1].item() == 0", "return self.alphas_cumprod[-1].item() < 1e-3"),
        ("abar + ratio**2 * (1 - abar)", "abar + ratio * (1 - abar)"),
        ("weight = snr.clamp(max=gamma) / (snr + 1)", "weight = snr.clamp(max=gamma) / snr"),
        ("weight = gamma / snr.clamp(min=gamma)", "weight = gamma / snr.clamp(max=gamma)"),
        ("return weight.clamp(min=floor)", "return weight"),
        (
            "below = t.long().clamp(max=self.last_timestep - 1)",
            "below = t.round().long().clamp(max=self.last_timestep - 1)",
        ),
        ("t = to_float64(t).clamp(0, self.last_timestep)", "t = to_float64(t).float().clamp(0, self.last_timestep)"),
        (".add_(below).clamp_(0, self.last_timestep)", ".add_(below).round().clamp_(0, self.last_timestep)"),
    ],
)

STEPS = faults_of(
    "samplers",
    "samplers/test_step_schedules.py",
    [
        ("(last + 1) / steps - 1", "last / steps - 1"),
        ("stride = (last + 1) // steps", "stride = last // steps"),
        ("offset = min(1, last", "offset = min(0, last"),
        ("** 0.2)])", "** 0.1)])"),
        ("timesteps[0] = last ", "timesteps[0] = last - 1e-3 "),
        ("return np.linspace(high, low, steps) ** rho", "return np.linspace(high, low, steps) ** (rho + 0.1)"),
        ("np.linspace(1, 0, steps) ** rho)", "np.linspace(1, 0, steps) ** (1 / rho))"),
        (
            "np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps)",
            "np.linspace(math.atan(sigma_max), 0, steps)",
        ),
        ("max(math.ceil(steps / denoise - 1e-9), steps + 1)", "max(math.floor(steps / denoise - 1e-9), steps + 1)"),
        ("math.ceil(steps / denoise - 1e-9)", "math.ceil(steps / denoise)"),
        ("max(math.ceil(steps / denoise - 1e-9), steps + 1)", "math.ceil(steps / denoise - 1e-9)"),
        ("[-(steps + 1) :]", "[: steps + 1]"),
        ("return min(max((steps - 5) / 3, 1.0), 5.0)", "return min(max((steps - 5) / 3, 1.0), 4.0)"),
        ("return math.sqrt(height * width)", "return math.sqrt(height + width)"),
        ("if schedule.zero_terminal_snr and math.isfinite(sigma):", "if math.isfinite(sigma):"),
        ("if infinite and steps == 1:", "if False:"),
    ],
)

SOLVERS = faults_of(
    "samplers",
    "samplers/test_steps_by_hand.py samplers/test_solvers.py samplers/test_sampling.py",
    [
        ("slope = weights[i][1] * min(1, lengths[i - 1] / lengths[i])", "slope = weights[i][1]"),
        (
            "return log_length(sigmas, i) / (2 * log_length(sigmas, i - 1))",
            "return log_length(sigmas, i) / log_length(sigmas, i - 1)",
        ),
        ("np.array([1 + slope, -slope]) for step, slope", "np.array([1, 0]) for step, slope"),
        ("return alpha_next - alpha * s_next / s\n", "return alpha_next - alpha * s_next\n"),
        ("log_sigma, first=1 if math.isinf(sigmas[0]) else 0)", "log_sigma)"),
        ("phi_3 = 0.5 - phi_2 / h", "phi_3 = 0.5 - phi_2"),
        ("phi_2 = 1 - b / h", "phi_2 = 1 - b"),
        ("correct.append(held * np.array([0.5, 0.5]))", "correct.append(held * np.array([0.4, 0.6]))"),
        ("(1 + h_last / h) * (-h_last / h)", "(1 + h_last / h) * (h_last / h)"),
        ("if math.isfinite(h_last) else phi_2 / b", "if math.isfinite(h_last) else phi_2"),
        (
            "nodes = np.log([sigma for sigma in sigmas[max(i - 2, 0) : i + 1][::-1]",
            "nodes = np.log([sigma for sigma in sigmas[max(i - 1, 0) : i + 1][::-1]",
        ),
        ("integral * alpha_s(sigmas[i + 1])[0]", "integral * alpha_s(sigmas[i])[0]"),
        ("return 2 * end if math.isinf(start)", "return 4 * end if math.isinf(start)"),
        ("else math.sqrt(start * end)", "else (start + end) / 2"),
        ("eta * math.sqrt(1 - (sigma_next / sigma) ** 2)", "eta * (1 - (sigma_next / sigma) ** 2)"),
        ("alpha=alpha_end * math.sqrt(end**2 - start**2))", "alpha=0.99 * alpha_end * math.sqrt(end**2 - start**2))"),
        (
            "return add_noise(x0, 0.0, end, noise()) if end > 0 else x0",
            "return add_noise(x0, 0.0, 0.99 * end, noise()) if end > 0 else x0",
        ),
        (
            "weights = integral_weights(u, u[0], u[1], angle)",
            "weights = integral_weights(u, *u, angle) * 0 + integral_weights(u, *u, angle).sum() / 2",
        ),
        ("torch.lerp(x0, history[1], -slope) if slope else x0", "x0"),
        ("phi_3 = phi_2 / h - 0.5", "phi_3 = phi_2 / h"),
        ("slope = slope + r_0 * bend", "slope = slope"),
        ("alpha=-phi_3 / (h * phi_1))", "alpha=phi_3 / (h * phi_1))"),
        (
            "alpha=s_next * math.sqrt(1 - ratio ** (2 * eta)))",
            "alpha=0.99 * s_next * math.sqrt(1 - ratio ** (2 * eta)))",
        ),
        ("alpha=alpha_next * (1 - ratio ** (1 + eta)))", "alpha=alpha_next * (1 - ratio))"),
        ("carried = end / middle *", "carried = 0.9 * end / middle *"),
        (
            "down = end * math.sqrt(1 - share**2)\n    x = ddim(run.kept, x0, start, down)",
            "down = end\n    x = ddim(run.kept, x0, start, down)",
        ),
        ("lambda: s_noise * randn_like(x, generator))", "lambda: randn_like(x, generator))"),
        ("if noise.isnan().any():", "if False:"),
        ("if any(after >= before", "if any(after > before"),
        ("self.history = [value, *self.history[: count - 1]]", "self.history = [value, *self.history[:count]]"),
        ("return (alpha * x).add_(model_output, alpha=-s)", "return (alpha * x).add_(model_output, alpha=s)"),
        ("model_output = model_output.to(x.dtype)", "model_output = model_output.bfloat16().to(x.dtype)"),
        ("return (alpha * x - x0) / s\n", "return (x - alpha * x0) / s\n"),
    ],
)

STOCHASTIC = [
    *faults_of(
        "samplers/er_sde.py",
        "samplers/test_er_sde.py",
        [
            ("weights[0] = 1 - end / start * keep", "weights[0] = 1 - keep"),
            ("(end - start) ** 2 / 2 + (sigma - start) @ scale", "(end - start) ** 2 + (sigma - start) @ scale"),
            ("s_end * math.sqrt(1 - keep**2)", "0.99 * s_end * math.sqrt(1 - keep**2)"),
            ("0.3), math.log(10))", "0.4), math.log(10))"),
        ],
    ),
    *faults_of(
        "samplers/sa_solver.py",
        "samplers/test_sa_solver.py",
        [
            ("tau = eta if NOISY[0] <= end <= NOISY[1] else 0.0", "tau = eta"),
            ("kept = (end / start) ** (tau**2)", "kept = (end / start) ** tau"),
            ("rate = 1 + tau**2", "rate = 1 + tau"),
            ("past[: min(PREDICTOR_ORDER, left - i)]", "past[: min(PREDICTOR_ORDER - 1, left - i)]"),
        ],
    ),
]

SPECTRAL = faults_of(
    "samplers",
    "samplers/test_steps_by_hand.py samplers/test_spectral_solver.py samplers/test_spectral.py",
    [
        ("correction[1:].sub_(seen.predicted[:-1])", "correction[1:].sub_(seen.predicted[1:])"),
        ("if step.early:", "if True:"),
        (
            "self.power = moved_back.clamp_(min=1 / STIFFEST).reciprocal_().add_(1)",
            "self.power = moved_back.clamp_(min=1 / STIFFEST).reciprocal_()",
        ),
        ("block = min(x.shape[-2:]) // BLOCKS", "block = 1 + min(x.shape[-2:]) // BLOCKS"),
        ("early = np.arange(len(held)) <= len(held) / 2", "early = np.arange(len(held)) <= len(held)"),
        ("if len(predict) < FINISH_FROM or", "if"),
        ("np.minimum(1, change / SHORT_STEP)", "np.ones_like(change)"),
    ],
)

GUIDANCE = faults_of(
    "samplers/guidance.py",
    "samplers/test_steps_by_hand.py samplers/test_guidance.py",
    [
        ("return torch.lerp(uncond, cond, scale)", "return torch.lerp(uncond, cond, scale - 1)"),
        ("(scale - 1) * difference", "scale * difference"),
        ("return d - exposure * m - contrast * k * p", "return d - exposure * m"),
        ("return d - exposure * m - contrast * k * p", "return d - contrast * k * p"),
        ("torch.lerp(torch.ones_like(ratio), ratio, phi)", "ratio"),
        ("rescaled = _canvas_mean(cond) + rest", "rescaled = _canvas_mean(guided) + rest"),
        ("return x.mean((-2, -1), keepdim=True)", "return x.mean((-3, -2, -1), keepdim=True)"),
        ("torch.where(std_guided > 0, std_cond / std_guided, torch.ones_like(std_cond))", "std_cond / std_guided"),
    ],
)

SCHEDULER = faults_of(
    "samplers",
    "samplers/test_steps_by_hand.py samplers/test_diffusers_scheduler.py samplers/test_diffusers_run.py",
    [
        ('(self.config["s_noise"] if s_noise is None else s_noise) * unit', "unit"),
        ("exact + (sample.float() - given.float())", "exact"),
        ("exact + (sample.float() - given.float())", "sample.float()"),
        ("s = (1 + u**2).rsqrt()", "s = (1 + u).rsqrt()"),
        (
            "return (alpha * noise - s * sample).to(sample.dtype)",
            "return (alpha * noise + s * sample).to(sample.dtype)",
        ),
        (
            "dtype = torch.promote_types(like.dtype, torch.float32)\n        return send(",
            "dtype = like.dtype\n        return send(",
        ),
        ("return int(found[-1])", "return int(found[0])"),
        ("(timesteps.diff() < 0).all()", "(timesteps.diff() <= 0).all()"),
        ('self.sigmas[step:].tolist(), self.config["eta"])', "self.sigmas[step:].tolist())"),
        ('if key != "timestep_spacing"}', "}"),
        ('if model.get("snr_shift_scale", 1.0) != 1.0:', "if False:"),
    ],
)

PLAN = faults_of(
    "data/epoch_plan.py",
    "data/test_epoch_orders.py data/test_epoch_plan.py",
    [
        ("keys = self._random(epoch, ORDER, len(pictures))", "keys = self._random(0, ORDER, len(pictures))"),
        ("self._random(epoch, STEPS, len(bucket_of_step))", "self._random(0, STEPS, len(bucket_of_step))"),
        ("if 0 < count < 2 * self.batch_size and not repeating[b]", "if False"),
        (
            "self._random(epoch - epoch % epochs, KEPT_ORDER + b, len(members))",
            "self._random(0, KEPT_ORDER + b, len(members))",
        ),
        ("KEPT_ORDER + b, len(members))", "KEPT_ORDER, len(members))"),
        ("[self.rank :: self.world_size]", "[: self.batch_size // self.world_size]"),
        ("for step in drawn[start:]:", "for step in drawn:"),
        ("chosen = head[~again][:wanted]", "chosen = head[:wanted]"),
        ("waiting = before % self.batch_size", "waiting = 0 * before"),
        ("np.floor(epochs * self.repeats[self._pictures] + phase)", "np.floor(epochs * self.repeats[self._pictures])"),
        ("key = np.array([self.seed, epoch], dtype=np.uint64)", "key = np.array([0, epoch], dtype=np.uint64)"),
        ("if 0 < count < self.batch_size]", "if 0 < count < 0]"),
    ],
)

BUCKETS = [
    *faults_of(
        "canvas.py",
        "test_canvas.py",
        [
            ("| {(512, 512)})", ")"),
            ("other = min(limit, area // side) // step * step", "other = area // side // step * step"),
            ("if max(side, other) <= LONGEST_RATIO * min(side, other):", "if True:"),
            ("key=lambda bucket: (bucket[0], -bucket[1])", "key=lambda bucket: bucket[0] * bucket[1]"),
            ("np.where(middles > -_TIE, _TIE, -_TIE)", "_TIE"),
            ("> max_aspect_error + _TIE] = -1", "> 2 * max_aspect_error + _TIE] = -1"),
            ("return math.sqrt(width * height / math.prod(trained))", "return width * height / math.prod(trained)"),
        ],
    ),
    *faults_of(
        "data/bucketing.py",
        "data/test_bucketing.py",
        [
            ("return 1 - np.minimum(across, down) / np.maximum(across, down)", "return 1 - np.minimum(across, down)"),
            (
                "reason[np.minimum(*sizes.T) < minimum_size] = TOO_SMALL",
                "reason[np.maximum(*sizes.T) < minimum_size] = TOO_SMALL",
            ),
            ("reason[np.asarray(repeats) == 0] = NO_WEIGHT", "pass"),
            ("closed = too_few[counts[too_few].argmin()]", "closed = too_few[counts[too_few].argmax()]"),
            ("better |= _covers(sizes, buckets, candidates)", "better |= candidates >= 0"),
        ],
    ),
]

OBJECTIVE = faults_of(
    "training/objective.py",
    "training/test_objective.py",
    [
        ("u = (random.permutation(batch_size) + u) / batch_size", "pass"),
        ("return alpha * noise - s * x0", "return alpha * noise + s * x0"),
        ("losses = self._device_weight[t] * errors", "losses = errors"),
        ("losses = losses / u.exp() + u", "losses = losses / u.exp()"),
        ("cumulative.diff() * (1 - settings.terminal_probability)", "cumulative.diff()"),
        ("probability[-1] += settings.terminal_probability", "probability[0] += settings.terminal_probability"),
        ("z = (-2 * torch.log(", "z = (2 * torch.log("),
        ("torch.where(snr < 1, weight.clamp(min=floor), weight)", "weight"),
        ("NoiseSchedule.from_betas(schedule.betas, bool(settings.zero_terminal_snr))", "schedule"),
        ("self.schedule = self.schedule.shifted(shift)", "pass"),
        (
            "math.ceil(0.9 * (schedule.last_timestep + 1)), None)",
            "math.ceil(0.8 * (schedule.last_timestep + 1)), None)",
        ),
        ("noise.add_(offset, alpha=self.settings.noise_offset)", "noise.add_(offset)"),
    ],
)

EMA = faults_of(
    "training/ema.py",
    "training/test_ema.py",
    [
        ("(gamma_of(self.sigma_rel) + 1)", "gamma_of(self.sigma_rel)"),
        (
            "return 1 - math.expm1(log * (step - before)) / math.expm1(log * step)",
            "return self.decay ** (step - before)",
        ),
        ("if step % self.every:", "if False:"),
        ("weights, 1 - profile.kept(before, step))", "weights, profile.kept(before, step))"),
        ("system[count, count] = 0", "system[count, count] = 1"),
        ('self.step = int(tensors["step"])', "pass"),
    ],
)

LEAK = faults_of(
    "diagnostics",
    "diagnostics/test_limits.py diagnostics/test_leak.py diagnostics/test_guidance_shift.py",
    [
        ("LEAK_SHARE = 0.2 ", "LEAK_SHARE = 0.3 "),
        ("LEAST_PEAK = 1.5 ", "LEAST_PEAK = 2.0 "),
        ("PULL_LEVELS = 1.0 ", "PULL_LEVELS = 2.0 "),
        ("PULL_LATENT = 0.02 ", "PULL_LATENT = 0.03 "),
        ("SLOPE_DEPARTURE = 0.1 ", "SLOPE_DEPARTURE = 0.2 "),
        ("TABLE_UP_TO = 0.8 ", "TABLE_UP_TO = 1.0 "),
        ("if misfit < next_misfit / 4 else None", "if misfit < next_misfit else None"),
        ('if side > 0 and table == "zero SNR":', 'if side > 0 and table == "plain":'),
        ("return alpha * variance / (alpha**2 * variance + s**2)", "return alpha * variance / (alpha**2 + s**2)"),
        (
            "grey = probe.rgb_mean.mean(0), reference.rgb_mean.mean(0), 127.5",
            "grey = probe.rgb_mean.mean(0), reference.rgb_mean.mean(0), 255",
        ),
        ("if bias > 0 and (departure <= 0 or not infinite):", "if bias > 0 and departure <= 0:"),
        ("if bias == 0 or departure == 0:", "if bias == 0:"),
        ("if np.linalg.norm(mean) * offset < 2 * PULL_LATENT:", "if False:"),
        (
            "Estimate.over_seeds(1 + (slopes - exact) @ mean / (mean @ mean))",
            "Estimate.over_seeds((slopes - exact) @ mean / (mean @ mean))",
        ),
        ("believed = (1 - variance) / response.value", "believed = 1 / response.value"),
    ],
)

CHECKPOINTS = [
    *faults_of(
        "checkpoints/latent_scaling.py",
        "checkpoints/test_latent_scaling.py",
        [
            ("return ((z - mean) / std).to(z.dtype)", "return (z / std - mean).to(z.dtype)"),
            ("return (x * std + mean).to(x.dtype)", "return (x * std).to(x.dtype)"),
            ("tuple(number / factor for number in std)", "tuple(number * factor for number in std)"),
            ("0.13025, False: 0.18215", "0.18215, False: 0.18215"),
            ("dtype = torch.promote_types(like.dtype, torch.float32)", "dtype = like.dtype"),
        ],
    ),
    *faults_of(
        "checkpoints/schedule_shift.py",
        "checkpoints/test_schedule_shift.py",
        [
            ("if not all(math.isclose(ratio, shift, rel_tol=TOLERANCE) for ratio in ratios):", "if False:"),
            ("return kept if shift in (None, 1) else", "return"),
            (".shifted(shift).betas.tolist()", ".betas.tolist()"),
        ],
    ),
    *faults_of(
        "files.py",
        "test_files.py",
        [
            ("target = Path(os.path.realpath(path))", "target = Path(path)"),
            ("os.chmod(temporary, stat.S_IMODE(old.st_mode))", "pass"),
            ("_remove_leftovers(target)\n        file, temporary", "file, temporary"),
            ("fcntl.LOCK_EX | fcntl.LOCK_NB)\n        remove(neighbour)", "fcntl.LOCK_SH)\n        remove(neighbour)"),
            ("temporary.unlink()", "pass"),
        ],
    ),
]

PICTURES = [
    *faults_of(
        "data/keyed_random.py",
        "data/test_keyed_random.py",
        [
            ("generator.manual_seed(int(seeds[slot]))", "generator.manual_seed(int(seeds[0]))"),
            ("key, counter = (seed, epoch)", "key, counter = (seed, 0)"),
            ("(0, 0, picture + 1, purpose)", "(0, 0, picture + 1, 0)"),
        ],
    ),
    *faults_of("data/dataset.py", "data/test_dataset.py", [("div_(127.5)", "div_(128)")]),
    *faults_of("data/picture_boxes.py", "data/test_picture_boxes.py", [("div_(127.5)", "div_(128)")]),
    *faults_of("data/make_latent_cache.py", "data/test_latent_cache.py", [("div_(127.5)", "div_(128)")]),
    *faults_of(
        "data/tag_weights.py",
        "data/test_tag_weights.py",
        [
            ("(np.median(frequencies) / frequencies) ** power", "(np.mean(frequencies) / frequencies) ** power"),
            ("weights=np.clip(scaled, low, high)", "weights=scaled"),
            ("np.where(tagged, weights * scale, 1.0)", "np.where(tagged, weights * scale, scale)"),
            (", weights=shares) - 1", ") - 1"),
        ],
    ),
    *faults_of(
        "data/tokens.py",
        "data/test_tokens.py",
        [
            ("split_special_tokens=True", "split_special_tokens=False"),
            ("places = torch.arange(math.lcm(*lengths))", "places = torch.arange(max(lengths))"),
            ("output.hidden_states[-2] for output", "output.hidden_states[-1] for output"),
            ("outputs[1].text_embeds[tokens.rows[:, 0]]", "outputs[1].text_embeds[tokens.rows[:, -1]]"),
            ("TEXT = CHUNK - 2 ", "TEXT = CHUNK - 3 "),
        ],
    ),
]

FAULTS = [
    *SCHEDULE,
    *STEPS,
    *SOLVERS,
    *STOCHASTIC,
    *SPECTRAL,
    *GUIDANCE,
    *SCHEDULER,
    *PLAN,
    *BUCKETS,
    *OBJECTIVE,
    *EMA,
    *LEAK,
    *CHECKPOINTS,
    *PICTURES,
]
