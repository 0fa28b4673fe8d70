"""The fuzzing harness itself, and its properties on some thousands of inputs. Runs apart: `make fuzz`."""

import os
import time

import pytest

from tests import fuzz
from tests.fuzz import TARGETS, Target

pytestmark = pytest.mark.fuzz
TOTAL = 2500  # inputs of all targets together, besides their seeds


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_taken_or_clearly_refused(name):
    unit = TOTAL / sum(target.share for target in TARGETS.values())
    row = fuzz.fuzz(name, int(unit * TARGETS[name].share) + 1)
    assert not row["failing"], next(iter(row["failing"].items()))
    assert row["accepted"] or name == "RefCOCO gadgets"


# The harness itself.


def broken(data, folder):
    if data.startswith(b"k"):
        raise KeyError("k")
    if data.startswith(b"v"):
        raise ValueError("wrong" if data == b"v" else "it is line 3")
    if data.startswith(b"u"):
        data.decode("ascii") + "\xff".encode().decode("ascii")


@pytest.mark.parametrize(
    "data, outcome", [(b"a", "accepted"), (b"v3", "refused"), (b"v", "finding"), (b"k", "finding"), (b"u", "finding")]
)
def test_other_exceptions_and_messages_without_a_place_are_findings(data, outcome, tmp_path):
    assert fuzz.attempt(Target("bytes", list, broken, r"line \d"), data, tmp_path).outcome == outcome


def test_what_takes_too_long_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.05)

    def busy(data, folder):
        while data or time.process_time() < end:
            pass

    def waits(data, folder):
        time.sleep(60)

    end = time.process_time() + 0.1
    assert "more than 0.05" in fuzz.attempt(Target("bytes", list, busy), b"", tmp_path).said
    monkeypatch.setattr(fuzz, "HANG", 0.2)
    assert "Hang" in fuzz.attempt(Target("bytes", list, busy), b"x", tmp_path).said
    assert "Hang" in fuzz.attempt(Target("bytes", list, waits), b"", tmp_path).said


def test_the_command_saves_findings_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "TARGETS", {"broken": Target("bytes", lambda: [b"kvua"], broken, r"line \d")})
    with pytest.raises(SystemExit) as stop:
        fuzz.main(["--inputs", "20", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert (tmp_path / "broken-0").read_bytes().startswith((b"k", b"v", b"u"))
    assert "broken" in capsys.readouterr().out

    monkeypatch.setattr(fuzz, "TARGETS", {"crash": Target("bytes", lambda: [b"a"], lambda *_: os._exit(3))})
    with pytest.raises(SystemExit) as stop:
        fuzz.main(["--inputs", "20", "--out", str(tmp_path)])
    assert stop.value.code == 1 and (tmp_path / "crash-0").read_bytes() == b"a"


def test_the_same_seed_makes_the_same_inputs(monkeypatch):
    def made(seed):
        inputs = []
        none = Target("text", lambda: [b"seed one", b"two"], lambda data, _: inputs.append(data))
        monkeypatch.setitem(TARGETS, "none", none)
        fuzz.fuzz("none", 60, seed)
        return inputs

    assert made(0) == made(0) != made(1)
