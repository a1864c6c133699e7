"""What all that trains a guide shares: the loop, its checkpoints, numbers that change on the way."""

from .trainer import StopTraining, Task, Trainer

__all__ = ["StopTraining", "Task", "Trainer"]
