"""The MODELs of the diagnostic's question about guidance: with it, without it, and with its exposure kept true."""

from ..samplers.guidance import CONTRAST, EXPOSURE
from .guidance import exposure_true_denoised

# what other nodes hang into the guidance
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


def guidances_of(model, cfg: float, dimensions: int) -> tuple[dict[str, tuple[object, float]], list[str]]:
    """What the guidance of a MODEL is compared with, as MODEL and CFG; and a sentence if it cannot be.

    The prompt alone, and for pictures (4 dimensions) the same guidance with ZTSNR Guidance behind it.
    """
    if cfg == 1:
        return {}, ["Guidance was not asked about: at CFG 1 there is none."]
    guidances = {"unguided": (without_guidance(model), 1.0)}
    if dimensions == 4:
        exposure_true = model.clone()
        exposure_true.set_model_sampler_post_cfg_function(lambda args: exposure_true_denoised(args, EXPOSURE, CONTRAST))
        guidances["exposure_true"] = exposure_true, cfg
    return guidances, []


def name_of_guidance(model, cfg: float) -> str:
    """For a sentence: "CFG 5 moves brightness"."""
    others = any(model.model_options.get(name) for name in GUIDANCE)
    return f"CFG {cfg:g} with guidance nodes" if others else f"CFG {cfg:g}"


def without_guidance(model):
    """A clone of a MODEL without what other nodes hang into the guidance."""
    model = model.clone()
    for name in GUIDANCE:
        model.model_options.pop(name, None)
    return model
