"""What a notebook shows of a comparison and of a diagnosis."""

from __future__ import annotations

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from html_tables import Page

from lmppl.inference import SMC, Comparison, Diagnosis, Finding, diagnose, plot_ancestry
from lmppl.inference.judging.comparison import Row


@pytest.fixture
def pyplot():
    """Pictures are drawn without a screen, and closed."""
    from matplotlib import pyplot

    matplotlib.use("agg")
    yield pyplot
    pyplot.close("all")


def comparison() -> Comparison:
    rows = [Row("<b>SMC</b>", 10, draws_tv=0.1, ess=0.31, sd={"ess": 0.02}), Row("exact", log_evidence=-3.0)]
    return Comparison(rows, notes=["<i>a note</i>"])


def test_a_comparison_shows_its_tables():
    found = comparison()
    page = Page(found._repr_html_())
    assert page.tables == [
        [["algorithm", "N", "TV"], ["<b>SMC</b>", "10", "0.100"]],
        [["algorithm", "log Z", "ESS/N"], ["<b>SMC</b>", "", "0.310 ± 0.020"], ["exact", "-3.000", ""]],
    ]
    assert "i" not in page.tags and "<i>a note</i>" in page.shown
    assert repr(found) == "Comparison(<b>SMC</b>, exact)"


def test_a_diagnosis_shows_its_verdicts():
    findings = [
        Finding("ESS / N", "0.9", "good", False),
        Finding("k-hat", "1.2", "<b>heavy</b>", True),
        Finding("calibration", "-", "no model", None, checked=False),
        Finding("rest", "-", "not defined", None),
    ]
    found = Diagnosis(findings)
    (table,) = Page(found._repr_html_()).tables
    assert table == [
        ["", "figure", "verdict", "what it means"],
        ["ESS / N", "0.9", "ok", "good"],
        ["k-hat", "1.2", "suspect", "<b>heavy</b>"],
        ["calibration", "-", "not checked", "no model"],
        ["rest", "-", "", "not defined"],
    ]
    assert repr(found) == "Diagnosis(Suspect: k-hat; Not checked: calibration)"
    assert repr(Diagnosis()) == "Diagnosis(Nothing suspect.)"


def test_plots_without_a_path_are_figures_of_pyplot(pyplot, tmp_path):
    def model():
        with pyro.plate("data", 1):
            k = pyro.sample("k", dist.Normal(torch.zeros(1), 1.0))
            pyro.factor("f", 3.0 * k)
            pyro.sample("j", dist.Normal(torch.zeros(1), 1.0))

    posterior = SMC(model, num_particles=20).run()
    ax = pyplot.subplots()[1]
    assert plot_ancestry(posterior.ancestry, ax=ax) is ax and ax.collections
    for axes in (
        [plot_ancestry(posterior.ancestry)],
        comparison().plot(),
        diagnose(SMC(model, num_particles=20), simulations=0, repetitions=2).plot(),
    ):
        assert axes and axes[0].figure.number in pyplot.get_fignums()
    before = pyplot.get_fignums()
    comparison().plot(tmp_path / "bars.png")
    assert pyplot.get_fignums() == before and (tmp_path / "bars.png").is_file()
