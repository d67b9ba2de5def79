"""The JSON schema of recipes: it takes recipes, refuses others, and the committed file is current."""

import json
from pathlib import Path

import jsonschema
import pytest

from toolkit.config import read_yaml, shipped
from toolkit.config.json_schema import recipe_schema, schema_text
from toolkit.config.load import field_names
from toolkit.config.objective import OBJECTIVES

FILE = Path(__file__).parents[2] / "docs" / "recipe.schema.json"


def test_the_committed_schema_is_that_of_the_code():
    same = FILE.read_text(encoding="utf-8") == schema_text()
    assert same, f"{FILE.name} is not up to date; `toolkit schema > docs/{FILE.name}` writes it."


def test_shipped_recipes_fit_and_mistakes_do_not():
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.check_schema(validator.schema)
    for path in shipped().values():
        assert list(validator.iter_errors(read_yaml(path.read_text(encoding="utf-8"), path.name))) == [], path.name
    good = {"model": {"name_or_path": "org/name"}, "objective": {"kind": "dpo", "pairs": 4}}
    validator.validate(good)
    validator.validate({**good, "resume_from_checkpoint": "step-3", "train": {"mixed_precision": False}})
    validator.validate({**good, "model": {"name_or_path": "org/name", "quantise": "nf4"}})
    for change in (
        {"trian": {}},
        {"train": {"max_step": 3}},
        {"train": {"max_steps": 0}},
        {"objective": {"kind": "sft", "pairs": 4}},
        {"objective": {"kind": "dop"}},
        {"objective": {"pairs": 4}},
        {"resume_from_checkpoint": "latest"},
        {"model": {"name_or_path": "org/name", "quantise": "int3"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**good, **change})


def test_every_field_is_in_it_and_those_with_a_text_have_theirs():
    schema = recipe_schema()
    definitions = schema["$defs"]
    cases = {
        case["if"]["properties"]["kind"]["const"]: definitions[case["then"]["$ref"].rpartition("/")[2]]
        for case in schema["properties"]["objective"]["allOf"]
    }
    assert set(cases) == set(OBJECTIVES.names())
    for kind, case in cases.items():
        names = {name.partition(".")[2] for name in field_names(kind=kind) if name.count(".") == 1}
        assert set(case["properties"]) <= names
        assert set(OBJECTIVES.find("", kind).model_fields) == set(case["properties"])
    assert definitions["TrainSection"]["properties"]["max_length"]["description"].startswith("Longest sequence;")
    assert cases["cpo"]["properties"]["chat_template"]["description"].startswith("For messages:")  # of a class above
    assert "``" not in json.dumps(schema)
