"""Data files: what of a file is text, where a line ends, and what is said of a file that cannot be read."""

from __future__ import annotations

import json

import pytest

from lmppl.models.arithmetic import read_file
from lmppl.models.classifier import read_labelled
from lmppl.models.continuation import read_prompts
from lmppl.models.contrastive import read_pairs
from lmppl.models.infilling import read_stories
from lmppl.models.random_number import read_bounds
from lmppl.models.subjectivity import read_data, read_sentences

SENTENCE = {"text": "a film", "label_text": "objective"}
SUM = [{"str_query": "Question: 6 - 4 = ? Answer:", "num_sol": 2}]
READERS = {
    read_prompts: "Tom had a dog.",
    read_stories: "Tom had a dog. It was big. They ran.",
    read_pairs: "Tom had a dog.\tMia saw a cat.",
    read_bounds: "3 40",
    read_labelled: "1\tTom had a dog.",
    read_sentences: json.dumps(SENTENCE),
    read_file: json.dumps(SUM),
}
LINES = [read for read in READERS if read is not read_file]


@pytest.fixture
def file(tmp_path):
    def write(content: bytes):
        (tmp_path / "file").write_bytes(content)
        return tmp_path / "file"

    return write


@pytest.mark.parametrize("read", READERS)
def test_a_byte_order_mark_and_the_kind_of_newline_change_nothing(read, file):
    line = READERS[read].encode()
    plain = read(file(line + b"\n"))
    for content in (line, b"\xef\xbb\xbf" + line + b"\r\n", b"\xef\xbb\xbf\r\n" + line, b"\n \r\n" + line + b"\n\n"):
        assert read(file(content)) == plain, content


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_lines_end_at_newlines_alone(end, file):
    """Nine characters at which `str.splitlines` splits, within a text: each reader has one text, and it whole."""
    said = f"Tom{end}had a dog."
    assert read_prompts(file(f"{said}\nMia.\n".encode())) == [said, "Mia."]
    assert read_stories(file(f"{said} It ran. He hid.".encode()))[0].x == said
    assert read_pairs(file(f"{said}\tMia.".encode()))[0].x == said
    assert read_labelled(file(f"1\t{said}".encode())) == ([said], [True])
    if end in "\u2028\u2029\x85":  # JSON escapes the others
        (found,) = read_sentences(file(json.dumps({**SENTENCE, "text": said}, ensure_ascii=False).encode()))
        assert found.text == said


@pytest.mark.parametrize("read", LINES)
@pytest.mark.parametrize("wrong, byte", [(b"caf\xe9", 4), (b"\xff\xfea", 1), ("Grüße".encode("latin-1"), 3)])
def test_what_is_not_utf_8_is_named_with_file_line_and_byte(read, wrong, byte, file):
    path = file(READERS[read].encode() + b"\r\n" + wrong)
    with pytest.raises(ValueError, match=rf"{path}, line 2 is not UTF-8 at byte {byte} of the line, 0x.*UTF-8"):
        read(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_a_mark_is_utf_8_with_nul_bytes_and_is_refused(read, encoding, file):
    """Its ASCII texts decode as UTF-8, every character with a NUL beside it."""
    path = file(READERS[read].encode(encoding))
    with pytest.raises(ValueError, match=rf"^(data|labelled): {path}, line 1 has a NUL byte.*UTF-8"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_directory_is_no_file(read, tmp_path):
    with pytest.raises(ValueError, match=rf"^(data|labelled): {tmp_path} is a directory; expected a file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": "a", label_text', "is not JSON: .* at character 15"),
        ('{"text": "a", "label_text": "\\ud83d"}', "has half of a character"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("1" * 5000, "is not JSON that can be read"),
        ('{"text": "a"}', "is not an object with the strings"),
        ('{"text": 5, "label_text": "x"}', "is not an object with the strings"),
        ("[5]", "is not an object with the strings"),
    ],
)
def test_a_line_of_jsonl_that_cannot_be_read_is_named(line, said, file):
    path = file(json.dumps(SENTENCE).encode() + b"\n\n" + line.encode())
    with pytest.raises(ValueError, match=rf"^data: {path}, line 3 {said}"):
        read_sentences(path)


def test_a_json_file_that_cannot_be_read_is_named(file):
    path = file(b'[\n{"str_query": 5,}]')
    with pytest.raises(ValueError, match=rf"^data: {path}, line 2 is not JSON: .* at character 1[67]"):
        read_file(path)
    with pytest.raises(ValueError, match=rf"^data: {path}, line 2 is not UTF-8 at byte 2"):
        read_file(file(b'[\n"\xe9"]'))
    with pytest.raises(ValueError, match=rf"^data: {path} is not a file of questions"):
        read_file(file(b"5"))


def test_the_files_of_a_directory_are_named_themselves(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(SENTENCE) + "\n")
    (tmp_path / "test.jsonl").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1 is not UTF-8"):
        read_data(tmp_path, 10)
