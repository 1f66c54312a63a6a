"""Programs that are compiled once and called cheaply."""
