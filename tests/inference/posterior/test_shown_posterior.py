"""What a notebook shows of a posterior: the same numbers as its tables, nothing of a text read as HTML."""

from __future__ import annotations

import contextlib

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from html_tables import Page
from plate_of_three import X, Y, model

from lmppl.distributions import AutoregressiveText
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior

HOSTILE = ["", "<script>alert('1')</script>", 'a & "b"', " $x$\n", "&lt;"]
TAGS = {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td"}


class Words(AutoregressiveText):
    """One word, drawn evenly, and an end."""

    def __init__(self, batch_shape=(), words=HOSTILE):
        super().__init__(words, batch_shape, max_tokens=1, stop=0)

    def next_logits(self, prefix, element):
        return torch.zeros(len(prefix), self.vocab_size, dtype=torch.double)


def words(posterior_of=Importance, **options) -> Posterior:
    def program():
        with pyro.plate("<data>", 3):
            z = pyro.sample("<z>", Words((3,)))
            pyro.factor("f", 0.5 * z[..., 0])

    return posterior_of(program, **options).run()


@pytest.fixture(autouse=True)
def no_window():
    """Pictures are drawn without a screen, and closed."""
    from matplotlib import pyplot

    matplotlib.use("agg")
    yield
    pyplot.close("all")


# -- HTML ------------------------------------------------------------------------------------------------------------


def rows_of(page: Page, site: str, plates: int = 1) -> dict[tuple, list[list[str]]]:
    """A site's rows by plate element."""
    table = next(t for t in page.tables if site in t[0])
    found: dict[tuple, list[list[str]]] = {}
    for row in table[1:]:
        key = tuple(row[:plates]) if row[plates - 1] or not plates else key  # noqa: F821 the element above
        found.setdefault(key, []).append(row[plates:])
    return found


@pytest.mark.parametrize("kind", ["exact", "particles"])
def test_html_has_the_numbers_of_the_table(kind, request):
    posterior = request.getfixturevalue(kind)
    page = Page(posterior._repr_html_())
    assert page.tags <= TAGS
    for i in range(3):
        shown, table = rows_of(page, "z")[(str(i),)], posterior.table("z", i)
        assert [row[0] or "(empty)" for row in shown[:4]] == [s or "(empty)" for s, _ in table[:4]]
        assert [row[2] for row in shown[:4]] == [f"{p:.3f}" for _, p in table[:4]]
        assert shown[4][0] == f"{len(table) - 4} more"
        assert float(shown[4][2]) == pytest.approx(sum(p for _, p in table[4:]), abs=6e-4)
        if kind == "exact":
            assert len(shown[0]) == 3  # no errors, no counts: these are no draws
            continue
        strings = [row[i] for row in posterior.strings("z")]
        is_first = torch.tensor([s == table[0][0] for s in strings])
        assert shown[0][3] == f"{float(posterior.standard_error(is_first, i)):.3f}"
        assert int(shown[0][4]) == int(is_first.sum())
    first = page.tables[0]
    assert first[0][:2] == ["data", "log evidence"]
    for i, row in enumerate(first[1:]):
        assert row[:2] == [str(i), f"{float(posterior.log_evidence[i]):.3f}"]
        if kind == "particles":
            assert row[2] == f"{float(posterior.ess[i]):.1f}"


def test_a_text_is_never_read_as_html():
    page = Page(words(Enumeration)._repr_html_())
    assert page.tags <= TAGS
    table = next(t for t in page.tables if "<z>" in t[0])
    shown = [row[1] for row in table[1:]]
    assert "<script>alert('1')</script>" in shown and 'a & "b"' in shown and " $x$\n" in shown and "&lt;" in shown
    assert table[0][0] == "<data>"
    assert 'class="tex2jax_ignore mathjax_ignore"' in words()._repr_html_()  # dollars are no formula


def test_bars_are_as_long_as_the_probabilities_with_errors_around_their_ends(particles):
    html = particles._repr_html_()
    p = particles.table("z", 0)[0][1]
    is_first = torch.tensor([row[0] == particles.table("z", 0)[0][0] for row in particles.strings("z")])
    error = float(particles.standard_error(is_first, 0))
    assert f'<div style="width:{100 * p:.1f}%;height:100%' in html
    low, high = max(0, p - error), min(1, p + error)
    assert f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%" in html


def test_html_names_a_plate_element_without_evidence(particles):
    none = torch.tensor([True, False, False])
    log_weights = particles.log_weights.masked_fill(none, -torch.inf)
    posterior = Posterior(particles.values, log_weights, log_weights.logsumexp(0), particles.sites)
    page = Page(posterior._repr_html_())
    assert page.tables[0][1][:3] == ["0", "-inf", "0.0"]
    assert rows_of(page, "z")[("0",)][0][0] == "every particle has probability zero"
    assert rows_of(page, "z")[("1",)][0][0] == "(empty)"


def test_large_posteriors_are_cut():
    decoded = []

    class Counted(Words):
        def decode(self, value):
            decoded.append(len(value))
            return super().decode(value)

    def program():
        with pyro.plate("many", 500):
            pyro.sample("z", Counted((500,), [""] + [f"{i:0200d}" for i in range(40)]))
            pyro.sample("w", dist.Normal(torch.zeros(500), 1.0).expand([500]))
            pyro.sample("v", dist.Normal(0.0, 1.0).expand([50]).to_event(1))

    html = Importance(program, num_particles=30).run()._repr_html_()
    page = Page(html)
    assert len(html) < 40_000 and sum(decoded) < 30 * 10 * 5
    assert "496 more plate elements" in page.shown and "496 more of z" in page.shown
    assert f"{4 * 47 + 496} more of v" in page.shown and "…" in page.shown


def test_numbers_have_means_and_deviations(particles):
    def program():
        with pyro.plate("data", 2):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("v", dist.Dirichlet(torch.ones(2, 3)))
            pyro.sample("k", dist.Categorical(torch.ones(2, 3)))
            pyro.factor("f", w)

    posterior = Importance(program, num_particles=50).run()
    page = Page(posterior._repr_html_())
    for i in range(2):
        weights = posterior.probabilities[:, i].double()
        for x, name in ((posterior.samples["w"][:, i], "w"), (posterior.samples["v"][:, i, 2], "v[2]")):
            mean = (weights * x).sum()
            sd, error = ((weights**k * (x - mean) ** 2).sum().sqrt() for k in (1, 2))
            table = next(t for t in page.tables if any(name in row for row in t))
            row = [row for row in table[1:] if name in row][i]
            assert row[2:] == [f"{mean:.4g}", f"{error:.2g}", f"{sd:.4g}"]
        shown = {row[0]: row[2] for row in rows_of(page, "k")[(str(i),)]}
        assert shown == {str(k): f"{p:.3f}" for k, p in posterior.table("k", i)}


def test_sites_of_other_plates_are_shown_by_their_elements():
    def program():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("documents", 2):
            z = pyro.sample("z", Words((2,)))
            pyro.factor("f", w * (z[..., 0] == 1))

    posterior = Importance(program, num_particles=50).run()
    rows = rows_of(Page(posterior._repr_html_()), "z")
    for i in range(2):
        expected = [f"{p:.3f}" for _, p in posterior.table("z", (i,))[:4]]
        assert [row[2] for row in rows[(str(i),)][:4]] == expected


def test_what_an_algorithm_adds_is_shown():
    def titles(posterior):
        return Page(posterior._repr_html_()).tables[0][0]

    assert titles(words()) == ["<data>", "log evidence", "ESS"]  # too few distinct weights for a k-hat
    assert titles(words(SMC)) == ["<data>", "log evidence", "ESS", "least ESS", "survival", "suspect"]
    chains = MetropolisHastings(model, num_chains=2, num_samples=10, warmup=5).run(X, Y)
    assert titles(chains) == ["data", "ESS", "R-hat"]
    found = Enumeration(model, mass=0.5).run(X, Y)
    assert titles(found) == ["data", "log evidence", "unexplored", "lower bound", "upper bound"]
    low, high = found.log_evidence_bounds
    assert found.summary(1) == pytest.approx(
        {
            "log evidence": float(found.log_evidence[1]),
            "unexplored": float(found.unexplored[1]),
            "lower bound": float(low[1]),
            "upper bound": float(high[1]),
        }
    )
    assert chains.summary(2)["R-hat"] == pytest.approx(max(float(x[2]) for x in chains.rhat.values()))


def test_a_summary_is_of_one_plate_element():
    def program():
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([[0.5, 0.5], [0.01, 0.99]])))
            pyro.factor("f", 5.0 * (k == 0))
            pyro.sample("j", dist.Categorical(torch.ones(2, 2)))

    posterior = SMC(program, num_particles=40, ess_threshold=0.9).run()
    assert posterior.ancestry
    for i in range(2):
        found = posterior.summary(i)
        for name, x in (("least ESS", posterior.min_ess), ("survival", posterior.survival), ("ESS", posterior.ess)):
            assert found[name] == pytest.approx(float(x[i])), name
        assert bool(found["suspect"]) == bool(posterior.suspect[i])
    with pytest.raises(ValueError, match="^index: "):
        posterior.summary()


