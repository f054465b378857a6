"""``ztsnr finetune``: the run, from settings to files that every program loads right.

One ``NoiseSchedule`` gives the betas, the SNR, the loss weights, the sampler of the previews, and what the exported
files say.  Everything random follows from the seed and the place in the plan, so a run that was stopped goes on as if
it had not been, on any number of processes.
"""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints.latent_scaling import LatentScaling
from ..data.dataset import Batch, loader
from ..data.keyed_random import POSTERIOR, keyed_noise
from ..data.latent_cache import LatentCache
from ..data.prefetch import ahead, sent
from ..data.quarantine import Quarantine
from ..data.tokens import batch_prompts
from ..errors import UserError
from ..files import atomic_write
from ..world import World, describe_device, start_world
from .config import FinetuneSettings
from .ema import ConstantDecay, Ema, PowerFunction, Profile
from .guard import StepGuard
from .networks import Denoiser, Tokenize, add_adapter, in_groups, load_networks, trained_names
from .objective import Objective
from .optimizers import clip_grad_norm, load_optimizer_tensors, lr_factor, make_optimizer, optimizer_tensors, set_lr
from .parallel import parallelize, whole
from .precision import LossScale
from .previews import Previews
from .run_data import open_data
from .run_state import RunStates
from .settings_file import changed_settings, settings_content, write_settings
from .speed import Speed
from .stopping import out_of_memory_in_one_sentence, stop_signals
from .validation import Validation
from .watch import BandedLoss, Watch, check_installed

BANDS = (300, 600, 900)  # thousandths of the schedule; t = T is a band of its own


@dataclass(frozen=True)
class Place:
    """Where a run is: so many steps are done, and the next one is this one of this epoch."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0


def run_finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Train, and export what came of it.

    Args:
        settings: of the run.
        resume: go on from the last state in its folder, if there is one.
        dry_run: do everything but train: read the data and the model, plan the memory, print the tables.
        say: takes each line that is for the user, in the first process.

    Returns:
        What was exported; nothing after a dry run, or if the run was stopped by a signal, which saves its state.

    Raises:
        UserError: what the user can mend, in a sentence.
    """
    with start_world(settings.speed.device) as world, out_of_memory_in_one_sentence(settings):
        states = RunStates(settings.out / "states", settings.keep, settings.keep_every, world)
        trouble = world.tell(_folder_trouble(settings.out, states, resume) if world.first else None)
        if trouble:
            raise UserError(trouble)
        say = say if world.first else (lambda line: None)
        if settings.speed.device == "auto":
            say(f"Device: {describe_device(world.device)}")
        run = _Run(settings, world, say)
        if last := states.last():
            run.restore(states, *last)
            run.say_changes()
        if not (dry_run and last):  # those of a run that is there are what it was trained with
            run.write_settings()
        if dry_run:
            return []
        run.warm_up()
        return run.export() if run.train(states) else []


