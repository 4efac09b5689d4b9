"""Never part of an archive."""
