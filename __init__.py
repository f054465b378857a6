"""comfyui-ztsnr: exact zero-terminal-SNR sampling for v-prediction diffusion models."""

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"  # help pages of the nodes


async def comfy_entrypoint():
    """What ComfyUI calls when it loads this folder from custom_nodes."""
    from .nodes import ZTSNRExtension

    return ZTSNRExtension()


if __package__:  # not where pytest imports this file by itself, for it lies at the repository's root
    from .moved import keep_old_names

    keep_old_names()
