"""comfyui-ztsnr: exact zero-terminal-SNR sampling for v-prediction diffusion models."""

__version__ = "0.1.0"