def _folder_trouble(out: Path, states: RunStates, resume: bool) -> str | None:
    """Why this cannot be the folder of the run; it is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        return f"{out} cannot be the folder of a run: {reason}"
    if states.paths() and not resume:
        return (
            f"{out} holds a run that is at step {max(states.paths())}: go on with --resume auto, or choose another "
            "folder"
        )
    return None


class _Run:
    """A run and all its parts."""

    def __init__(self, settings: FinetuneSettings, world: World, say: Callable[[str], None]):
        self.settings, self.world, self.say = settings, world, say
        check_installed(settings.watch)
        self.place = Place()
        self.objective = Objective(settings.objective, device=world.device)
        self.say(self.objective.table())
        self.data = open_data(settings.data, settings.seed, world, settings.out / "index.arrow")
        self._say_data()

        self.networks = load_networks(settings.model.base, settings.model.config)
        if self.data.cache is not None:
            self.data.cache.check_vae(self.networks.vae)
        self.latent_scaling = self._choose_scaling()
        self.tokenize = Tokenize(self.networks, settings.data.max_chunks)
        self._place_networks()

        self.profiles: list[Profile] = [PowerFunction(width) for width in settings.average.sigma_rel]
        if settings.average.decay is not None:
            self.profiles.append(ConstantDecay(settings.average.decay))
        self.ema = Ema(
            self.model.parameters,
            self.profiles,
            device="cpu" if settings.average.on_cpu else None,
            every=settings.average.every,
        )
        self.optimizer = self._make_optimizer()
        settle = self.ema.settle  # and not this object, whose memory would wait for the garbage collector
        self.optimizer.register_step_pre_hook(lambda *_: settle())
        self.guard = StepGuard(settings.out / "bad_batches", settings.optimizer.max_skipped, world)
        self.loss_scale = LossScale(world.device) if settings.model.dtype == "float16" else None
        last = self.objective.schedule.last_timestep
        self.bands = BandedLoss(last, [round(band / 999 * last) for band in BANDS], world.device)
        self.previews = self._previews()  # a prompt that cannot be followed is told now

    # ------------------------------------------------------------------------------------------------------------------
    # Putting it together

    def write_settings(self) -> None:
        """Put down all that the run depends on."""
        contents = {"config.toml": write_settings(self.settings), "objective.csv": self.objective.to_csv().encode()}
        for name, content in contents.items() if self.world.first else ():
            with atomic_write(self.settings.out / name) as file:
                file.write(content)

    def say_changes(self) -> None:
        """What a run that goes on is trained with from here on, and was not before."""
        with suppress(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):  # somebody else's file by now
            before = tomllib.loads((self.settings.out / "config.toml").read_text(encoding="utf-8"))
            for line in changed_settings(before, settings_content(self.settings)):
                self.say(line)

    def _say_data(self) -> None:
        plan = self.data.plan
        counts = [count for count in plan.counts(0) if count.pictures]
        trained = sum(count.pictures for count in counts)
        self.say(
            f"{trained} pictures in {len(counts)} buckets make {plan.step_count(0)} steps of {plan.batch_size} an "
            f"epoch; {len(self.data.held_out)} are held out"
        )
        for reason, count in self.data.left_out.items():
            self.say(f"left out, being {reason}: {count} pictures")
        refused = self.data.refused
        for key, reason in list(zip(refused["key"].to_pylist(), refused["reason"].to_pylist(), strict=True))[:5]:
            self.say(f"{key} cannot be used: {reason}")
        if len(refused) > 5:
            self.say(f"and {len(refused) - 5} others cannot be used")
        if self.data.weights is not None:
            self.say(self.data.weights.report())

    def _choose_scaling(self) -> LatentScaling:
        folder = self.settings.model.latent_statistics
        if folder is None:
            return self.networks.latent_scaling
        found = LatentCache(folder).statistics
        scaling = LatentScaling(tuple(found.mean.tolist()), tuple(found.std.tolist()))
        vae = self.networks.vae
        if len(scaling.mean) != vae.config.latent_channels:
            raise UserError(
                f"{folder} has latents of {len(scaling.mean)} channels, and the model's have another number"
            )
        vae.register_to_config(**scaling.vae_config(vae.config.scaling_factor))  # for the previews
        return scaling

    def _place_networks(self) -> None:
        settings, networks, device = self.settings, self.networks, self.world.device
        if settings.model.adapter is not None:
            add_adapter(networks.unet, settings.model.adapter)
        self.denoiser = Denoiser(networks).train()
        # given on, because a compiled U-Net is for one layout of its input
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        networks.unet.to(memory_format=self.layout)
        self.dtype = getattr(torch, settings.model.dtype)
        self.denoiser.to(device)
        networks.vae.to(device)
        names = trained_names(
            self.denoiser, adapter=settings.model.adapter is not None, text_encoders=settings.model.text_encoders
        )
        self.denoiser.requires_grad_(False)
        for stage in settings.stages:  # a wrong name is told now
            in_groups(names, stage.groups)
        if settings.model.text_encoders:
            self.denoiser.text_encoders.requires_grad_(True)  # which the plan of the memory reads
        self.speed = Speed(
            settings,
            networks,
            self.data.plan,
            [name.removeprefix("unet.") for name in names if name.startswith("unet.")],
            self.data.cache is None,
            self.world,
            self.say,
        )
        self.denoiser.requires_grad_(False)  # from here on ``self.model`` says what is trained
        self.speed.prepare(networks.unet, networks.factor)
        kept_in = torch.bfloat16 if settings.optimizer.bf16_stochastic_round else torch.float32
        self.model = parallelize(self.denoiser, settings.speed.strategy, self.dtype, names, kept_in, self.world)
        self.stage = -1

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings.optimizer
        unet = [p for name, p in self.model.parameters.items() if name.startswith("unet.")]
        text = [p for name, p in self.model.parameters.items() if name.startswith("text_encoders.")]
        text_lr = settings.text_encoder_learning_rate
        groups: list[dict[str, Any]] = [{"params": unet}]
        if text:
            groups.append({"params": text, "lr": settings.learning_rate if text_lr is None else text_lr})
        if self.objective.learned is not None:
            groups.append({"params": list(self.objective.learned.parameters()), "lr": 1e-2, "weight_decay": 0.0})
        return make_optimizer(
            settings.name,
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            bf16_stochastic_round=settings.bf16_stochastic_round,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # One step

    def _stage_at(self, step: int) -> int:
        """The index of the stage that a step belongs to."""
        for index, stage in enumerate(self.settings.stages):
            if stage.steps is None or step < stage.steps or index == len(self.settings.stages) - 1:
                return index
            step -= stage.steps
        raise AssertionError("there is always a last stage")

    def _enter_stage(self, index: int) -> None:
        stage = self.settings.stages[index]
        names = in_groups(self.model.parameters, stage.groups)
        self.model.train_only(names)
        for name, parameter in self.model.parameters.items():
            if name not in names:
                parameter.grad = None
        if len(self.settings.stages) > 1:
            self.say(f"stage {index + 1}: {', '.join(stage.groups)}, {len(names)} tensors")
        self.stage = index

    def latents(self, data: torch.Tensor, slots: range, epoch: int, step: int) -> torch.Tensor:
        """The U-Net's latents of what the data give: of cached latents, or of pixels through the VAE."""
        if self.data.cache is None:
            with torch.no_grad():
                posterior = self.networks.vae.encode(data).latent_dist
            shape = posterior.mean.shape[1:]
            noise = keyed_noise(shape, slots, self.settings.seed, epoch, step, POSTERIOR, self.world.device)
            data = posterior.mean + posterior.std * noise
        return self.latent_scaling.to_model(data)

    def _backward(self, batch: Batch, slots: range, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of this rank's share of a step, in parts; its errors and losses (B,)."""
        parts = self.settings.optimizer.accumulation
        size = -(-len(slots) // parts)
        errors, losses = [], []
        for begin in range(0, len(slots), size):
            part = slice(begin, begin + size)
            last = begin + size >= len(slots)
            x0 = self.latents(batch.data[part], slots[part], batch.epoch, batch.step)
            noise = self.objective.draw_noise(x0.shape[1:], slots[part], self.settings.seed, batch.epoch, batch.step)
            noisy = self.objective.noisy(x0, noise, t[part]).to(self.dtype)
            noisy = noisy.contiguous(memory_format=self.layout)
            tokens = self.speed.of_one_length(batch.tokens._replace(rows=batch.tokens.rows[part]))
            with nullcontext() if last else self.model.accumulating():
                output = self.model(noisy, t[part], tokens, batch.time_ids[part])
                weighted, error = self.objective.losses(output, x0, noise, t[part])
                weighted = weighted * batch.weights[part]
                loss = weighted.sum() / len(slots)
                (loss * self.loss_scale.scale if self.loss_scale else loss).backward()
            errors.append(error)
            losses.append(weighted.detach())
        return torch.cat(errors), torch.cat(losses)

    def step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of the optimizer; (B,) timesteps, errors and losses of this rank's pictures."""
        step = self.place.step
        if self._stage_at(step) != self.stage:
            self.warm_up()  # other parameters, other graphs
        plan = self.data.plan
        slots = range(plan.rank, plan.batch_size, plan.world_size)
        t = self.objective.draw_timesteps(self.settings.seed, batch.epoch, batch.step, plan.batch_size)
        t = sent(t[plan.rank :: plan.world_size], self.world.device)
        errors, losses = self._backward(batch, slots, t)
        if self.objective.learned is not None:
            self.world.average_gradients(self.objective.learned.parameters())

        settings = self.settings.optimizer
        factor = lr_factor(
            step,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self.settings.steps,
            final_share=settings.final_share,
            reference_steps=settings.reference_steps,
        )
        set_lr(self.optimizer, factor * self.settings.stages[self.stage].learning_rate)
        if self.loss_scale:
            self.loss_scale.unscale(self._all_parameters())
        norm = clip_grad_norm(self.model.parameters.values(), settings.clip or None)  # not a learned weight's beside
        if settings.bf16_stochastic_round:  # by torch's own generator; the same on all ranks, and after a resume
            torch.manual_seed(self.settings.seed + step)
        bad = self.guard.step(self.optimizer, norm, batch, t, step)
        if self.loss_scale:
            self.loss_scale.update(bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step + 1)
        self.place = Place(step + 1, batch.epoch, batch.step + 1)
        return t, errors, losses

    def _all_parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    # ------------------------------------------------------------------------------------------------------------------
    # The run

    def warm_up(self) -> None:
        """Compile for every bucket, before the clock runs."""
        self._enter_stage(self._stage_at(self.place.step))
        self.speed.warm_up(self._try_bucket)

    def _try_bucket(self, size: tuple[int, int], batch: int) -> None:
        """A forward and a backward pass of a bucket (width, height), of which nothing stays."""
        device, factor = self.world.device, self.networks.factor
        channels = self.networks.unet.config.in_channels
        noisy = torch.zeros(batch, channels, size[1] // factor, size[0] // factor, device=device, dtype=self.dtype)
        noisy = noisy.contiguous(memory_format=self.layout)
        tokens = self.speed.of_one_length(batch_prompts([self.tokenize("")] * batch))
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        self.model(noisy, t, tokens, torch.zeros(batch, 6, device=device)).float().sum().backward()
        for parameter in self._all_parameters():
            parameter.grad = None

    def train(self, states: RunStates) -> bool:
        """Until the last step; False if a signal stopped it."""
        settings, world, out = self.settings, self.world, self.settings.out
        watch = Watch(out, settings.watch, world, self.place.step, settings_content(settings))
        validation = self._validation()
        previews = self.previews
        batches = self._batches()
        bar = tqdm(total=settings.steps, initial=self.place.step, unit="step", disable=None if world.first else True)
        self.speed.start_interval()
        with stop_signals() as stopped, closing(batches), bar:
            while self.place.step < settings.steps:
                self.bands.add(*self.step(next(batches)))
                self.guard.look()
                bar.update()
                step = self.place.step
                self.speed.count(settings.data.batch_size)
                ends = step == settings.steps
                if step % settings.watch.log_every == 0 or ends:
                    metrics = self.bands.read(world) | self.guard.read() | self.speed.read()
                    metrics["learning rate"] = float(self.optimizer.param_groups[0]["lr"])  # torchao's is a tensor
                    with self._writing("the line of metrics"):
                        watch.write(step, metrics)
                    bar.set_postfix_str(_postfix(metrics))
                    if bar.disable:  # there is no terminal
                        self.say(f"step {step}: {_postfix(metrics)}")
                    self.speed.start_interval()
                if validation is not None and (step % settings.watch.validate_every == 0 or ends):
                    with self.speed.paused():
                        metrics = self._measure(validation)
                        with self._writing("the validation"):
                            watch.write(step, metrics)
                if previews is not None and (step % settings.watch.preview_every == 0 or ends):
                    with self.speed.paused():
                        self._show(previews, watch)
                if settings.average.snapshots and (step % settings.average.snapshots == 0 or ends):
                    with self.speed.paused():
                        self._snapshot()
                stopping = world.any(bool(stopped))
                if step % settings.save_every == 0 or stopping or ends:
                    self.guard.read()  # what is saved is sound
                    with self.speed.paused():
                        self._save(states)
                if stopping and not ends:
                    break
        with self._writing("the end of the metrics"):
            watch.close()
        if self.place.step < settings.steps:
            self.say(f"stopped at step {self.place.step}; go on with --resume auto")
            return False
        return True

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """What cannot be written within the block is missing, and said; the run matters more."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            self.say(f"{what} of step {self.place.step} could not be written: {reason}; training goes on without it")

    def _batches(self) -> Iterator[Batch]:
        settings = self.settings
        dataset = self.data.dataset(Quarantine(settings.out / "quarantine"), settings.data.captions, self.tokenize)
        batches = loader(
            dataset,
            epoch=self.place.epoch,
            start=self.place.epoch_step,
            workers=settings.data.workers,
            max_unusable=settings.data.max_unusable,
        )
        return ahead(batches, self.world.device)

    def _predict(self, noisy: torch.Tensor, t: torch.Tensor, tokens: Any, time_ids: torch.Tensor) -> torch.Tensor:
        with self.speed.eager():
            return self.model(noisy.to(self.dtype), t, tokens, time_ids)

    def _validation(self) -> Validation | None:
        if not self.settings.watch.validate_every:
            return None
        validation = Validation(
            self.data,
            self.settings.watch.validation_pictures,
            self.settings.data.captions,
            self.tokenize,
            self.objective,
            lambda pixels, number: self.latents(pixels, range(1), 0, number),
            self.world,
        )
        if not validation.count:
            self.say("no picture is held out, so there is no validation")
            return None
        return validation

    def _measure(self, validation: Validation) -> dict[str, float]:
        """With the average that is exported, or else with the weights as they are."""
        with self._averaged():
            return validation.measure(self._predict)

    def _previews(self) -> Previews | None:
        if not self.settings.watch.preview_every:
            return None
        return Previews(
            self.networks, self.objective.schedule, self.settings.objective.prediction_type, self.settings.watch
        )

    def _show(self, previews: Previews, watch: Watch) -> None:
        with self._averaged(), self.speed.eager():
            sheet, metrics = previews.make()
        with self._writing("the sheet of pictures"):
            watch.write(self.place.step, metrics)
            watch.picture(self.place.step, "previews", sheet)
            if self.world.first:
                folder = self.settings.out / "previews"
                folder.mkdir(exist_ok=True)
                with atomic_write(folder / f"step-{self.place.step:08d}.png") as file:
                    sheet.save(file, "PNG")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the network has the first average of its weights."""
        with self.ema.applied(self.profiles[0]) if self.profiles else nullcontext():
            self.model.refresh()
            self.denoiser.eval()
            yield
        self.model.refresh()
        self.denoiser.train()

    # ------------------------------------------------------------------------------------------------------------------
    # Its state

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = self._named_parameters()
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in named.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer, named).items()}
        if self.loss_scale:
            tensors |= {f"loss_scale.{name}": tensor for name, tensor in self.loss_scale.state_tensors().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.ema.state_tensors().items()}
        return tensors | {"bands": self.bands.sums}

    def _named_parameters(self) -> dict[str, torch.Tensor]:
        learned = self.objective.learned
        more = {} if learned is None else {f"learned_weight.{n}": p for n, p in learned.named_parameters()}
        return self.model.parameters | more

    def _leave_bands_to_first(self) -> None:
        """What was gathered since the last line of metrics, of all processes, is in all of them: count it once."""
        if not self.world.first:
            self.bands.sums.zero_()

    def _save(self, states: RunStates) -> None:
        """Write the state; where that fails, say so and train on."""
        step = self.place.step
        state = {
            "epoch": self.place.epoch,
            "epoch_step": self.place.epoch_step,
            "fingerprint": self.data.fingerprint,
            "guard": self.guard.state(),
        }
        self.world.sum(self.bands.sums)
        try:
            states.write(step, self._tensors(), state)
        except UserError as error:
            there = f"that of step {max(states.paths())} is there" if states.paths() else "there is none"
            self.say(f"{error}; {there}")
            if step >= self.settings.steps:
                raise
        self._leave_bands_to_first()

    def restore(self, states: RunStates, step: int, path: Path) -> None:
        """Go on from a state."""
        state = states.read_json(path)
        if state["fingerprint"] != self.data.fingerprint:
            raise UserError(
                f"{path} is of a run with other pictures, buckets, another batch_size or another seed: give the run "
                "those that it had, or choose another folder"
            )
        tensors = self._tensors()
        states.read_into(path, tensors)
        prefix = {name: len(name) + 1 for name in ("optimizer", "average")}
        part = {
            name: {key[cut:]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            for name, cut in prefix.items()
        }
        load_optimizer_tensors(self.optimizer, self._named_parameters(), part["optimizer"])
        self.ema.load_state_tensors(part["average"])
        self.guard.load(state["guard"])
        self._leave_bands_to_first()
        self.place = Place(step, state["epoch"], state["epoch_step"])
        self.say(f"going on from step {step}")

    def _snapshot(self) -> None:
        folder = self.settings.out / "snapshots"
        with suppress(OSError):  # what cannot be made, the first file finds missing
            folder.mkdir(exist_ok=True)
        for profile in self.profiles:
            if isinstance(profile, PowerFunction):
                path = folder / f"{profile.name}-step-{self.place.step:08d}.safetensors"
                with self._writing("a snapshot"):
                    self.ema.save_snapshot(path, profile, dtype=torch.float16)

    # ------------------------------------------------------------------------------------------------------------------

    def export(self) -> list[Path]:
        """Write what is trained: the averages, and the weights as they are."""
        from .export import export_model

        kinds: dict[str, Profile | None] = {profile.name: profile for profile in self.profiles}
        if self.settings.export.raw:
            kinds["raw"] = None
        written = []
        for kind, profile in kinds.items():
            tensors = self.model.parameters if profile is None else self.ema.tensors(profile)
            weights = {}
            for name, tensor in tensors.items():
                one = whole(tensor.detach())
                if self.world.first:
                    weights[name] = one.float().cpu()
            trouble = None
            if self.world.first:
                try:
                    name = self.settings.out.resolve().name  # also of "."
                    name = name if kind == next(iter(kinds)) else f"{name}_{kind}"
                    out = self.settings.out / "export"
                    written += export_model(
                        weights, out, name, self.settings, self.objective, self.latent_scaling, self.say
                    )
                except UserError as error:
                    trouble = str(error)
            if trouble := self.world.tell(trouble):
                raise UserError(trouble)
        return written


# ----------------------------------------------------------------------------------------------------------------------


def _postfix(metrics: dict[str, float]) -> str:
    """The loss, of all and by bands of timesteps, and the speed; what a narrow terminal cuts off is the low noise."""
    bands = {name: name.removeprefix("loss/") for name in reversed(metrics) if name.startswith("loss/t")}
    shown = {"loss": "loss", "pictures a second": "img/s", "MFU": "MFU", "peak memory (GiB)": "GiB", **bands}
    return ", ".join(f"{short} {metrics[name]:.3g}" for name, short in shown.items() if name in metrics)
