"""Giving a MODEL its exact schedule and first step."""

import comfy.model_base
import comfy.model_sampling
import torch
from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP

from ..errors import UserError
from ..samplers import NoiseSchedule
from ..samplers.devices import to_float64
from ..samplers.step_schedules import DEFAULT_GUIDANCE
from .first_step import KEY, first_step_wrapper
from .model_sampling import ExactEpsilon, ExactSchedule, ExactVPrediction

PREDICTIONS = ("auto", "v_prediction", "epsilon")
SCHEDULES = ("auto", "zero terminal SNR", "as trained")
FIRST_STEPS = ("exact infinity", "as ComfyUI does it")
UNPATCHED = (
    "This zero-SNR model comes without ZTSNR Model: it starts at ComfyUI's finite sigma instead of infinity, and its "
    "timesteps are rounded. Put ZTSNR Model (v-prediction) between the loader and this node."
)


def patch_model(
    model,
    *,
    prediction: str = "auto",
    schedule: str = "auto",
    first_step: str = "exact infinity",
    canvas_shift: float = 1.0,
    guidance: float = DEFAULT_GUIDANCE,
):
    """A clone of a MODEL that samples exactly, with every sampler and scheduler.

    Args:
        model: ModelPatcher of a Stable Diffusion 1.x, 2.x or XL base model; it is not changed.
        prediction: one of ``PREDICTIONS``; auto is what ComfyUI found in the checkpoint, or what an earlier node of
            ours set.
        schedule: one of ``SCHEDULES``; auto is zero terminal SNR if the checkpoint, or that node, says so.
        first_step: one of ``FIRST_STEPS``; the second is ComfyUI's own model_sampling, which starts at sigma 4518.76.
        canvas_shift: length of the canvas over the trained one, by which every sigma is multiplied
            (``NoiseSchedule.shifted``).
        guidance: CFG scale that the scheduler ztsnr_spectral makes its steps for.

    Returns:
        The patched clone, and its description in one or more sentences.

    Raises:
        UserError: the model is not supported, or settings contradict each other.
    """
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    said = patched.get_model_object("model_sampling")
    if getattr(said, "made_by_ztsnr", False) or _says_zero_snr_v(said):
        patched.object_patches.pop("model_sampling", None)
    _check(patched)
    original = patched.get_model_object("model_sampling")
    said_v_prediction = isinstance(said, comfy.model_sampling.V_PREDICTION)
    v_prediction = said_v_prediction if prediction == "auto" else prediction == "v_prediction"
    marked = bool(said.zsnr)
    zero_snr = marked if schedule == "auto" else schedule == "zero terminal SNR"
    if zero_snr and not v_prediction:
        raise UserError(
            "An epsilon model cannot run with zero terminal SNR: at infinite sigma its input is already the noise that "
            "it has to predict. Set prediction to v_prediction if the checkpoint was trained so, or schedule to 'as "
            "trained'."
        )

    if first_step == "as ComfyUI does it":
        model_sampling = _stock(model, v_prediction, zero_snr, canvas_shift, guidance)
    else:
        noise_schedule = trained_schedule(original, zero_snr).shifted(canvas_shift)
        canvas_length = trained_canvas_length(model.model) * canvas_shift
        exact = ExactVPrediction if v_prediction else ExactEpsilon
        model_sampling = exact(noise_schedule, canvas_length, guidance)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, first_step_wrapper)
    patched.add_object_patch("model_sampling", model_sampling)
    told = schedule != "auto"
    return patched, _report(model_sampling, v_prediction, zero_snr, marked, told, canvas_shift)


def trained_schedule(model_sampling, zero_snr: bool) -> NoiseSchedule:
    """The schedule behind a stock ``ModelSamplingDiscrete``, in float64 if it is Stable Diffusion's."""
    table = to_float64(model_sampling.sigmas).cpu()
    stable_diffusion = NoiseSchedule.sdxl(zero_terminal_snr=model_sampling.zsnr)
    timesteps = torch.arange(stable_diffusion.last_timestep)
    # ComfyUI computes its table in float32, and puts 4518.76 in the place of infinity
    if len(table) == len(timesteps) + 1 and torch.allclose(stable_diffusion.sigma(timesteps), table[:-1], rtol=1e-4):
        return NoiseSchedule.sdxl(zero_terminal_snr=zero_snr)
    alphas_cumprod = 1 / (1 + table**2)
    if zero_snr and model_sampling.zsnr:
        alphas_cumprod[-1] = 0
    if zero_snr == model_sampling.zsnr:
        return NoiseSchedule(alphas_cumprod)
    if model_sampling.zsnr:
        raise UserError("This checkpoint's schedule always has zero terminal SNR; set schedule to auto.")
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    return NoiseSchedule.from_betas(betas, zero_terminal_snr=True)


