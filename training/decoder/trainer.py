"""Fine-tuning the decoder of a VAE, so that eyes and other small things come out right, without changing latents.

NovelAI did this to SDXL's VAE for V3 (arXiv 2409.15997).  The encoder and ``quant_conv`` are frozen, so the U-Net,
latent caches, and other models for the same latents need not change: only ``decoder`` and ``post_quant_conv`` do.  The
losses are those that the VAE was first trained with (``perceptual``).

The decoder learns from samples of the encoder's posterior and not from its mean, as in latent diffusion (Rombach et
al., arXiv 2112.10752): what a U-Net gives it is never exactly a mean either.  It is measured on means, which need no
random numbers.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from diffusers import AutoencoderKL

from ...checkpoints.vae import hash_encoder, load_vae
from ...data.dataset import PictureDataset, loader
from ...errors import Stopped, UserError
from ...files import atomic_write, check_new
from ...samplers.devices import send
from ...world import World, describe_device, find_device
from ..config import WatchSettings
from ..networks import check_finite
from ..progress import Progress
from ..run_folder import open_run_folder, say_changes
from ..run_state import RunStates
from ..settings_file import write_settings
from ..stopping import out_of_memory_in_one_sentence, stop_signals, stopped_sentence
from ..watch import Watch, written_if_possible
from .export import is_whole, merge_decoder, save_vae
from .perceptual import load_lpips
from .pictures import posterior_noise, read_pictures
from .reconstruction import Scores, evaluate, picture_sheet
from .settings import VaeDecoderSettings
from .state import has_old_state, recorded, refuse_old_state, restore_old_state, restore_state
from .step import DecoderTraining

SCORES, SHEET, SETTINGS = "scores.json", "pictures.png", "config.toml"
SHORT = {"pictures a second": "img/s"}  # in lines for the user
KEEP = 2  # states, as many as ``ztsnr finetune`` keeps by default


@dataclass(frozen=True)
class VaeDecoderReport:
    """The results of ``run_finetune_vae``.

    Attributes:
        before, after: scores on the held-out pictures.
        vae: the diffusers folder of the VAE alone, float32.
        merged: the model with it; None where ``model`` was a VAE alone.
    """

    before: Scores
    after: Scores
    vae: Path
    merged: Path | None


def run_finetune_vae(
    settings: VaeDecoderSettings, *, resume: bool = False, say: Callable[[str], None] = print
) -> VaeDecoderReport:
    """Fine-tune the decoder of a VAE, measure it, and write it alone and within its model.

    The folder ``out`` then holds ``vae`` (a diffusers folder), ``merged`` or ``merged.safetensors``, ``scores.json``,
    ``pictures.png`` (original, before, after), ``metrics.jsonl``, ``config.toml`` with all settings, and the last
    states of the run.  SIGINT and SIGTERM save the state and raise ``Stopped``.  A resumed run gives the same result as
    one that never stopped, bit for bit on the same machine on a CPU in float32.

    Args:
        settings: settings of the run.
        resume: continue from the last state in ``out``, if there is one; also what ``settings.resume`` says.
        say: called with each line for the user.

    Returns:
        What was written.

    Raises:
        Stopped: a signal stopped the run, which has saved its state.
        UserError: pictures, model, boxes or LPIPS are missing; there are too few pictures; ``out`` is in use, or holds
            another run, one that is not to be resumed, or other results; a loss or weight is not finite.
    """
    resume = resume or settings.resume
    device = find_device(settings.device)
    world = World(0, 1, 1, device)
    out = Path(settings.out)
    states = RunStates(out / "states", KEEP, 0, world)
    with out_of_memory_in_one_sentence(_ways_to_less_memory(settings)), open_run_folder(out, states, resume, world):
        last = states.last()
        if not resume:
            refuse_old_state(out)
        results = _Results.of(settings)
        if last is None and not has_old_state(out):  # else they are this run's, which a kill may have left half written
            results.check_new()
        if settings.device == "auto":
            say(f"Device: {describe_device(device)}")

        # The model, the pictures, and the scores of the decoder as it is.
        vae = load_vae(settings.model, config=settings.config, device=device)
        encoder = hash_encoder(vae)
        check_finite(settings.model, vae=vae)
        perceptual = load_lpips(settings.lpips_backbone).to(device) if settings.lpips_weight else None
        dataset, examples = read_pictures(settings, vae, say)
        before, shown_before = evaluate(vae, examples, perceptual, settings.batch_size)
        say(f"Before, on {before.pictures} held-out pictures: {before}.")

        # Where the run was.
        training = DecoderTraining(vae, settings, perceptual)
        fixed = recorded(settings, dataset.index, encoder)
        if last is not None:
            restore_state(training, states, *last, fixed)
        elif has_old_state(out):
            restore_old_state(training, out, fixed)
        if training.steps:
            say(f"resuming at step {training.steps}")
            say_changes(out / SETTINGS, settings, say)
        with atomic_write(out / SETTINGS) as file:
            file.write(write_settings(settings))

        train(training, dataset, states, fixed, world, say)

        # The average of the weights is the result.
        training.take_average()
        if hash_encoder(vae) != encoder:
            raise RuntimeError("the encoder has changed in training, and must not: nothing was written")
        after, shown_after = evaluate(vae, examples, perceptual, settings.batch_size)
        say(f"After {training.steps} steps: {after}.")
        scores = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after), "steps": training.steps}
        sheet = picture_sheet(
            {"original": examples[: len(shown_after), :3], "before": shown_before, "after": shown_after}
        )
        with atomic_write(out / SCORES) as file:
            file.write((json.dumps(scores | {"encoder_sha256": encoder}, indent=2) + "\n").encode())
        with atomic_write(out / SHEET) as file:
            sheet.save(file, "PNG")
        results.write(vae, say)
        return VaeDecoderReport(before, after, results.vae, results.merged)


def train(
    training: DecoderTraining,
    dataset: PictureDataset,
    states: RunStates,
    fixed: dict,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Train to the last step, or raise Stopped behind the step in which a signal came; the state is saved either way.

    It is saved too before the UserError that ends a run because its pictures cannot be read.
    """
    settings, plan, device = training.settings, dataset.plan, training.vae.device
    # The epoch that the next step belongs to, and its place there.
    epoch, start = 0, training.steps
    while start >= (count := plan.step_count(epoch)):
        epoch, start = epoch + 1, start - count
    batches = loader(dataset, epoch=epoch, start=start, workers=settings.workers)
    watch = Watch(Path(settings.out), WatchSettings(tensorboard=False), world, training.steps)
    begun, seen = time.perf_counter(), 0
    with stop_signals() as stopped, Progress(training.steps, settings.steps, say) as progress:
        batches = islice(batches, max(settings.steps - training.steps, 0))
        while True:
            try:
                batch = next(batches, None)
            except UserError:  # too many pictures cannot be read: keep what was learned
                if training.steps:
                    training.check()
                    states.write_or_say(training.steps, training.state(), {"settings": fixed}, say, is_last=False)
                raise
            if batch is None:
                break
            noise = posterior_noise(training.vae, settings, batch.epoch, batch.pictures.tolist())
            losses = training.step(send(batch.data, device), send(noise, device))
            progress.advance()
            seen += len(batch.data)
            step, stopping = training.steps, bool(stopped)
            is_last = step >= settings.steps
            if is_last or stopping or step % settings.log_every == 0:
                training.check()
                metrics = {name: value.item() for name, value in losses.items()}
                metrics |= {"pictures a second": seen / (time.perf_counter() - begun)}
                with written_if_possible("the line of metrics", step, say):
                    watch.write(step, metrics)
                progress.show(step, _line(metrics))
                begun, seen = time.perf_counter(), 0
            if is_last or stopping or step % settings.save_every == 0:
                training.check()  # raises before a broken state is saved
                states.write_or_say(step, training.state(), {"settings": fixed}, say, is_last=is_last)
            if stopping:
                break
    if training.steps < settings.steps:
        say(stopped_sentence(stopped[0], training.steps))
        raise Stopped(stopped[0])


