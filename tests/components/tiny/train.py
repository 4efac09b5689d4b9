"""Never part of an archive."""

import data  # noqa: F401
