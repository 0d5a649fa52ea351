"""Prompts from lines, PartiPrompts' TSV, names in JSON and COCO's captions; mistakes are named with their line."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from decouple_merge.config import Text, validate
from decouple_merge.data.prompts import load_prompts, read_prompts

PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tone of many\n"hi" on a sign\tArts\tBasic\t\n'


def write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def coco(images: int = 50, captions: int = 5) -> list[dict[str, Any]]:
    return [
        {"image_id": 1000 + i, "id": 7 * i + c, "caption": f"image {i}\n caption {c}. "}
        for i in range(images)
        for c in range(captions)
    ]


def write_coco(path: Path, annotations: list[dict[str, Any]]) -> Path:
    return write(path, json.dumps({"info": {}, "images": [], "annotations": annotations}))


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "\ufeffa café\r\n  two dogs \n\n \n")
    assert read_prompts(path) == ["a café", "two dogs"]


def test_prompts_are_the_column_of_a_tsv_wherever_it_is(tmp_path: Path) -> None:
    # A quotation mark at the start of a prompt opens nothing.
    assert read_prompts(write(tmp_path / "parti.tsv", PARTI)) == ["bond", '"hi" on a sign']
    swapped = "Category\tPrompt\r\n\ta cat\r\nArts\ta dog\r\n"
    assert read_prompts(write(tmp_path / "swapped.TSV", swapped)) == ["a cat", "a dog"]


def test_prompts_are_the_texts_of_a_json_list(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "names.json", '["tench", " great white shark"]')) == [
        "tench",
        "great white shark",
    ]


def test_one_caption_of_each_coco_image_is_chosen_by_the_seed_alone(tmp_path: Path) -> None:
    annotations = coco()
    prompts = read_prompts(write_coco(tmp_path / "a.json", annotations))
    images = [int(p.split()[1]) for p in prompts]
    assert sorted(images) == list(range(50))
    assert images != sorted(images)
    assert {p.split("caption ")[1] for p in prompts} == {f"{c}." for c in range(5)}
    assert all(p == f"image {i} caption {p[-2]}." for i, p in zip(images, prompts, strict=True))
    random.Random(0).shuffle(annotations)
    assert read_prompts(write_coco(tmp_path / "b.json", annotations)) == prompts
    other = read_prompts(tmp_path / "b.json", seed=1)
    assert sorted(int(p.split()[1]) for p in other) == list(range(50))
    assert [p.split()[1] for p in other] != [p.split()[1] for p in prompts]
    assert set(other) != set(prompts)


def test_the_choice_of_captions_stays_what_it_is(tmp_path: Path) -> None:
    # Records name the hash of the prompts: another choice would end every comparison with older ones.
    found = read_prompts(write_coco(tmp_path / "a.json", coco(5, 3)))
    assert found == [
        "image 3 caption 1.",
        "image 0 caption 0.",
        "image 4 caption 1.",
        "image 2 caption 1.",
        "image 1 caption 0.",
    ]


def test_empty_captions_are_not_chosen(tmp_path: Path) -> None:
    annotations = [{**a, "caption": " "} if a["id"] % 7 else a for a in coco(30, 3)]
    prompts = read_prompts(write_coco(tmp_path / "a.json", annotations))
    assert {p.split("caption ")[1] for p in prompts} == {"0."}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a cat\n\na dog\n", "a.txt, line 2: found no text, expected one prompt a line; remove the line"),
        ("a.txt", b"a cat\nc\xe9\n", r"a.txt, line 2, is not UTF-8 \(byte 7: .*\); save it as UTF-8"),
        ("a.txt", "a café".encode("utf-16"), "a.txt, line 1, is not UTF-8"),
        ("a.txt", " \n", "a.txt: found no prompts"),
        ("a.tsv", "", "a.tsv, line 1: found columns '', expected 'Prompt' among them"),
        ("a.tsv", "Prompts\tCategory\na\tb\n", "line 1: found columns 'Prompts, Category', expected 'Prompt'"),
        ("a.tsv", "Prompt,Category\na,b\n", "line 1: found columns 'Prompt,Category', .* separated by tabs"),
        ("a.tsv", PARTI + "\tArts\t\t\n", "a.tsv, line 4: found no text in column Prompt"),
        ("a.tsv", "Category\tPrompt\na\tb\nc\n", "a.tsv, line 3: found no text in column Prompt"),
        ("a.tsv", "Category\tPrompt\na\tb\n\nc\td\n", "a.tsv, line 3: found no text in column Prompt"),
        ("a.tsv", "Prompt\tCategory\n", "a.tsv: found no prompts"),
        ("a.json", '["a",\n "b', "a.json, line 2, column 2: not JSON .*fetch the file again"),
        ("a.json", '["a", ""]', "a.json: entry 2 of the list is '', expected a text"),
        ("a.json", '["a", 3]', "a.json: entry 2 of the list is 3, expected a text"),
        ("a.json", "[]", "a.json: found no prompts"),
        ("a.json", '{"images": []}', "a.json: found keys images, expected COCO's captions, with annotations, or a"),
        (
            "a.json",
            '{"annotations": [{"image_id": 1, "id": 2}]}',
            "annotation 1 of 1 is .*captions_val2014",
        ),
        ("a.json", '{"annotations": [{"image_id": 1, "id": 2, "caption": 3}]}', "annotation 1 of 1 is"),
        ("a.json", '{"annotations": [7]}', "annotation 1 of 1 is 7, expected numbers image_id and id, and a caption"),
        ("a.json", '{"annotations": [{"image_id": 9, "id": 2, "caption": " "}]}', "all captions of image 9 are empty"),
        ("a.json", '{"annotations": []}', "a.json: found no prompts"),
    ],
)
def test_mistakes_are_named_with_their_place(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("nowhere.txt", "nowhere.tsv", "nowhere.json"):
        with pytest.raises(ValueError, match=f"{name}: No such file or directory; expected a UTF-8 text file"):
            read_prompts(tmp_path / name)


def test_the_template_takes_the_prompt_and_nothing_else_of_braces(tmp_path: Path) -> None:
    path = write(tmp_path / "names.txt", "tench\na {0} sign\n")
    found = load_prompts(Text(prompts=path, template="a photo of a {}."))
    assert found == ["a photo of a tench.", "a photo of a a {0} sign."]
    for values in ({"template": "a photo of a {}"}, {"prompt_seed": 3}):
        with pytest.raises(ValueError, match=rf"{next(iter(values))} is set, which is for the prompts of a file"):
            validate(Text, values, "text")
    with pytest.raises(ValueError, match=r"text: template: expected \{\} where the prompt goes"):
        validate(Text, {"template": "a photo"}, "text")
