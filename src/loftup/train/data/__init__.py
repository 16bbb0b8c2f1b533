"""Pictures with class-agnostic masks, and the batches of random views made of them."""
