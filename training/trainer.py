"""``ztsnr finetune``: a run, from settings to files that every program loads correctly.

One ``NoiseSchedule`` gives the betas, the SNR, the loss weights, the sampler of the previews, and what the exported
files say.  Everything random follows from the seed and the place in the plan, so a run that was stopped resumes as if
it had never stopped, on any number of processes.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..data.dataset import Batch, loader
from ..data.prefetch import ahead
from ..data.quarantine import Quarantine
from ..errors import Stopped, UserError
from ..files import atomic_write
from ..world import World, describe_device, start_world
from .base_hashes import HASHES, base_hashes
from .config import FinetuneSettings
from .previews import Previews
from .progress import Progress
from .run import Run
from .run_data import say_undecodable
from .run_folder import open_run_folder, say_changes
from .run_state import RunStates
from .saving import export_run, restore_state, save_snapshots, save_state
from .settings_file import settings_content, write_settings
from .step import TrainingStep
from .stopping import out_of_memory_in_one_sentence, stop_signals, stopped_sentence
from .validation import Validation
from .watch import Watch, written_if_possible

UNREADABLE = 1000  # why a run stops, beside the numbers of signals: a process has no next batch


def run_finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Train, and export the result.

    Args:
        settings: settings of the run.
        resume: continue from the last state in the run's folder, if it has one.
        dry_run: read the data and the model, plan the memory, print the tables, and stop.
        say: called in the first process with each line for the user.

    Returns:
        The exported files and folders.  Empty after a dry run.

    Raises:
        UserError: what the user can mend.
        Stopped: a signal stopped the run, which has saved its state.
    """
    with start_world(settings.speed.device) as world, out_of_memory_in_one_sentence(_ways_to_less_memory(settings)):
        states = RunStates(settings.out / "states", settings.keep, settings.keep_every, world)
        with open_run_folder(settings.out, states, resume, world):
            say = say if world.first else (lambda line: None)
            if settings.speed.device == "auto":
                say(f"Device: {describe_device(world.device)}")
            run = Run(settings, world, say)
            last = states.last()
            if last or not dry_run:
                run.base_hashes = base_hashes(run.base.path, settings.out / HASHES, world)
            if last:
                restore_state(run, states, *last)
                say_changes(settings.out / "config.toml", run.settings, say)
            if not (dry_run and last):  # a dry run leaves the settings that a run was trained with
                _write_settings(run)
            if dry_run:
                say_undecodable(run.data, settings.data, world, say)
                return []
            train(run, states)
            return export_run(run)


def train(run: Run, states: RunStates) -> None:
    """Train to the last step, or raise Stopped after the step in which a signal came; the state is saved either way.

    It is saved too before the UserError that ends a run because its pictures cannot be read.
    """
    settings, world = run.settings, run.world
    take_step = TrainingStep(run)
    take_step.warm_up()
    watch = Watch(settings.out, settings.watch, world, run.place.step, settings_content(settings))
    validation = _validation(run, take_step)
    batches = _batches(run)
    run.speed.start_interval()
    with (
        stop_signals() as stopped,
        closing(batches),
        Progress(run.place.step, settings.steps, run.say, shown=world.first) as progress,
    ):
        stopping = 0
        batch, trouble = _fetched(batches) if run.place.step < settings.steps else (None, None)
        if world.any(trouble is not None):
            _end_with(trouble, world)
        while batch is not None:
            run.bands.add(*take_step(batch))
            run.guard.look()
            progress.advance()
            run.speed.count(settings.data.batch_size)

            step = run.place.step
            due = partial(_is_due, step, settings.steps)
            if due(settings.watch.log_every):
                progress.show(step, _log(run, watch))
                run.speed.start_interval()
            if validation is not None and due(settings.watch.validate_every):
                with run.speed.paused():
                    _measure(run, validation, watch)
            if run.previews is not None and due(settings.watch.preview_every):
                with run.speed.paused():
                    _show(run, run.previews, watch)
            if due(settings.average.snapshots):
                with run.speed.paused():
                    save_snapshots(run)
            batch, trouble = _fetched(batches) if step < settings.steps else (None, None)
            # A signal, or a batch that cannot be read, may reach one process alone; all stop after the same step.
            stopping = world.largest(UNREADABLE if trouble else max(stopped, default=0))
            if stopping or due(settings.save_every):
                run.guard.read()  # raises before a broken state is saved
                with run.speed.paused():
                    save_state(run, states)
            if stopping:
                break
    with written_if_possible("the end of the metrics", run.place.step, run.say):
        watch.close()
    if run.place.step < settings.steps:
        if stopping == UNREADABLE:
            _end_with(trouble, world)
        run.say(stopped_sentence(stopping, run.place.step))
        raise Stopped(stopping)


