"""One forward of a checkpoint inside ComfyUI, for ``ztsnr verify --run``.

    PYTHON_OF_COMFYUI forward_inside.py COMFYUI CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors

A program of its own, for ComfyUI's own interpreter: it asks for nothing but ComfyUI and safetensors.  Everything runs
in float32 on the CPU, so that what differs is the networks.
"""

import json
import sys

comfyui, checkpoint, inputs_path, outputs_path = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@torch.inference_mode()
def main() -> None:
    inputs = load_file(inputs_path)
    with safe_open(inputs_path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    patcher, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    outputs = {}

    if clip is not None:
        names = ["l", "g"] if "pooled" in inputs else ["h" if hasattr(clip.cond_stage_model, "clip_h") else "l"]
        tokens = {name: [[(token, 1.0) for token in row]] for name, row in zip(names, settings["tokens"], strict=True)}
        outputs["text"], outputs["pooled"] = clip.encode_from_tokens(tokens, return_pooled=True)

    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    sigmas = model.model_sampling.sigmas
    sigma = sigmas[-1:]
    # calculate_input divides by sqrt(sigma^2 + 1): what comes to the U-Net is the state that every program was given
    x = inputs["state"] * (sigma**2 + 1) ** 0.5
    adm = model.encode_adm(pooled_output=inputs["pooled"], **settings["sizes"]) if "pooled" in inputs else None
    outputs["denoised"] = model.apply_model(x, sigma, c_crossattn=inputs["text"], **({} if adm is None else {"y": adm}))
    outputs["sigmas"] = sigmas

    if getattr(vae, "first_stage_model", None) is not None:
        comfy.model_management.load_models_gpu([vae.patcher])
        outputs["picture"] = vae.first_stage_model.decode(inputs["latent"].to(vae.vae_dtype))

    about = {
        "version": comfyui_version.__version__,
        "architecture": type(model.model_config).__name__,
        "model_type": model.model_type.name,
    }
    tensors = {name: tensor.float().contiguous() for name, tensor in outputs.items() if tensor is not None}
    save_file(tensors, outputs_path, {"about": json.dumps(about)})


if __name__ == "__main__":
    main()
