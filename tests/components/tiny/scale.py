"""Here so that the archive has to follow an import of an import."""

SCALE = 0.5
