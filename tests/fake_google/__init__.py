"""A fake of the part of Google's API that provisioning uses. It is no Google: README.md says what it knows."""
