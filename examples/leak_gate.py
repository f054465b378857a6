"""A test for CI: is a checkpoint zero-SNR trained?  Exits with 1 if it is not, or if that cannot be told.

python examples/leak_gate.py MODEL "a prompt that leaves the brightness open" [CONFIG]

The sampler and the pictures are the subject of `ztsnr leak MODEL --gate 3`, which takes longer.
"""

import sys

from ztsnr.checkpoints import load_pipeline
from ztsnr.diagnostics import mean_leak
from ztsnr.diagnostics.pipelines import encode, network
from ztsnr.samplers import NoiseSchedule


def main(model: str, prompt: str, config: str | None = None) -> int:
    pipe = load_pipeline(model, config=config).pipeline
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    denoise = network(pipe, encode(pipe, prompt), schedule, pipe.scheduler.config.prediction_type)
    side = pipe.unet.config.sample_size
    report = mean_leak(denoise, None, (pipe.unet.config.in_channels, side, side), schedule=schedule)
    print(report)
    return 0 if report.checkpoint.verdict == "zero SNR" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
