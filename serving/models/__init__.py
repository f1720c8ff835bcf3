"""What a served model is made of: where its files come from, its licence, and the groups that run it."""
