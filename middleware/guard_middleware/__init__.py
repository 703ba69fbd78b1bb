"""Guard clients for programs that talk to a guard service; the middleware grows from here."""
