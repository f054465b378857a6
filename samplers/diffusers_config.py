"""diffusers configs: what another scheduler's config says about the model, and what ours says to other classes."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from ..errors import UserError
from .step_schedules import ZTSNRWarning

# What a noise schedule and a network are in every diffusers config.
MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Unused here.  Other classes read these when they take over our config, and their own defaults are wrong for latent
# models: a spacing that never runs t = T, x0 clipped to [-1, 1], PNDM's Runge-Kutta warm-up.
FOR_OTHER_CLASSES = {
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}


def warn_of_plain_epsilon(config: Mapping[str, Any], keywords: Mapping[str, Any]) -> None:
    """Warn the caller's caller if neither a foreign config nor the user's keywords say that the model is ZTSNR."""
    by_config = config["rescale_betas_zero_snr"] or config["prediction_type"] != "epsilon"
    if by_config or not {"prediction_type", "rescale_betas_zero_snr"}.isdisjoint(keywords):
        return
    if "solver" in config:  # it was ours once, and the user was warned then
        return
    warnings.warn(
        "this config mentions neither v-prediction nor zero terminal SNR, so the model is sampled as a plain epsilon "
        'model; for a ZTSNR model add prediction_type="v_prediction", rescale_betas_zero_snr=True; for an epsilon '
        'model add prediction_type="epsilon"',
        ZTSNRWarning,
        stacklevel=3,
    )


def describe_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Another scheduler's config, completed by that class's defaults where it does not describe the model."""
    name = config.get("_class_name")  # absent from the config of a scheduler that was constructed, not loaded
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
        signature = inspect.signature(scheduler_class.__init__).parameters
        defaults |= {key: signature[key].default for key in MODEL_KEYS if key in signature}
    # diffusers drops values that equal a class's defaults when a config changes class; the model's must survive
    forgettable = [key for key in config.get("_use_default_values", ()) if key not in MODEL_KEYS]
    given = {key: value for key, value in config.items() if key != "timestep_spacing"}
    model = {**defaults, **given, "_use_default_values": forgettable}
    if model.get("beta_schedule") is None and model.get("trained_betas") is None:
        raise UserError(
            f"the config of {name or 'that scheduler'} has no betas: ZTSNRScheduler is for variance-preserving models, "
            "not for flow matching or EDM"
        )
    if model.get("snr_shift_scale", 1.0) != 1.0:
        raise UserError(
            f"the config of {name or 'that scheduler'} shifts its noise levels (snr_shift_scale "
            f"{model['snr_shift_scale']:g}): ZTSNRScheduler does not support that"
        )
    return model


def stock_euler(**config: Any) -> diffusers.EulerDiscreteScheduler:
    """diffusers' own Euler scheduler for a Stable Diffusion v-prediction model: what to compare with."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return diffusers.EulerDiscreteScheduler(**betas, prediction_type="v_prediction", **config)
