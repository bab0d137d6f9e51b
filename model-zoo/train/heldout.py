"""Writes the held-out scenes and their questions: PNG files and `questions.jsonl`, the same on every machine.

    python3 heldout.py FOLDER [--images 160] [--unseen]

Needs numpy alone. `--unseen` shows the pairs of colour and shape, and the numbers, that no training scene has.
"""

import argparse
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np

from questions import ask_many
from scenes import make_scene, render

QUESTIONS = 8
HELD_OUT_SEEDS = {"seen": 10_000_000, "unseen": 20_000_000}


def png(image: np.ndarray) -> bytes:
    """An RGB image as PNG."""
    height, width, _ = image.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(lines.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=160, help="eight questions each")
    parser.add_argument("--unseen", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    first = HELD_OUT_SEEDS["unseen" if args.unseen else "seen"]
    with (args.folder / "questions.jsonl").open("w") as lines:
        for seed in range(first, first + args.images):
            scene = make_scene(seed, args.unseen)
            (args.folder / f"{seed}.png").write_bytes(png(render(scene)))
            for kind, question, answer in ask_many(scene, QUESTIONS, random.Random(seed + 1)):
                row = {"image": f"{seed}.png", "kind": kind, "question": question, "answer": answer}
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
