"""The paper's experiments on a pretrained model: the command, on a tiny one, and short studies."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from paths import SHARED
from pyro import condition, poutine
from transformers import AutoModelForCausalLM

from benchmarks.paper.runner import page
from benchmarks.paper_pretrained import (
    STUDIES,
    Place,
    __main__,
    arithmetic,
    continuation,
    grpo,
    infilling,
    on_checkpoint,
    random_number,
    subjectivity,
    uncertainty,
)
from benchmarks.paper_pretrained.grpo_worker import Target, bar, log_target, read
from benchmarks.paper_pretrained.tell import tell
from lmppl import LanguageModel, embedded
from lmppl.distributions import Completion
from lmppl.embedded.numbers import FIXED
from lmppl.inference import Enumeration
from lmppl.models import Arithmetic, Continuation, RandomNumber
from lmppl.models.arithmetic import FILES
from lmppl.models.continuation import embedded_prompts
from lmppl.models.forecasts import log_score
from lmppl.models.programs.random_number import tensors
from lmppl.models.programs.subjectivity import Subjectivity

NUMBERS = embedded.path("numbers")


def of(study, *given):
    """Every cell of a study, once and short."""
    return {cell: [study.run(cell, 0, True, *given) | {"seed": 0}] for cell in study.cells}


def states(study, results):
    """A report of these results: no figure that is not one, and a verdict or more."""
    text = study.report(results)
    assert "nan" not in text and "seen**" in text
    return text


def test_the_random_number_runs_on_any_language_model():
    results = of(random_number.STUDY, LanguageModel.embedded("numbers"))
    assert results[random_number.PRIOR][0]["forward"] == pytest.approx(2.1533, abs=1e-3)
    for found in results.values():
        assert sum(found[0]["q"]) == pytest.approx(found[0]["valid"], rel=1e-5)
    assert all(results[cell][0]["tokens"] > 0 for cell in random_number.CELLS[1:])
    text = states(random_number.STUDY, results)
    assert all(f"| {cell} |" in text for cell in random_number.CELLS)
    states(random_number.STUDY, {random_number.PRIOR: results[random_number.PRIOR]})  # of what there is


def test_answers_that_are_invalid_keep_their_proportions():
    lm = LanguageModel.embedded("numbers", dtype=torch.float64)
    task, z = RandomNumber(lm, invalid=-6.0), lm.encode(["42.", "7.", "007", "0."])[:, None]
    asked = tensors([FIXED])

    def log_joint(text):
        return poutine.trace(condition(task.model, {"z": text})).get_trace(*asked).log_prob_sum().item()

    log_p = task.completion(lm, *asked).log_prob(z)[:, 0]
    assert [log_joint(text) for text in z] == pytest.approx([0.0, 0.0, log_p[2].item() - 6.0, 0.0], abs=1e-9)


def test_the_page_is_what_the_records_say(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    out = tmp_path / "results-pretrained.md"
    page(STUDIES, __main__.PREAMBLE, 3, __main__.RECORDS, out)
    assert out.read_text() == (docs / out.name).read_text()
    table = out.read_text().split("\n\n")[2]
    assert table.startswith("| experiment |") and f"\n\n{table}\n\n" in (docs.parent / "README.md").read_text()
    pictures = {picture.name for picture in tmp_path.glob("*.png")}
    assert pictures == {picture.name for picture in docs.glob("results-pretrained-*.png")}


@pytest.fixture
def beginnings(tmp_path, monkeypatch):
    """The embedded stories' language model, and a folder of data with their beginnings."""
    monkeypatch.setattr(continuation, "LIMIT", {"max_tokens": 5})
    monkeypatch.setattr(continuation, "TEST", 2)
    (tmp_path / "prompts").mkdir()
    lines = [p.replace("\n", " ") for part in embedded_prompts() for p in part][:12]
    (tmp_path / "prompts" / "prompts.txt").write_text("\n".join(lines))
    return LanguageModel.embedded("stories"), tmp_path


