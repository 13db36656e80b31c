"""Weights by rule: every parameter from its name, so that golden numbers need no stored weights (specification)."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn


def seeded_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: seeded(name, tuple(value.shape)) for name, value in network.state_dict().items()}


def save_seeded(network: nn.Module, file: Path) -> Path:
    """Write a checkpoint of a network's shapes with such weights."""
    torch.save(seeded_weights(network), file)
    return file


def seeded(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    r = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        value = r.uniform(0.8, 1.6, shape)
    elif name.endswith(("running_mean", "bias")):
        value = r.uniform(-0.2, 0.2, shape)
    elif len(shape) == 1:
        low, high = (0.8, 1.4) if name.endswith("conv.7.weight") else (0.7, 1.3)
        value = r.uniform(low, high, shape)
    else:
        value = r.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        value = value * {"outc.conv.weight": 0.015, "12.conv_block.0.weight": 0.1}.get(name, 1.0)
    return torch.from_numpy(np.asarray(value, np.float32))
