"""Operations that the model names; backends implement them."""
