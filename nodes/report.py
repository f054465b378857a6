"""A probe for a user's own graph, and a report of what it saw."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..diagnostics.estimates import CONFIDENCE
from ..diagnostics.latent_stats import LatentStatistics
from ..diagnostics.leak_probes import ToRGB, measure_pictures
from ..diagnostics.sampler_verdict import ChannelFit, fit_pictures
from ..errors import UserError
from .latent_rgb import draw, rgb_of, strip_of
from .messages import refused
from .probe import RunProbe, watch
from .schema import schema

Probe = io.Custom("LATENT_MEAN_PROBE")
FEWEST = 3  # pictures that a slope with an interval takes


class LatentMeanProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LatentMeanProbe",
            display_name="Latent Mean Probe",
            category="ZTSNR/diagnostics",
            description="Passes a model through and records, while any sampler runs it, the mean and spread of the "
            "latents at every step. Pictures stay the same to the last bit.",
            search_aliases=["latent statistics", "mean leak", "brightness", "monitor", "sigma"],
            inputs=[io.Model.Input("model", tooltip="Any model. It is not changed.")],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect it to the sampler to watch."),
                Probe.Output(display_name="probe", tooltip="Connect it to Latent Mean Report."),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        probe = RunProbe()
        return io.NodeOutput(watch(model, probe), probe)


class LatentMeanReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LatentMeanReport",
            display_name="Latent Mean Report",
            category="ZTSNR/diagnostics",
            description="Shows what a Latent Mean Probe recorded: the mean of the prediction over the noise levels of "
            "the run, and for a batch whether brightness followed the noise.",
            search_aliases=["latent statistics", "mean leak", "brightness", "plot", "sigma"],
            is_output_node=True,
            inputs=[
                Probe.Input("probe", tooltip="From Latent Mean Probe, whose model the sampler ran."),
                io.Latent.Input("latent", tooltip="The finished latent of that sampler."),
                io.Combo.Input(
                    "theme", options=["dark", "light"], default="dark", tooltip="Background of the picture."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For true brightness and colours. Without it they are estimated from the latents.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The run in numbers."),
                io.Image.Output(display_name="picture", tooltip="The run as a picture; needs matplotlib."),
            ],
        )

    @classmethod
    def execute(cls, probe: RunProbe, latent: dict, theme: str, vae=None) -> io.NodeOutput:
        try:
            check_result(probe, latent["samples"])
            statistics = probe.recorder.read()
            latents = probe.latent_format.process_in(latent["samples"].float().cpu())
            to_rgb, through = rgb_of(probe.latent_format, vae)
            pictures = None if to_rgb is None else to_rgb(latents).float().cpu().numpy()
        except UserError as reason:
            return refused(reason, outputs=2)
        picture_mean = latents.flatten(2).mean(2).double().numpy()
        lines = describe_run(statistics, picture_mean)
        if pictures is not None:
            lines.append(describe_brightness(pictures, through))
            lines += describe_first_guidance(probe, to_rgb)

        def figure():
            from ..diagnostics.run_figure import run_figure

            strip = strip_of(probe.predictions, statistics.sigmas, latents[:1], to_rgb)
            return run_figure(statistics, picture_mean, theme=theme, strip=strip)

        picture = draw(figure, theme, lines[0])
        return io.NodeOutput("\n".join(lines), picture, ui=ui.PreviewImage(picture, cls=cls))


def check_result(probe: RunProbe, samples: torch.Tensor) -> None:
    """UserError unless the latent is the result of the probed run."""
    if probe.result is None:
        raise UserError(
            "The probe has recorded no run: connect the model of Latent Mean Probe to the sampler of this latent."
        )
    if getattr(samples, "is_nested", False):
        raise UserError(
            "The latent has several tensors, such as audio and video: this node takes a latent of one tensor."
        )
    result, samples = probe.result.float().cpu(), samples.float().cpu()
    # LATENTs may be kept in half precision
    if result.shape != samples.shape or not torch.allclose(result, samples, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"This latent {tuple(samples.shape)} is not the result of the last probed run {tuple(result.shape)}: "
            "connect the sampler's own output, and use one Latent Mean Probe for each sampler."
        )


def describe_run(statistics: LatentStatistics, picture_mean: np.ndarray) -> list[str]:
    """A run in sentences: where it began, the means of each channel, and how the pictures' follow the noise's.

    Args:
        picture_mean: (B, C) channel means of the finished latents.
    """
    evaluations, batch, channels = statistics.denoised_mean.shape
    sigmas = [number(sigma, "infinity") for sigma in statistics.sigmas[[0, -1]]]
    lines = [
        f"{evaluations} evaluation{'s' * (evaluations > 1)} of the network, from sigma {sigmas[0]} to {sigmas[1]}."
        + ("" if batch == 1 else f" Means over {batch} pictures:")
    ]
    if problem := statistics.nonfinite():
        lines[0] = f"{problem}. {lines[0]}"
    fits = slopes_of(statistics.noise_mean, picture_mean)
    for channel in range(channels):
        means = {
            "first prediction": statistics.denoised_mean[0],
            "last prediction": statistics.denoised_mean[-1],
            "picture": picture_mean,
        }
        parts = [f"{name} {number(mean[:, channel].mean())}" for name, mean in means.items()]
        if statistics.noise_mean is not None:
            mean, std = (values[:, channel].mean() for values in (statistics.noise_mean, statistics.noise_std))
            parts.insert(0, f"noise {number(mean)} (std {number(std)})")
        if fits is not None:
            fit = fits[channel]
            parts.append(f"slope of the pictures' means on the noise's {fit.slope}, R^2 {fit.r_squared:.2f}")
        lines.append(f"Channel {channel + 1}: {', '.join(parts)}.")
    if fits is not None:
        lines.append(f"Intervals: {CONFIDENCE:.0%} confidence.")
    elif statistics.noise_mean is None:
        lines.append("The noise is unknown: the sampler itself added none.")
    elif is_constant(statistics.noise_mean) and batch > 1:
        lines.append("All pictures began with the same noise means, so there is no slope to fit.")
    elif batch < FEWEST:
        lines.append(f"A batch of at least {FEWEST} would show how the pictures' means follow the noise's.")
    if statistics.noise_std is not None and (statistics.noise_std == 0).any():
        lines.append("The noise is constant: every value of a channel is the same.")
    return lines


def slopes_of(noise_mean: np.ndarray | None, picture_mean: np.ndarray) -> list[ChannelFit] | None:
    """Each channel's line of the pictures' means (B, C) on the noise's; None if none can be fitted."""
    if noise_mean is None or len(noise_mean) < FEWEST or is_constant(noise_mean) or not np.isfinite(picture_mean).all():
        return None
    return fit_pictures(noise_mean, picture_mean)


