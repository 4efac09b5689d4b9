"""Model archives: bytes whose origin, content and behaviour can be checked wherever they go.

An archive is a folder of `model.mar`, `manifest.json` and `model.sig`. `pack` and `sign` make it, `fetch`
brings it to a node, `verify` lets in nothing else, and `prove` runs it against its golden outputs.
"""

from torchrelay.archive.keys import KeyPair, ensure_key, key_digest
from torchrelay.archive.mar import digest, golden_set, unpack
from torchrelay.archive.packing import pack
from torchrelay.archive.proving import Examination, evaluate, examine, prove, replay
from torchrelay.archive.signing import put_signature, sign
from torchrelay.archive.transfer import fetch
from torchrelay.archive.verifying import verify

__all__ = [
    "Examination",
    "KeyPair",
    "digest",
    "ensure_key",
    "evaluate",
    "examine",
    "fetch",
    "golden_set",
    "key_digest",
    "pack",
    "prove",
    "put_signature",
    "replay",
    "sign",
    "unpack",
    "verify",
]
