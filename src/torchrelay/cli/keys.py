"""The verb that replaces secrets: what MLflow signs webhooks with, and what a perimeter signs archives with."""

import click

from torchrelay.config import Perimeter, Site, settings, site
from torchrelay.console import leg, paint, result, say
from torchrelay.errors import ConfigError


@click.command()
@click.option("--perimeter", default="production", show_default=True, help="Whose secrets are replaced.")
@click.option("--webhook", is_flag=True, help="Replace the webhook's secret.")
@click.option("--signing", is_flag=True, help="Replace the signing key.")
def rotate_keys(perimeter: str, webhook: bool, signing: bool) -> None:
    """Give a perimeter a new webhook secret and signing key, by default both, while it serves."""
    here = site()
    place = _perimeter(here, perimeter)
    both = not (webhook or signing)
    if webhook or (both and place.orchestrator):
        _rotate_webhook(here, perimeter)
    if signing or both:
        _rotate_signing(here, perimeter, place)


def _perimeter(here: Site, name: str) -> Perimeter:
    if name not in here.perimeters:
        raise ConfigError(f"there is no perimeter {name!r}", f"one of: {', '.join(here.perimeters)}", "make status")
    return here.perimeters[name]


def _rotate_webhook(here: Site, perimeter: str) -> None:
    from torchrelay.webhooks import change_secret, webhook_place
    from torchrelay.webhooks.signing import ROTATION_S

    place = webhook_place(here, perimeter)
    with leg("rotate_webhook_secret", perimeter):
        change_secret(place)
        say(f"  MLflow signs with the new secret; the old one is let in for {ROTATION_S // 60} minutes more")


def _rotate_signing(here: Site, perimeter: str, place: Perimeter) -> None:
    from torchrelay import nodes
    from torchrelay.delivery.admission import Trusting
    from torchrelay.delivery.gatekeeper import Strict
    from torchrelay.delivery.rotation import rotate_signing_key

    gatekeeper = Strict(here, perimeter) if place.orchestrator else Trusting()
    log = settings().state / "logs" / "configure.log"
    with leg("rotate_signing_key", perimeter):
        lost = rotate_signing_key(here, perimeter, gatekeeper, lambda: nodes.configure(log))
    for version in lost:
        say(f"  {paint('not signed anew', 'yellow')}, and so not to be served again: {version}")
    result(f"{paint(perimeter, 'bold')} signs with, and trusts, a new key alone")