def is_constant(noise_mean: np.ndarray) -> bool:
    """True if some channel's means (B, C) are the same in all samples."""
    return bool((np.ptp(noise_mean, axis=0) == 0).any())


def describe_brightness(pictures: np.ndarray, through: str) -> str:
    """Brightness and clipping of pictures (B, 3, H, W) in a sentence."""
    measured = measure_pictures(pictures)
    brightness = measured["brightness"]
    if not np.isfinite(brightness).all():
        return f"The brightness {through} is not finite."
    spread = "" if len(brightness) == 1 else f" ({brightness.min():.1f} to {brightness.max():.1f})"
    clipped = f"{measured['clipped'].mean():.1%} of the pixels are clipped"
    return f"Brightness {brightness.mean():.1f} of 255{spread} {through}; {clipped}."


def describe_first_guidance(probe: RunProbe, to_rgb: ToRGB) -> list[str]:
    """How far guidance moved the first prediction's brightness, as a sentence; none if it changed nothing."""
    if probe.unguided is None or torch.equal(probe.unguided, probe.predictions[0]):
        return []
    pictures = [to_rgb(x0.cpu().float()).float().cpu().numpy() for x0 in (probe.unguided, probe.predictions[0])]
    alone, guided = (measure_pictures(picture)["brightness"][0] for picture in pictures)
    if not np.isfinite([alone, guided]).all():
        return []
    return [
        f"In the first prediction guidance moves the brightness by {guided - alone:+.1f} levels of 255, from "
        f"{alone:.1f} of the prompt alone to {guided:.1f}."
    ]


def number(value: float, infinite: str = "not finite") -> str:
    """A number with four digits, or ``infinite`` if it is not finite."""
    return f"{value:.4g}" if np.isfinite(value) else infinite
