"""JSON from files that others wrote. What Python's parser lets through, or fails at in its own ways, is one error."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from magicpig.errors import ArgumentError
from magicpig.wording import shown


class JsonError(ArgumentError):
    """Text that is not JSON, or not usable as such. One line, naming the cause and where it is."""

    code = "invalid_json"


def parse(text: str | bytes, *, lenient: bool = False) -> Any:
    """The value of a JSON text, as `json.loads`.

    Raises JsonError for what is no JSON or no UTF-8, and for values nested so deep, or numbers with so many digits,
    that Python gives up; unless ``lenient``, also for a name that stands twice in one object, NaN and Infinity.
    """
    try:
        if lenient:
            return json.loads(text)
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not JSON: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise JsonError("not usable: values are nested too deep") from None
    except ValueError:  # the only one left: integers of thousands of digits
        raise JsonError("not usable: a number has too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"{shown(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON")
