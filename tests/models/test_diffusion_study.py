"""The study of infilling by unmasking: its exact posterior beside an enumeration, short runs, and its page."""

from __future__ import annotations

import json

import pytest
import torch
from paths import ROOT

from benchmarks.diffusion import RECORDS, STUDIES, measured, page
from benchmarks.diffusion.__main__ import PREAMBLE
from benchmarks.paper import runner
from benchmarks.paper.study import Study
from lmppl.inference.judging.quality import density_quality


def test_its_posterior_is_the_enumerated_one():
    """Within the prior mass that the enumeration leaves out; TV of the guide too."""
    e = measured.made(0)
    stories = measured.Stories(e, measured.unseen(0, 2))
    exact = e.exact.run(stories.x, stories.y)
    assert (exact.log_evidence - stories.log_z).exp() == pytest.approx([1.0, 1.0], abs=0.01)
    found = density_quality(exact, e.guide, (stories.x, stories.y), {}).total_variation
    assert stories.tv(stories.guide()) == pytest.approx(found.tolist(), abs=0.01)


def test_a_seed_has_stories_of_its_own_and_trained_ones_were_trained_on():
    """A pair of place and verb of the unseen ones is in none of the others."""
    seeds = [measured.unseen(seed, measured.STORIES) for seed in range(3)]
    assert len({s for part in seeds for s in part}) == 3 * measured.STORIES

    def pairs(stories):
        return {(s.x.split()[-1], s.y.split()[1]) for s in stories}

    known = [measured.seen(seed, measured.STORIES) for seed in range(3)]
    assert not pairs(s for part in seeds for s in part) & pairs(s for part in known for s in part)


@pytest.fixture(scope="module")
def short():
    return {cell: [measured.run(cell, 0, short=True) | {"seed": 0}] for cell in measured.CELLS}


def test_every_cell_runs_and_is_reported(short):
    json.dumps(short, allow_nan=False)
    start = short[measured.UNTRAINED][0]
    assert min(start["prior"]["tv"]) > 0.9 > 0.2 > max(start["guide"]["tv"])
    assert len(start["guide"]["seen tv"]) == 2 and start["guide"]["outside"] < 0.1
    for cell in (measured.VARIANCE, measured.BOUNDED, measured.FEW):  # two steps move a guide little, and do
        (found,) = short[cell]
        assert found["tv"] != start["guide"]["tv"] and found["tv"] == pytest.approx(start["guide"]["tv"], abs=0.05)
        assert found["tokens"] > 0
    order = start["random order"]
    assert order["left to right"] == start["guide"]["tv"][:1]
    assert order["tv"] == pytest.approx(order["left to right"], abs=0.02)  # the network hardly minds it
    text = page.report(short)
    assert "nan" not in text and text.count("- *") == 7
    for cell in measured.CELLS:
        page.report({cell: short[cell]})  # of what there is
    assert {"untrained", "linex_gain", "causal", "random"} <= set(page.told(short))


def test_bounds_hold_the_text(short):
    """By one particle on average within 5 standard errors, by more particles nearer."""
    found = short[measured.BOUNDS][0]
    assert found["text"] > found["path"] + 6  # log 720 = 6.58
    assert abs(found["importance sampling, 4"]["below"]) < 0.05


def test_a_claim_is_seen_by_its_interval():
    def runs(*tvs):
        return [{"tv": tvs, "seen tv": tvs, "sd": 1.0, "ess": 1.0, "error": 0.0, "tokens": 1, "smc error": 0.0}]

    start = [{"prior": runs(0.9, 0.9)[0], "guide": runs(0.2, 0.1)[0] | {"outside": 0.0}}]
    seen = page.claims({measured.UNTRAINED: start, measured.BOUNDED: runs(0.1001, 0.0)})
    assert seen.count("**seen**. TV -0.100 ± 0.001 on 2 stories.") == 2
    worse = page.claims({measured.UNTRAINED: start, measured.BOUNDED: runs(0.3, 0.2)})
    assert worse.count("**not seen**. TV +0.100 ± 0.000") == 2


def test_the_page_is_what_the_records_say(tmp_path):
    runner.page(STUDIES, PREAMBLE, 3, RECORDS, tmp_path / "diffusion.md")
    written = (tmp_path / "diffusion.md").read_text()
    assert written == (ROOT / "docs" / "diffusion.md").read_text()
    assert "–" not in written and "Not complete" not in written


def test_the_text_of_a_page_names_figures_and_a_dash_what_is_missing(tmp_path):
    study = Study("coin", "A coin", ("heads",), None, lambda results: "", told=lambda r: {"share": "0.5"})
    runner.page((study,), "{share}, {other}, {seeds}\n", 1, tmp_path, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().startswith("–, –, 1\n")
    (tmp_path / "coin").mkdir()
    (tmp_path / "coin" / "heads.0.json").write_text(json.dumps({"seconds": 1.0, "found": {}}))
    runner.page((study,), "{share}, {other}, {seeds}\n", 1, tmp_path, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().startswith("0.5, –, 1\n")


def test_the_tv_of_a_guide_with_mass_elsewhere_counts_it():
    """Half of the mass on one of two texts, the rest on none: TV is 1/2 (|0.5 - 0.5| + |0.5 - 0| + 0.5) = 1/2."""
    stories = object.__new__(measured.Stories)
    stories.log_p, stories.middles = torch.tensor([[0.5], [0.5]]).log(), None

    class Half:
        def text_log_prob(self, words):
            return torch.tensor([[0.5], [0.0]]).log()

    assert stories.tv(Half()) == pytest.approx([0.5])
