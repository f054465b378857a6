"""What a run leaves on the disk: its state, from which it resumes; snapshots of its averages; the exported model."""

from contextlib import suppress
from pathlib import Path

import torch

from ..errors import UserError
from .base_hashes import HASHES, base_hashes, changed_parts
from .ema import PowerFunction, Profile
from .optimizers import load_optimizer_tensors, optimizer_tensors
from .parallel import whole
from .run import Place, Run
from .run_state import RunStates
from .watch import written_if_possible


def run_tensors(run: Run) -> dict[str, torch.Tensor]:
    """All tensors that the next step depends on, by name; they are the run's own, so loading into them restores it."""
    named = run.named_parameters()
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in named.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(run.optimizer, named).items()}
    if run.loss_scale:
        tensors |= {f"loss_scale.{name}": tensor for name, tensor in run.loss_scale.state_tensors().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in run.ema.state_tensors().items()}
    return tensors | {"bands": run.bands.sums}


def save_state(run: Run, states: RunStates) -> None:
    """Write the state; see ``RunStates.write_or_say``."""
    step = run.place.step
    state = {
        "epoch": run.place.epoch,
        "epoch_step": run.place.epoch_step,
        "fingerprint": run.data.fingerprint,
        "base": run.base_hashes,
        "guard": run.guard.state(),
    }
    run.world.sum(run.bands.sums)
    states.write_or_say(step, run_tensors(run), state, run.say, is_last=step >= run.settings.steps)
    _leave_bands_to_first(run)


def restore_state(run: Run, states: RunStates, step: int, path: Path) -> None:
    """Bring a run to where it was when it wrote a state.

    Raises:
        UserError: the state is damaged, or is one of other pictures, another model or other parameters.
    """
    state = states.read_json(path)
    if state["fingerprint"] != run.data.fingerprint:
        raise UserError(
            f"{path} was written with other pictures, buckets, another batch_size or another seed: give the run "
            "those that it had, or choose another folder"
        )
    if "base" not in state:
        run.say(f"{path} is a state of version 0.1.0 and does not say which base it was trained on: it is not checked")
    elif changed := changed_parts(run.base.path, state["base"], run.base_hashes):
        raise UserError(
            f"{path} was trained on another base: {changed}.  Set model.base to the one that the run began with, or "
            "choose another folder"
        )
    tensors = run_tensors(run)
    states.read_into(path, tensors)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    # What ``run_tensors`` gave as copies, being numbers and no tensors, still has to be put in its place.
    load_optimizer_tensors(run.optimizer, run.named_parameters(), part("optimizer."))
    run.ema.load_state_tensors(part("average."))
    run.guard.load(state["guard"])
    _leave_bands_to_first(run)
    run.place = Place(step, state["epoch"], state["epoch_step"])
    run.say(f"resuming at step {step}")


def _leave_bands_to_first(run: Run) -> None:
    """A state holds the sums of all processes, and loads into each of them: keep them in one, to count them once."""
    if not run.world.first:
        run.bands.sums.zero_()


def save_snapshots(run: Run) -> None:
    """Write the power-function averages as they are, for ``post_hoc``; a failed write is reported, and no more."""
    folder = run.settings.out / "snapshots"
    with suppress(OSError):  # writing the first file reports the missing folder
        folder.mkdir(exist_ok=True)
    for profile in run.profiles:
        if isinstance(profile, PowerFunction):
            path = folder / f"{profile.name}-step-{run.place.step:08d}.safetensors"
            with written_if_possible("a snapshot", run.place.step, run.say):
                run.ema.save_snapshot(path, profile, dtype=torch.float16)


def export_run(run: Run) -> list[Path]:
    """Write the model with each of its averages, and with the last weights if ``export.raw`` is set.

    Returns:
        What was written, in the first process; see ``export_model``.

    Raises:
        UserError: it cannot be written, or what was written is not sound; in all processes.
    """
    from .export import export_model  # here, because a dry run needs none of peft

    # The trained weights go into the base's files, which may have been replaced in the meantime.
    now = base_hashes(run.base.path, run.settings.out / HASHES, run.world)
    if changed := changed_parts(run.base.path, run.base_hashes, now):
        raise UserError(
            f"the base has changed while the run was training: {changed}.  The last state is saved: put the old base "
            "back, and export with --resume auto"
        )
    kinds: dict[str, Profile | None] = {profile.name: profile for profile in run.profiles}
    if run.settings.export.raw:
        kinds["raw"] = None
    out = run.settings.out / "export"
    folder_name = run.settings.out.resolve().name  # resolved, because out may be "."
    written: list[Path] = []
    for kind, profile in kinds.items():
        tensors = run.model.parameters if profile is None else run.ema.tensors(profile)
        weights = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())  # all processes take part, and the first keeps it
            if run.world.first:
                weights[name] = gathered.float().cpu()
        name = folder_name if kind == next(iter(kinds)) else f"{folder_name}_{kind}"
        parts = (weights, out, name, run.settings, run.objective, run.latent_scaling, run.say)
        exported = run.world.by_first(lambda parts=parts: export_model(*parts))
        written += exported if run.world.first else []
    return written