# -- plots -----------------------------------------------------------------------------------------------------------


def widths(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def test_bars_of_a_plot_are_the_table(particles):
    table = particles.table("z", 0)
    ax = particles.plot("z", 0)
    assert widths(ax) == pytest.approx([p for _, p in table[:10]])
    assert [t.get_text() for t in ax.get_yticklabels()] == [s or "(empty)" for s, _ in table[:10]]
    assert ax.get_title() == f"z: 10 of {len(table)} values" and ax.yaxis_inverted()
    is_first = torch.tensor([row[0] == table[0][0] for row in particles.strings("z")])
    (segments,) = ax.containers[-1].lines[2]
    low, high = segments.get_segments()[0][:, 0]
    error = float(particles.standard_error(is_first, 0))
    assert low == pytest.approx(table[0][1] - error) and high == pytest.approx(min(1.0, table[0][1] + error))
    assert widths(particles.plot(index=0)) == widths(ax)  # the first text


def test_an_exact_posterior_has_no_error_bars(exact):
    ax = exact.plot("z", 1)
    assert len(ax.containers) == 1 and widths(ax) == pytest.approx([p for _, p in exact.table("z", 1)[:10]])


def test_numbers_are_a_histogram_vectors_are_means():
    from matplotlib import pyplot

    def program():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Dirichlet(torch.ones(3)))
        pyro.factor("f", w)

    posterior = Importance(program, num_particles=200).run()
    ax = pyplot.subplots()[1]
    assert posterior.plot("w", ax=ax) is ax
    area = sum(bar.get_width() * bar.get_height() for bar in ax.patches)
    mean = sum((bar.get_x() + bar.get_width() / 2) * bar.get_width() * bar.get_height() for bar in ax.patches)
    w, weights = posterior.samples["w"], posterior.probabilities
    width = ax.patches[0].get_width()
    assert area == pytest.approx(1.0) and mean == pytest.approx(float((w * weights).sum()), abs=width / 2)
    v = posterior.samples["v"]
    assert widths(posterior.plot("v")) == pytest.approx((weights[:, None] * v).sum(0).tolist(), rel=1e-4)


