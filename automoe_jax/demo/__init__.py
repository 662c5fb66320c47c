"""A local page on which one types a sentence and sees what exports make of it."""
