"""Programs that measure: each prints a table, writes JSON and draws a picture."""
