"""``ztsnr leak``."""

from pathlib import Path

import click

from .mistakes import device_of, mistakes_in_one_sentence


@click.command()
@click.argument("model")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT[=COLOUR]",
    help="Prompt to sample; =black, white, red, green, blue, grey or #rrggbb is the right colour.  The first prompt "
    "should leave the brightness open.  Repeat it for more.  [default: the empty prompt and six solid colours]",
)
@click.option("--negative-prompt", help="Negative prompt.  [default: the pipeline's]")
@click.option("--seeds", type=click.IntRange(2), default=8, show_default=True, help="Number of noise seeds.")
@click.option("--first-seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="First noise seed.")
@click.option("--width", type=click.IntRange(8), default=None, help="Width in pixels.  [default: the model's]")
@click.option("--height", type=click.IntRange(8), default=None, help="Height in pixels.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1, 1000), default=28, show_default=True, help="Sampling steps.")
@click.option(
    "--scheduler",
    default="ztsnr",
    show_default=True,
    metavar="NAME",
    help="Sampler to test: ztsnr, model (the scheduler that the model was published with), or a diffusers class such "
    "as EulerDiscreteScheduler.",
)
@click.option("--spacing", help="Spacing of the steps, such as trailing or leading.  [default: the scheduler's]")
@click.option(
    "--guidance",
    type=click.FloatRange(1.0),
    default=5.0,
    show_default=True,
    help="Classifier-free guidance scale.  Above 1, the report also shows how far it shifts brightness.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(10),
    default=40,
    show_default=True,
    help="Steps of the exact flow to compare with.",
)
@click.option(
    "--offset",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Offset of the noise means, in their standard deviations.",
)
@click.option(
    "--prediction",
    type=click.Choice(["v_prediction", "epsilon", "sample"]),
    help="Prediction type of the model.  [default: the files']",
)
@click.option("--zero-snr/--no-zero-snr", default=None, help="Zero terminal SNR or not.  [default: the files']")
@click.option("--config", help="For a single file: diffusers folder or Hub name whose settings complete it.")
@click.option("--device", default="auto", show_default=True, help="auto picks CUDA, XPU or MPS if available.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the model.  [default: float16 on CUDA, else float32]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=Path("ztsnr_leak"),
    show_default=True,
    help="Folder for the report.  An interrupted run resumes from it.",
)
@click.option(
    "--gate",
    type=click.FloatRange(0),
    metavar="LEVELS",
    help="Exit with status 1 if the checkpoint leaks, or if a pull toward grey exceeds this many levels of 255.",
)
def leak(
    model: str,
    prompts: tuple[str, ...],
    negative_prompt: str | None,
    seeds: int,
    first_seed: int,
    width: int | None,
    height: int | None,
    steps: int,
    scheduler: str,
    spacing: str | None,
    guidance: float,
    reference_steps: int,
    offset: float,
    prediction: str | None,
    zero_snr: bool | None,
    config: str | None,
    device: str,
    dtype: str | None,
    out: Path,
    gate: float | None,
) -> None:
    """Test whether a model was trained with zero terminal SNR, whether a sampler leaks, and what guidance does.

    A network or a sampler leaks if the mean of the noise shifts the picture's brightness.  MODEL is a diffusers folder,
    a single .safetensors file, or a name on the Hugging Face Hub.  Prints a table and the verdict, and writes
    report.html and report.json.
    """
    with mistakes_in_one_sentence():
        from ..diagnostics.leak_run import PROMPTS, parse_prompt, run_leak

        asked = [parse_prompt(text) for text in prompts] or PROMPTS

        import torch

        from ..checkpoints import load_pipeline

        place = device_of(device)
        dtype = dtype or ("float16" if place.type == "cuda" else "float32")
        loaded = load_pipeline(
            model,
            config=config,
            device=place,
            dtype=getattr(torch, dtype),
            prediction_type=prediction,
            zero_terminal_snr=zero_snr,
        )
        own = loaded.pipeline.unet.config.sample_size * loaded.pipeline.vae_scale_factor
        passed = run_leak(
            loaded,
            out,
            prompts=asked,
            negative_prompt=negative_prompt,
            seeds=range(first_seed, first_seed + seeds),
            size=(width or own, height or own),
            steps=steps,
            scheduler=scheduler,
            spacing=spacing,
            guidance_scale=guidance,
            reference_steps=reference_steps,
            offset=offset,
            gate=gate,
            say=click.echo,
        )
    if not passed:
        raise SystemExit(1)
