"""The journal: what survives a kill, what a changed or hostile file ends in, and which field changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint import journal as log
from quantkit.checkpoint.journal import Blob, Unit, changed_field, encode_line, first_line, layout, read_journal, sums_line, unit_line
from quantkit.errors import InputError
from quantkit.formats.safetensors import TensorEntry

IDENTITY = {"recipe": {"bits": 4}, "torch": "2.13"}
A = Unit("block-0", Blob(20, "a" * 64), layout([("w", "F32", (2, 2)), ("b", "BF16", (2,))]), {"n": 1}, Blob(7, "b" * 64))
B = Unit("outer", Blob(0, "c" * 64), (), {}, None)


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = [first_line(IDENTITY), unit_line(A), unit_line(B), sums_line("d" * 64)]
    found = read_journal(write(tmp_path / "j", *lines))
    assert found == log.Journal(IDENTITY, (A, B), "d" * 64, sum(map(len, lines)))


def test_tensors_lie_one_after_the_other() -> None:
    assert A.tensors == (TensorEntry("w", "F32", (2, 2), 0, 16), TensorEntry("b", "BF16", (2,), 16, 20))


def test_sums_before_a_unit_are_of_an_earlier_publish(tmp_path: Path) -> None:
    found = read_journal(write(tmp_path / "j", first_line(IDENTITY), sums_line("d" * 64), unit_line(B)))
    assert found is not None and found.sums is None


@pytest.mark.parametrize("cut", [0, 1, 40, 66, -1])
def test_a_torn_first_line_is_no_journal(tmp_path: Path, cut: int) -> None:
    assert read_journal(write(tmp_path / "j", first_line(IDENTITY)[:cut])) is None
    assert read_journal(tmp_path / "absent") is None


@pytest.mark.parametrize("cut", [1, 30, 70, -2, -1])
def test_a_torn_last_line_was_never_committed(tmp_path: Path, cut: int) -> None:
    whole = first_line(IDENTITY) + unit_line(A)
    found = read_journal(write(tmp_path / "j", whole, unit_line(B)[:cut]))
    assert found is not None and found.units == (A,) and found.length == len(whole)


def test_a_last_line_of_the_right_length_and_no_content_was_never_committed(tmp_path: Path) -> None:
    whole = first_line(IDENTITY) + unit_line(A)
    found = read_journal(write(tmp_path / "j", whole, bytes(len(unit_line(B)) - 1) + b"\n"))
    assert found is not None and found.units == (A,) and found.length == len(whole)


def test_an_altered_line_is_an_error(tmp_path: Path) -> None:
    altered = first_line(IDENTITY).replace(b'"bits":4', b'"bits":8')
    with pytest.raises(InputError, match="line 1 was changed after it was written") as caught:
        read_journal(write(tmp_path / "j", altered, unit_line(A)))
    assert caught.value.hint == "--overwrite starts over"


def test_a_link_or_a_directory_is_no_journal(tmp_path: Path) -> None:
    write(tmp_path / "real", first_line(IDENTITY))
    (tmp_path / "j").symlink_to("real")
    with pytest.raises(InputError, match="is a link"):
        read_journal(tmp_path / "j")
    with pytest.raises(InputError, match="is not a regular file"):
        read_journal(tmp_path)


def test_a_huge_journal_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "JOURNAL_LIMIT", 10)
    with pytest.raises(InputError, match="expected at most 10"):
        read_journal(write(tmp_path / "j", first_line(IDENTITY)))


def unit(**changes: Any) -> bytes:
    data = json.loads(unit_line(A).partition(b"  ")[2])
    return encode_line({**data, **changes})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (encode_line({"journal": 2, "identity": {}}), b"", "line 1: is not a journal of this version"),
        (encode_line({"journal": 1}), b"", "line 1: is not a journal of this version"),
        (unit_line(A), b"", "line 1: is not a journal of this version"),
        (first_line({}), encode_line({"sums": "x"}), "line 2: names no sha256"),
        (first_line({}), encode_line({}), "line 2: a unit line is malformed"),
        (first_line({}), unit(facts=[]), "a unit line is malformed"),
        (first_line({}), unit(spool=[1]), "a file entry is malformed"),
        (first_line({}), unit(spool=[-1, "a" * 64]), "a file entry is malformed"),
        (first_line({}), unit(spool=[True, "a" * 64]), "a file entry is malformed"),
        (first_line({}), unit(carry=[1, "A" * 64]), "a file entry is malformed"),
        (first_line({}), unit(tensors=[["w", "F32"]]), "a tensor entry is malformed"),
        (first_line({}), unit(tensors=[["", "F32", [5]]]), "tensor ''"),
        (first_line({}), unit(tensors=[["w", "Q4", [5]]]), "of dtype 'Q4'"),
        (first_line({}), unit(tensors=[["w", "F32", [-5]]]), "of shape"),
        (first_line({}), unit(tensors=[["w", "F32", [1] * 9]]), "at most 8 sizes"),
        (first_line({}), unit(tensors=[["w", "F32", [5, 2]]]), "the tensors of unit 'block-0' take 40 bytes, expected the 20 of its file"),
        (first_line({}), unit(tensors=[["w", "F32", [4]], ["w", "F32", [1]]]), "or a tensor of it is there twice"),
        (first_line({}), unit_line(A) + unit_line(A), "line 3: unit 'block-0' or a tensor of it is there twice"),
    ],
)
def test_every_field_is_checked(tmp_path: Path, first: bytes, second: bytes, message: str) -> None:
    # A good line after the bad one, so that it is not taken for a torn tail.
    with pytest.raises(InputError, match=message):
        read_journal(write(tmp_path / "j", first, second, sums_line("e" * 64)))


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_good_hash_over_what_is_no_object_does_not_help(tmp_path: Path, text: bytes) -> None:
    import hashlib

    line = hashlib.sha256(text).hexdigest().encode() + b"  " + text + b"\n"
    with pytest.raises(InputError, match="line 2 was changed"):
        read_journal(write(tmp_path / "j", first_line(IDENTITY), line, unit_line(A)))


def test_strict_json_only() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_line({"x": float("nan")})


@pytest.mark.parametrize(
    ("then", "now", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}, None),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ("a.b", 1, 2)),
        ({"a": 4}, {"a": 4.0}, ("a", 4, 4.0)),
        ({"a": 1}, {"a": True}, ("a", 1, True)),
        ({"b": 1}, {"a": 1, "b": 1}, ("a", None, 1)),
        ({"z": 1, "b": 1}, {"z": 2, "b": 2}, ("b", 1, 2)),
        ({"a": None}, {"a": {"x": 1}}, ("a", None, {"x": 1})),
    ],
)
def test_the_changed_field_is_named(then: Any, now: Any, found: Any) -> None:
    assert changed_field(then, now) == found
