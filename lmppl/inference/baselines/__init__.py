"""What amortised inference is compared with: other ways to train a guide, and a guide that is only prompted."""

from .policy_gradient import PolicyGradient
from .prompting import Prompting, few_shot
from .reweighted_wake_sleep import ReweightedWakeSleep
from .supervised import SupervisedFineTuning, dreams

__all__ = ["PolicyGradient", "Prompting", "ReweightedWakeSleep", "SupervisedFineTuning", "dreams", "few_shot"]
