"""guardctl: everything a person does from a shell. One file per verb; this one only starts it."""


def main() -> None:
    """Run guardctl on the process's arguments; ends with SystemExit."""
    # Imported here, so that a server that shares the package does not load the command line.
    from guard_service.cli.app import app

    app()
