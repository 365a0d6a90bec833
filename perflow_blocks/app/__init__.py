"""The page of `perflow app`: `studio` draws for it, `page` shows it."""
