import subprocess
import sys

import pytest

import quickstudy.data
from quickstudy.data.base import Dataset
from quickstudy.data.registry import DATASETS, dataset_entry
from quickstudy.errors import DataError

HEAVY = ("torch", "numpy", "PIL", "matplotlib", "pooch", "rich")


def test_importing_the_package_and_the_table_costs_nothing() -> None:
    code = f"import sys, quickstudy.data, quickstudy.data.registry; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_leads_to_its_dataset(name: str) -> None:
    entry = dataset_entry(name)
    kind = entry.load()
    assert issubclass(kind, Dataset)
    assert entry.name == kind.name == name
    assert getattr(quickstudy.data, kind.__name__) is kind
    assert all((entry.description, entry.classes, entry.size, entry.licence, entry.how))
    assert "\n" not in entry.description
    assert entry.homepage.startswith("https://")
    with pytest.raises(DataError, match=r"no split 'valid': they are train, val, test|tasks to test on alone"):
        kind().split("valid")  # type: ignore[arg-type]


def test_an_unknown_dataset_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no dataset 'omniglott' \(did you mean 'omniglot'\?\); there are"):
        dataset_entry("omniglott")


def test_every_public_name_is_there() -> None:
    for name in quickstudy.data.__all__:
        assert getattr(quickstudy.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Imagenet'"):
        _ = quickstudy.data.Imagenet
