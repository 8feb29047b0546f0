"""All of `sparse_grad`: which entries of a row's gradient are kept, and sums over those."""
