"""The ComfyUI nodes: a schema and a few lines each; the work is in the other rooms."""

from comfy_api.latest import ComfyExtension, io

from .checkpoint import ZTSNRCheckpointLoader
from .diagnostic import LatentMeanDiagnostic
from .guidance import ZTSNRGuidance, ZTSNRGuidanceRescale
from .latent import ZTSNRBucketLatent
from .model import ZTSNRModelSampling
from .report import LatentMeanProbe, LatentMeanReport
from .sampler import ZTSNRSampler
from .scheduler import ZTSNRScheduler, register_schedulers


class ZTSNRExtension(ComfyExtension):
    """Everything ComfyUI gets from this pack, besides the schedulers in KSampler's list."""

    def __init__(self):
        register_schedulers()  # not in on_load, which ComfyUI 0.3.64 does not know yet

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ZTSNRCheckpointLoader,
            ZTSNRModelSampling,
            ZTSNRScheduler,
            ZTSNRSampler,
            ZTSNRGuidance,
            ZTSNRGuidanceRescale,
            ZTSNRBucketLatent,
            LatentMeanDiagnostic,
            LatentMeanProbe,
            LatentMeanReport,
        ]
