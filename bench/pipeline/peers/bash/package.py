"""Step 5: the weights and their version in a zip file; no signature, no proof."""

import json
import zipfile
from pathlib import Path

version = json.loads(Path("work/registration.json").read_text(encoding="utf-8"))["version"]
with zipfile.ZipFile(f"work/digits-{version}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.write("work/model.pt", "model.pt")
    archive.write("work/registration.json", "registration.json")
