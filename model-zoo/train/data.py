"""Batches of drawn scenes, made by worker processes so that the GPU never waits."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from heldout import QUESTIONS
from questions import KINDS, ask_many
from scenes import SIZE, image_labels, make_scene, patch_labels, render, text_labels
from text import Slots

# Seeds of training start here; `heldout` uses smaller ones.
FIRST_TRAINING_SEED = 1_000_000_000


def draw(seeds, slots: Slots, held_out: bool = False) -> dict:
    """Images, labels and questions of `seeds`, as tensors."""
    count = len(seeds)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    patches, whole, texts, ids, wanted, kinds = [], [], [], [], [], []
    for row, seed in enumerate(seeds):
        scene = make_scene(seed, held_out)
        images[row] = render(scene)
        patches.append(patch_labels(scene))
        whole.append(image_labels(scene))
        texts.append(text_labels(scene))
        asked = ask_many(scene, QUESTIONS, random.Random(seed + 1))
        row_ids, row_wanted = slots.fill(asked)
        ids.append(row_ids)
        wanted.append(row_wanted)
        kinds.append([KINDS.index(kind) for kind, _, _ in asked])
    stack = lambda rows: torch.from_numpy(np.stack(rows))
    return {
        "images": torch.from_numpy(images), "patches": stack(patches), "whole": stack(whole),
        "texts": stack(texts), "ids": stack(ids), "wanted": stack(wanted), "kinds": torch.tensor(kinds),
    }


class Training(IterableDataset):
    """Endless batches; each worker has its own seeds, from `first` on."""

    def __init__(self, slots: Slots, batch: int, first: int):
        self.slots, self.batch, self.first = slots, batch, first

    def __iter__(self):
        torch.set_num_threads(1)
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        seed = FIRST_TRAINING_SEED + self.first + index * self.batch
        while True:
            yield draw(range(seed, seed + self.batch), self.slots)
            seed += self.batch * step


def training(slots: Slots, batch: int, first: int, workers: int) -> DataLoader:
    """Batches of training scenes whose seeds start at `first`."""
    pin = torch.cuda.is_available()
    return DataLoader(
        Training(slots, batch, first), batch_size=None, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
