"""What all trainers share: the loop, its checkpoints, and schedules."""

from .loop import checkpoint
from .loop.batches import Task
from .loop.stopping import EarlyStopping, StopTraining
from .trainer import Trainer

__all__ = ["EarlyStopping", "StopTraining", "Task", "Trainer", "checkpoint"]
