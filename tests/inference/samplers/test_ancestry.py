"""Ancestry replayed: what particles were at each resampling, taken along the lineages, is how the final ones begin."""

from __future__ import annotations

import pytest
import torch
from programs_by_hand import Program

from lmppl import text
from lmppl.inference.samplers.smc.ancestry import Resampling, lineages, plot_ancestry, survivors
from lmppl.inference.samplers.smc.smc import SMC


def watched(scheme: str = "systematic", threshold: float = 1.0, N: int = 7, runs: int = 5):
    """A posterior, and the prefixes of every particle before each token of each site."""
    program, seen = Program(1, runs=runs), {}

    def twist(prefix, before):
        seen["w" if "z" in before else "z", prefix.shape[-1]] = prefix
        return program.log_psi(prefix, before)

    return SMC(program.model, None, N, threshold, scheme, twist).run(), seen


@pytest.mark.parametrize("scheme", ["systematic", "multinomial", "residual"])
@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_lineages_lead_from_early_prefixes_to_the_final_texts(scheme, threshold):
    posterior, seen = watched(scheme, threshold)
    line = lineages(posterior.ancestry)  # (R, N, runs)
    assert line.shape == (len(posterior.ancestry), 7, 5) and line.dtype == torch.long
    assert {event.site for event in posterior.ancestry} == ({"z", "w"} if threshold == 1.0 else {"w"})
    for event, ancestor in zip(posterior.ancestry, line, strict=True):
        prefix = seen[event.site, event.token]  # (N, runs, t), before this resampling
        then = prefix.gather(0, ancestor[..., None].expand_as(prefix))
        final = posterior.samples[event.site][..., : event.token]
        assert bool(text.equal(then, final).all())


def test_events_in_order_with_their_scores():
    posterior, _ = watched()
    assert [e.site for e in posterior.ancestry] == sorted((e.site for e in posterior.ancestry), reverse=True)
    for event in posterior.ancestry:
        assert event.chosen.shape == event.log_scores.shape == (7, 5)
        moved = (event.chosen != torch.arange(7)[:, None]).any(0)
        weight = event.log_scores.softmax(0).gather(0, event.chosen)
        assert bool((weight[:, moved] > 0).all())
    alive = survivors(posterior.ancestry)
    assert bool((alive[1:] >= alive[:-1]).all()) and bool((alive >= 1).all() and (alive <= 7).all())


def test_composition_by_hand():
    first, second = torch.tensor([0, 0, 2]), torch.tensor([2, 1, 1])
    events = tuple(Resampling("z", t, c[:, None], torch.zeros(3, 1)) for t, c in enumerate((first, second)))
    assert lineages(events)[:, :, 0].tolist() == [[2, 0, 0], [2, 1, 1]]
    assert survivors(events)[:, 0].tolist() == [2, 2]


def test_never_resampled():
    posterior, _ = watched(threshold=0.0)
    assert posterior.ancestry == ()
    with pytest.raises(ValueError, match="ancestry"):
        lineages(posterior.ancestry)


def test_a_resampled_posterior_has_left_its_ancestry_behind():
    posterior, _ = watched()
    assert not hasattr(posterior.resample(3), "ancestry")
    torch.testing.assert_close(posterior.resample(3).log_evidence, posterior.log_evidence)


def test_the_plot_is_a_whole_picture(tmp_path):
    posterior, _ = watched()
    plot_ancestry(posterior.ancestry, tmp_path / "ancestry.png", index=2)
    assert [f.name for f in tmp_path.iterdir()] == ["ancestry.png"]
    assert (tmp_path / "ancestry.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="index"):
        plot_ancestry(posterior.ancestry, tmp_path / "other.png")
    with pytest.raises(ValueError, match="index"):
        plot_ancestry(posterior.ancestry, tmp_path / "other.png", index=(1, 2))
    plot_ancestry(watched(runs=1)[0].ancestry, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
