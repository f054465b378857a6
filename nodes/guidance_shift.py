"""The MODELs with which the diagnostic measures guidance: with it, without it, and with exposure-true guidance."""

from ..samplers.guidance import CONTRAST, EXPOSURE
from .guidance import exposure_true_denoised

# where other nodes hook into guidance
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


def guidances_of(model, cfg: float, dimensions: int) -> tuple[dict[str, tuple[object, float]], list[str]]:
    """What the guidance of a MODEL is compared with, as MODEL and CFG; and a sentence if that is impossible.

    The prompt alone, and for pictures (4 dimensions) the same guidance followed by ZTSNR Guidance.
    """
    if cfg == 1:
        return {}, ["Guidance was not measured: at CFG 1 there is none."]
    guidances = {"unguided": (without_guidance(model), 1.0)}
    if dimensions == 4:
        exposure_true = model.clone()
        exposure_true.set_model_sampler_post_cfg_function(lambda args: exposure_true_denoised(args, EXPOSURE, CONTRAST))
        guidances["exposure_true"] = exposure_true, cfg
    return guidances, []


def name_of_guidance(model, cfg: float) -> str:
    """The name of a MODEL's guidance, such as "CFG 5"."""
    others = any(model.model_options.get(name) for name in GUIDANCE)
    return f"CFG {cfg:g} with guidance nodes" if others else f"CFG {cfg:g}"


def without_guidance(model):
    """A clone of a MODEL without the guidance functions of other nodes."""
    model = model.clone()
    for name in GUIDANCE:
        model.model_options.pop(name, None)
    return model
