"""'Did you mean': one way to refuse an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the known word closest to this one, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> dict[str, str]:
    """Arguments of a `GraphqError` that names the nearest and the known names."""
    names = sorted(known)
    return {
        "what": f"There is no {kind} called {name!r}.",
        "expected": f"one of {', '.join(names)}" if names else f"nothing: no {kind} is known here",
        "hint": did_you_mean(name, names),
    }
