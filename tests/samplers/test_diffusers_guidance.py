"""Exposure-true guidance and CFG++ in unmodified diffusers pipelines of tiny random networks.

The reference is ``ztsnr.samplers.sample`` on the same network, with ``exposure_true_guidance`` of its two pictures x0
written out by hand; for CFG++, the update of its paper.
"""

import itertools
import weakref

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)

from ztsnr.samplers import (
    DEFAULT_SOLVER,
    ExposureTrueGuidance,
    NoiseSchedule,
    ZTSNRScheduler,
    attach,
    exposure_true,
    exposure_true_guidance,
    rescale_guidance,
    sample,
    to_denoised,
)
from ztsnr.samplers.diffusers_guidance import _Hook
from ztsnr.samplers.prediction import alpha_s, from_denoised
from ztsnr.samplers.sampling import drive, start_run

from . import test_diffusers_pipelines as pipelines
from .test_diffusers_pipelines import LATENT, SIZE, prompt, random_latents

networks, pipeline = pipelines.networks, pipelines.pipeline  # pytest looks for fixtures among a module's own names

SCALE = 5.0
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
EPSILON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def assert_same(latents, expected):
    """Equal to 1e-5 of the largest value: an epsilon model multiplies rounding by sigma."""
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def two_pictures(pipe, words=None):
    """pictures(x, sigma) -> (with the prompt, without it): x0 as the pipeline's own network sees it."""
    is_sdxl = not isinstance(pipe, StableDiffusionPipeline)
    scheduler, words = pipe.scheduler, words or prompt(type(pipe))
    schedule = NoiseSchedule.from_config(scheduler.config)

    @torch.no_grad()
    def pictures(x, sigma):
        t = torch.tensor(schedule.timestep(float(sigma)), dtype=torch.float32)
        predictions = []
        for sign in ("", "negative_"):
            added = {}
            if is_sdxl:
                sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).repeat(len(x), 1)
                added = {"text_embeds": words[f"{sign}pooled_prompt_embeds"].repeat(len(x), 1), "time_ids": sizes}
            text = words[f"{sign}prompt_embeds"].repeat(len(x), 1, 1)
            asked = {"encoder_hidden_states": text, "added_cond_kwargs": added}
            output = pipe.unet(x.to(text.dtype), t, **asked).sample
            predictions.append(to_denoised(output, x, sigma, scheduler.config.prediction_type))
        return predictions

    return pictures


def guided_by_hand(pipe, scale=SCALE, rescale=0.0, shares=()):
    """denoise(x, sigma) of exposure-true guidance on pictures x0; the pipeline rescales the network's output."""
    pictures, kind = two_pictures(pipe), pipe.scheduler.config.prediction_type

    def denoise(x, sigma):
        cond, uncond = pictures(x, sigma)
        guided = exposure_true_guidance(cond, uncond, scale, None, *shares)
        if rescale:
            outputs = (from_denoised(picture, x, sigma, kind) for picture in (guided, cond))
            guided = to_denoised(rescale_guidance(*outputs, rescale), x, sigma, kind)
        return guided

    return denoise


def arguments(kind=StableDiffusionXLPipeline, **more):
    return prompt(kind) | {"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "latent"} | more


def run(pipe, **more):
    return pipe(**arguments(type(pipe), **{"latents": random_latents(5)} | more)).images


# ----------------------------------------------------------------------------------------------------------------------
# attach


@pytest.mark.parametrize("model", [V, EPSILON], ids=["v", "epsilon"])
@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionPipeline])
@pytest.mark.parametrize(("solver", "rescale"), [(DEFAULT_SOLVER, 0.0), (DEFAULT_SOLVER, 0.7), ("heun", 0.0)])
def test_text_to_image_is_sample(pipeline, kind, model, solver, rescale):
    pipe = pipeline(kind, solver=solver, **model)
    noise = random_latents(5, batch=2)
    with attach(pipe):
        latents = run(pipe, latents=noise, num_images_per_prompt=2, guidance_rescale=rescale)
    expected = sample(guided_by_hand(pipe, rescale=rescale), noise, pipe.scheduler.sigmas, solver)
    assert_same(latents, expected)
    assert (run(pipe, latents=noise, num_images_per_prompt=2, guidance_rescale=rescale) - latents).abs().max() > 0.01


