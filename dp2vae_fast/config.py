"""What a run is made of: five frozen objects, read from a recipe, a TOML file and keywords, in rising order
of precedence.

Everything that the guarantee depends on lives in :class:`PrivacyConfig`; everything that only changes how
fast the same mechanism runs lives in :class:`PerformanceConfig`. No field of the latter can change what is
drawn, clipped or accounted.

A TOML file has one table per object::

    [privacy]
    target_epsilon = 10.0
    [model]
    preset = "mlp"

Field names are unique across the tables, so a keyword or a command-line flag needs no prefix.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ENCODERS = ("linear", "dp", "public", "private")
ENGINES = ("fused", "opacus")
COMPILE = ("none", "graph")
DEFAULT_RECIPE = "digits"
_LEAST_NOISE = 0.01
_LEAST_CLIP = 1e-6  # what is divided by it must stay finite


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names it and the way out."""


@dataclass(frozen=True)
class DataConfig:
    """Which images are trained on and how they are read (all choices are public)."""

    data: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    conditional: bool = True
    test_fraction: float = 0.2
    split_seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The decoder that is released and the likelihood it is trained with."""

    preset: str = "mlp"
    latent_dim: int = 16
    width: int | None = None
    likelihood: str = "bernoulli"
    beta: float = 1.0
    iwae_samples: int = 1


@dataclass(frozen=True)
class PrivacyConfig:
    """The mechanism: every number that the guarantee is a function of.

    Exactly one of ``target_epsilon`` (stage 2's noise is calibrated over all mechanisms together) and
    ``noise_multiplier`` (used as it is; 0 means that nothing is private) is set. ``shares`` splits the budget
    in squared Gaussian-DP units: mechanism *j* of stage 1 gets ``mu_j**2 = shares[j] * mu**2``; DP-SGD of
    stage 2 gets the rest; where it is empty the encoder mode's own split holds. ``pixel_center`` is the public grey
    level that images are measured from; ``mean_clip`` and ``residual_clip`` bound how far a record's pixels may lie
    from it and from the released mean of its class, as root mean squares. ``seed=None`` keys the noise from the
    operating system; a seed makes it reproducible, and the report says so.
    """

    target_epsilon: float | None = 10.0
    noise_multiplier: float | None = None
    target_delta: float = 1e-5
    accountant: str = "prv"
    encoder: str = "linear"
    public_encoder: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    pixel_center: float = 0.5
    mean_clip: float = 0.4
    residual_clip: float = 0.25
    max_grad_norm: float = 1.0
    expected_batch_size: int = 256
    steps: int = 500
    pretrain_steps: int = 500
    seed: int | None = None


@dataclass(frozen=True)
class OptimizationConfig:
    """How the noisy gradients are used, and stage 1's free parameters: post-processing, without influence on
    the guarantee."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    warm_start_steps: int = 1000
    pretrain_learning_rate: float = 1e-3


@dataclass(frozen=True)
class PerformanceConfig:
    """How fast the same mechanism runs. Nothing here may change what is drawn, clipped or accounted."""

    engine: str = "fused"
    device: str = "auto"
    threads: int | None = None
    physical_batch_size: int = 256
    max_memory_overhead: float = 1.25
    measure_plan: bool = False
    compile: str = "none"
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Config:
    """One run, complete."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    recipe: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The tables of the TOML shape, as plain JSON-able values."""
        return {name: dict(vars(getattr(self, name))) for name in _TABLES}

    def fingerprint(self, *tables: str) -> str:
        """SHA-256 of the named tables (all of them by default); equal fingerprints mean equal settings."""
        chosen = {name: table for name, table in self.to_dict().items() if not tables or name in tables}
        text = json.dumps(chosen, sort_keys=True, default=dict)
        return hashlib.sha256(text.encode()).hexdigest()


_TABLES: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "privacy": PrivacyConfig,
    "optimization": OptimizationConfig,
    "performance": PerformanceConfig,
}
_HOME = {f.name: table for table, cls in _TABLES.items() for f in dataclasses.fields(cls)}
MECHANISM_TABLES = ("data", "model", "privacy", "optimization")


def recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("dp2vae_fast") / "recipes"
    return tuple(sorted(p.name[: -len(".toml")] for p in folder.iterdir() if p.name.endswith(".toml")))


