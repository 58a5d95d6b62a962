"""Few-shot learning in PyTorch: every meta-learner behind one interface."""

__version__ = "0.1.0"