def trained_canvas_length(base_model) -> int:
    """Side of the square latent canvas that a model was trained on: 1024 pixels for SDXL, else 768 at most."""
    return 128 if isinstance(base_model, comfy.model_base.SDXL) else 96


def schedule_of(model_sampling) -> NoiseSchedule:
    """The schedule that a MODEL's ``model_sampling`` runs, patched or not.

    Raises:
        UserError: a model without a table of noise levels (flow matching, EDM).
    """
    if isinstance(model_sampling, ExactSchedule):
        return model_sampling.schedule
    if not isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise UserError(
            "This model has no table of noise levels (flow matching or EDM): ZTSNR nodes are for Stable Diffusion 1.x, "
            "2.x and XL models."
        )
    return NoiseSchedule(1 / (1 + to_float64(model_sampling.sigmas) ** 2))


def canvas_length_of(model) -> float:
    """sqrt(height * width) of the latent canvas that a MODEL is for, patched or not."""
    model_sampling = model.get_model_object("model_sampling")
    return getattr(model_sampling, "canvas_length", None) or trained_canvas_length(model.model)


def unpatched_zero_snr(model_sampling) -> bool:
    """True if a zero-SNR model would start from ComfyUI's finite sigma because ZTSNR Model is missing."""
    return bool(getattr(model_sampling, "zsnr", False)) and not getattr(model_sampling, "made_by_ztsnr", False)


def _says_zero_snr_v(model_sampling) -> bool:
    """True if it is core ModelSamplingDiscrete with v_prediction and zsnr, as NoobAI-XL's authors advise."""
    stable_diffusion = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete)
    v_prediction = isinstance(model_sampling, comfy.model_sampling.V_PREDICTION)
    return stable_diffusion and v_prediction and bool(getattr(model_sampling, "zsnr", False))


def _check(model) -> None:
    base = model.model
    if isinstance(base, comfy.model_base.SDXLRefiner):
        raise UserError(
            "This is the SDXL refiner, an epsilon model that works at low noise only: connect it without this node."
        )
    if base.model_type not in (ModelType.EPS, ModelType.V_PREDICTION) or base.latent_format.latent_channels != 4:
        raise UserError(
            f"This node is for Stable Diffusion 1.x, 2.x and XL models, not for a {type(base).__name__} "
            f"({base.model_type.name}) model: connect it directly."
        )
    if "model_sampling" in model.object_patches:
        raise UserError(
            "Another node (ModelSamplingDiscrete, for example) has already replaced this model's schedule, and not by "
            "v-prediction with zero SNR: remove it, or connect the loader here directly."
        )


def _stock(model, v_prediction: bool, zero_snr: bool, canvas_shift: float, guidance: float):
    """ComfyUI's own model_sampling for these settings: integer timesteps, and 4518.76 for infinity."""
    parameterization = comfy.model_sampling.V_PREDICTION if v_prediction else comfy.model_sampling.EPS

    class Stock(comfy.model_sampling.ModelSamplingDiscrete, parameterization):
        made_by_ztsnr = True

    model_sampling = Stock(model.model.model_config, zsnr=zero_snr)
    model_sampling.set_sigmas(model_sampling.sigmas * canvas_shift)
    model_sampling.guidance = guidance
    return model_sampling


def _report(model_sampling, v_prediction: bool, zero_snr: bool, marked: bool, told: bool, canvas_shift: float) -> str:
    prediction = "v-prediction" if v_prediction else "epsilon"
    if not zero_snr:
        start = f"schedule as trained, up to sigma {float(model_sampling.sigma_max):.4g}"
    elif isinstance(model_sampling, ExactSchedule):
        start = "zero terminal SNR, exact first step from infinity"
    else:
        start = f"zero terminal SNR, starting at sigma {float(model_sampling.sigma_max):.6g} as ComfyUI does"
    sentences = [f"{prediction}, {start}"]
    if canvas_shift != 1:
        sentences.append(f"every sigma times {canvas_shift:g}")
    if marked and not zero_snr:
        sentences.append(
            "the checkpoint says it was trained with zero terminal SNR: it never starts from pure noise now, expect "
            "greyish pictures"
        )
    if v_prediction and not zero_snr and not told:
        sentences.append(
            "nothing in the checkpoint says zero terminal SNR; most v-prediction models of the SDXL family (NoobAI-XL, "
            "Illustrious v-pred) have it: set schedule to 'zero terminal SNR' for them"
        )
    return "; ".join(sentences) + "."
