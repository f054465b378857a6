"""Load Checkpoint (ZTSNR): the stock loader, followed by the patch that the file's marks ask for."""

import copy
import logging
from pathlib import Path

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..checkpoints import SUPPORTED, CheckpointReport, inspect_checkpoint
from ..checkpoints.latent_scaling import LatentScaling
from ..checkpoints.schedule_shift import shift_of_metadata
from ..errors import UserError
from .messages import refused, show
from .model_patch import patch_model
from .schema import schema

UNET_FOLDER = "diffusion_models"
UNET_PREFIX = f"{UNET_FOLDER}/"  # in the list of files; always a slash, so that workflows move between systems


class ZTSNRCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRCheckpointLoader",
            display_name="Load Checkpoint (ZTSNR)",
            category="ZTSNR",
            description="Loads a checkpoint like Load Checkpoint, reads from the file whether it is a v-prediction and "
            "a zero-terminal-SNR model, and makes it sample exactly if it is. Also for U-Net files of every format, "
            "where the stock loader overlooks v-prediction.",
            search_aliases=["load checkpoint", "load diffusion model", "UNETLoader", "v-pred", "zsnr", "NoobAI"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=list_files(),
                    tooltip="A .safetensors file of models/checkpoints, or of models/diffusion_models (those begin with"
                    " diffusion_models/).",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, with its exact schedule if it is v-pred."),
                io.Clip.Output(display_name="clip", tooltip="The text encoders; none in a U-Net file."),
                io.Vae.Output(display_name="vae", tooltip="The VAE; none in a U-Net file."),
                io.String.Output(display_name="report", tooltip="What the file is, what it says, and what was done."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        try:
            path = find_file(ckpt_name)
            report = inspect_checkpoint(path)
            LatentScaling.from_metadata(report.metadata)  # these two raise what the report only warns of
            shift_of_metadata(report.metadata)
            if report.format == "LoRA":
                raise UserError(f"{ckpt_name} is a LoRA: load it with Load LoRA, after its checkpoint.")
            # For a U-Net file too: this finds its format, and returns a VAE that explains its absence when used
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(
                str(path), embedding_directory=folder_paths.get_folder_paths("embeddings")
            )[:3]
            if report.latent_scaling is not None and report.supported:
                scale_latents(model, report.latent_scaling)
            model, sentence = apply_report(model, report)
        except UserError as reason:
            return refused(reason, outputs=4)
        text = "\n".join([str(report), sentence, *missing_parts(report)])
        show(text, logging.WARNING if report.warnings else logging.INFO)
        return io.NodeOutput(model, clip, vae, text, ui=ui.PreviewText(text))


def list_files() -> list[str]:
    """The entries of the list: the checkpoints, then the U-Net files prefixed with their folder's name."""
    unets = folder_paths.get_filename_list(UNET_FOLDER)
    return [*folder_paths.get_filename_list("checkpoints"), *(UNET_PREFIX + name for name in unets)]


def find_file(ckpt_name: str) -> Path:
    """The file behind an entry of ``list_files``."""
    path = folder_paths.get_full_path("checkpoints", ckpt_name)
    if path is None and ckpt_name.startswith(UNET_PREFIX):
        path = folder_paths.get_full_path(UNET_FOLDER, ckpt_name.removeprefix(UNET_PREFIX))
    if path is None:
        raise UserError(
            f"{ckpt_name} is not in models/checkpoints or models/diffusion_models: refresh it (R) and choose again."
        )
    return Path(path)


def apply_report(model, report: CheckpointReport) -> tuple[object, str]:
    """A MODEL as its file asks for, patched or as it is, and a sentence that says which."""
    taken_for = f"The model is as ComfyUI loads it ({model.model.model_type.name})"
    if not report.supported:
        return model, f"{taken_for}: the ZTSNR nodes are for {', '.join(sorted(SUPPORTED))}."
    prediction, shift = report.prediction_type or "auto", shift_of_metadata(report.metadata)
    if prediction != "v_prediction" and shift == 1:
        otherwise = "; set prediction in ZTSNR Model (v-prediction) if its author says otherwise"
        return model, f"{taken_for}{otherwise if prediction == 'auto' else ''}."
    schedule = {True: "zero terminal SNR", False: "as trained", None: "auto"}[report.zero_terminal_snr]
    patched, sentence = patch_model(model, prediction=prediction, schedule=schedule, canvas_shift=shift)
    return patched, f"The model is patched: {sentence}"


def scale_latents(model, scaling: LatentScaling) -> None:
    """Give a MODEL that was just loaded latents of its own (NovelAI V3, arXiv 2409.15997).

    ComfyUI takes every latent into and out of the model's scale by its latent_format, and draws previews by it.  As an
    object patch it outlives the reloading that some nodes ask for; on the model itself it is there before the first run
    too, when previews and Add Noise ask the model and patches are not in it yet.

    Raises:
        UserError: the scaling has another number of channels than the model.
    """
    stock = model.get_model_object("latent_format")
    if len(scaling.mean) != stock.latent_channels:
        raise UserError(
            f"The file's latent scaling has {len(scaling.mean)} channels, but this model has {stock.latent_channels}."
        )
    scaled = copy.copy(stock)
    scaled.process_in, scaled.process_out = scaling.to_model, scaling.from_model
    # stock colours are those of scale_factor * z, and z is std * x + mean
    factors, bias = torch.tensor(stock.latent_rgb_factors), torch.tensor(stock.latent_rgb_factors_bias or [0.0] * 3)
    mean, std = stock.scale_factor * torch.tensor([scaling.mean, scaling.std])
    scaled.latent_rgb_factors = (std[:, None] * factors).tolist()
    scaled.latent_rgb_factors_bias = (bias + mean @ factors).tolist()
    scaled.taesd_decoder_name = None  # it is fed the model's latents as they are, so previews take the factors
    model.add_object_patch("latent_format", scaled)
    model.model.latent_format = scaled


def missing_parts(report: CheckpointReport) -> list[str]:
    """A sentence for each part that the file lacks and that must be loaded elsewhere."""
    sentences = []
    if not report.has_text_encoders:
        sentences.append("No text encoders in the file: load them with DualCLIPLoader (SDXL) or Load CLIP.")
    if not report.has_vae:
        sentences.append("No VAE in the file: load one with Load VAE.")
    return sentences
