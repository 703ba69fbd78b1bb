"""x"""


def bulk() -> None:
    """x"""
