"""Launch configurations: measured ones win over the heuristic, on the device they were measured on."""

import json
from dataclasses import dataclass

import pytest

from pallas_kernels import tuning


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


KEY = {"rows": 64, "dtype": "bfloat16"}
GUESS = Config(block=16, num_warps=4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """tuned(rows): what the file of "Some GPU" holds."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)

    def write(rows):
        tuning.path("Some GPU").write_text(json.dumps(rows))
        tuning._rows.cache_clear()

    yield write
    tuning._rows.cache_clear()


def test_measured_configuration_is_taken_for_its_key_and_device_only(tuned):
    tuned([tuning.row("op", KEY, Config(block=64, num_warps=8), us=12.5)])
    assert tuning.choose("op", "Some GPU", KEY, GUESS) == Config(block=64, num_warps=8)
    assert tuning.choose("op", "Some GPU", {"dtype": "bfloat16", "rows": 64}, GUESS).block == 64
    assert tuning.choose("op", "Some GPU", {**KEY, "rows": 128}, GUESS) == GUESS
    assert tuning.choose("other", "Some GPU", KEY, GUESS) == GUESS
    assert tuning.choose("op", "Another GPU", KEY, GUESS) == tuning.choose("op", "", KEY, GUESS) == GUESS


def test_stale_file_that_names_a_field_the_op_no_longer_has_is_an_error(tuned):
    tuned([{"op": "op", "key": KEY, "config": {"splits": 4}}])
    with pytest.raises(TypeError, match="splits"):
        tuning.choose("op", "Some GPU", KEY, GUESS)


def test_every_tuned_file_in_the_package_is_readable():
    for file in tuning.TUNED.glob("*.json"):
        assert all({"op", "key", "config"} <= row.keys() for row in json.loads(file.read_text()))