def test_continuation_runs_on_any_language_model(beginnings):
    results = of(continuation.STUDY, *beginnings)
    text = states(continuation.STUDY, results)
    assert all(f"| {family} |" in text for family in ("greedy", "nucleus", "power sampling", "SMC", "GFlowNet"))
    states(continuation.STUDY, {cell: results[cell] for cell in ("decoding", "T=0.9")})
    states(continuation.STUDY, {"T=0.9": results["T=0.9"]})


def test_the_picture_has_every_method(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *args, **kwargs: (drawn.append(f), save(f, *args, **kwargs)))
    names = [f"method {i}" for i in range(15)]
    rows = [{"family": name, "setting": "", "distance": i / 15, "log_likelihood": -i} for i, name in enumerate(names)]
    continuation.STUDY.plot({"decoding": [{"rows": rows}]}, tmp_path / "picture.png")
    assert [t.get_text() for t in drawn[0].axes[0].get_legend().get_texts()] == names


def test_texts_of_a_continuation_have_plain_tokens_alone(beginnings):
    """By every method; so log p, of which the mask is a part, is finite."""
    lm, data = beginnings
    for cell in ("decoding", continuation.POWER, "T=0.8"):
        for row in continuation.run(cell, 0, True, lm, data)["rows"]:
            assert all(torch.tensor(row["each"]["log_likelihood"]).isfinite()), row["family"]
            assert not any("\n" in text for text in row["texts"])


@pytest.fixture
def told(monkeypatch):
    """The embedded stories' language model, and stories of its own."""
    lm = LanguageModel.embedded("stories", dtype=torch.float64)
    monkeypatch.setattr(infilling, "LEAD", "")
    monkeypatch.setitem(infilling.LIMIT, "max_tokens", 3)
    stories = tell(lm, 12, 0)
    monkeypatch.setattr(infilling, "stories", lambda: (stories[4:], stories[2:4], stories[:2]))
    monkeypatch.setattr(infilling, "written", lambda: stories[2:4])
    return lm, stories


def test_infilling_runs_on_any_language_model(told):
    results = of(infilling.STUDY, told[0])
    text = states(infilling.STUDY, results)
    assert all(text.count(f"| {name} |") == 2 for name in (*infilling.METHODS, infilling.SEQUENTIAL))
    assert text.count("hand-written stories (1 seed)") == 1
    states(infilling.STUDY, {cell: results[cell] for cell in ("supervised", "GFlowNet")})


def test_the_density_of_a_told_middle_is_the_posteriors(told):
    """log p(z, y) - log p(z) is log p(y | x z), and p(z, y) by the enumerated evidence p(z | x, y)."""
    lm, stories = told
    task, story = infilling.Told(lm), stories[0]
    x, y = task.encode([story])
    z = lm.encode([story.z])[None]
    joint = infilling.log_joint(task.model, x, y, z)
    exact = Enumeration(task.model, mass=0.999999).run(x, y)
    assert dict(exact.table("z", 0))[story.z] == pytest.approx((joint - exact.log_evidence).exp().item(), rel=1e-4)
    after = task.sentence(lm.join(x, z)).log_prob(y)
    torch.testing.assert_close(joint - infilling.log_joint(task.prior, x, y, z), after)


def test_a_unit_counts_its_tokens():
    study = on_checkpoint(random_number.STUDY)
    found = study.run(random_number.PRIOR, 0, True, Place(NUMBERS))
    assert 101 < found["scored"] < 1000


