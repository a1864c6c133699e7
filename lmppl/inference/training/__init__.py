"""What all that trains a guide shares: the loop, its checkpoints, numbers that change on the way."""

from .loop import checkpoint
from .loop.batches import Task
from .loop.stopping import EarlyStopping, StopTraining
from .trainer import Trainer

__all__ = ["EarlyStopping", "StopTraining", "Task", "Trainer", "checkpoint"]
