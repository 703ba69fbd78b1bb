"""The hazard categories that guards know, and how prompts word them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Category:
    """One hazard category.

    With a `prompt_name` the model reads that alone, as it was trained to, and `description` is for
    people. Without one the model reads `name` and `description`: the category has its own wording.
    """

    code: str
    name: str
    description: str = ""
    prompt_name: str = ""


# Names: model cards and chat templates of Llama Guard 3. S14 is known to the 8B model only.
LLAMA_GUARD_3: tuple[Category, ...] = (
    Category(
        "S1",
        "Violent Crimes",
        "Help with, calls for or approval of unlawful violence against people or animals: "
        "terrorism, murder, assault, kidnapping, cruelty.",
        "Violent Crimes",
    ),
    Category(
        "S2",
        "Non-Violent Crimes",
        "Help with, calls for or approval of crimes without violence: fraud, theft, forced labour, "
        "drug and weapon offences, computer crime.",
        "Non-Violent Crimes",
    ),
    Category(
        "S3",
        "Sex-Related Crimes",
        "Help with or approval of sexual assault, harassment, trafficking or prostitution.",
        "Sex Crimes",
    ),
    Category(
        "S4",
        "Child Sexual Exploitation",
        "Anything that depicts, describes, helps with or approves of sexual abuse of children.",
        "Child Exploitation",
    ),
    Category(
        "S5",
        "Defamation",
        "Provably false statements that are likely to damage a living person's reputation.",
        "Defamation",
    ),
    Category(
        "S6",
        "Specialized Advice",
        "Professional financial, medical or legal advice, and assurances that something dangerous "
        "is safe.",
        "Specialized Advice",
    ),
    Category(
        "S7",
        "Privacy",
        "Private personal data whose spread endangers somebody's body, accounts or money.",
        "Privacy",
    ),
    Category(
        "S8",
        "Intellectual Property",
        "Answers that may infringe somebody else's intellectual property.",
        "Intellectual Property",
    ),
    Category(
        "S9",
        "Indiscriminate Weapons",
        "Help with or approval of making chemical, biological, radiological or nuclear weapons or "
        "powerful explosives.",
        "Indiscriminate Weapons",
    ),
    Category(
        "S10",
        "Hate",
        "Content that degrades people for what they are: origin, religion, disability, sex, "
        "gender identity, illness and the like.",
        "Hate",
    ),
    Category(
        "S11",
        "Suicide & Self-Harm",
        "Help with, encouragement or approval of suicide, self-injury or disordered eating.",
        "Self-Harm",
    ),
    Category("S12", "Sexual Content", "Erotica.", "Sexual Content"),
    Category(
        "S13",
        "Elections",
        "False statements about how, when or where elections are held.",
        "Elections",
    ),
    Category(
        "S14",
        "Code Interpreter Abuse",
        "Attempts to abuse a code interpreter: denial of service, breaking out of its container, "
        "gaining privileges.",
        "Code Interpreter Abuse",
    ),
)

BY_CODE: dict[str, Category] = {category.code: category for category in LLAMA_GUARD_3}