def load_config(
    *,
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Build a validated :class:`Config` from a recipe, a TOML file and flat overrides.

    A keyword in ``overrides`` beats the file, the file beats the recipe, the recipe beats the defaults. A
    file may name the recipe it starts from with a top-level ``recipe = "..."``. Setting one of
    ``target_epsilon`` and ``noise_multiplier`` in a layer unsets the other one of the layers below. Keywords
    whose value is None are ignored.

    Raises :class:`ConfigError` with one line: unknown recipe, unreadable file, unknown key, wrong type,
    impossible value.
    """
    layers: list[dict[str, Any]] = []
    if file is not None:
        text = _read_text(Path(file))
        flat, named = _flatten(_parse(text, str(file)), origin=str(file))
        recipe = recipe or named
        layers.append(flat)
    if recipe is not None:
        layers.insert(0, _read_recipe(recipe))
    layers.append(_known({k: v for k, v in (overrides or {}).items() if v is not None}, origin="settings"))

    values: dict[str, Any] = {}
    for layer in layers:
        for chosen, other in (("target_epsilon", "noise_multiplier"), ("noise_multiplier", "target_epsilon")):
            if chosen in layer and other not in layer:
                values[other] = None
        values |= layer
    tables = {
        table: cls(
            **{f.name: _coerce(cls, f.name, values[f.name]) for f in dataclasses.fields(cls) if f.name in values}
        )
        for table, cls in _TABLES.items()
    }
    config = Config(**tables, recipe=recipe)
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise :class:`ConfigError` for the first setting that no run can have; says nothing about the data."""
    data, model, privacy = config.data, config.model, config.privacy
    optimization, performance = config.optimization, config.performance

    if (privacy.target_epsilon is None) == (privacy.noise_multiplier is None):
        raise ConfigError("set exactly one of target_epsilon and noise_multiplier: the other one follows from it")
    _check(privacy, "target_epsilon", lambda v: v > 0, "a positive number (10 is loose, 1 is strict)")
    least = f"zero (nothing is private) or at least {_LEAST_NOISE} (less bounds nothing)"
    _check(privacy, "noise_multiplier", lambda v: v == 0 or v >= _LEAST_NOISE, least)
    between = "a number between 0 and 1, below one over the number of records"
    _check(privacy, "target_delta", lambda v: 0 < v < 1, between)
    _choice(privacy, "accountant", ("prv", "rdp"))
    _choice(privacy, "encoder", ENCODERS)
    if privacy.encoder == "public" and not privacy.public_encoder:
        raise ConfigError('encoder = "public" needs public_encoder: a checkpoint or a public data set that you name')
    if privacy.encoder != "public" and privacy.public_encoder:
        raise ConfigError(f'public_encoder is only read with encoder = "public", but encoder is "{privacy.encoder}"')
    for name, share in privacy.shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"shares.{name} = {share}: a share of the budget lies between 0 and 1")
    if sum(privacy.shares.values()) >= 1:
        total = sum(privacy.shares.values())
        raise ConfigError(f"shares add up to {total:g}: leave something below 1 for DP-SGD of stage 2")
    _check(privacy, "max_grad_norm", lambda v: v > 0, "a positive number")
    _check(privacy, "expected_batch_size", lambda v: v >= 1, "at least 1")
    _check(privacy, "steps", lambda v: v >= 1, "at least 1")
    _check(privacy, "pretrain_steps", lambda v: v >= 1, "at least 1")
    _check(privacy, "pixel_center", lambda v: 0 <= v <= 1, "a grey level from 0 to 1")
    for clip in ("mean_clip", "residual_clip"):
        _check(privacy, clip, lambda v: v >= _LEAST_CLIP, f"at least {_LEAST_CLIP}, of pixels from 0 to 1")
    _check(privacy, "seed", lambda v: 0 <= v < 2**63, "a number from 0 to 2**63 - 1")

    _check(data, "image_size", lambda v: v >= 1, "at least 1")
    _check(data, "channels", lambda v: v >= 1, "at least 1")
    _check(data, "test_fraction", lambda v: 0 <= v < 1, "a fraction from 0 (no held-out records) to below 1")

    _check(model, "latent_dim", lambda v: v >= 1, "at least 1")
    _check(model, "width", lambda v: v >= 1, "at least 1")
    _choice(model, "likelihood", ("bernoulli", "gaussian"))
    _check(model, "beta", lambda v: v >= 0, "zero or a positive number")
    _check(model, "iwae_samples", lambda v: v >= 1, "at least 1")

    _choice(optimization, "optimizer", ("sgd", "adam", "adamw"))
    _check(optimization, "learning_rate", lambda v: v > 0, "a positive number")
    _check(optimization, "momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1")
    _check(optimization, "weight_decay", lambda v: v >= 0, "zero or a positive number")
    _check(optimization, "ema_decay", lambda v: 0 <= v < 1, "zero (off) or a decay below 1, such as 0.99")
    _check(optimization, "warm_start_steps", lambda v: v >= 0, "zero (off) or a number of steps")
    _check(optimization, "pretrain_learning_rate", lambda v: v > 0, "a positive number")

    _choice(performance, "engine", ENGINES)
    if performance.engine == "opacus" and model.iwae_samples > 1:
        raise ConfigError('iwae_samples above 1 puts several rows to a record: it needs engine = "fused"')
    _choice(performance, "compile", COMPILE)
    if performance.engine == "opacus" and performance.compile != "none":
        raise ConfigError(f'compile = "{performance.compile}" needs engine = "fused": Opacus cannot be captured')
    _check(performance, "threads", lambda v: v >= 1, "at least 1")
    _check(performance, "physical_batch_size", lambda v: v >= 1, "at least 1")
    _check(performance, "max_memory_overhead", lambda v: v >= 1, "at least 1")
    _check(performance, "checkpoint_every", lambda v: v >= 1, "at least 1")