def _line(metrics: dict[str, float]) -> str:
    return ", ".join(f"{SHORT.get(name, name)} {value:.4g}" for name, value in metrics.items())


@dataclass(frozen=True)
class _Results:
    """Where the trained VAE is written: alone, and within its model."""

    model: str
    vae: Path
    merged: Path | None

    @classmethod
    def of(cls, settings: VaeDecoderSettings) -> "_Results":
        model, out = Path(settings.model), Path(settings.out)
        name = "merged" if model.is_dir() else "merged.safetensors"
        return cls(settings.model, out / "vae", out / name if is_whole(model) else None)

    def paths(self) -> list[Path]:
        return [self.vae] if self.merged is None else [self.vae, self.merged]

    def check_new(self) -> None:
        """Refuse to overwrite what is not of this run."""
        for path in self.paths():
            check_new(path)

    def write(self, vae: AutoencoderKL, say: Callable[[str], None]) -> None:
        """Write both; those of an earlier export of the same run are replaced."""
        for path in self.paths():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.merged is not None:
            merge_decoder(vae, self.model, self.merged)
            say(f"Wrote {self.merged}, which differs from {self.model} in the decoder alone.")
        save_vae(vae, self.vae)
        say(f"Wrote {self.vae}, {self.vae.parent / SCORES} and {self.vae.parent / SHEET}.")


def _ways_to_less_memory(settings: VaeDecoderSettings) -> list[str]:
    ways = [f"batch_size below {settings.batch_size}"] if settings.batch_size > 1 else []
    ways += ['dtype = "bfloat16"'] if settings.dtype == "float32" else []
    return [*ways, f"size below {settings.size}"]
