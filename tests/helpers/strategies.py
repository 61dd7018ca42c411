"""Values that hypothesis draws for several test files."""

from __future__ import annotations

from hypothesis import strategies as st

# What `st.text()` draws, which first encodes every character there is to see which of them UTF-8 has: 2.5 s.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
