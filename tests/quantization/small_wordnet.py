"""A WordNet of a few synsets in the database's own file format."""

from pathlib import Path

LICENCE = "  1 This software is a test's own; a line of a licence begins with two spaces.  \n"
DATA = {
    "noun": (
        "00000001 03 n 01 dwelling 0 000 | a place to live in\n"
        "00000002 03 n 02 house 0 Bauhaus 0 001 @ 00000001 n 0000 | a dwelling for one family; "
        '"they painted the house"; "a house burned"\n'
        "00000003 03 n 02 tent 0 garden_shed 0 001 @ 00000001 n 0000 | a light shelter\n"
        "00000004 03 n 01 boat 0 000 | a small vessel\n"
    ),
    "verb": "00000005 30 v 02 bake 0 cook_up 0 000 01 + 08 00 | cook in an oven\n",
    "adj": '00000006 00 a 01 galore(ip) 0 000 | in great numbers; "guests galore"\n',
    "adv": "00000007 02 r 01 soon 0 000 | in the near future\n",
}


def write_wordnet(folder: Path) -> Path:
    """Make the folder and its data files."""
    folder.mkdir()
    for part, synsets in DATA.items():
        (folder / f"data.{part}").write_text(LICENCE + synsets)
    return folder
