"""JSON objects from files, files written as a whole, and the first line of an exception."""

import pytest

from mtp_jax.config import UserError
from mtp_jax.errors import first_line
from mtp_jax.files import read_json, write_text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read as JSON (.*No such file or directory.*)"),
        (b"{", "cannot be read as JSON (Expecting property name .*)"),
        (b"\xff{}", "cannot be read as JSON ('utf-8' codec .*)"),
        (b"[" * 100_000, "is nested deeper than 32 levels"),
        (b'{"a": 1, "a": 2}', "cannot be read as JSON ('a' occurs twice)"),
        (b"[1]", "holds a list, not a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, content, says):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    says = says.replace("(", r"\(").replace(")", r"\)")
    for name, options in ((str(path), ()), ("--config=x", ("--config=x",))):
        with pytest.raises(UserError, match=f"^{name}: {says}; fetch it again$") as error:
            read_json(path, "fetch it again", *options)
        assert "\n" not in str(error.value)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    for text in ('{"a": "\u00e9"}', '{"a": 1}\n'):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text and list(tmp_path.iterdir()) == [path]
    assert read_json(path, "") == {"a": 1}
    path.with_suffix(".partial").mkdir()  # what cannot be written leaves the old file
    with pytest.raises(OSError):
        write_text(path, "{}")
    assert read_json(path, "") == {"a": 1}


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  \n one \ntwo"), "one"), (ValueError(), "ValueError"), (KeyError("a"), "'a'")],
)
def test_the_first_line_of_an_exception(error, line):
    assert first_line(error) == line
