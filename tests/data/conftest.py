import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from quickstudy.data.images import ImageClasses

OWN_DATA = os.environ.get("QUICKSTUDY_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the data or the cache of the person who runs it."""
    monkeypatch.delenv("QUICKSTUDY_DATA", raising=False)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def own_data() -> str:
    if not OWN_DATA:
        pytest.skip("QUICKSTUDY_DATA is not set")
    return OWN_DATA


@pytest.fixture
def classes() -> ImageClasses:
    """Twelve classes of 9 to 20 images; the two channels of every image are its class and its number."""
    counts = np.array([9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    images = torch.zeros(int(counts.sum()), 2, 3, 3, dtype=torch.uint8)
    for c, (start, count) in enumerate(zip(offsets, counts)):
        images[start : start + count, 0] = c
        images[start : start + count, 1] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return ImageClasses.from_offsets(images, offsets, [f"class{c}" for c in range(12)], "numbered")


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[..., Path]:
    def make(files: dict[str, bytes], name: str = "files.zip") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in files.items():
                archive.writestr(member, content)
        return path

    return make
