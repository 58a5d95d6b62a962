"""Few-shot learning in PyTorch: every meta-learner behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickstudy.classifier import FewShotClassifier

__version__ = "0.1.0"
__all__ = ["FewShotClassifier", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the classifier when it is first used: with torch and scikit-learn, which `quickstudy --help` needs not."""
    if name != "FewShotClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from quickstudy.classifier import FewShotClassifier

    return FewShotClassifier
