"""How well a guard judges labelled rows: figures, reports and limits. Needs numpy, no model."""
