"""Values that hypothesis draws for several test files."""

from __future__ import annotations

from hypothesis import strategies as st

# What `st.text()` takes its characters from, without first encoding each there is to see which UTF-8 has: 2.5 s.
CHARACTERS = st.characters(exclude_categories=("Cs",))
ANY_TEXT = st.text(CHARACTERS)
