"""A perimeter's signing key changes: the new one is trusted before it signs, the old one until nothing needs it.

Three steps, each of which may be repeated, and a kill between two of them loses nothing:

- `prepare`: the new key is made (signing.next.pem), and signing.pub lists it after the present one;
- `switch`: the new key signs, and signing.pub lists it before the old one, whose private half is gone;
- `retire`: signing.pub lists the new key alone.

After `prepare` and after `retire`, whoever verifies must be given the new signing.pub.
"""

from pathlib import Path
from typing import Literal

from torchrelay.archive.keys import PRIVATE, PUBLIC, ensure_key, make_key, public_half, public_keys
from torchrelay.config import write_file

NEXT = "signing.next.pem"


def stage(folder: Path) -> Literal["none", "prepared", "switched"]:
    """How far a rotation in this key folder has come; the step after it is the next one to take."""
    if (folder / NEXT).exists():
        return "prepared"
    public = folder / PUBLIC
    return "switched" if public.is_file() and len(public_keys(public.read_bytes())) > 1 else "none"


def prepare(folder: Path) -> None:
    """Make the new key, and have it trusted beside the present one."""
    keys = ensure_key(folder)
    if not (folder / NEXT).exists():
        make_key(folder / NEXT)
    ahead = [public_half(keys.private), public_half(folder / NEXT)]
    others = [key for key in public_keys(keys.public.read_bytes()) if key not in ahead]
    write_file(keys.public, b"".join([*ahead, *others]))


def switch(folder: Path) -> None:
    """Sign with the new key from now on; the old one is trusted still."""
    if (folder / NEXT).exists():
        (folder / NEXT).replace(folder / PRIVATE)
    own = public_half(folder / PRIVATE)
    others = [key for key in public_keys((folder / PUBLIC).read_bytes()) if key != own]
    write_file(folder / PUBLIC, b"".join([own, *others]))


def retire(folder: Path) -> None:
    """Trust the present key alone."""
    write_file(folder / PUBLIC, public_half(folder / PRIVATE))
