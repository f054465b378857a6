"""ZTSNR Model (v-prediction): the node that gives a model its exact schedule and first step."""

from comfy_api.latest import io, ui

from ..errors import UserError
from ..samplers.step_schedules import DEFAULT_GUIDANCE
from .messages import refused, show
from .model_patch import FIRST_STEPS, PREDICTIONS, SCHEDULES, patch_model
from .schema import schema


class ZTSNRModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRModelSampling",
            display_name="ZTSNR Model (v-prediction)",
            category="ZTSNR",
            description="Makes a zero-terminal-SNR v-prediction model sample exactly, with every sampler and scheduler:"
            " the first step starts from infinite sigma, and timesteps are not rounded. Connect it after the loader "
            "and LoRAs.",
            search_aliases=["v-pred", "v prediction", "zsnr", "ztsnr", "zero terminal SNR", "ModelSamplingDiscrete"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion 1.x, 2.x or XL model, with LoRAs if you like. It is not changed.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=list(PREDICTIONS),
                    default="auto",
                    tooltip="What the network predicts. auto: what the checkpoint, or an earlier ZTSNR node, says. "
                    "Choose v_prediction for a v-pred file that ComfyUI loads as epsilon (its pictures are noise or "
                    "oversaturated).",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="auto",
                    tooltip="auto: what the checkpoint says. zero terminal SNR: for NoobAI-XL v-pred, Illustrious "
                    "v-pred and others that were trained from pure noise. as trained: the schedule without it.",
                ),
                io.Combo.Input(
                    "first_step",
                    options=list(FIRST_STEPS),
                    default="exact infinity",
                    tooltip="exact infinity: the first step starts from pure noise. as ComfyUI does it: from sigma "
                    "4518.76 with rounded timesteps, for comparison.",
                ),
                io.Float.Input(
                    "canvas_shift",
                    default=1.0,
                    min=0.05,
                    max=8.0,
                    step=0.05,
                    tooltip="1 is off. For canvases larger than the model was trained on: how many times longer, "
                    "sqrt(area / trained area); 1.5 for 1536 x 1536 on an SDXL model. Every sigma is multiplied by it. "
                    "Below 1 for models trained on a schedule of their own.",
                ),
                io.Float.Input(
                    "cfg",
                    default=DEFAULT_GUIDANCE,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,  # workflows saved before it existed do not have it
                    tooltip="The CFG that you sample with, 1 without guidance. Only the scheduler ztsnr_spectral uses "
                    "it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        prediction: str,
        schedule: str,
        first_step: str,
        canvas_shift: float,
        cfg: float = DEFAULT_GUIDANCE,
    ) -> io.NodeOutput:
        try:
            patched, report = patch_model(
                model,
                prediction=prediction,
                schedule=schedule,
                first_step=first_step,
                canvas_shift=canvas_shift,
                guidance=cfg,
            )
        except UserError as reason:
            return refused(reason, outputs=1)
        show(report)
        return io.NodeOutput(patched, ui=ui.PreviewText(report))