def test_labels_of_a_plot_are_no_formulas_and_pictures_can_be_drawn():
    ax = words(Enumeration).plot("<z>", 0)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert r" \$x\$⏎" in labels
    ax.figure.canvas.draw()


def test_a_plot_says_which_argument_is_wrong(particles):
    with pytest.raises(ValueError, match="^site: 'y' is none of"):
        particles.plot("y", 0)
    with pytest.raises(ValueError, match="^index: "):
        particles.plot("z")


def test_arviz_keeps_texts_apart_that_differ_by_a_nul_at_the_end():
    """numpy's own strings end before it, so that two texts would share one probability."""

    def program():
        pyro.sample("z", Words(words=["", "a", "a\0"]))

    data = Enumeration(program).run().to_arviz()
    shares = data.posterior["one_hot(z)"].mean(("chain", "draw"))
    found = dict(zip(shares.coords["z_text"].values.tolist(), shares.values.tolist(), strict=True))
    assert found == pytest.approx({"": 1 / 3, "a": 1 / 3, "a\0": 1 / 3})
    assert set(data.texts["z"].values.flatten().tolist()) == {"", "a", "a\0"}


@pytest.mark.parametrize("plate", [False, True])
def test_chains_of_several_texts_in_one_site(plate):
    def program():
        with pyro.plate("data", 2) if plate else contextlib.nullcontext():
            pyro.sample("z", Words((2, 3) if plate else (3,)).to_event(1))

    posterior = MetropolisHastings(program, num_chains=2, num_samples=8, warmup=2).run()
    tokens = (posterior.samples["z"] != -1).sum((-1, -2)).unflatten(0, (2, 8))
    assert torch.equal(posterior.statistics["length(z)"], tokens.double())
    assert "MarkovChains(z: 16 particles" in posterior._repr_html_()


def test_a_value_that_is_certain_has_a_bar_and_no_error():
    """Weights in single precision sum to more than one here."""

    def program():
        z = pyro.sample("z", Words())
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x.float() + torch.where(z[..., 0] == 1, 0.0, -torch.inf))

    for seed in range(8):
        torch.manual_seed(seed)
        posterior = Importance(program, num_particles=60).run()
        (bar,) = posterior.plot("z").patches
        assert bar.get_width() == pytest.approx(1.0)
        table = next(t for t in Page(posterior._repr_html_()).tables if t[0][0] == "z")
        assert "± s.e." not in table[0] and table[1][2] == "1.000"


def test_labels_name_control_characters_and_read_no_formula():
    def program():
        with pyro.plate("data", 1):
            pyro.sample("$_{$", Words(words=["", "\x1b[31m$a_{$\0"]))
            pyro.sample("$_$x{", dist.Normal(0.0, 1.0))

    posterior = Importance(program, num_particles=40).run()
    ax = posterior.plot("$_{$", 0)
    ax.figure.canvas.draw()  # a warning is an error
    assert {t.get_text() for t in ax.get_yticklabels()} == {"(empty)", r"\x1b[31m\$a_{\$\x00"}
    posterior.plot("$_$x{", 0).figure.canvas.draw()


def test_arviz_loses_no_site_to_a_name_of_its_own():
    def program():
        pyro.sample("z", Words())
        for name, mean in {"length(z)": 5.0, "z_text": 6.0, "draw": 7.0, "x": 8.0}.items():
            pyro.sample(name, dist.Delta(torch.tensor(mean)))

    found = Importance(program, num_particles=10).run().to_arviz().posterior
    sites = {"length(z)_site": 5.0, "z_text_site": 6.0, "draw_site": 7.0, "x": 8.0}
    assert {name: float(found[name].mean()) for name in sites} == sites
    assert 1 <= float(found["length(z)"].mean()) <= 2 and found["one_hot(z)"].dims[-1] == "z_text"
