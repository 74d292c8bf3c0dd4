"""Every word that the demo world's prompts and responses can use."""

from __future__ import annotations

from functools import lru_cache

from prefopt.world import lexicon as lex
from prefopt.world import prompts


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """All words of both domains, the full stop included, sorted."""
    words = {lex.END, *lex.CLASS}
    words.update(word for pattern in lex.PATTERNS for word in pattern if not word.isupper())
    for phrasing in _phrasings():
        words.update(word for word in phrasing.split() if not word.startswith("{"))
    return tuple(sorted(words))


def _phrasings() -> list[str]:
    found: list[str] = []
    for domain in prompts.DOMAINS:
        for phrasings in prompts.FACT_PHRASINGS[domain].values():
            found += phrasings
        for table in (
            prompts.SUM_PHRASINGS,
            prompts.OPEN_PHRASINGS,
            prompts.CLOSED_FRAMES,
            prompts.OPEN_FRAMES,
        ):
            found += table[domain]
    return found
