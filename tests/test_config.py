"""Settings: precedence, validation, and the wall between privacy and performance."""

import dataclasses

import pytest

from dp2vae_fast.config import (
    MECHANISM_TABLES,
    Config,
    ConfigError,
    PerformanceConfig,
    load_config,
    recipes,
)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_valid_run_with_an_end_to_end_guarantee(name):
    config = load_config(recipe=name)
    assert config.recipe == name
    assert config.privacy.encoder != "private"
    assert config.privacy.target_epsilon is not None and config.privacy.target_delta <= 1e-5


def test_keyword_beats_file_beats_recipe_beats_default(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "digits"\n[privacy]\nsteps = 7\nmax_grad_norm = 0.5\n')
    config = load_config(file=file, overrides={"max_grad_norm": 0.25, "engine": None})
    assert (config.privacy.steps, config.privacy.max_grad_norm) == (7, 0.25)
    assert config.recipe == "digits" and config.model.preset == load_config(recipe="digits").model.preset
    assert config.performance.engine == PerformanceConfig().engine


def test_either_way_of_giving_the_budget_unsets_the_other():
    assert load_config(recipe="digits", overrides={"noise_multiplier": 1.5}).privacy.target_epsilon is None
    with pytest.raises(ConfigError, match="exactly one"):
        load_config(overrides={"noise_multiplier": 1.5, "target_epsilon": 3})


def test_field_names_are_unique_so_that_flags_need_no_prefix():
    names = [name for table in Config().to_dict().values() for name in table]
    assert len(names) == len(set(names))


def test_text_and_numbers_read_alike():
    text = load_config(overrides={"steps": "12", "max_grad_norm": "2", "conditional": "false", "width": "64"})
    assert text == load_config(overrides={"steps": 12, "max_grad_norm": 2.0, "conditional": False, "width": 64})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_epsilon": 0}, "target_epsilon = 0"),
        ({"target_epsilon": -1.0}, "target_epsilon = -1"),
        ({"target_epsilon": float("nan")}, "target_epsilon = nan"),
        ({"target_delta": 0.0}, "target_delta = 0"),
        ({"target_delta": 1.0}, "target_delta = 1"),
        ({"noise_multiplier": -0.1}, "noise_multiplier = -0.1"),
        ({"noise_multiplier": 1e-3}, "noise_multiplier = 0.001"),
        ({"max_grad_norm": 0}, "max_grad_norm = 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm = inf"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"steps": True}, "steps = True"),
        ({"expected_batch_size": 0}, "expected_batch_size = 0"),
        ({"encoder": "privat"}, "did you mean private"),
        ({"encoder": "public"}, "needs public_encoder"),
        ({"public_encoder": "x.pt"}, "only read with"),
        ({"engine": "fast"}, "choose one of fused, opacus"),
        ({"shares": {"means": 0.6, "covariance": 0.4}}, "add up to 1"),
        ({"shares": {"means": -0.1}}, "shares.means"),
        ({"test_fraction": 1.0}, "test_fraction = 1"),
        ({"max_grad_nrom": 1.0}, "did you mean max_grad_norm"),
        ({"conditional": "perhaps"}, "expected true or false"),
        ({"mean_clip": 1e-310}, "mean_clip = 1e-310"),
        ({"residual_clip": 0.0}, "residual_clip = 0"),
        ({"steps": 10**400}, "expected a whole number"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, names):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=settings)
    assert names in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[privacy\n", "not valid TOML"),
        ("[privcy]\nsteps = 3\n", "did you mean privacy"),
        ("[model]\nsteps = 3\n", "belongs in [privacy]"),
        ("[privacy]\nstep = 3\n", "did you mean steps"),
        ('recipe = "digit"\n', "did you mean digits"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, names):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file)
    assert names in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(file=tmp_path / "missing.toml")


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        load_config(recipe="mnist")
    assert all(name in str(caught.value) for name in recipes())


def test_no_performance_setting_is_part_of_the_mechanism():
    base = load_config(recipe="digits")
    changed = {
        "engine": "opacus",
        "physical_batch_size": 3,
        "max_memory_overhead": 2.0,
        "measure_plan": True,
        "threads": 1,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    captured = {"compile": "graph"}  # which the engine of Opacus cannot be
    assert {f.name for f in dataclasses.fields(PerformanceConfig)} == {*changed, *captured}
    for overrides in (changed, captured):
        fast = load_config(recipe="digits", overrides=overrides)
        assert fast.fingerprint(*MECHANISM_TABLES) == base.fingerprint(*MECHANISM_TABLES)
        assert fast.fingerprint() != base.fingerprint()
    with pytest.raises(ConfigError, match='compile = "graph" needs engine = "fused"'):
        load_config(recipe="digits", overrides=changed | captured)
    longer = load_config(recipe="digits", overrides={"steps": base.privacy.steps + 1})
    assert longer.fingerprint(*MECHANISM_TABLES) != base.fingerprint(*MECHANISM_TABLES)