def test_shares_are_those_asked_for(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline)
    for shares in ((0.0, 0.0), (1.0, 0.3)):
        with attach(pipe, *shares):
            latents = run(pipe)
        expected = sample(guided_by_hand(pipe, shares=shares), random_latents(5), pipe.scheduler.sigmas)
        assert_same(latents, expected)
    with attach(pipe, exposure=0, contrast=0):
        latents = run(pipe)
    assert_same(latents, run(pipe))


@pytest.mark.parametrize("model", [V, EPSILON], ids=["v", "epsilon"])
def test_stock_euler(pipeline, model):
    pipe = pipeline(StableDiffusionXLPipeline)
    pipe.scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        **model | {"rescale_betas_zero_snr": False},
    )
    with attach(pipe):
        latents = run(pipe)
    sigmas = pipe.scheduler.sigmas.double()
    start = random_latents(5) * (pipe.scheduler.init_noise_sigma / (1 + sigmas[0] ** 2).sqrt()).float()
    assert_same(latents, sample(guided_by_hand(pipe), start, sigmas, "euler"))


def test_stock_ddim_from_infinity_after_a_change_of_scheduler(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline, **EPSILON)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    with attach(pipe):
        pipe.scheduler = DDIMScheduler(**betas, **V, timestep_spacing="trailing", clip_sample=False)
        latents = run(pipe)
    schedule = ZTSNRScheduler().schedule
    sigmas = [*schedule.sigma(pipe.scheduler.timesteps).tolist(), 0.0]
    assert_same(latents, sample(guided_by_hand(pipe), random_latents(5), sigmas, "euler"))


def test_in_half_precision(pipeline):
    """What is lost is what the pipeline's own arithmetic in half precision loses of classifier-free guidance."""
    pipe = pipeline(StableDiffusionXLPipeline, torch.bfloat16)
    words, noise = prompt(dtype=torch.bfloat16), random_latents(5).bfloat16()
    pictures = two_pictures(pipe, words)

    def lost(*shares):
        with attach(pipe, *shares):
            latents = run(pipe, latents=noise, **words)
        assert latents.dtype == torch.bfloat16
        expected = sample(
            lambda x, sigma: exposure_true_guidance(*pictures(x, sigma), SCALE, None, *shares),
            noise,
            pipe.scheduler.sigmas,
        )
        return (latents.float() - expected).norm() / expected.norm()

    assert lost(0.9, 0.8) < 1.2 * lost(0.0, 0.0) < 0.06


def test_removal_restores_every_bit(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline)
    before = run(pipe)
    handle = attach(pipe)
    assert not torch.equal(run(pipe), before)
    handle.remove()
    handle.remove()
    assert torch.equal(run(pipe), before)
    with pytest.raises(KeyError), attach(pipe):
        raise KeyError
    assert torch.equal(run(pipe), before)
    assert not pipe.unet._forward_hooks


def test_without_guidance_nothing_changes(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline)
    noise = random_latents(5).repeat(2, 1, 1, 1)  # the same latents twice look like a doubled batch
    without = {"latents": noise, "num_images_per_prompt": 2, "guidance_scale": 1.0}
    before = run(pipe, **without)
    with attach(pipe):
        run(pipe)
        assert torch.equal(run(pipe, **without), before)


