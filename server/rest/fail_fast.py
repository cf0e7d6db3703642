"""A pydantic core schema -> one whose collections stop at their first wrong item."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import core_schema

KINDS = {
    kind
    for kind, schema in {
        "list": core_schema.ListSchema,
        "tuple": core_schema.TupleSchema,
        "set": core_schema.SetSchema,
        "frozenset": core_schema.FrozenSetSchema,
        "dict": core_schema.DictSchema,
    }.items()
    if "fail_fast" in schema.__annotations__
}


def fail_fast(schema: Any) -> Any:
    """A core schema in which every collection stops at its first error."""
    if isinstance(schema, dict):
        changed = {key: value if key in ("metadata", "cls") else fail_fast(value) for key, value in schema.items()}
        kind = schema.get("type")  # no string where `schema` maps a model's fields, and one of them is called type
        return changed | {"fail_fast": True} if isinstance(kind, str) and kind in KINDS else changed
    if isinstance(schema, Sequence) and not isinstance(schema, str | bytes):
        return type(schema)(fail_fast(item) for item in schema)  # type: ignore[call-arg]
    return schema
