"""A WordNet of a few nouns in the database's own file format."""

from pathlib import Path

DATA = (
    "  1 This file is a test's own; a line of the licence begins with two spaces.  \n"
    "00000001 03 n 01 dwelling 0 000 | a place to live in\n"
    "00000002 03 n 02 house 0 Bauhaus 0 001 @ 00000001 n 0000 | a dwelling for one family; "
    '"they painted the house"\n'
    "00000003 03 n 02 tent 0 garden_shed 0 001 @ 00000001 n 0000 | a light shelter\n"
    "00000004 03 n 01 boat 0 001 ~ 00000001 n 0000 | a small vessel\n"
)


def write_wordnet(folder: Path) -> Path:
    """Make the folder and its file of nouns."""
    folder.mkdir()
    (folder / "data.noun").write_text(DATA)
    return folder
