"""Fields of a config.json, and refusals of those that models here do not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Any

from lasp import RopeScaling

Json = Mapping[str, Any]


def needed(fields: Json, *names: str) -> list[Any]:
    """The values of fields; transformers 5 writes ``rope_theta`` into ``rope_parameters`` alone.

    Raises:
        ValueError: naming those that are missing or null.
    """
    inside = fields.get("rope_parameters") or {}
    if isinstance(inside, dict) and fields.get("rope_theta") is None:
        fields = {**fields, "rope_theta": inside.get("rope_theta")}
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(
            f"config.json must have {', '.join(missing)}, got none in one of"
            f" {fields.get('architectures') or fields.get('model_type')}: take the config.json that"
            " the weights came with"
        )
    return [fields[name] for name in names]


def refuse_others(fields: Json, **only: Any) -> None:
    """Raise ValueError for a field whose value is not the only one that the model can have.

    Args:
        fields: of config.json.
        only: the value of each; a field that is missing or null has it.
    """
    for name, value in only.items():
        got = fields.get(name)
        if got is not None and got != value:
            raise ValueError(
                f"{name} of config.json must be {value!r}, got {got!r}: lasp.hybrid has no other"
            )


def kinds(names: Any, symbols: Mapping[Any, str], field: str) -> str:
    """The pattern of a list of layer kinds."""
    unknown = [name for name in names if name not in symbols]
    if unknown:
        raise ValueError(f"{field} must be among {list(symbols)}, got {unknown[0]!r}")
    return "".join(symbols[name] for name in names)


def rope_scaling(fields: Json) -> RopeScaling | None:
    """How positions are scaled, by ``rope_scaling`` or transformers 5's ``rope_parameters``.

    Raises:
        ValueError: for a way that models here do not have.
    """
    parameters = fields.get("rope_parameters") or {}
    given = fields.get("rope_scaling") or parameters
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling of config.json must be a table, got {given!r}")
    for name, default in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
        value, outside = parameters.get(name), fields.get(name, default)
        if value is not None and outside is not None and value != outside:
            raise ValueError(
                f"{name} of rope_parameters must be that of config.json, {outside}, got {value}:"
                " write it there, where it is read"
            )
    unread = ("type", "rope_theta", "partial_rotary_factor")
    kind = given.get("type") or "default"
    given = {"rope_type": kind} | {k: v for k, v in given.items() if k not in unread}
    if given["rope_type"] == "default":
        return None
    known = {field.name for field in dataclass_fields(RopeScaling)}
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"rope_scaling of config.json must be of {sorted(known)}, got {unknown} besides"
        )
    return RopeScaling(**given)


def scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The field of a config.json; what has its default is left out."""
    if scaling is None:
        return None
    default = RopeScaling("linear", 1.0)
    return {
        name: value
        for name, value in asdict(scaling).items()
        if name in ("rope_type", "factor") or value != getattr(default, name)
    }


def check_not_quantised(fields: Json) -> None:
    """Raise ValueError for weights that are quantised."""
    if fields.get("quantization_config"):
        raise ValueError(
            "quantization_config of config.json must be missing, got quantised weights: convert"
            " weights of 16 or 32 bits"
        )