def _check(table: Any, name: str, good: Callable[[Any], bool], expected: str) -> None:
    value = getattr(table, name)
    if value is not None and not good(value):
        raise ConfigError(f"{name} = {value}: expected {expected}")


def _choice(table: Any, name: str, known: tuple[str, ...]) -> None:
    value = getattr(table, name)
    if value not in known:
        raise ConfigError(
            f'{name} = "{value}" is not known{_suggestion(value, known)}; choose one of {", ".join(known)}'
        )


def _suggestion(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _read_recipe(name: str) -> dict[str, Any]:
    known = recipes()
    if name not in known:
        raise ConfigError(f'unknown recipe "{name}"{_suggestion(name, known)}; the recipes are {", ".join(known)}')
    text = (resources.files("dp2vae_fast") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return _flatten(_parse(text, f"recipe {name}"), origin=f"recipe {name}")[0]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error


def _flatten(tables: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], str | None]:
    """One flat dictionary of fields, and the recipe that the file names (or None)."""
    flat: dict[str, Any] = {}
    for table, content in tables.items():
        if table == "recipe" and isinstance(content, str):
            continue
        if table not in _TABLES or not isinstance(content, Mapping):
            known = ", ".join(f"[{name}]" for name in _TABLES)
            raise ConfigError(
                f"{origin}: [{table}] is not a table of a run{_suggestion(table, _TABLES)}; known are {known}"
            )
        for name in content:
            if _HOME.get(name, table) != table:
                raise ConfigError(f"{origin}: {name} belongs in [{_HOME[name]}], not in [{table}]")
        flat |= _known(content, origin)
    return flat, tables.get("recipe")


def _known(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    for name in values:
        if name not in _HOME:
            hint = _suggestion(name, _HOME) or f"; known are {', '.join(_HOME)}"
            raise ConfigError(f"{origin}: unknown setting {name}{hint}")
    return dict(values)


def _coerce(cls: type, name: str, value: Any) -> Any:
    """``value`` as the declared type of ``cls.name``; text is parsed, so that a flag and a TOML value read
    alike."""
    hint = typing.get_type_hints(cls)[name]
    if value is None:
        return None
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping) or not all(_is_number(v) for v in value.values()):
            raise ConfigError(f"{name} = {value!r}: expected a table of numbers")
        return {str(k): float(v) for k, v in value.items()}
    wanted = next(t for t in (*typing.get_args(hint), hint) if t is not type(None))
    if isinstance(value, str) and wanted is not str:
        value = _parse_word(value)
    if wanted is str and isinstance(value, str | Path):
        return str(value)
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and _is_number(value) and float(value).is_integer():
        return int(value)
    if wanted is float and _is_number(value):
        return float(value)
    raise ConfigError(f"{name} = {value!r}: expected {_SPELLED[wanted]}")


def _parse_word(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_SPELLED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