@pytest.mark.parametrize(
    "given, says",
    [
        (["--lm", "nowhere"], "--lm: there is no checkpoint at nowhere"),
        (["--lm", str(NUMBERS), "--only", "dice"], "no experiment is called dice"),
    ],
)
def test_what_is_absent_is_named(given, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper_pretrained", *given])
    with pytest.raises(SystemExit) as exit:
        __main__.main()
    assert exit.value.code == 2 and says in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def sentences(tmp_path):
    """A folder of labelled sentences as the study reads it."""
    (tmp_path / "subj").mkdir()
    for name in subjectivity.STUDY.needs:
        lines = [
            {"text": f"{name[5:-6]} {i} is {kind}", "label_text": label}
            for i in range(3)
            for kind, label in (("told", "objective"), ("fun", "subjective"))
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_subjectivity_runs_on_any_language_model(stories, sentences):
    results = {cell: [subjectivity.run(cell, 0, True, stories, sentences)] for cell in subjectivity.CELLS[:2]}
    (first,), (second,) = results["untrained"], results["10"]
    assert first["lines"] == second["lines"] and len({*first["lines"]}) == 4
    assert {row[0] for row in second["shown"]} <= {"right", "wrong"} and len(second["shown"]) <= 4
    assert all(row[2].startswith("test ") for row in second["shown"])
    for found in (first, second):
        for method in found["methods"].values():
            assert len(method["p"]) == len(found["y"]) == 4 and all(0 <= p <= 1 for p in method["p"])
    text = states(subjectivity.STUDY, results)
    assert text.count("| GFlowNet + EM |") == 1
    subjectivity.STUDY.report({"untrained": results["untrained"]})  # of what there is


def test_longer_em_stands_beside_the_other_methods_of_its_seed(stories, sentences):
    (cell, count), *_ = subjectivity.LONGER.items()
    results = {c: [subjectivity.run(c, 0, True, stories, sentences)] for c in (count, cell)}
    (short,), (longer,) = results.values()
    assert longer["lines"] == short["lines"] and [*longer["methods"]] == [subjectivity.LONGER_EM]
    assert len(longer["methods"][subjectivity.LONGER_EM]["p"]) == 4
    (both,) = subjectivity.with_longer(results)[count]
    assert both["methods"] == short["methods"] | longer["methods"]
    text = states(subjectivity.STUDY, results)
    assert text.count("| GFlowNet + longer EM |") == 1 and text.count("| GFlowNet + EM |") == 1
    assert "GFlowNet + longer EM is ahead of supervised at 10 labels" in text
    (measured, _, here, seeds), *_ = subjectivity.headline(results)
    assert measured.endswith("GFlowNet + longer EM; 10 labels") and here.count("±") == 4 and seeds == 1
    results[cell].append(longer | {"lines": [9, 9, 9, 9]})  # a seed that has no other methods is left out
    assert len(subjectivity.with_longer(results)[count]) == 1


def test_prompts_are_chosen_and_calibrated_on_sentences_that_no_method_learns_from(stories, sentences):
    again = {"text": "train.10 0 is told", "label_text": "objective"}
    with (sentences / "subj" / "train.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    setup = subjectivity.Setup("10", 0, True, stories, sentences)
    assert all(s.text.startswith(" train ") for s in setup.unlabelled) and len(setup.unlabelled) == 6
    assert all(s.text.startswith(" train.10 ") for s in setup.labelled)


def test_figures_of_labels():
    p, y = [0.9, 0.6, 0.5, 0.2], [1, 0, 1, 0]
    assert subjectivity.right(p, y) == [1.0, 0.0, 0.5, 1.0]
    assert log_score(*subjectivity.forecast(p, y)) == pytest.approx(math.log(0.9 * 0.4 * 0.5 * 0.8) / 4)
    assert subjectivity.calibrated([0.5, 0.9], [0.9, 0.9, 0.9]) == pytest.approx([0.1, 0.5])


def test_uncertainty_runs_on_any_language_model(stories, sentences, monkeypatch):
    """Thirds of the sentences have no sentence twice, members answer the same ones, and both add up."""
    monkeypatch.setattr(uncertainty, "RESAMPLES", 20)
    results = {c: [uncertainty.run(c, seed, True, stories, sentences) for seed in (0, 1, 2)] for c in uncertainty.CELLS}
    thirds, members = results.values()
    lines = [line for r in thirds for line in r["lines"]]
    assert len({*lines}) == 6 and all(r["lines"] == lines for r in members)
    assert members[0]["direct"] != members[1]["direct"]
    for r in thirds:
        assert [len(chain) for chain in r["chains"]] == [2, 2] and len(r["direct"]) == 2
    chains, y = uncertainty.of_chains(thirds)
    assert y.tolist() == members[0]["y"]
    mean = torch.tensor([p for r in thirds for p in torch.tensor(r["chains"]).mean(0).tolist()])
    torch.testing.assert_close(chains.probabilities[1].float(), mean)
    whole, _ = uncertainty.of_members(members)
    torch.testing.assert_close(whole.probabilities[1], torch.tensor([r["direct"] for r in members]).double().mean(0))
    u = whole.split()
    torch.testing.assert_close(u.entropy, u.expected_entropy + u.parameter_information)


def test_an_answer_that_knows_its_errors_is_ahead_of_one_that_does_not():
    """AUROC 1 and 1/2 of the same errors, by hand, and an interval that holds the difference."""
    p = torch.tensor([0.9, 0.8, 0.6, 0.55] * 10, dtype=torch.float64)
    y = torch.tensor([1, 1, 0, 0] * 10)
    knows = uncertainty.Answer(torch.stack([1 - p, p]), y, {"nothing": torch.zeros(40)})
    (_, score, count, accuracy, area, half), (*_, nothing, _) = knows.rows("it")
    assert (score, count, accuracy, half) == ("entropy", "40", "50.0", "100.0")
    assert area == "1.00 (1.00 to 1.00)" and nothing == "0.50 (0.50 to 0.50)"
    said = uncertainty.ahead("it knows", (knows, "entropy"), (knows, "nothing"))
    assert said == "- *it knows*: **seen**. AUROC +0.50, +0.50 to +0.50, on 40 sentences.\n"
    assert "not seen" in uncertainty.ahead("it knows", (knows, "nothing"), (knows, "entropy"))


def test_data_that_are_absent_are_named(monkeypatch, capsys):
    given = ["--lm", str(NUMBERS), "--data", "nowhere", "--only", "subjectivity"]
    monkeypatch.setattr(sys, "argv", ["paper_pretrained", *given])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "--data: subjectivity needs subj/train.jsonl" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A folder of sums as the study reads it."""
    (tmp_path / "arithmetic").mkdir()
    for file, split in zip(FILES, ("rationales", "train", "test_3", "test_4"), strict=True):
        entries = [{"str_query": q.x, "num_sol": q.answer} for q in embedded.data("arithmetic", split)[:60]]
        (tmp_path / "arithmetic" / file).write_text(json.dumps(entries))
    monkeypatch.setattr(arithmetic, "SHOTS", 2)
    return tmp_path


def test_arithmetic_runs_on_any_language_model(stories, sums):
    results = of(arithmetic.STUDY, stories, sums)
    assert all(results[cell][0]["tokens"] > 0 for cell in arithmetic.CELLS[1:])
    text = states(arithmetic.STUDY, results)
    assert all(text.count(f"| {cell} |") == 2 for cell in arithmetic.CELLS)
    arithmetic.STUDY.report({cell: results[cell] for cell in arithmetic.CELLS[:1]})  # of what there is
    states(arithmetic.STUDY, {cell: results[cell] for cell in (arithmetic.SFT, arithmetic.GFLOWNET)})


def test_questions_are_asked_of_one_seed_and_trained_on_by_none(sums, monkeypatch):
    monkeypatch.setattr(arithmetic, "QUESTIONS", {3: 4, 4: 5, 5: 6})
    asked = [arithmetic.questions(sums, seed) for seed in range(3)]
    for operands, count in arithmetic.QUESTIONS.items():
        of_seeds = [q for a in asked for q in a.test[operands]]
        assert len(set(of_seeds)) == 3 * count and {len(q.operands) for q in of_seeds} == {operands}
        assert not set(of_seeds) & {*asked[0].rationales, *asked[0].train}


def test_the_start_of_all_methods_is_the_fine_tuned_model(sums):
    lm, test = LanguageModel.embedded("arithmetic"), arithmetic.questions(sums, 0, short=True)
    p, _ = arithmetic.fine_tuned(lm, test, 0, 23, 10)
    e = arithmetic.start(p, test, sums, 0, arithmetic.RECIPE, 23)
    found = [arithmetic.measured(Arithmetic(p, q, max_tokens=23), test.test[4], 2) for q in (p, e.guide_lm)]
    before = arithmetic.measured(Arithmetic(lm, lm), test.test[4], 2)
    assert found[0]["right"] == pytest.approx(found[1]["right"])
    assert found[0]["right"] != pytest.approx(before["right"], rel=0.1)
    history = e.gflownet().fit(e.batches, arithmetic.EVERY, progress=False)
    assert [m["replayed"] for m in history] == [0, 0, 0, 1]  # what the buffer has of a rationale's question


def test_evidence_of_the_right_chain_and_of_the_draws():
    """log Z and the right chain's posterior mass beside the enumerated ones; 400 draws, 5 standard errors and more."""
    lm = LanguageModel.embedded("arithmetic", dtype=torch.float64)
    task, asked = Arithmetic(lm, lm), embedded.data("arithmetic", "rationales")[:3]
    exact = Enumeration(task.model, mass=0.95).run(*task.encode(asked))
    torch.manual_seed(0)
    found = arithmetic.measured(task, asked, 400)
    for i, q in enumerate(asked):
        assert found["log_z"][i] == pytest.approx(exact.log_evidence[i].item(), abs=0.2)
        assert found["posterior"][i] == pytest.approx(dict(exact.table("z", i))[q.chain], abs=0.1)
        assert found["gap"][i] > 0 and found["right"][i] < found["posterior"][i]


def test_intervals_of_votes_and_their_differences():
    assert arithmetic.wilson([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert arithmetic.wilson([1.0] * 5 + [0.0] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)

    def votes(seed, *hits):
        return {"seed": seed, "of": {"4": {"vote": [float(h) for h in hits]}}}

    results = {"SFT": [votes(1, 0, 0, 0, 1)], "GFlowNet": [votes(0, 1, 1, 1, 1), votes(1, 1, 1, 0, 1)]}
    gain, half = arithmetic.ahead(results, "GFlowNet", "SFT", 4, "vote")
    assert gain == pytest.approx(50) and half == pytest.approx(3.182 * 57.735 / 2, rel=1e-3)  # of the seed of both


@pytest.fixture
def network():
    """The embedded stories' language model in double precision, and its network as another process loads it."""
    lm = LanguageModel.embedded("stories", dtype=torch.float64)
    return lm, AutoModelForCausalLM.from_pretrained(embedded.path("stories"), dtype=torch.float64).eval()


def ids(texts):
    """Texts (..., L) as lists, row by row."""
    return [[i for i in row if i >= 0] for row in texts.flatten(0, -2).tolist()]


def log_joint(model, x, given, z):
    """log of the joint of texts z (N, B, E), each alone: (N, B)."""
    found = [
        poutine.trace(condition(model, {"z": z[n, i : i + 1]})).get_trace(x[i : i + 1], given[i : i + 1])
        for n, i in torch.cartesian_prod(torch.arange(len(z)), torch.arange(len(x))).tolist()
    ]
    return torch.stack([trace.log_prob_sum() for trace in found]).view(z.shape[:-1])


def test_grpos_reward_is_the_tempered_sequence(network):
    """Of texts of all lengths, the longest with and without their stop, tokens being barred."""
    lm, model = network
    allowed = continuation.plain_tokens(lm)
    task = Continuation(lm, max_tokens=4, allowed=allowed)
    x, t = task.encode([p for part in embedded_prompts() for p in part][:3], 0.9)
    z = torch.cat([
        Completion(lm, x, max_tokens=4, allowed=allowed, stop=".").sample((6,)),
        torch.nn.functional.pad(lm.encode(["."] * 3), (0, 4), value=-1)[None],
    ])  # fmt: skip
    bar(model, (~allowed).nonzero()[:, 0].tolist())
    target = Target(int(lm.token_id(".")), 4, temperature=0.9)
    cut = [row[:4] for row in ids(z)]  # as TRL gives them: no stop after the limit
    assert any(len(row) == 4 and row[-1] != target.stop for row in cut) and min(map(len, cut)) == 1
    found = log_target(model, target, ids(x) * 7, [target.ended(row) for row in cut], None)
    torch.testing.assert_close(found.view(7, 3), log_joint(task.model, x, t, z))


def test_grpos_reward_is_the_joint_of_reason_and_label(network):
    lm, model = network
    given = {"why": "{x} He went to", "then": " Then:", "stop": "."}
    task = Subjectivity(lm, labels=("Tom", "Ben"), max_tokens=2, **given)
    x, y = lm.encode(["Tom went to the kitchen.", "He went. She went.", "He"]), torch.tensor([0, 1, 1])
    z = task.prior(x).sample((5,))
    target = Target(
        int(lm.token_id(".")), 2, 1, then=tuple(lm.encode(given["then"]).tolist()),
        labels=tuple(task.label_texts[:, 0].tolist()),
    )  # fmt: skip
    prompts = ids(lm.fill(given["why"], x=x)) * 5
    found = log_target(model, target, prompts, ids(z), y.tolist() * 5).view(5, 3)
    torch.testing.assert_close(found, log_joint(task.model, x, y, z))
    log_p, _ = read(model, target, prompts, ids(z), [])
    torch.testing.assert_close(log_p.view(5, 3), task.prior(x).log_prob(z))


def test_the_report_of_grpo_compares_with_the_other_studies():
    def texts(family, log_p, distance, log_z, gap):
        each = {"log_likelihood": [log_p, log_p - 1], "best": [log_p + 1, log_p], "distance": [distance, distance]}
        row = {"family": family, "setting": "T = 0.9", "distinct": 0.5, "words": 9.0, "gap": gap, "sd": 1.0, "ess": 0.5}
        row |= {"log_z": log_z, "texts": [f"what {family} writes."]}
        means = {key: sum(values) / 2 for key, values in each.items()}
        return {"rows": [row | means | {"khat": [0.1, 0.9], "each": each}], "took": took}

    def labels(method, hits, lines=(0, 1, 2, 3)):
        p = [0.9 if hit else 0.1 for hit in hits]
        said = {"p": p, "vote": p, "reasons": ["so", "so", "no", "so"], "distinct": 0.25}
        return {"lines": list(lines), "y": [1] * 4, "methods": {method: said}, "took": took}

    took = {"seconds": 60.0, "tokens": 1000, "rewards": [-30.0] * 10 + [-20.0] * 10}
    results = {
        "continuation": [texts("GRPO", -10.0, 0.2, -12.0, 0.0)],  # all draws are one text, and agree with one another
        "continuation: T=0.9": [texts("GFlowNet", -30.0, 0.8, -3.0, 1.0)],
        "continuation: decoding": [texts("greedy", -5.0, 0.0, 0.0, 0.0)],  # is not among the rows
        "subjectivity": [labels("GRPO", (1, 0, 0, 0)), labels("GRPO", (1, 1, 1, 1), lines=(4, 5, 6, 7))],
        "subjectivity: 50": [labels("GFlowNet", (1, 1, 1, 0))],
    }
    text = states(grpo.STUDY, results)
    assert "**seen**. +20.00 ± 0.00 nats and -0.60 ± 0.00 of edit distance" in text
    assert "log Z - ELBO is 9.00 nats, the GFlowNet's 1.00." in text
    assert "-50.0 ± 91.9 points on 4 sentences" in text  # of the seed that both have
    assert "| 0.25 | 0.50 |" in text and "| -30.00 | -20.00 |" in text and "greedy" not in text
    assert "| GRPO | 0.9 | -12.00 | 9.00 |" in text and "- GRPO: what GRPO writes.\n" in text
    assert grpo.STUDY.headline(results)[0][2] == "1.00, 0.50; 9.00, 0.50"
    for cell in grpo.CELLS:
        if cell in results:  # of what there is
            grpo.STUDY.report({cell: results[cell]})


@pytest.mark.slow
def test_trl_trains_an_adapter_that_loads(beginnings):
    if not (grpo.ENVIRONMENT / ".installed").is_file():
        pytest.skip(f"no TRL in {grpo.ENVIRONMENT}; a run of the study `grpo` installs it")
    found = grpo.run("continuation, matched", 0, True, *beginnings)
    (row,), took = found["rows"], found["took"]
    assert row["family"] == grpo.MATCHED and all(torch.tensor(row["each"]["log_likelihood"]).isfinite())
    assert len(took["rewards"]) == 2 and took["tokens"] > 0 and found["elsewhere"] == took["seconds"] > 0


@pytest.mark.parametrize(
    "study, cells",
    [
        (random_number.STUDY, random_number.CELLS[:2]),
        (subjectivity.STUDY, subjectivity.CELLS[:2]),
        (continuation.STUDY, ("T=0.9",)),
        (infilling.STUDY, (infilling.ASKED, infilling.GUIDE)),
        (arithmetic.STUDY, (arithmetic.SFT, arithmetic.GFLOWNET)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_study_runs_on_a_pretrained_model(study, cells, smollm2_lm):
    """A cell or two, so that it takes a minute: guides, and beside them what is not trained."""
    if any(not (SHARED / "data" / name).is_file() for name in study.needs):
        pytest.skip(f"no data for {study.name} in {SHARED}")
    states(study, {cell: [study.run(cell, 0, True, smollm2_lm, SHARED / "data") | {"seed": 0}] for cell in cells})


def test_every_story_is_one_that_the_pretrained_model_may_tell(smollm2_lm):
    """Its sentences are those tokens again, none of them barred: no density of one is zero."""
    task = infilling.Told(smollm2_lm)
    limit, stop, allowed = *infilling.LIMIT.values(), task.text["allowed"]
    stories = (*infilling.stories(), infilling.written())
    for sentence in (sentence for part in stories for story in part for sentence in (story.z, story.y)):
        z = smollm2_lm.encode(sentence)
        assert smollm2_lm.decode(z[-1:]) == stop and len(z) <= limit + 1 and bool(allowed[z].all()), sentence
        assert smollm2_lm.token_id(stop) not in z[:-1].tolist(), sentence


def test_guides_of_one_model_share_their_evidence():
    """The mean of their estimates of Z: the gap grows by what log Z does, and the posterior's mass falls with it."""

    def found(z, gap, posterior):
        each = {"log_z": [math.log(z)], "gap": [gap], "posterior": [posterior]}
        return {"of": {str(n): each for n in arithmetic.OPERANDS}}

    of = {
        arithmetic.SFT: [found(5, 0, 0) | {"seed": 0}, found(0.1, 2.0, 0.8) | {"seed": 1}],
        arithmetic.GFLOWNET: [found(0.3, 1.0, 0.2) | {"seed": 1}],  # the other seed's is missing
        arithmetic.LONGER: [found(1, 0, 1) | {"seed": 1}],
    }
    shared = arithmetic.with_one_evidence(of)
    for cell, z, gap, posterior in ((arithmetic.SFT, 0.1, 2.0, 0.8), (arithmetic.GFLOWNET, 0.3, 1.0, 0.2)):
        row = shared[cell][-1]["of"]["4"]
        assert row["log_z"] == pytest.approx([math.log(0.2)], rel=1e-5)
        assert row["gap"] == pytest.approx([gap + math.log(0.2 / z)], rel=1e-5)
        assert row["posterior"] == pytest.approx([posterior * z / 0.2], rel=1e-5)
    assert shared[arithmetic.LONGER] == of[arithmetic.LONGER]
    assert shared[arithmetic.SFT][0]["of"]["4"]["log_z"] == pytest.approx([math.log(5)])


def test_infillings_bleu_is_compared_seed_by_seed():
    """One seed says nothing; two that agree do, and a seed that only one of them has does not count."""

    def runs(**of):
        return {name: [{"seed": seed, "bleu": b} for seed, b in bleu.items()] for name, bleu in of.items()}

    one = runs(GFlowNet={0: 0.3, 1: 0.1}, prompting={1: 0.05})
    assert "not testable here**. The difference is +0.050 with one seed." in infilling.in_bleu(one, infilling.ASKED)
    two = runs(GFlowNet={0: 0.3, 2: 0.2}, prompting={2: 0.1, 1: 9.0, 0: 0.2})
    assert "**seen**. The difference is +0.100 ± 0.000 over 2 seeds." in infilling.in_bleu(two, infilling.ASKED)
    assert infilling.in_bleu(runs(GFlowNet={0: 0.3}, prompting={1: 0.1}), infilling.ASKED) == ""
