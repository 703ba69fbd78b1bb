"""What a guarded deployment must do, as requests with names; and what tries them on one."""
