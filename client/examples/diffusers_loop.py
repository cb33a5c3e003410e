"""A training loop as diffusers' examples write it, with accelerate: RemoteEma where they make an EMAModel.

ema-service serve --memory &
python diffusers_loop.py my-run
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn.functional import mse_loss

from ema_client import RemoteEma
from ema_client.integrations.diffusers import load_ema


def main(run: str) -> None:
    """Train a small UNet on noise for a few steps, two batches to a step; then denoise, and draw, with EMA weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    # Only the main process keeps it: EMAModel(model.parameters(), decay=0.999) would be in each.
    ema = RemoteEma(model, decay=0.999, run=run) if accelerator.is_main_process else None
    scheduler = DDPMScheduler(num_train_timesteps=50)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    for _ in range(10):
        with accelerator.accumulate(model):
            clean, noise = torch.randn(4, 1, 8, 8).sign(), torch.randn(4, 1, 8, 8)
            steps = torch.randint(0, 50, (4,))
            loss = mse_loss(model(scheduler.add_noise(clean, noise, steps), steps).sample, noise)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if ema and accelerator.sync_gradients:  # an optimizer step, not a batch
            ema(accelerator.unwrap_model(model))

    if ema:
        with ema.scope(accelerator.unwrap_model(model)), torch.no_grad():
            model(torch.randn(1, 1, 8, 8), torch.tensor([1]))
        ema.close()
        # On this machine or another: a pipeline that draws with the EMA.
        pipeline = DDPMPipeline(UNet2DModel.from_config(accelerator.unwrap_model(model).config), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        info = load_ema(pipeline, run)
        pipeline(num_inference_steps=4, output_type="np")
        print(f"num_updates: {info.num_updates}")


if __name__ == "__main__":
    main(sys.argv[1])
