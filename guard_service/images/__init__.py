"""Images as callers send them: bounded, fetched where the policy says so, decoded apart."""
