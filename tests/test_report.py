"""The report says what the ledger counts, no more and no less; its epsilon is the accountants'."""

import json
from dataclasses import replace

import dp_accounting
import pytest
import small
from dp_accounting.pld import PLDAccountant
from opacus.accountants import create_accountant

from dp2vae_fast.engine.accounting import Mechanism
from dp2vae_fast.trainer import Trainer
from dp2vae_fast.vae.report import Facts, build_report, headline, render, write_report

DELTA = 1e-5


@pytest.fixture(scope="module", params=["linear", "dp"])
def report(request):
    settings = small.config(encoder=request.param, target_epsilon=3, accountant="prv", test_fraction=0)
    return Trainer(small.digits(), config=settings).fit().report


def facts(**changes):
    base = dict(
        mechanisms=(Mechanism("class means", 2.0), Mechanism("DP-SGD", 1.5, 0.1, 100)),
        step_mechanism="DP-SGD",
        delta=DELTA,
        accountant="rdp",
        encoder="linear",
        end_to_end=True,
        statement="it holds",
        noise_source="secret",
        dataset_size=1000,
        sampling={"rate": 0.1},
        clipping={"mode": "flat"},
        public_constants={},
        arithmetic={"precision": "float32"},
    )
    return Facts(**base | changes)


def test_epsilon_is_what_opacus_gives_for_the_mechanisms_of_the_report(report):
    book = create_accountant("prv")
    book.history = [(m["noise_multiplier"], m["sample_rate"], m["steps"]) for m in report["mechanisms"]]
    assert report["epsilon"] == book.get_epsilon(DELTA)
    assert 2.9 < report["epsilon"] <= 3


def test_an_independent_accountant_agrees_and_is_not_above(report):
    book = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for m in report["mechanisms"]:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(m["noise_multiplier"])
        if m["sample_rate"] < 1:
            event = dp_accounting.PoissonSampledDpEvent(m["sample_rate"], event)
        book.compose(dp_accounting.SelfComposedDpEvent(event, m["steps"]))
    independent = book.get_epsilon(DELTA)
    assert abs(report["epsilon"] - independent) <= 0.02 + 0.01 * independent
    assert report["epsilon"] >= 0.999 * independent


def test_the_keys_that_others_rely_on_are_there(report):
    keys = {"epsilon", "delta", "neighbouring", "encoder", "end_to_end", "statement", "mechanisms", "noise_source"}
    assert keys <= set(report)
    assert report["neighbouring"] == "add/remove one record" and report["noise_source"] == "seeded"
    assert any("other runs" in sentence for sentence in report["not_claimed"])
    assert sum(m["share"] for m in report["mechanisms"]) == pytest.approx(1)
    json.dumps(report, allow_nan=False)


def test_what_it_says_of_sums_holds_for_every_backend(report):
    """The native kernels form a record's product in float32, the references in float64; the norm's bound counts it."""
    assert "in float32, which the bound of its norm counts" in report["arithmetic"]["sums"]


def test_a_mode_without_a_guarantee_reports_no_epsilon():
    report = build_report(facts(encoder="private", end_to_end=False))
    assert report["epsilon"] is None and report["epsilon_given_encoder"] > 0
    assert "No finite ε holds end to end" in render(report)


@pytest.mark.parametrize("quiet", ["class means", "DP-SGD"])
def test_one_mechanism_without_noise_voids_the_guarantee(quiet):
    mechanisms = [replace(m, noise_multiplier=0.0) if m.name == quiet else m for m in facts().mechanisms]
    report = build_report(facts(mechanisms=tuple(mechanisms)))
    assert report["epsilon"] is None and not report["end_to_end"]
    assert "nothing is guaranteed" in report["statement"]


def test_mechanisms_that_were_never_drawn_are_not_listed():
    report = build_report(facts(mechanisms=(*facts().mechanisms, Mechanism("unused", 0.0, 1.0, 0))))
    assert [m["name"] for m in report["mechanisms"]] == ["class means", "DP-SGD"]


def test_the_readable_twin_says_the_same(tmp_path):
    report = build_report(facts(warnings=("beware",), noise_source="seeded"))
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "privacy.json").read_text()) == report
    text = (tmp_path / "privacy.md").read_text()
    for said in (
        ", 1e-05)-differentially private",
        "It holds.",
        "Warning: beware",
        "only while the seed is secret",
        "| DP-SGD |",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("bound", "delta", "said"),
    [
        (1.00049, 1.2345644e-5, "(1.001, 1.23457e-05)"),
        (9.9991, 1e-5, "(10, 1e-05)"),
        (9.998, 3e-6, "(9.998, 3e-06)"),
        (0.1, 0.1, "(0.1, 0.1)"),
    ],
)
def test_what_is_said_of_epsilon_and_delta_is_rounded_up(bound, delta, said):
    report = build_report(facts(delta=delta)) | {"epsilon": bound}
    assert said in headline(report) and said in render(report)
    given = report | {"epsilon": None, "epsilon_given_encoder": bound}
    assert f"ε = {said[1:-1].replace(', ', ', δ = ')}." in headline(given)


def test_a_mechanisms_own_epsilon_is_rounded_up():
    report = build_report(facts())
    report["mechanisms"][0]["epsilon_alone"] = 2.00049
    assert "| 2.001 |" in render(report)
