"""The whole run at SDXL's full size on a GPU: 50 steps of random weights, stopped and resumed in the middle, exported,
and loaded in diffusers; and what it takes beside what was planned."""

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.full_size import write_folder
from tests.tiny_pipelines import make_tokenizer
from ztsnr.checkpoints import inspect_checkpoint, load_pipeline
from ztsnr.samplers import ZTSNRScheduler
from ztsnr.training import trainer
from ztsnr.training.speed import GIB

from .tiny_run import at, make_content, sends, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
STEPS = 50


def write_pictures(folder, count: int = 24):
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        size = (1024, 1024) if i % 2 else (1216, 832)
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"noise, tag{random.integers(5)}")


def test_fifty_steps_of_sdxl(tmp_path, monkeypatch):
    import signal

    write_folder(tmp_path / "tiny", "SDXL base", make_tokenizer(tmp_path / "tokens", "!").name_or_path,
                 prediction_type="epsilon", zero_snr=False)  # fmt: skip
    write_pictures(tmp_path / "pictures")
    content = make_content(
        tmp_path,
        tmp_path / "run",
        steps=STEPS,
        save_every=100,
        model__dtype="bfloat16",
        optimizer__learning_rate=1e-6,
        speed__device="cuda",
        speed__checkpointing="auto",
        watch__log_every=5,
        watch__preview_every=25,
        export__single_file=True,
    )
    content["data"] |= {"buckets": ["1024x1024,1216x832"], "step": 64, "workers": 4}
    said, runs = [], []
    states, export = tmp_path / "run" / "states", trainer.export_run

    def forget(batch):
        """A state is 41 GB, and the disk needs room for no more than one at a time."""
        shutil.rmtree(states)
        return batch

    def exported(run):
        runs.append(run)
        assert len(list(states.glob(f"step-{STEPS:08d}/*.safetensors"))) > 0
        shutil.rmtree(states)
        return export(run)

    monkeypatch.setattr(trainer, "export_run", exported)
    with at({STEPS // 2: sends(signal.SIGTERM)}) as before:
        assert train(content, say=said.append) == []
    gc.collect()
    torch.cuda.empty_cache()
    with at({STEPS // 2 + 1: forget}) as behind:
        file, folder = train(content, resume=True, say=said.append)
    assert before + behind == list(range(STEPS))

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps[-1] == STEPS
    assert all(row.get("recompiled", 0) == 0 for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    peak = max(row.get("peak memory (GiB)", 0) for row in rows)
    print("\n".join(said))
    print(f"pictures a second {[row['pictures a second'] for row in rows if 'loss' in row]}, peak {peak:.1f} GiB")
    plan = runs[0].speed.plan  # of the eager mode, so that compiled it takes less
    assert 0.5 * plan.totals[plan.mode] < peak * GIB < 1.05 * plan.totals[plan.mode]

    for path in (file, folder):
        report = inspect_checkpoint(path)
        assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
    pipe = load_pipeline(folder, device="cuda", dtype=torch.bfloat16).pipeline
    pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config)
    latents = pipe("noise", num_inference_steps=2, output_type="latent").images
    assert latents.isfinite().all()
