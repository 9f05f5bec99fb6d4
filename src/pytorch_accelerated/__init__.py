"""A small, transparent training loop for PyTorch, over Hugging Face Accelerate."""

from accelerate import notebook_launcher

from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues

__version__ = "0.2.0"

__all__ = ["Trainer", "TrainerPlaceholderValues", "__version__", "notebook_launcher"]
