"""``any`` fitted to one backbone, on photographs without labels, and judged on some that were held out."""
