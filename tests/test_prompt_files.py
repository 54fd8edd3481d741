"""Files of prompts: lines, and VBench's JSON."""

import json

import pytest

from paroattn.cli.prompt_files import FilePrompt, read_prompts


def test_every_line_that_is_not_empty_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\na cat\n\n  a harbour at dawn, 日の出 \r\na cat\n", encoding="utf-8")
    assert read_prompts(path) == [FilePrompt("a cat"), FilePrompt("a harbour at dawn, 日の出")]
    assert [prompt.text for prompt in read_prompts(path, merge=False)] == [
        "a cat",
        "a harbour at dawn, 日の出",
        "a cat",
    ]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n", encoding="utf-8-sig")
    (tmp_path / "list.json").write_text('[{"prompt_en": "a cat"}]', encoding="utf-8-sig")
    for name in ("lines.txt", "list.json"):
        assert read_prompts(tmp_path / name) == [FilePrompt("a cat")]


def test_vbench_lists_have_dimensions(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    entries = [
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"], "auxiliary_info": {}},
        {"prompt_en": "a dog", "dimension": "color"},
        {"prompt_en": "a cat", "dimension": ["color"]},
    ]
    path.write_text(json.dumps(entries))
    assert read_prompts(path) == [
        FilePrompt("a cat", ("subject_consistency", "motion_smoothness", "color")),
        FilePrompt("a dog", ("color",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "is no file; expected one prompt per line"),
        ("empty.txt", b"\n \n# a cat\n", "holds no prompt"),
        ("bytes.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("broken.json", b"[1", "is not JSON"),
        ("object.json", b"{}", "holds a dict; expected a list"),
        ("numbers.json", b"[1]", "entry 0 has no text prompt_en"),
        ("blank.json", b'[{"prompt_en": " "}]', "entry 0 has no text prompt_en"),
        ("wrong.json", b'[{"prompt_en": "a", "dimension": 3}]', "dimension of entry 0 is 3"),
        ("none.json", b"[]", "holds no prompt"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value)
