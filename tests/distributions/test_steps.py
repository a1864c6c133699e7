"""Texts that grow token by token: what two distributions share while they do."""

from __future__ import annotations

import pytest
import torch

from lmppl.distributions import Completion


@pytest.mark.parametrize("sharer_first", [True, False])
def test_what_shares_scores_as_it_would_alone_whichever_is_told_first(lm, sharer_first):
    q = Completion(lm, "ab", max_tokens=5, temperature=2.0)
    p = Completion(lm, "ab", max_tokens=4, stop=".", min_tokens=1)
    shape, generator = torch.Size([6]), torch.Generator().manual_seed(0)
    proposal, alone = q.token_steps(shape), p.token_steps(shape)
    target = p.token_steps(shape, share=proposal)
    order = (target, proposal) if sharer_first else (proposal, target)
    before = lm.tokens_scored
    for _ in range(4):
        token, _ = proposal.draw(torch.rand(6, generator=generator))
        found = target.score(token)
        spent, before = lm.tokens_scored - before, lm.tokens_scored
        assert torch.equal(found, alone.score(token))
        assert lm.tokens_scored - before == spent  # one pass for both, and another one for it alone
        before = lm.tokens_scored
        for steps in (*order, alone):
            steps.append(token)
        chosen = torch.randint(6, (6,), generator=generator)
        for steps in (*order, alone):
            steps.select(chosen)
        assert torch.equal(target.prefix, proposal.prefix) and torch.equal(target.ended, alone.ended)


def test_tokens_that_the_shared_steps_were_not_given_are_noticed(lm):
    fn = Completion(lm, "ab", max_tokens=5)
    shared = fn.token_steps(torch.Size([2]))
    steps = fn.token_steps(torch.Size([2]), share=shared)
    steps.append(torch.tensor([2, 3]))
    with pytest.raises(AssertionError, match="share"):
        steps.score(torch.tensor([2, 3]))
