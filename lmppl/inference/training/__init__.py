"""What all that trains a guide shares: the loop, its checkpoints, numbers that change on the way."""

from .trainer import Task, Trainer

__all__ = ["Task", "Trainer"]
