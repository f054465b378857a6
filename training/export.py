"""Export a trained model to files that every program loads correctly."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoints import export_lora, inspect_checkpoint, to_single_file, verify_checkpoint
from ..checkpoints.diffusers_folder import set_scheduler
from ..checkpoints.latent_scaling import LatentScaling
from ..checkpoints.schedule_shift import shift_of
from ..checkpoints.single_file import say_left_behind
from ..errors import UserError
from ..files import atomic_folder
from ..samplers import NoiseSchedule
from .config import FinetuneSettings
from .networks import Denoiser, Networks, add_adapter, load_networks
from .objective import Objective


def export_model(
    weights: Mapping[str, torch.Tensor],
    out: Path,
    name: str,
    settings: FinetuneSettings,
    objective: Objective,
    latent_scaling: LatentScaling,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write trained weights as a diffusers folder and a single file, and verify both by reading them.

    The base is loaded again and gets the trained weights, so no trace of training code is left in it.  An adapter is
    written separately, once as peft saves it and once as ComfyUI reads it, and is merged into the base in float32.
    Files of an earlier export of the run are replaced.

    Args:
        weights: trained parameters of the ``Denoiser`` by name, float32 on the CPU.
        out: folder for the files.
        name: name of the model: NAME.safetensors and the folder NAME.
        settings: settings of the run.
        objective: objective of the training, with its prediction type and schedule.
        latent_scaling: scaling of the model's latents.
        say: called with each line for the user.

    Returns:
        The files and folders written.

    Raises:
        UserError: they cannot be written, or fail the verification.
    """
    folder, file = out / name, out / f"{name}.safetensors"
    adapter, lora = out / f"{name}_adapter", out / f"{name}_lora.safetensors"
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for old in (folder, file, adapter, lora):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    networks = load_networks(settings.model.base, settings.model.config)
    if settings.model.adapter is not None:
        _merge_adapter(networks, weights, settings, adapter)
    else:
        _load(Denoiser(networks), weights)
    _describe(networks, objective, latent_scaling)
    if networks.is_sdxl and settings.data.captions.caption_dropout > 0:
        # trained without a prompt, on the encoded empty text: guidance has to subtract it, not zeros
        networks.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    dtype = getattr(torch, settings.export.dtype)
    for parameter in Denoiser(networks).parameters():
        parameter.data = parameter.data.to(dtype)
    with atomic_folder(folder) as place, _writing(folder):
        networks.pipeline.save_pretrained(place, safe_serialization=True)
    del networks
    written = [adapter] if settings.model.adapter is not None else []
    if settings.model.adapter is not None and settings.model.adapter.kind == "lora":
        export_lora(adapter, lora, model=folder, dtype=dtype)
        written.append(lora)
    for path in written:
        say(f"Wrote {path}: the adapter alone.")

    if settings.export.single_file:
        base = Path(settings.model.base)
        is_base = base.is_file() and not settings.model.text_encoders
        if is_base:
            say_left_behind(base, say)
        to_single_file(folder, file, base=base if is_base else None, dtype=dtype if is_base else None)
        _check(file, say)
        written.append(file)
    if settings.export.folder:
        _check(folder, say)
        written.append(folder)
    else:
        shutil.rmtree(folder)
    if (shift := objective.settings.schedule_shift) != 1:
        say(
            f"Every sigma is {shift:g} times the published one.  diffusers reads this from the folder, and Load "
            f"Checkpoint (ZTSNR) in ComfyUI from the file; after any other loader set canvas_shift of the node ZTSNR "
            f"Model to {shift:g}."
        )
    if settings.export.single_file and shift_of(objective.schedule) is None:
        say(
            f"{file} cannot hold the base's own noise schedule, and programs will sample it on the published one: use "
            "the diffusers folder (export.folder)"
        )
    return written


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise a UserError with the path if the block cannot write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}") from None


def _load(denoiser: Denoiser, weights: Mapping[str, torch.Tensor]) -> None:
    own = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def _describe(networks: Networks, objective: Objective, latent_scaling: LatentScaling) -> None:
    """Record in the configs what the model predicts, its schedule, and the scaling of its latents."""
    pipe, schedule = networks.pipeline, objective.schedule
    set_scheduler(pipe, objective.prediction_type, schedule.zero_terminal_snr)
    said = NoiseSchedule.from_config(pipe.scheduler.config).alphas_cumprod
    if said.shape != schedule.alphas_cumprod.shape or not torch.allclose(said, schedule.alphas_cumprod, atol=1e-9):
        # a shifted schedule, or that of another base, can only be given by its betas
        config = {**pipe.scheduler.config, "num_train_timesteps": len(schedule.betas), "_use_default_values": []}
        pipe.register_modules(scheduler=type(pipe.scheduler).from_config(config, trained_betas=schedule.betas.tolist()))
    vae = networks.vae
    vae.register_to_config(**latent_scaling.vae_config(vae.config["scaling_factor"]))


def _merge_adapter(
    networks: Networks, weights: Mapping[str, torch.Tensor], settings: FinetuneSettings, out: Path
) -> None:
    """Write the adapter alone, then merge it into the U-Net's weights."""
    unet = networks.unet
    plain = dict(unet.named_modules())
    assert settings.model.adapter is not None
    add_adapter(unet, settings.model.adapter)
    _load(Denoiser(networks), weights)
    config = unet.peft_config["default"]
    with atomic_folder(out) as place, _writing(out):
        state = get_peft_model_state_dict(unet)
        rows = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
        save_file(rows, place / "adapter_model.safetensors", {"format": "pt"})
        about = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        (place / "adapter_config.json").write_text(json.dumps(about, indent=2, default=str), encoding="utf-8")
    for name, module in list(unet.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, key = name.rpartition(".")
            setattr(unet.get_submodule(parent), key, plain[name])
    unet._hf_peft_config_loaded = False


def _check(path: Path, say: Callable[[str], None]) -> None:
    report = verify_checkpoint(path)
    if not report.sound:
        raise UserError(f"{path} was written, but verification failed:\n{report}")
    said = inspect_checkpoint(path)
    snr = "zero terminal SNR" if said.zero_terminal_snr else "no zero terminal SNR"
    say(f"Wrote {path}: {said.prediction_type}, {snr}; verified.")