def test_guidance_that_ends_within_a_run(pipeline):
    """The way of diffusers' own guide to callbacks: the scale is set to 0 and the texts are cut."""
    pipe = pipeline(StableDiffusionXLPipeline, solver="euler")

    def callback(pipe, i, t, kept):
        if i != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {name: kept[name][-1:] for name in ("prompt_embeds", "add_text_embeds", "add_time_ids")}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    with attach(pipe):
        latents = run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    sigmas, pictures, guided = pipe.scheduler.sigmas, two_pictures(pipe), guided_by_hand(pipe)
    half = sample(guided, random_latents(5), sigmas[:3], "euler")
    expected = sample(lambda x, sigma: pictures(x, sigma)[0], half, sigmas[2:], "euler")
    assert_same(latents, expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(pipeline, strength):
    pipe = pipeline(StableDiffusionXLImg2ImgPipeline)
    image, seeded = 0.5 * random_latents(7), torch.Generator().manual_seed(8)
    with attach(pipe):
        latents = pipe(**arguments(image=image, strength=strength, generator=seeded)).images
    noise = torch.randn(1, 4, *LATENT, generator=torch.Generator().manual_seed(8))
    sigmas = pipe.scheduler.sigmas[-1 - round(4 * strength) :]
    alpha, s = alpha_s(sigmas[0].item())
    expected = sample(guided_by_hand(pipe), alpha * image + s * noise, sigmas)
    assert_same(latents, expected)


def test_inpainting_keeps_what_is_not_masked(pipeline):
    pipe = pipeline(StableDiffusionXLInpaintPipeline)
    image, mask = 0.5 * random_latents(7), torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    asked = {"image": image, "mask_image": mask, "height": SIZE, "width": SIZE, "strength": 1.0}

    def paint():
        return pipe(**arguments(**asked, generator=torch.Generator().manual_seed(8))).images

    plain = paint()
    with attach(pipe):
        latents = paint()
    half = LATENT[1] // 2
    assert torch.equal(latents[..., half:], image[..., half:])
    assert (latents - plain)[..., :half].abs().max() > 0.01


@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet(pipeline, guess_mode):
    """In one step from infinity the picture is the guided x0: its canvas mean is that of the prompt alone."""
    pipe = pipeline(StableDiffusionXLControlNetPipeline)
    control = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    asked = {"image": control, "num_inference_steps": 1, "guess_mode": guess_mode}
    alone, plain = run(pipe, **asked, guidance_scale=1.0), run(pipe, **asked)
    with attach(pipe, exposure=1.0, contrast=0.0):
        latents = run(pipe, **asked)
    assert_same(latents.mean((-2, -1)), alone.mean((-2, -1)))
    assert (plain - alone).mean((-2, -1)).abs().max() > 0.01
    shape = [x - x.mean((-2, -1), keepdim=True) for x in (latents, plain)]
    assert_same(*shape)


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_perturbed_attention(pipeline, scale):
    pipe = pipeline(StableDiffusionXLPAGPipeline)
    pipe.set_pag_applied_layers("mid")
    asked = {"num_inference_steps": 1, "guidance_scale": scale, "pag_scale": 3.0}
    answers = []
    with pipe.unet.register_forward_hook(lambda module, args, output: answers.append(output[0])):
        plain = run(pipe, **asked)
        with attach(pipe):
            latents = run(pipe, **asked)
    *uncond, cond, perturbed = answers[1].chunk(3 if scale > 1 else 2)
    added = sum((scale - 1) * exposure_true(cond - other, cond) for other in uncond)
    expected = -(cond + added + 3.0 * exposure_true(cond - perturbed, cond))
    assert_same(latents, expected)
    assert (latents - plain).abs().max() > 1e-3


def test_pipelines_that_share_a_network(pipeline):
    base = pipeline(StableDiffusionXLPipeline)
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(base, requires_aesthetics_score=False)
    other.set_progress_bar_config(disable=True)
    assert other.unet is base.unet

    def paint():
        return other(**arguments(image=random_latents(7), generator=torch.Generator().manual_seed(8))).images

    plain_base, plain_other = run(base), paint()
    with attach(base):
        true_base = run(base)
        assert torch.equal(paint(), plain_other)
        with attach(other):
            true_other = paint()
            assert torch.equal(run(base), true_base)
        assert torch.equal(paint(), plain_other)
    with attach(other):
        assert torch.equal(paint(), true_other)
        assert torch.equal(run(base), plain_base)
    assert not torch.allclose(true_base, plain_base, atol=1e-2)
    assert not torch.allclose(true_other, plain_other, atol=1e-2)


def ask(self, x, t, **more):
    """A method of a pipeline that asks its network."""
    added = {"text_embeds": torch.zeros(len(x), 16), "time_ids": torch.zeros(len(x), 6)}
    return self.unet(x, t, encoder_hidden_states=torch.ones(len(x), 7, 32), added_cond_kwargs=added, **more)


@torch.no_grad()
def test_either_form_of_output_and_of_arguments(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline)
    x = random_latents(3, batch=2)
    with attach(pipe):
        run(pipe)
        as_object = ask(pipe, x, 500)
        as_tuple = ask(pipe, x, torch.tensor(500.0), return_dict=False)
        assert torch.equal(as_object.sample, as_tuple[0])
        true = as_tuple[0]
    plain = ask(pipe, x, torch.tensor(500.0)).sample
    assert torch.equal(true[1], plain[1])
    assert not torch.allclose(true[0], plain[0], atol=1e-3)


@torch.no_grad()
def test_nothing_is_read_on_the_host(pipeline, no_host_reads):
    pipe = pipeline(StableDiffusionXLPipeline)
    x, t = random_latents(3, batch=2), torch.tensor(500.0)
    with attach(pipe, cfg_pp=True):
        run(pipe)
        with no_host_reads():
            ask(pipe, x, t)
    assert pipe.scheduler.unconditional_output is not None


def test_a_dropped_pipeline_is_freed(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline)
    unet, gone = pipe.unet, weakref.ref(pipe)
    handle = attach(pipe)
    del pipe
    assert gone() is None
    ask(type("Other", (), {"unet": unet}), random_latents(3), 500)
    handle.remove()


@pytest.fixture
def quickly_compiled(pipeline, monkeypatch):
    """A pipeline whose U-Net computes next to nothing: compiling the real one takes many seconds."""

    def forward(sample, timestep, encoder_hidden_states, return_dict=True, **rest):
        text = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return (torch.tanh(sample.roll(1, -1) + 20 * text) * (1 + timestep / 1000) + text,)

    pipe = pipeline(StableDiffusionXLPipeline)
    monkeypatch.setattr(pipe.unet, "forward", forward)
    torch.compiler.reset()
    return pipe


@pytest.mark.parametrize("first", ["compile", "attach"])
def test_compiled_network(quickly_compiled, first):
    pipe = quickly_compiled
    with attach(pipe):
        expected = run(pipe)
    plain, unet = run(pipe), pipe.unet

    if first == "compile":
        pipe.unet = torch.compile(unet, backend="eager")
        assert_same(run(pipe), plain)
        handle = attach(pipe)
    else:
        handle = attach(pipe)
        pipe.unet = torch.compile(unet, backend="eager")
    assert_same(run(pipe), expected)
    handle.remove()
    assert_same(run(pipe), plain)
    assert (plain - expected).abs().max() > 0.01


def test_network_compiled_in_place(quickly_compiled):
    pipe = quickly_compiled
    with attach(pipe):
        expected = run(pipe)
    plain = run(pipe)
    try:
        with attach(pipe):
            pipe.unet.compile(backend="eager")
            assert_same(run(pipe), expected)
        assert_same(run(pipe), plain)
        with pytest.raises(ValueError, match="compiled in place"):
            attach(pipe)
        guider = ExposureTrueGuidance(scheduler=pipe.scheduler)
        with pytest.raises(ValueError, match="compiled in place"):
            guider.prepare_models(pipe.unet)
    finally:
        pipe.unet._compiled_call_impl = None


def test_what_attach_refuses(pipeline, networks):
    pipe = pipeline(StableDiffusionXLPipeline)
    for exposure, contrast in ((1.1, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.5, 2.0)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            attach(pipe, exposure, contrast)
    with attach(pipe), pytest.raises(ValueError, match="already attached"):
        attach(pipe)
    pipe.scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="cfg_pp needs"):
        attach(pipe, cfg_pp=True)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="has no betas"):
        attach(pipe)
    parts = {"vae": networks["vae"], "unet": networks["sd"], "text_encoder": None, "tokenizer": None}
    other = StableDiffusionInstructPix2PixPipeline(
        **parts, scheduler=ZTSNRScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="its batch is not ordered uncond, cond"):
        attach(other)
    with pytest.raises(ValueError, match="which DDIMPipeline lacks"):
        attach(diffusers.DDIMPipeline(networks["sd"], DDIMScheduler()))
    assert not any(isinstance(hook, _Hook) for hook in networks["sd"]._forward_hooks.values())


