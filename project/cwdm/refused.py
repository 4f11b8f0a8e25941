"""Why settings were refused: which key, and what was meant."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel


def explain(model: type[BaseModel], fault: Any) -> str:
    """A fault that pydantic found in values for a model, in one line."""
    keys = [str(key) for key in fault["loc"]]
    where = ".".join(keys)
    if fault["type"] == "missing":
        return f"{where} is needed; give it in the file or as {where}=VALUE"
    if fault["type"] != "extra_forbidden":
        found = "" if isinstance(fault["input"], dict) else f", found {fault['input']!r}"
        return f"{where or 'settings'}: {fault['msg'].removeprefix('Value error, ')}{found}"
    known = list(_group(model, keys[:-1]).model_fields)
    guess = difflib.get_close_matches(keys[-1], known, n=1)
    hint = f"did you mean '{guess[0]}'?" if guess else f"known here: {', '.join(known)}"
    return f"unknown key '{where}'; {hint}"


def _group(model: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    """The model of the settings under these keys, lists and unions passed through."""
    for key in keys:
        annotation = None if key.isdecimal() else model.model_fields[key].annotation
        models = [kind for kind in _leaves(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        model = models[0] if models else model
    return model


def _leaves(annotation: Any) -> list[Any]:
    inside = get_args(annotation)
    return [leaf for part in inside for leaf in _leaves(part)] if inside else [annotation]
