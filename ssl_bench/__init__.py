"""A self-supervised learning benchmark suite for large-batch optimizers."""

__version__ = "0.1.0"
