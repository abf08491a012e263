"""Anomaly maps and metrics of a class's test images; the table that shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import MASK_SIZE, AnomalyClass
from hardware import free_memory
from loading import FeatureSource, ImageStore, evaluation_plan, load_masks
from metrics import METRIC_NAMES, GroundTruth
from model import PyramidFlow, PyramidFlowConfig, anomaly_map
from parallel import World
from util import InputError, progress

CPU_BATCH_ELEMENTS = 2**24  # of features: what computes a kernel's spectrum once for several images
CUDA_BATCH_ELEMENTS = 2**26
CUDA_BYTES = 64  # of memory, generously, per element of a feature: stem, hidden maps, latents


class DivergedError(InputError):
    """Training left the finite numbers; what was saved before stays."""

    exit_code = 1

    def __init__(self, what: str):
        super().__init__(
            f"{what}; checkpoints of earlier epochs, if any, are untouched; try another --seed or --volumeNorm"
        )


def evaluation_batch(config: PyramidFlowConfig, device: torch.device) -> int:
    """Images that are scored together; on CUDA no more than half of the free memory holds."""
    height, width = config.level_size(0)
    elements = CPU_BATCH_ELEMENTS
    if device.type == "cuda":
        elements = min(CUDA_BATCH_ELEMENTS, free_memory(device) // 2 // CUDA_BYTES)
    return max(1, elements // (height * width * config.channels))


def features_in_order(
    source: FeatureSource, config: PyramidFlowConfig, description: str, world: World | None = None
) -> Iterator[Tensor]:
    """Features of all images of the source, or of this process's share, (B,C,H,W) at a time."""
    images = (world or World()).share(range(len(source.store)))
    plan = evaluation_plan(images, evaluation_batch(config, source.store.device))
    return progress(source.batches(plan), description, len(plan))


@dataclass
class TestSet:
    """The test images of a class.

    Attributes:
        data: the class.
        store: the images.
        source: their features.
        truth: the masks as the metrics need them, on the device.
        world: the processes that share the work.
    """

    data: AnomalyClass
    store: ImageStore
    source: FeatureSource
    truth: GroundTruth
    world: World

    @classmethod
    def load(
        cls, data: AnomalyClass, model: PyramidFlow, cache: str, num_workers: int, device: torch.device,
        world: World | None = None,
    ) -> TestSet:  # fmt: skip
        world = world or World()
        paths, size = [image.path for image in data.test], model.config.image_size
        store = ImageStore(paths, size, cache, device, num_workers, "test images", world)
        source = FeatureSource(store, model.encode, constant=model.encoder_is_constant)
        truth = GroundTruth.from_masks(data.defective, load_masks(data, num_workers), device)
        return cls(data, store, source, truth, world)

    def anomaly_maps(self, model: PyramidFlow, template: tuple[Tensor, ...]) -> Tensor:
        """(N,256,256) on the device, in every process.

        Raises:
            DivergedError: a score is not finite.
        """
        model.eval()
        batches = features_in_order(self.source, model.config, "test", self.world)
        maps = [at_mask_size(anomaly_map(model, batch, template)) for batch in batches]
        empty = torch.zeros(0, *MASK_SIZE, device=self.store.device)
        maps = self.world.collect(torch.cat([empty, *maps]), len(self.store))
        if not torch.isfinite(maps).all():
            raise DivergedError("anomaly maps are no longer finite")
        return maps


def at_mask_size(maps: Tensor) -> Tensor:
    """(B,H,W) -> (B,256,256), where maps and masks meet."""
    if maps.shape[-2:] == MASK_SIZE:
        return maps
    return F.interpolate(maps[:, None], MASK_SIZE, mode="bilinear", antialias=True)[:, 0]


# -------------------------------------------------------------------------------------- table


def result_table(rows: list[tuple[str, str, dict]]) -> str:
    """Markdown, percent.

    Args:
        rows: (class, label, metrics by name).
    """
    lines = [
        "| class | epoch | " + " | ".join(METRIC_NAMES.values()) + " |",
        "|---|---|" + "---|" * len(METRIC_NAMES),
    ]
    for name, label, values in rows:
        shown = " | ".join(percent(values[key]) for key in METRIC_NAMES)
        lines.append(f"| {name} | {label} | {shown} |")
    return "\n".join(lines)


def mean_row(rows: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
    """The mean over classes, as a further row; metrics that a class lacks are left out of it."""
    means = {}
    for key in METRIC_NAMES:
        values = [row[key] for _, _, row in rows if row[key] is not None]
        means[key] = sum(values) / len(values) if values else None
    return [(f"mean of {len(rows)}", "", means)] if rows else []


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"
