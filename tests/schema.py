"""Holds a record of measurements against benchmarks/schema.json."""

import json
import re
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "benchmarks" / "schema.json").read_text())


def follows(value: Any, schema: dict[str, Any], where: str = "record") -> None:
    """Assert that a value is as a JSON Schema says, of the keywords that ours uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    known = {"$schema", "title", "description", "type", "required", "additionalProperties", "properties", "items"}
    assert schema.keys() <= known | {"const", "minLength", "minItems", "minimum", "pattern"}, schema.keys()
    if "type" in schema:
        wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        boolean = isinstance(value, bool)
        fits = "boolean" in wanted if boolean else any(isinstance(value, kinds[k]) for k in wanted if k != "boolean")
        assert fits, f"{where} is {value!r}, not {schema['type']}"
    assert value == schema.get("const", value), where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys(), where
        for key, item in value.items():
            others = schema.get("additionalProperties", True)
            assert key in schema.get("properties", {}) or others, f"{where}.{key}"
            rule = schema.get("properties", {}).get(key, others)
            follows(item, rule if isinstance(rule, dict) else {}, f"{where}.{key}")
    elif isinstance(value, list):
        assert len(value) >= schema.get("minItems", 0), where
        for i, item in enumerate(value):
            follows(item, schema.get("items", {}), f"{where}[{i}]")
    elif isinstance(value, str):
        assert len(value) >= schema.get("minLength", 0), where
        assert re.search(schema.get("pattern", ""), value), where
    elif isinstance(value, int | float):
        assert value >= schema.get("minimum", value), where
