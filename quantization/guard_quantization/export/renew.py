"""An artifact of an earlier version, with the graphs of this one."""

from __future__ import annotations

from pathlib import Path

from guard_quantization.export.artifact import Release, make_artifact
from guard_quantization.export.stored import StoredModel
from guard_service.artifact import DOCUMENTS, Artifact
from guard_service.tokenizer import load_tokenizer


def renewed(artifact: Artifact, folder: Path) -> Artifact:
    """Write the artifact's weights as they are stored, with new graphs, into the new `folder`.

    The golden prompts stay and are scored anew. Raises FileExistsError, ExportError.
    """
    stored, old = StoredModel(artifact), artifact.manifest
    documents = {name: artifact.folder / name for name in DOCUMENTS}
    kept = {key: value for key, value in old.provenance.items() if key != "export"}
    release = Release(
        name=old.name,
        template=old.template,
        window_tokens=old.window_tokens,
        categories=old.categories,
        licence=old.licence,
        custom_categories=old.custom_categories,
        codes=tuple(old.verdict.codes),
        notice=old.notice,
        calibration=old.calibration,
        golden=tuple(golden.turns for golden in old.golden),
        tolerance=old.tolerance,
        documents={name: path for name, path in documents.items() if path.is_file()},
        provenance={**kept, "renewed": artifact.digest},
    )
    return make_artifact(
        folder,
        stored.config,
        stored,
        load_tokenizer(artifact.tokenizer),
        release,
        stored.precision,
        head_is_cut=True,
    )
