"""The smallest Kedro project: five empty nodes."""