# ----------------------------------------------------------------------------------------------------------------------
# CFG++


def cfg_pp_by_hand(pipe, x, scale, true):
    """Algorithm 2 of arXiv 2406.08070: DDIM with the guided picture and the unconditional noise.

    With ``true`` the difference of the two pictures is T of it, wherever it appears.
    """
    pictures, sigmas = two_pictures(pipe), pipe.scheduler.sigmas.tolist()
    for sigma, after in itertools.pairwise(sigmas):
        cond, uncond = pictures(x, sigma)
        if true:
            uncond = cond - exposure_true(cond - uncond, cond)
        guided = uncond + scale * (cond - uncond)
        (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(after)
        noise = (x - alpha * uncond) / s
        x = alpha_next * guided + s_next * noise
    return x


@pytest.mark.parametrize("model", [V, EPSILON], ids=["v", "epsilon"])
@pytest.mark.parametrize("true", [True, False])
def test_cfg_pp_is_its_paper(pipeline, model, true):
    pipe = pipeline(StableDiffusionXLPipeline, solver="euler", **model)
    shares = {} if true else {"exposure": 0, "contrast": 0}
    with attach(pipe, **shares, cfg_pp=True):
        latents = run(pipe, guidance_scale=1.6)
    assert_same(latents, cfg_pp_by_hand(pipe, random_latents(5), 1.6, true))
    plain = run(pipe, guidance_scale=1.6)
    assert (latents - plain).abs().max() > 0.01


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun"])
def test_cfg_pp_of_other_solvers(pipeline, solver):
    pipe = pipeline(StableDiffusionXLPipeline, solver=solver)
    with attach(pipe, cfg_pp=True):
        latents = run(pipe, guidance_scale=1.6)
    pictures = two_pictures(pipe)

    def answer(x, sigma):
        cond, uncond = pictures(x, sigma)
        true = exposure_true(cond - uncond, cond)
        return cond + 0.6 * true, cond - true

    assert_same(latents, drive(start_run(solver, pipe.scheduler.sigmas.tolist()), random_latents(5), answer))


def test_an_unconditional_prediction_is_used_once():
    scheduler = ZTSNRScheduler(solver="euler", spacing="trailing")
    x, v, other = (random_latents(seed) for seed in (1, 2, 3))

    def second_step(given):
        scheduler.set_timesteps(4)
        state = x
        for i, t in enumerate(scheduler.timesteps[:3]):
            scheduler.unconditional_output = given if i == 1 else None
            state = scheduler.step(v, t, state).prev_sample
            assert scheduler.unconditional_output is None
        return state

    assert torch.equal(second_step(v), second_step(None))
    assert not torch.allclose(second_step(other), second_step(None), atol=1e-2)
    scheduler.set_timesteps(4)
    scheduler.unconditional_output = other
    at_infinity = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.step(v, scheduler.timesteps[0], x).prev_sample, at_infinity)
    scheduler.unconditional_output = other[:, :, :8]
    with pytest.raises(ValueError, match="returned shape"):
        scheduler.step(v, scheduler.timesteps[1], x)
    scheduler.set_timesteps(4)
    assert scheduler.unconditional_output is None
