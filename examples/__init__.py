"""Scripts to copy, and what the tests and studies share with them."""
