"""Configs: what the command line states comes back as typed values, survives JSON, and decides reuse by identity."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate import config as configs
from palate.config import scale


@dataclasses.dataclass(frozen=True)
class Source:
    path: Path = Path("data")
    weight: float = 1.0
    readers: int = scale(1)


@dataclasses.dataclass(frozen=True)
class Checked:
    batch: int = 4
    dropout_share: float = 0.1

    def __post_init__(self) -> None:
        configs.require_at_least(self, 1, "batch")
        configs.require_shares(self, "dropout_share")


def test_what_a_config_refuses_ends_the_program_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert configs.parse(Checked, None, ["--batch", "1"]) == Checked(batch=1)
    for flags, message in (
        (["--batch", "0"], "--batch is at least 1, got 0"),
        (["--dropout-share", "2"], "--dropout-share is a share from 0 to 1, got 2.0"),
        (["--dropout-share", "nan"], "got nan"),
    ):
        with pytest.raises(SystemExit):
            configs.parse(Checked, None, flags)
        assert message in capsys.readouterr().err


def test_a_config_in_a_file_is_taken_and_overridden(tmp_path: Path) -> None:
    file = tmp_path / "best.json"
    file.write_text(json.dumps(configs.to_dict(Checked(batch=9, dropout_share=0.3))))
    assert configs.parse(Checked, None, ["--config", str(file)]) == Checked(9, 0.3)
    assert configs.parse(Checked, None, ["--config", str(file), "--batch", "2"]) == Checked(2, 0.3)
    assert configs.parse(Checked, None, ["--config", file.as_uri()]) == Checked(9, 0.3)
    file.write_text(json.dumps({"batches": 9}))
    with pytest.raises(SystemExit, match=r"best.json: Checked has no field 'batches'"):
        configs.parse(Checked, None, ["--config", str(file)])
    with pytest.raises(SystemExit, match=r"--config .*none.json"):
        configs.parse(Checked, None, ["--config", str(tmp_path / "none.json")])


def test_a_command_takes_a_config_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "best.json"
    file.write_text(json.dumps(configs.to_dict(Checked(batch=9))))
    commands = {"check": Checked, "read": Source}
    monkeypatch.setattr("sys.argv", ["job", "check", "--config", str(file), "--dropout-share", "0.2"])
    assert configs.parse_command(commands) == Checked(9, 0.2)
    monkeypatch.setattr("sys.argv", ["job", "read", "--weight", "3"])
    assert configs.parse_command(commands) == Source(weight=3.0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How it learns."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = scale(False)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "tiny"
    clusters: int | None = None
    objective: Literal["lpo", "dpo"] = "lpo"
    targets: tuple[str, ...] = ("q", "v")
    optimizer: Optimizer = Optimizer()
    sources: tuple[Source, ...] = ()
    named: dict[str, Source] = dataclasses.field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    workers: int = scale(1)
    out: str = scale("runs")


finite = st.floats(allow_nan=False)
sources = st.builds(Source, st.text("abc/.", min_size=1).map(Path), finite, st.integers(0, 9))
any_config = st.builds(
    Config,
    model=st.text(),
    clusters=st.none() | st.integers(),
    objective=st.sampled_from(["lpo", "dpo"]),
    targets=st.lists(st.text()).map(tuple),
    optimizer=st.builds(Optimizer, finite, st.tuples(finite, finite), st.booleans()),
    sources=st.lists(sources, max_size=3).map(tuple),
    named=st.dictionaries(st.text(), sources, max_size=3),
    labels=st.frozensets(st.text(), max_size=3),
    workers=st.integers(0, 99),
    out=st.text(),
)


@given(any_config)
def test_a_config_survives_json(config):
    stored = json.loads(json.dumps(configs.to_dict(config)))
    assert configs.from_dict(Config, stored) == config
    assert configs.identity(configs.from_dict(Config, stored)) == configs.identity(config)


@given(any_config, any_config)
def test_identity_is_everything_but_the_scale_fields(one, other):
    def without(source: Source) -> Source:
        return replace(source, readers=7)

    def normal(config: Config) -> Config:
        return replace(
            config,
            optimizer=replace(config.optimizer, fused=True),
            sources=tuple(map(without, config.sources)),
            named={name: without(source) for name, source in config.named.items()},
            workers=7,
            out="elsewhere",
        )

    assert configs.identity(one) == configs.identity(normal(one))
    assert (configs.identity(one) == configs.identity(other)) == (normal(one) == normal(other))


def test_identity_leaves_out_scale_fields_at_every_depth():
    config = Config(sources=(Source(),), named={"a": Source()})
    found = configs.identity(config)
    assert found.keys() == {field.name for field in dataclasses.fields(Config)} - {"workers", "out"}
    assert found["optimizer"] == {"learning_rate": 1e-3, "betas": [0.9, 0.999]}
    assert found["sources"] == [{"path": "data", "weight": 1.0}]
    assert found["named"] == {"a": {"path": "data", "weight": 1.0}}


def test_a_plain_mapping_is_identity_throughout():
    assert configs.identity({"seed": 1}) == configs.to_dict({"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": 4}, r"Config has no field 'cluster'; it has \['clusters', "),
        ({"optimizer": {"lr": 1.0}}, r"no field 'optimizer\.lr'; it has \['betas', 'fused', 'learning_rate'\]"),
        ({"sources": [{"path": "x", "wait": 1}]}, r"no field 'sources\.wait'"),
        ({"clusters": "4"}, "clusters\n.*valid integer"),
        ({"clusters": 4.5}, "clusters\n.*valid integer"),
        ({"objective": "ppo"}, "objective\n.*'lpo' or 'dpo'"),
        ({"optimizer": {"learning_rate": None}}, r"optimizer\.learning_rate\n"),
        ({"targets": "q"}, "targets\n"),
    ],
)
def test_an_unknown_or_ill_typed_field_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        configs.from_dict(Config, {**configs.to_dict(Config()), **change})


def test_a_config_written_before_a_field_existed_gets_its_default():
    stored = configs.to_dict(Config(clusters=3))
    del stored["objective"]
    assert configs.from_dict(Config, stored) == Config(clusters=3)


@dataclasses.dataclass(frozen=True)
class Flags:
    """A config as jobs have them."""

    corpus: str
    clusters: int | None = None
    optimizer: Optimizer = Optimizer()
    decoding_beta: float = 1.0
    workers: int = scale(1)


def test_the_command_line_is_parsed_into_typed_values():
    arguments = "--corpus s3://bucket/c --clusters 4 --learning-rate 1e-4 --betas 0.8 0.9 --fused --workers 3"
    assert configs.parse(Flags, arguments=arguments.split()) == Flags(
        corpus="s3://bucket/c", clusters=4, optimizer=Optimizer(1e-4, (0.8, 0.9), True), workers=3
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus", "c", "--cluster", "4"], "--cluster"),
        (["--corpus", "c", "--clusters", "four"], "four"),
        ([], "--corpus"),
    ],
)
def test_an_unknown_ill_typed_or_missing_flag_ends_the_program_with_its_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        configs.parse(Flags, arguments=arguments)
    assert end.value.code == 2
    assert said in "".join(capsys.readouterr())


def test_help_shows_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        configs.parse(Flags, description="Trains CARD.", arguments=["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "Trains CARD." in shown
    assert "--decoding-beta" in shown
    assert "1.0" in shown