def _fetched(batches: Iterator[Batch]) -> tuple[Batch | None, UserError | None]:
    """The next batch, or why there is none."""
    try:
        return next(batches), None
    except UserError as error:
        return None, error


def _end_with(trouble: UserError | None, world: World) -> NoReturn:
    """End the run in all processes with the message of the one that has trouble."""
    if trouble is not None:
        raise trouble
    world.wait()  # breaks off as that process leaves, and start_world raises its message
    raise UserError("another process cannot read its pictures: its own output says more")


def _is_due(step: int, last: int, every: int) -> bool:
    """True after a step if something is due every ``every`` steps and after the last one; 0 means never."""
    return every > 0 and (step % every == 0 or step == last)


def _ways_to_less_memory(settings: FinetuneSettings) -> list[str]:
    ways = []
    if settings.speed.checkpointing != "full":
        ways.append('speed.checkpointing = "full"')
    ways.append(f"optimizer.accumulation above {settings.optimizer.accumulation}")
    if settings.optimizer.name == "adamw":
        ways.append('optimizer.name = "adamw8bit"')
    if not settings.average.on_cpu and settings.speed.strategy == "ddp":
        ways.append("average.on_cpu = true")
    if settings.model.adapter is None:
        ways.append("model.adapter")
    return ways


def _write_settings(run: Run) -> None:
    """Record all that the run depends on."""
    contents = {"config.toml": write_settings(run.settings), "objective.csv": run.objective.to_csv().encode()}
    for name, content in contents.items() if run.world.first else ():
        with atomic_write(run.settings.out / name) as file:
            file.write(content)


def _batches(run: Run) -> Generator[Batch, None, None]:
    settings = run.settings
    dataset = run.data.dataset(Quarantine(settings.out / "quarantine"), settings.data.captions, run.tokenize)
    batches = loader(
        dataset,
        epoch=run.place.epoch,
        start=run.place.epoch_step,
        workers=settings.data.workers,
        max_unusable=settings.data.max_unusable,
    )
    return ahead(batches, run.world.device)


def _validation(run: Run, take_step: TrainingStep) -> Validation | None:
    if not run.settings.watch.validate_every:
        return None
    validation = Validation(
        run.data,
        run.settings.watch.validation_pictures,
        run.settings.data.captions,
        run.tokenize,
        run.objective,
        lambda pixels, number: take_step.latents(pixels, range(1), 0, number),
        run.world,
    )
    if not validation.count:
        run.say("no picture is held out, so there is no validation: set data.validation_share above 0")
        return None
    return validation


def _log(run: Run, watch: Watch) -> str:
    """Write a line of metrics, and return it in short."""
    metrics = run.bands.read(run.world) | run.guard.read() | run.speed.read()
    metrics["learning rate"] = float(run.optimizer.param_groups[0]["lr"])  # torchao's is a tensor
    with written_if_possible("the line of metrics", run.place.step, run.say):
        watch.write(run.place.step, metrics)
    return _postfix(metrics)


def _measure(run: Run, validation: Validation, watch: Watch) -> None:
    """Validate with the average that is exported, or with the weights if there is none."""
    with run.averaged():
        metrics = validation.measure(run.predict)
    with written_if_possible("the validation", run.place.step, run.say):
        watch.write(run.place.step, metrics)


def _show(run: Run, previews: Previews, watch: Watch) -> None:
    """Sample the previews with the average, or with the weights if there is none."""
    step = run.place.step
    with run.averaged(), run.speed.eager():
        sheet, metrics = previews.make()
    with written_if_possible("the sheet of pictures", step, run.say):
        watch.write(step, metrics)
        watch.picture(step, "previews", sheet)
        if run.world.first:
            folder = run.settings.out / "previews"
            folder.mkdir(exist_ok=True)
            with atomic_write(folder / f"step-{step:08d}.png") as file:
                sheet.save(file, "PNG")


def _postfix(metrics: dict[str, float]) -> str:
    """The loss, overall and by bands of timesteps, and the speed.  A narrow terminal cuts off the low noise, last."""
    bands = {name: name.removeprefix("loss/") for name in reversed(metrics) if name.startswith("loss/t")}
    shown = {"loss": "loss", "pictures a second": "img/s", "MFU": "MFU", "peak memory (GiB)": "GiB", **bands}
    return ", ".join(f"{short} {metrics[name]:.3g}" for name, short in shown.items() if name in metrics)
