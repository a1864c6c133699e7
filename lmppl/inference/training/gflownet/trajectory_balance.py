"""Trajectory balance, with a log Z that is learned or given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .... import text
from ...core import programs
from ...core.sites import lm_of, prompt_of
from ...core.weights import Balance
from ...processes import distributed
from .objective import Objective, against

LogZ: TypeAlias = float | Tensor | Callable[..., Tensor] | None


class TrajectoryBalance(Objective):
    r"""Trajectory balance: compares whole samples with the log Z of their observation.

    .. math:: \mathcal L = \frac1N \sum_n g\big(u(z_n) - \log Z_\psi(x)\big),
              \qquad \text{squared: } \big(u(z_n) - \log Z_\psi(x)\big)^2

    At the true log Z its expected on-policy gradient is that of :math:`D_f(p, q)`; squared, at any log Z.  With the log
    Z that fits a batch best, the mean of u, it is `VarGrad`.  It learns more slowly than `VarGrad` because log Z must
    be learned first.

    :param log_z: None: learned, by a `LogPartition` that reads the guide's first prompt.  `GFlowNet` and
        `pyro.infer.SVI` train its `parameters`; in other loops give them to the optimiser.  Or a number, a tensor
        (*kept plates), or a function of the program's arguments (a module, for instance) that returns one.  In nats;
        under a reward temperature T it is the log of the sum of p^(1/T).
    :param log_z_lr: the learning rate that `GFlowNet` sets for the parameters of log Z.
    :param kwargs: the other arguments of `Objective`: ``num_particles``, ``exploration``, ``reward_temperature``,
        ``floor``, ``divergence``, ``max_plate_nesting``.
    :raises ValueError: for another ``log_z``, and as `Objective`; in a step, for a tensor of another shape.

    Source: Malkin et al. 2022, "Trajectory balance: improved credit assignment in GFlowNets".

    Example::

        trainer = GFlowNet(model, guide, TrajectoryBalance(log_z_lr=0.05), optimizer=optimizer)
        trainer.fit(batches, steps=100)
        TrajectoryBalance(log_z=torch.tensor([-3.2, -5.1]))  # known: one for each of two observations
    """

    uses_prefixes = False

    def __init__(self, log_z: LogZ = None, log_z_lr: float = 1e-2, **kwargs: Any):
        super().__init__(**kwargs)
        if not (log_z is None or isinstance(log_z, int | float | Tensor) or callable(log_z)):
            raise ValueError(f"log_z: expected None, a number, a tensor or a function, got {log_z!r}")
        self.learned = LogPartition() if log_z is None else None
        self.log_z, self.log_z_lr = log_z, log_z_lr

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of log Z: those of `LogPartition`, or of a module given as ``log_z``."""
        module = self.learned if self.learned is not None else self.log_z
        return module.parameters() if isinstance(module, nn.Module) else iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        return [group | {"lr": self.log_z_lr} for group in super().param_groups()]

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        log_z = self.learned(balance, u) if self.learned is not None else self._given(balance, u)
        return against(self.divergence, u, log_z, balance, balance.valid.to(u.dtype))

    def _given(self, balance: Balance, u: Tensor) -> Tensor:
        args, kwargs = balance.arguments
        given = self.log_z(*args, **kwargs) if callable(self.log_z) else self.log_z
        log_z = torch.as_tensor(given, dtype=u.dtype, device=u.device)
        if log_z.dim() and log_z.shape != balance.plates.sizes:
            raise ValueError(f"log_z: expected the shape {tuple(balance.plates.sizes)}, got {tuple(log_z.shape)}")
        return log_z


class RelativeTrajectoryBalance(TrajectoryBalance):
    r"""Relative trajectory balance: another name of `TrajectoryBalance`, for a reward relative to a prior.

    .. math:: \mathcal L = \frac1N \sum_n \big(\log Z_\psi + \log q(z_n) - \log p(z_n) - \log r(z_n)\big)^2

    With r(z) = p(observed | z) the prior times r is the joint, and the bracket is :math:`\log Z_\psi - u(z_n)`.  Every
    model of this package has its prior among its sites, so that every objective is relative to it already.

    :param log_z: as in `TrajectoryBalance`.
    :param log_z_lr: as in `TrajectoryBalance`.
    :param kwargs: as in `TrajectoryBalance`.

    Source: Venkatraman et al. 2024, "Amortizing intractable inference in diffusion models".

    Example::

        trainer = GFlowNet(model, guide, RelativeTrajectoryBalance(), optimizer=optimizer)
        trainer.fit(batches, steps=100)
    """


class LogPartition(nn.Module):
    r"""log Z of each observation: a linear head on random features of the guide's first prompt.

    .. math:: \log Z_\psi(x) = b + w \cdot \tanh(P \bar e(x))

    :math:`\bar e` is the mean input embedding of the prompt's tokens, P a fixed random matrix.  w starts at zero, b at
    the mean of u in the first batch with a possible draw.  If the guide's first latent is no text, or its prompt
    differs between particles, all observations share b alone.

    :param features: the length of w.
    """

    def __init__(self, features: int = 256):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, balance: Balance, u: Tensor) -> Tensor:
        """log Z of each observation.

        :param balance: holds the guide's trace, from which the prompts are read.
        :param u: (1, particle, *kept); sets the first value of b.
        :returns: (*kept), nats.
        """
        if not bool(self.bias):  # no batch has been seen
            with torch.no_grad():
                seen = balance.valid & (balance.log_p > -torch.inf)
                count = distributed.total(seen.sum()).clamp(min=1)
                self.bias.copy_(distributed.total(u.where(seen, torch.zeros_like(u)).sum()) / count)
        features = self._features(balance)
        if features is None:
            return self.bias.to(u)
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return (balance.plates.reduce(features @ weight)[0, 0] + bias).to(u)

    @torch.no_grad()
    def _features(self, balance: Balance) -> Tensor | None:
        """(*plate axes, features) of the prompts of the guide's first text; None where b alone serves."""
        fn = next(iter(programs.latents(balance.guide).values()))["fn"]
        nesting = balance.plates.nesting
        prompt = prompt_of(fn) if fn.event_dim <= 1 else None  # a value of several texts has no one prompt
        if prompt is None or prompt.shape[: -1 - nesting].numel() > 1:
            return None
        prompt = prompt.reshape(prompt.shape[-1 - nesting :])  # (*plate axes, L)
        embedded = lm_of(fn).network.model.get_input_embeddings()(prompt.clamp(min=0)).float()
        real = (prompt != text.PAD)[..., None]
        mean = (embedded * real).sum(-2) / real.sum(-2).clamp(min=1)
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(mean.shape[-1], len(self.weight), generator=generator).to(mean.device)
        spread = torch.cat([m.flatten() for m in distributed.gather(mean.cpu())]).std().to(mean.device)
        return torch.tanh(mean / spread.clamp(min=1e-6) @ projection / mean.shape[-1] ** 0.5)
