"""An example that trains: a small residual network on scikit-learn's handwritten digits, once with every block in its residual blocks.

1797 grey images of 8 x 8, a quarter of them held out. It shows how the blocks are used and that they learn; a set this small does not rank them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import tritattn

from .environment import environment
from .features import names
from .plots import accuracy_figure
from .runner import status_of
from .schema import DIGITS, Writer, frame

PLAIN = "none"
REPLACES = ("sk", "splat")  # these take the place of a convolution
WIDTH, CLASSES, BATCH, RATE = 32, 10, 64, 0.01


class Residual(nn.Module):
    """relu(attention(bn(conv(relu(bn(conv x))))) + shortcut): the block takes sum and ReLU into its own pass."""

    def __init__(self, attention: str, inputs: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        replaced = attention in REPLACES
        self.conv2: nn.Module = tritattn.nn.create(attention, channels) if replaced else nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention: Any = None
        if not replaced and attention != PLAIN:
            self.attention = tritattn.nn.create(attention, channels, activation="relu")
        self.shortcut = nn.Identity() if (inputs, stride) == (channels, 1) else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        identity = self.shortcut(x)
        return F.relu(out + identity) if self.attention is None else self.attention(out, identity)


def network(attention: str) -> nn.Sequential:
    stem = nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
    blocks = Residual(attention, WIDTH, WIDTH), Residual(attention, WIDTH, 2 * WIDTH, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, CLASSES))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, then those held out; the same split every time, as many of each digit in both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, held, y, answers = train_test_split(images.astype("float32"), labels, test_size=0.25, random_state=0, stratify=labels)
    maps = [(torch.from_numpy(part) / 8 - 1).view(-1, 1, 8, 8) for part in (x, held)]
    return maps[0], torch.from_numpy(y), maps[1], torch.from_numpy(answers)


def train(attention: str, seed: int, epochs: int, device: str) -> dict[str, Any]:
    """The columns of one network: its accuracy on the images held out."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = network(attention).to(device)
    x, y, held, answers = (t.to(device) for t in load())
    steps = epochs * -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(epochs):
        for batch in torch.randperm(len(x), device=device).split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(held).argmax(1) == answers).double().mean().item()
    parameters = sum(p.numel() for p in model.parameters())
    return {"accuracy": accuracy, "loss": loss.item(), "parameters": parameters, "seconds": time.perf_counter() - started, "status": "ok"}


def digits(
    path: str | os.PathLike[str], console: Console, *, epochs: int, seeds: int, blocks: Sequence[str] = (), device: str = "cpu", resume: bool = True
) -> Path:
    """Train a network per block and seed; the rows, and a figure of them beside the CSV."""
    if device == "cpu":
        torch.set_num_threads(1)  # maps this small are not worth sharing
    runs = [(name, seed) for seed in range(seeds) for name in blocks or (PLAIN, *names())]
    columns = (TextColumn("digits {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Writer(path, DIGITS, environment(device), resume=resume) as writer, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(runs))
        for name, seed in runs:
            row: dict[str, Any] = {"block": name, "seed": seed, "epochs": epochs}
            progress.update(task, description=name)
            if not writer.has(row):
                try:
                    found = train(name, seed, epochs, device)
                except Exception as error:
                    found = {"status": status_of(error)}
                writer.write({**row, **found})
            progress.advance(task)
    table = frame(writer.rows, DIGITS)
    good = table[table.status == "ok"]
    out = Table(title="accuracy on the digits held out", title_justify="left", box=None, pad_edge=False)
    for name in ("block", "accuracy", "parameters", "seconds"):
        out.add_column(name, justify="left" if name == "block" else "right")
    for name, group in good.groupby("block", sort=False):
        out.add_row(str(name), f"{group.accuracy.mean():.3f}", f"{group.parameters.iloc[0]:.0f}", f"{group.seconds.mean():.1f}")
    console.print(out)
    for _, failed in table[table.status != "ok"].iterrows():
        console.print(f"  {failed.block}: {failed.status}", soft_wrap=True)
    figure = accuracy_figure(table)
    if figure:
        Path(path).with_suffix(".svg").write_text(figure, encoding="utf-8")
    return Path(path)
