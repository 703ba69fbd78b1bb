"""The starter guard under several names: folders to exchange one for another, and a broken one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from guard_service.artifact import MANIFEST_FILE, named_folder
from guard_service.manifest import parse_manifest

NAMES = ("starter-a", "starter-b")
_BROKEN = "starter-cut"


class Models:
    """A link to the folder in use; weights are the same, so scores are, but digests are not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "models"
        self._folder.mkdir(exist_ok=True)
        self.link = self._folder / "now"
        self.digests = {name: self._copy(name) for name in NAMES}
        self._copy(_BROKEN)
        data = self._folder / _BROKEN / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-1000])
        self._now = ""
        self.renew()

    @property
    def digest(self) -> str:
        """Of the folder that the link leads to, or led to before it was spoiled."""
        return self.digests[self._now]

    def renew(self) -> None:
        """Have the link lead to the other one."""
        self._now = next(name for name in NAMES if name != self._now)
        self._lead(self._now)

    def spoil(self) -> None:
        """Have it lead to one whose weights are cut."""
        self._lead(_BROKEN)

    def _lead(self, name: str) -> None:
        draft = self._folder / ".draft"
        draft.symlink_to(name)
        draft.replace(self.link)

    def _copy(self, name: str) -> str:
        """Its digest."""
        made = self._folder / name
        shutil.copytree(named_folder("starter"), made)
        manifest = json.loads((made / MANIFEST_FILE).read_bytes())
        told = json.dumps({**manifest, "name": name}).encode()
        (made / MANIFEST_FILE).write_bytes(told)
        return parse_manifest(told).digest
