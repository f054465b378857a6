"""Three models that differ in their ``model_sampling`` alone, for what runs inside ComfyUI.

"ours" is behind ZTSNR Model, "stock" behind ComfyUI's own ModelSamplingDiscrete (v_prediction, zsnr).  "limit" is
ComfyUI's code where its errors are nearly gone: the table is not rounded and starts at LIMIT, the state is float64.
"""

import functools

import inside
import torch

LIMIT = 1e6


@functools.cache
def limit_class():
    import comfy.model_sampling as stock

    class Limit(stock.ModelSamplingDiscrete, stock.V_PREDICTION):
        """ComfyUI's own, but for a table that is exact between its entries, and a state in float64."""

        exact = inside.room("samplers").NoiseSchedule.sdxl()

        def sigma(self, timestep):
            return self.exact.sigma(timestep.double().cpu()).clamp(max=LIMIT).float()

        def timestep(self, sigma):
            levels = sigma.double().cpu()
            return self.exact.timestep(levels.masked_fill(levels >= LIMIT, float("inf"))).float()

        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return super().noise_scaling(sigma, noise.double(), latent_image, max_denoise)

    return Limit


def on_limit(model):
    """The model on the limit."""
    sampling = limit_class()(model.model.model_config, zsnr=True)
    sampling.set_sigmas(sampling.sigma(torch.arange(1000)))
    limit = model.clone()
    limit.add_object_patch("model_sampling", sampling)
    return limit


def by_comfyui(model):
    """The model behind core ModelSamplingDiscrete."""
    return inside.stock("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]


DOORS = {"ours": lambda model: inside.patched(model), "stock": by_comfyui, "limit": on_limit}
