"""The parts of a run, put together: objective, data, networks, averages, optimizer, and what watches them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..checkpoints.latent_scaling import LatentScaling
from ..data.latent_cache import LatentCache
from ..errors import UserError
from ..world import World
from .base import read_base, resolve_objective
from .caption_lengths import cut_captions
from .config import FinetuneSettings
from .ema import ConstantDecay, Ema, PowerFunction, Profile
from .guard import StepGuard
from .networks import Denoiser, Tokenize, add_adapter, in_groups, load_networks, trained_names
from .objective import Objective
from .optimizers import make_optimizer
from .parallel import parallelize
from .precision import LossScale
from .previews import Previews
from .run_data import open_data
from .speed import Speed
from .watch import BandedLoss, check_installed

BANDS = (300, 600, 900)  # thousandths of the schedule; t = T is a band of its own


@dataclass(frozen=True)
class Place:
    """Where a run is: ``step`` steps are done, and the next one is step ``epoch_step`` of epoch ``epoch``."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0


class Run:
    """All parts of a run.

    Attributes:
        place: how far the run has come.
        settings: settings of the run; those of the objective are resolved against the base.
        base: what the base model says of itself.
        base_hashes: part of the base -> hash of its content; empty until it is known.
        objective: schedule, noise and loss.
        data: pictures and the plan of the epochs.
        networks: the base model; ``denoiser`` holds those of its networks that predict.
        latent_scaling: scaling of the U-Net's latents.
        model: the denoiser as the processes train it together; ``model.parameters`` are the trained parameters.
        dtype, layout: dtype and memory format of the U-Net's input.
        profiles, ema: the averages of the weights.
        loss_scale: None unless the run computes in float16.
        bands: mean losses by bands of timesteps since the last line of metrics.
        previews: None if ``watch.preview_every`` is 0.

    Raises:
        UserError: what the user can mend: a missing library, pictures, model, prompt or setting.
    """

    def __init__(self, settings: FinetuneSettings, world: World, say: Callable[[str], None]):
        self.world, self.say = world, say
        check_installed(settings.watch)  # before anything is loaded
        self.place = Place()
        # By headers alone, so that a LoRA of the wrong prediction type is refused before gigabytes are read.
        self.base, self.base_hashes = read_base(settings.model.base), {}
        is_adapter = settings.model.adapter is not None
        objective = resolve_objective(settings.objective, self.base, is_adapter=is_adapter, say=say)
        self.settings = settings = replace(settings, objective=objective)
        self.objective = Objective(objective, self.base.schedule, device=world.device)
        self.say(self.objective.table())
        self.data = open_data(settings.data, settings.seed, world, settings.out / "index.arrow")
        self._say_data()

        self.networks = load_networks(settings.model.base, settings.model.config)
        if self.data.cache is not None:
            self.data.cache.check_vae(self.networks.vae)
        self.latent_scaling = self._choose_scaling()
        self.tokenize = Tokenize(self.networks, settings.data.max_chunks)
        if world.first and (line := cut_captions(self.data, settings.data, self.networks.tokenizers[0])):
            self.say(line)
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
        settle = self.ema.settle  # not self.ema: a reference to this object would keep its memory for the collector
        self.optimizer.register_step_pre_hook(lambda *_: settle())
        self.guard = StepGuard(settings.out / "bad_batches", settings.optimizer.max_skipped, world)
        self.loss_scale = LossScale(world.device) if settings.model.dtype == "float16" else None
        last = self.objective.schedule.last_timestep
        self.bands = BandedLoss(last, [round(band / 999 * last) for band in BANDS], world.device)
        self.previews = self._previews()  # now, so that a prompt that cannot be parsed is reported before training

    def all_parameters(self) -> Iterator[torch.Tensor]:
        """Every parameter that the optimizer has, those of a learned loss weight too."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter that the optimizer has, by the name that it has in a state."""
        learned = self.objective.learned
        more = {} if learned is None else {f"learned_weight.{n}": p for n, p in learned.named_parameters()}
        return {**self.model.parameters, **more}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the network has the first average of its weights, or the weights if there is no average."""
        with self.ema.applied(self.profiles[0]) if self.profiles else nullcontext():
            self.model.refresh()
            self.denoiser.eval()
            yield
        self.model.refresh()
        self.denoiser.train()

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, tokens: Any, time_ids: torch.Tensor) -> torch.Tensor:
        """The network's output without compiled code, whose graphs are for the shapes of training."""
        with self.speed.eager():
            return self.model(noisy.to(self.dtype), t, tokens, time_ids)

    # ------------------------------------------------------------------------------------------------------------------

    def _say_data(self) -> None:
        plan = self.data.plan
        counts = [count for count in plan.counts(0) if count.pictures]
        trained = sum(count.pictures for count in counts)
        self.say(
            f"{trained} pictures in {len(counts)} buckets make {plan.step_count(0)} steps of {plan.batch_size} per "
            f"epoch; {len(self.data.held_out)} are held out"
        )
        for reason, count in self.data.left_out.items():
            self.say(f"left out ({reason}): {count} pictures")
        refused = self.data.refused
        for key, reason in list(zip(refused["key"].to_pylist(), refused["reason"].to_pylist(), strict=True))[:5]:
            self.say(f"{key} cannot be used: {reason}")
        if len(refused) > 5:
            self.say(f"and {len(refused) - 5} others cannot be used")
        if self.data.weights is not None:
            self.say(self.data.weights.report())

    def _choose_scaling(self) -> LatentScaling:
        """The base's scaling, or mean and std of a cache if ``model.latent_statistics`` names one."""
        folder = self.settings.model.latent_statistics
        if folder is None:
            return self.networks.latent_scaling
        found = LatentCache(folder).statistics
        scaling = LatentScaling(tuple(found.mean.tolist()), tuple(found.std.tolist()))
        vae = self.networks.vae
        if len(scaling.mean) != vae.config["latent_channels"]:
            raise UserError(
                f"model.latent_statistics = {folder} has {len(scaling.mean)} latent channels, but the model's VAE has "
                f"{vae.config['latent_channels']}: give a cache of this VAE"
            )
        vae.register_to_config(**scaling.vae_config(vae.config["scaling_factor"]))  # for the previews
        return scaling

    def _place_networks(self) -> None:
        """Bring the networks to the device, choose what is trained, and share it among the processes."""
        settings, networks, device = self.settings, self.networks, self.world.device
        if settings.model.adapter is not None:
            add_adapter(networks.unet, settings.model.adapter)
        self.denoiser = Denoiser(networks).train()
        # stored, because a compiled U-Net is compiled for one layout of its input
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        cast(Any, networks.unet).to(memory_format=self.layout)
        self.dtype = getattr(torch, settings.model.dtype)
        self.denoiser.to(device)
        cast(torch.nn.Module, networks.vae).to(device)
        names = trained_names(
            self.denoiser, adapter=settings.model.adapter is not None, text_encoders=settings.model.text_encoders
        )
        self.denoiser.requires_grad_(False)
        for stage in settings.stages:  # reports a wrong name now, not when the stage begins
            in_groups(names, stage.groups)
        if settings.model.text_encoders:
            self.denoiser.text_encoders.requires_grad_(True)  # the memory plan reads this
        self.speed = Speed(
            settings,
            networks,
            self.data.plan,
            [name.removeprefix("unet.") for name in names if name.startswith("unet.")],
            self.data.cache is None,
            self.world,
            self.say,
        )
        self.denoiser.requires_grad_(False)  # from here on ``self.model`` decides what is trained
        self.speed.prepare(networks.unet, networks.factor)
        kept_in = torch.bfloat16 if settings.optimizer.bf16_stochastic_round else torch.float32
        self.model = parallelize(self.denoiser, settings.speed.strategy, self.dtype, names, kept_in, self.world)

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

    def _previews(self) -> Previews | None:
        if not self.settings.watch.preview_every:
            return None
        return Previews(
            self.networks,
            self.objective.schedule,
            self.objective.prediction_type,
            self.settings.watch,
            self.tokenize,
            empty_text=self.settings.data.captions.caption_dropout > 0,
        )
