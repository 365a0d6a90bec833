"""What callers get wrong, found before a model runs: one function for each kind of mistake."""
