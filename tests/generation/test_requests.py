import hashlib

import pytest

from vqdm.errors import UserError
from vqdm.generation.requests import SETTINGS, make_requests, overrides, prompt_ids, seed_of, unused_columns
from vqdm.prompts import load_rows

NONE = dict.fromkeys(SETTINGS)


def test_seed_is_sha256_of_base_id_and_sample():
    plain = int(hashlib.sha256(b"7|cat|2").hexdigest()[:16], 16) % 2**63
    assert seed_of(7, "cat", 2) == plain
    assert len({seed_of(base, name, k) for base in range(3) for name in "ab" for k in range(5)}) == 30


def test_ids_come_from_a_column_where_they_tell_rows_apart():
    assert prompt_ids([{"id": 5}, {"id": "x"}]) == ["5", "x"]
    assert prompt_ids([{"item_id": "p1"}, {"item_id": "p2"}]) == ["p1", "p2"]
    assert (
        prompt_ids([{"id": 5}, {"id": 5}]) == prompt_ids([{}, {}]) == prompt_ids([{"id": ""}, {"id": 1}]) == ["0", "1"]
    )
    assert prompt_ids([{"ID": 5}, {"ID": 6}]) == ["5", "6"]
    assert prompt_ids([{"id": None}, {"id": 6}]) == ["0", "1"]


def test_requests_of_a_row_do_not_depend_on_the_other_rows():
    rows = [{"prompt": f"p{i}", "id": f"name{i}"} for i in range(4)]
    every = make_requests(rows, 2, 3, None, NONE, "file")
    assert [request.key for request in every] == [(i, k) for i in range(4) for k in range(2)]
    turned = make_requests(rows[::-1], 2, 3, None, NONE, "file")
    assert {(r.id, r.sample): r.seed for r in every} == {(r.id, r.sample): r.seed for r in turned}


def test_cells_overrule_settings_and_empty_ones_do_not():
    rows = [
        {"prompt": "a", "Seed": "9", "height": " 64 ", "guidance_scale": "", "negative_prompt": None, "note": "x"},
        {"prompt": "b", "Seed": None, "height": 32.0, "guidance_scale": 0, "negative_prompt": "blurry"},
    ]
    first, again, second, _ = make_requests(rows, 2, 0, "bad", NONE | {"guidance_scale": 5.0, "width": 16}, "file")
    assert (first.seed, again.seed, second.seed) == (9, 10, seed_of(0, "1", 0))
    assert (first.negative_prompt, second.negative_prompt) == ("bad", "blurry")
    assert first.settings == {"guidance_scale": 5.0, "num_inference_steps": None, "height": 64, "width": 16}
    assert second.settings == {"guidance_scale": 0.0, "num_inference_steps": None, "height": 32, "width": 16}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Negative Prompt": "blurry"}, {"negative_prompt": "blurry"}),
        ({"num-inference-steps": "20"}, {"num_inference_steps": 20}),
        ({"seed": "42.0"}, {"seed": 42}),  # as data frames write a column with empty cells
        ({"height": " 64 "}, {"height": 64}),
    ],
)
def test_cells_as_other_programs_write_them(row, expected):
    assert overrides(row, "row 1") == expected


def test_bad_cells_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,seed\n,\n"a\nb",1\nc,many\n')
    with pytest.raises(UserError, match=r"p\.csv: line 5: seed is 'many'"):
        make_requests(load_rows(str(path), "PROMPTS"), 1, 0, None, NONE, str(path))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"steps": 3}], "column steps does not act; rename it to num_inference_steps"),
        ([{"CFG scale": 3}], "column CFG scale does not act; rename it to guidance_scale"),
        ([{"guidanceScale": 3}], "column guidanceScale does not act"),
        ([{"id": 1}, {"id": 1}], "ids are not used, since 2 rows share '1'"),
        ([{"id": 1}, {}, {"id": ""}], "ids are not used, since 2 rows have none"),
    ],
)
def test_columns_that_do_not_act_are_named(rows, words):
    (line,) = unused_columns(rows)
    assert words in line


def test_columns_that_act_and_those_of_others_are_not():
    assert unused_columns([{"prompt": "a", "Seed": 1, "id": "x", "note": 1}, {"id": "y"}]) == []


def test_large_seeds_keep_every_bit():
    assert overrides({"seed": str(2**62 + 1)}, "row 1") == {"seed": 2**62 + 1}


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"seed": "many"}, "row 3: seed is 'many'; allowed are numbers"),
        ({"seed": -1}, "seed is -1"),
        ({"negative_prompt": ["a"]}, r"negative_prompt is \['a'\]; expected text"),
        ({"seed": 1, "Seed": 2}, "has two columns seed"),
        ({"guidance_scale": "7,5"}, "guidance_scale is '7,5'; allowed are numbers"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"height": 20}, "height is 20; allowed are multiples of 8"),
        ({"guidance_scale": "nan"}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed are numbers from 1 to 1000"),
    ],
)
def test_bad_cells_are_named(cell, words):
    with pytest.raises(UserError, match=words):
        overrides(cell, "row 3")
