"""``quickstudy predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

SHOWN = 3
"""Classes that a row of the table names at most."""


def predict(
    classifier: Path, images: list[str], format: Literal["table", "json"] = "table", device: str = "auto"
) -> int:
    """Say which class each image is of, and how probable that is.

    An image that cannot be read is named, and then the exit status is 1.

    Args:
        classifier: folder that `quickstudy fit` has written.
        images: image files.
        format: a row for each image with its most probable classes; or JSON with the probability of every class.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
    """
    from quickstudy import FewShotClassifier
    from quickstudy.data.reader import readable

    learned = FewShotClassifier.load(classifier, device=device)
    files, broken = readable(images)
    for reason in broken:
        print(f"left out: {reason}", file=sys.stderr)
    names = learned.classes_.tolist()
    found = [dict(zip(names, row)) for row in learned.predict_proba(files).tolist()] if files else []
    best = [sorted(row, key=row.__getitem__, reverse=True) for row in found]
    if format == "json":
        rows = [{"image": f, "class": b[0], "probabilities": row} for f, b, row in zip(files, best, found)]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        width = max(map(len, files), default=0)
        for file, order, row in zip(files, best, found):
            shown = "   ".join(f"{name} {100 * row[name]:.1f} %" for name in order[:SHOWN])
            print(f"{file:<{width}}   {shown}")
    return 1 if broken else 0
